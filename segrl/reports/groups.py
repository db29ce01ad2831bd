"""Groups of answers kept while training: small records of one question, its G answers, rewards and advantages.

A record is bounded whatever the size of the images: masks are kept on the grid of a picture of at most 256 pixels.
"""

# H/W pixels of the original image, h/w pixels of the kept picture, G answers

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segrl.errors import DataError
from segrl.files.whole import write_whole
from segrl.geometry.masks import mask_to_rle, resize_mask, rle_to_mask
from segrl.metrics.overlap import dice
from segrl.predictions.frames import shrunk_size
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target, VolumeTarget
from segrl.reports.drawing import INK, PALE, PAPER, draw_legend, draw_overlay, wrap_text

__all__ = [
    "GROUPS",
    "answer_lines",
    "answer_overlay",
    "group_answer",
    "group_header",
    "group_picture",
    "read_groups",
    "write_group",
]

GROUPS = "groups"  # folder of a run
SIDE = 256  # pixels, longest edge of the kept picture
MOST_TEXT = 4000  # characters of an answer
MOST_BOXES = 64
TILE, GAP, LINES = 220, 12, 11


def group_header(image: Image.Image | None, target: Target | VolumeTarget, index: int | None) -> dict[str, Any]:
    """Return what the answers of a group have in common.

    Args:
        image: What is shown; None where rows have no image.
        target: The ground truth.
        index: Slice of a volume that is shown; None of an image.

    Returns:
        Texts of the row, `size` (w, h) of the picture, `pixels` (W, H) of the original, `slice`, `depth`, and the
        ground truth `target` on the picture's grid, as `segrl.geometry.mask_to_rle`.
    """
    mask = target.mask if index is None else target.mask[index]
    height, width = mask.shape
    size = shrunk_size((width, height), SIDE)
    texts = {name: text[:MOST_TEXT] for name, text in target.to_dict().items() if text}
    depth = None if index is None else len(target.mask)
    shown = {"size": list(size), "pixels": [width, height], "slice": index, "depth": depth}
    return {**texts, **shown, "picture": image is not None, "target": _rle(mask, size)}


def group_answer(prediction: Prediction, target: Target | VolumeTarget, index: int | None) -> dict[str, Any]:
    """Return one answer of a group; rewards and advantage are added when they are known.

    Args:
        prediction: The answer, with its mask.
        target: The ground truth.
        index: Slice of a volume that is shown; None of an image.
    """
    mask = prediction.mask
    shown = None if mask is None else mask if index is None else mask[index]
    height, width = (target.mask if index is None else target.mask[index]).shape
    size = shrunk_size((width, height), SIDE)
    on_slice = index is None or prediction.slice_index == index
    return {
        "text": prediction.text[:MOST_TEXT],
        "status": str(prediction.status.value),
        "slice": prediction.slice_index,
        "boxes": prediction.boxes[:MOST_BOXES].tolist() if on_slice else [],
        "mask": None if shown is None else _rle(shown, size),
        "dice": None if mask is None else dice(mask, target.mask),
    }


def write_group(folder: Path, name: str, record: Mapping[str, Any], image: Image.Image | None) -> None:
    """Write a group as `<name>.json` and its picture as `<name>.png`; each appears whole or not at all.

    Args:
        folder: Of groups, made if it is absent.
        name: Of the files.
        record: The header, `step`, and `answers`.
        image: Scaled to the record's `size`.
    """
    if image is not None:
        buffer = io.BytesIO()
        _small(image, record).save(buffer, format="PNG")
        write_whole(folder / f"{name}.png", buffer.getvalue())
    write_whole(folder / f"{name}.json", json.dumps(_finite(record)) + "\n")


