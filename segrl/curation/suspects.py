"""Cases whose mask may be wrong: the committee agrees with itself, and not with the mask. A person looks at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segrl.caching.content import content_key
from segrl.curation.case import Case
from segrl.curation.json_lines import read_json_lines, write_json_lines
from segrl.errors import DataError
from segrl.files.whole import write_whole
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file
from segrl.geometry.masks import rle_to_mask
from segrl.metrics.overlap import dice
from segrl.reports.drawing import draw_overlay, drawn_size
from segrl.reports.page import element, picture
from segrl.reports.sheet import read_sheet, sheet_page

__all__ = ["LIST", "SHEET", "Suspect", "SuspectSettings", "find_suspects", "read_rejected", "write_suspects"]

SHEET, LIST = "spot_check.html", "suspects.jsonl"
ANSWERS, CHOICES = "answers.csv", ("accept", "reject")
_SIDE = 280  # of a drawn image, pixels


@dataclass(frozen=True, kw_only=True)
class SuspectSettings:
    """Which cases are suspects, `difficulty: {suspects: ...}`; the paper has no such step.

    Attributes:
        agreement: Smallest mean Dice between the members' masks. Members that all find nothing do not agree: that is a
            hard case.
        error: Smallest mean error against the mask.

    Raises:
        DataError: A number that is not from 0 to 1.

    Example:
        >>> SuspectSettings().agreement
        0.7
    """

    agreement: float = 0.7
    error: float = 0.6

    def __post_init__(self) -> None:
        for name in ("agreement", "error"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name}={getattr(self, name)}; expected a number from 0 to 1")


@dataclass(frozen=True)
class Suspect:
    """A case whose mask may be wrong.

    Attributes:
        case: The case.
        agreement: Mean Dice between the members' masks.
        error: Mean error of the members.
    """

    case: Case
    agreement: float
    error: float


def find_suspects(
    cases: Sequence[Case],
    masks: Mapping[str, Sequence[Mapping[str, Any]]],
    errors: Mapping[str, Sequence[float]],
    settings: SuspectSettings,
) -> list[Suspect]:
    """Return the suspects, those with the largest agreement first.

    Args:
        cases: All cases.
        masks: Of the members as run lengths, by the id of a case; a committee of one has no agreement.
        errors: Of the members, by the id of a case.
        settings: Limits.
    """
    found = []
    for case in cases:
        error = float(np.mean(errors[case.id]))
        if error < settings.error:
            continue
        drawn = [rle_to_mask(mask) for mask in masks[case.id]]
        pairs = [dice(a, b) for a, b in combinations(drawn, 2) if a.any() or b.any()]
        agreement = float(np.mean(pairs)) if pairs else 0.0
        if pairs and agreement >= settings.agreement:
            found.append(Suspect(case, agreement, error))
    return sorted(found, key=lambda suspect: (-suspect.agreement, suspect.case.id))


def write_suspects(suspects: Sequence[Suspect], masks: Mapping[str, Sequence[Mapping[str, Any]]], home: Path) -> None:
    """Write `suspects.jsonl` and `spot_check.html`, on which a person accepts or rejects each mask.

    Args:
        suspects: In the order of the sheet; without any there is a list and no sheet.
        masks: Of the members, by the id of a case.
        home: Folder.
    """
    rows = [{"id": each.case.id, "agreement": each.agreement, "error": each.error} for each in suspects]
    write_json_lines(home / LIST, rows)
    (home / SHEET).unlink(missing_ok=True)
    if suspects:
        questions = [(_heading(each), _pictures(each.case, masks[each.case.id])) for each in suspects]
        intro = (
            "The committee agrees with itself and not with these masks. Accept a mask that is right, reject one that "
            "is wrong."
        )
        identity = content_key([each.case.id for each in suspects])[:8]
        page = sheet_page("Masks to look at", intro, questions, CHOICES, identity)
        write_whole(home / SHEET, page)


def read_rejected(home: Path) -> set[str]:
    """Return the ids of the cases that a person rejected in `answers.csv`, which the sheet saved; none without it.

    Raises:
        DataError: A list that is damaged, or answers of another sheet or to other questions; names file and row.

    Example:
        >>> read_rejected(Path("no/folder"))
        set()
    """
    if not (home / ANSWERS).is_file():
        return set()
    ids = read_json_lines(home / LIST, lambda row: str(row["id"]), "difficulty")
    samples = {str(number): identity for number, identity in enumerate(ids, 1)}
    answers = read_sheet(home / ANSWERS, home, content_key(ids)[:8], samples, CHOICES)
    return {samples[sample] for sample, answer, _ in answers if answer == "reject"}


def _heading(suspect: Suspect) -> str:
    case = suspect.case
    return f"{case.lesion} ({case.source}: {case.name}); agreement {suspect.agreement:.2f}, error {suspect.error:.2f}"


def _pictures(case: Case, masks: Sequence[Mapping[str, Any]]) -> str:
    image = read_image(case.image, str(case.image))
    size = drawn_size(image, _SIDE)
    shared = np.mean([rle_to_mask(mask) for mask in masks], axis=0) >= 0.5
    found = np.asarray(Image.fromarray(shared).resize(image.size, Image.Resampling.NEAREST))
    cells = [
        ("image", draw_overlay(image, size)),
        ("mask (green)", draw_overlay(image, size, target=read_mask_file(case.mask, str(case.mask)))),
        ("committee (red)", draw_overlay(image, size, mask=found)),
    ]
    return element(
        "div", *(element("div", element("p", text=name), picture(drawn, name)) for name, drawn in cells), class_="row"
    )
