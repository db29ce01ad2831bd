"""Cases that a report shows: which answers, which slice of a volume, and a small picture of what was asked about."""

# D slices, H/W pixels

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segrl.files.whole import write_whole

__all__ = ["CASE", "CASES", "choose_cases", "encode_case", "fullest_slice", "write_cases"]

CASES = "cases"  # folder of the pictures, by the number of their record
CASE, SHOWN = 224, 6  # pixels; cases of each kind


def choose_cases(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the numbers of the "worst", "median" and "best" answers by Dice, 6 each; of few answers some are in two.

    Example:
        >>> chosen = choose_cases([{"dice": n / 100} for n in range(50)])
        >>> chosen["worst"][:3], chosen["median"][:3], chosen["best"][:3]
        ([0, 1, 2], [22, 23, 24], [49, 48, 47])
        >>> choose_cases([])["best"]
        []
    """
    scored = [number for number, record in enumerate(records) if "dice" in record]
    ordered = sorted(scored, key=lambda number: (records[number]["dice"], number))
    middle = max(0, len(ordered) // 2 - SHOWN // 2)
    return {"worst": ordered[:SHOWN], "median": ordered[middle : middle + SHOWN], "best": ordered[-SHOWN:][::-1]}


def fullest_slice(mask: np.ndarray) -> int:
    """Return the slice of a mask (D, H, W) with most foreground; of an empty mask the middle one.

    Example:
        >>> mask = np.zeros((5, 2, 2), dtype=bool)
        >>> fullest_slice(mask)
        2
        >>> mask[4, 0] = True
        >>> fullest_slice(mask)
        4
    """
    areas = mask.sum(axis=(1, 2))
    return int(areas.argmax()) if areas.any() else len(mask) // 2


def encode_case(shown: Any, mask: np.ndarray | None = None) -> bytes:
    """Return a small JPEG of an image, or of the slice of a `Case` with most of the ground truth.

    Args:
        shown: What `on_answer` of an evaluation gets.
        mask: Ground truth (D, H, W) of a `Case`; None for an image, which is shown as it is.

    Example:
        >>> content = encode_case(Image.new("L", (900, 600)))
        >>> Image.open(io.BytesIO(content)).size
        (224, 149)
    """
    if not isinstance(shown, Image.Image):
        assert mask is not None
        shown = Image.fromarray(shown.grey[fullest_slice(mask)])
    small = shown.convert("RGB")
    small.thumbnail((CASE, CASE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def write_cases(folder: Path, picture: Callable[[int], bytes | None], records: Sequence[Mapping[str, Any]]) -> None:
    """Write the pictures of the cases that a report shows into `cases/` of a run's folder.

    Args:
        folder: The run's.
        picture: The number of a record to its picture from `encode_case`, or to None for none; called only for the
            cases that are shown, 18 at most.
        records: Of all answers.

    Example:
        >>> write_cases(Path("run"), {0: b"a", 1: b"b"}.get, [{"dice": 0.5}, {}])
        >>> [path.name for path in Path("run", "cases").iterdir()]
        ['00000.jpg']
    """
    for number in sorted({number for chosen in choose_cases(records).values() for number in chosen}):
        content = picture(number)
        if content is not None:
            write_whole(folder / CASES / f"{number:05d}.jpg", content)