def read_groups(run: str | Path) -> list[tuple[dict[str, Any], Image.Image | None]]:
    """Return the groups that a run kept with their pictures, in the order of its steps; none if it kept none.

    Raises:
        DataError: A file is damaged; names it.

    Example:
        >>> read_groups("no/such/run")
        []
    """
    found = []
    for path in sorted((Path(run) / GROUPS).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            picture = path.with_suffix(".png")
            image = Image.open(picture).convert("RGB") if picture.is_file() else None
            _ = record["step"], [answer["rewards"] for answer in record["answers"]], rle_to_mask(record["target"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a group of answers ({type(error).__name__}: {error}); remove it") from error
        found.append((record, image))
    return sorted(found, key=lambda pair: pair[0]["step"])


def answer_overlay(
    record: Mapping[str, Any], answer: Mapping[str, Any] | None, image: Image.Image | None
) -> Image.Image:
    """Draw one answer of a group, or None for the ground truth alone, over the picture in its kept size."""
    ground = Image.new("RGB", tuple(record["size"])) if image is None else image
    mask = None if answer is None or answer["mask"] is None else rle_to_mask(answer["mask"])
    boxes = np.asarray([] if answer is None else answer["boxes"], dtype=np.float64).reshape(-1, 4)
    target, pixels = rle_to_mask(record["target"]), (record["pixels"][0], record["pixels"][1])
    edge = 2 * SIDE / max(ground.size) if max(ground.size) < 2 * SIDE else 1.0
    size = max(1, round(ground.width * edge)), max(1, round(ground.height * edge))
    return draw_overlay(ground, size, mask=mask, target=target, boxes=boxes, pixels=pixels, line=2)


def group_picture(record: Mapping[str, Any], image: Image.Image | None) -> Image.Image:
    """Draw the G answers of a group side by side, each with its rewards, advantage and text.

    Args:
        record: Of the group, with its answers.
        image: What was shown; None draws masks on black.

    Example:
        >>> answer = {"text": "At [0, 0, 2, 2].", "status": "valid", "boxes": [], "mask": None, "dice": None}
        >>> answer |= {"rewards": {"box_f1": 0.5}, "reward": 0.5, "advantage": -1.0}
        >>> record = {"step": 3, "size": [4, 4], "pixels": [4, 4], "target": {"size": [4, 4], "counts": [16]}}
        >>> group_picture({**record, "query": "Where?", "answers": [answer] * 2}, None).size
        (476, 460)
    """
    answers = record["answers"]
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    width = GAP + len(answers) * (TILE + GAP)
    sheet = Image.new("RGB", (width, 60 + TILE + 10 + 10 + 15 * LINES - 5), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"step {record['step']}: {record.get('query', '')}"
    for number, line in enumerate(wrap_text(title, font, width - 2 * GAP, 2)):
        draw.text((GAP, 6 + 16 * number), line, fill=INK, font=font)
    draw_legend(draw, GAP, 40, 11)
    for number, answer in enumerate(answers):
        x, y = GAP + number * (TILE + GAP), 60
        drawn = answer_overlay(record, answer, image)
        drawn.thumbnail((TILE, TILE))
        sheet.paste(drawn, (x, y))
        y += TILE + 6
        for line in answer_lines(answer):
            for part in wrap_text(line, small, TILE, 2):
                draw.text((x, y), part, fill=INK, font=small)
                y += 14
        room = max(1, (sheet.height - y) // 14)
        for part in wrap_text(answer["text"], small, TILE, room):
            draw.text((x, y), part, fill=PALE, font=small)
            y += 14
    return sheet


def answer_lines(answer: Mapping[str, Any]) -> list[str]:
    """Return rewards and advantage of an answer as lines of text."""
    parts = ", ".join(f"{name} {_number(value)}" for name, value in answer["rewards"].items())
    overlap = "" if answer.get("dice") is None else f", Dice {answer['dice']:.2f}"
    first = f"reward {_number(answer['reward'])}, advantage {_number(answer['advantage'], sign=True)}"
    return [first, f"{answer['status']}{overlap}", parts]


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.2f}" if sign else f"{value:.2f}"


def _rle(mask: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    return mask_to_rle(mask if mask.shape == size[::-1] else resize_mask(mask, (size[1], size[0])))


def _small(image: Image.Image, record: Mapping[str, Any]) -> Image.Image:
    size = tuple(record["size"])
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC) if image.size != size else image.convert("RGB")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
