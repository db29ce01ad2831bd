"""Conventions of published evaluators: the same masks, other numbers.

Each follows what its source does, edge cases included, in double precision. Where a source states no rule for a kind of
row, the convention refuses such rows. Sources were read on 2026-11-29.
"""

# I, U, P, T: pixels of intersection, union, prediction and truth of one row; N rows

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segrl.errors import SegRLError
from segrl.evaluation.conventions.cases import Case

__all__ = ["CONVENTIONS", "Convention", "ConventionError"]

Scores = dict[str, float]


class ConventionError(SegRLError):
    """A convention has no rule for some rows."""


@dataclass(frozen=True)
class Convention:
    """Rules by which one evaluator turns masks into numbers.

    Attributes:
        name: In `CONVENTIONS`.
        source: The public evaluator: repository, revision, file and function.
        rules: What it does about each question on which evaluators disagree.
        mean: The score of the rows whose mean `row` explains.
        row: The score of one row; None where the row is left out.
        score: All scores of some rows, fractions in [0, 1] but for distances.
        refuses: Kinds of rows (`KINDS`) for which the source states no rule.

    Example:
        >>> true = np.eye(4, dtype=bool)
        >>> CONVENTIONS["lisa"]([Case.of(true, true), Case.of(true & False, true & False)])["giou"] > 0.99
        True
        >>> CONVENTIONS["core_seg"]([Case.of(true & False, true & False, name="row 7")])
        Traceback (most recent call last):
        segrl.evaluation.conventions.published.ConventionError: core_seg states no rule for 1 of 1 rows (both ...
    """

    name: str
    source: str
    rules: Mapping[str, str]
    mean: str
    row: Callable[[Case], float | None]
    score: Callable[[Sequence[Case]], Scores]
    refuses: tuple[str, ...] = ()

    def __call__(self, cases: Sequence[Case]) -> Scores:
        """Return the scores of some rows.

        Raises:
            ConventionError: No rows, rows of a kind that the source says nothing about, or a division by zero there.
        """
        if not cases:
            raise ConventionError(f"{self.name}: expected at least one row, got none")
        refused = [case for case in cases if case.traits.intersection(self.refuses)]
        if refused:
            kinds = ", ".join(kind for kind in self.refuses if any(kind in case.traits for case in refused))
            names = ", ".join(case.name or "a row without a name" for case in refused[:3])
            raise ConventionError(
                f"{self.name} states no rule for {len(refused)} of {len(cases)} rows ({kinds}), such as {names}"
            )
        try:
            return self.score(cases)
        except ZeroDivisionError as error:
            raise ConventionError(f"{self.name} divides by zero on these rows: {error}") from error


def _divided(above: float, below: float, what: str) -> float:
    if not below:
        raise ZeroDivisionError(what)
    return above / below


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- LISA, MMR -------------------------------------------------------------------------------------------------------


def _lisa_row(case: Case) -> float:
    counts = case.overlap
    return 1.0 if not counts.either else counts.both / (counts.either + 1e-5)


def _lisa(cases: Sequence[Case]) -> Scores:
    both, either = (sum(getattr(case.overlap, part) for case in cases) for part in ("both", "either"))
    return {
        "giou": math.fsum(map(_lisa_row, cases)) / (len(cases) + 1e-5),  # its meters add 1e-5 to their counts
        "ciou": both / (either + 1e-10),
    }


def _mmr(cases: Sequence[Case]) -> Scores:
    answered = [case for case in cases if case.answered]
    if not answered:
        raise ZeroDivisionError("no row has a mask")
    return _lisa(answered)


# ---- ReLA ------------------------------------------------------------------------------------------------------------


def _says_none(case: Case) -> bool:
    return not case.overlap.predicted


def _rela_row(case: Case) -> float:
    counts = case.overlap
    if not counts.true:
        return float(_says_none(case))
    return 0.0 if _says_none(case) else counts.both / counts.either


def _rela(cases: Sequence[Case]) -> Scores:
    ious = [_rela_row(case) for case in cases]
    targeted = [value for case, value in zip(cases, ious, strict=True) if case.overlap.true]
    without = [case for case in cases if not case.overlap.true]
    both = sum(case.overlap.both for case in cases)
    either = sum(case.overlap.either for case in cases)  # a false alarm adds its pixels, a right "none" nothing
    found: Scores = {"giou": _mean(ious), "ciou": _divided(both, either, "no pixel is true or predicted")}
    for threshold in (0.7, 0.8, 0.9):
        hits = sum(value >= threshold for value in targeted)
        found[f"p@{threshold}"] = _divided(hits, len(targeted), "no row has a target")
    if not without:
        return found | {"n_acc": 0.0, "t_acc": 0.0}
    right = sum(map(_says_none, without))
    kept = sum(not _says_none(case) for case in cases if case.overlap.true)
    return found | {"n_acc": right / len(without), "t_acc": kept / len(targeted)}


# ---- VisionReasoner and Seg-Zero -------------------------------------------------------------------------------------


def _vision_reasoner_row(case: Case) -> float | None:
    counts = case.painted
    if not case.answered:  # "penalty": no intersection, the truth as union
        return 0.0
    return counts.both / counts.either if counts.either else None


def _vision_reasoner(cases: Sequence[Case]) -> Scores:
    ious = [value for case in cases if (value := _vision_reasoner_row(case)) is not None]
    if not ious:
        raise ZeroDivisionError("every row is left out")
    both, either = (sum(getattr(case.painted, part) for case in cases) for part in ("both", "either"))
    return {"giou": _mean(ious), "ciou": both / either if either else 0.0}


# ---- M3D, UniBiomed, CORE-Seg, segrl ---------------------------------------------------------------------------------


def _m3d_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true + 1)


def _m3d(cases: Sequence[Case]) -> Scores:
    return {"mdice": _mean([_m3d_row(case) for case in cases])}


def _unibiomed_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true + 1e-8)


def _unibiomed_surfaces(case: Case) -> tuple[float, float]:
    """95th percentile of the distances of wrong pixels, and surface Dice within 2 voxels, both without spacing."""
    true, predicted, _ = case.masks()
    assert predicted is not None  # others are refused
    if not predicted.any() or not true.any():
        return math.nan, 0.0
    to_predicted, to_true = (np.asarray(ndimage.distance_transform_edt(~mask)) for mask in (predicted, true))
    outside = predicted & ~true, true & ~predicted
    # its surfaces are whole masks, of which pixels at distance zero are dropped: the wrong pixels remain
    wrong = np.concatenate([to_true[outside[0]], to_predicted[outside[1]]])
    hd95 = float(np.percentile(wrong, 95)) if len(wrong) else math.nan
    rims = [mask & ~np.asarray(ndimage.binary_erosion(mask)) for mask in (predicted, true)]
    near = np.count_nonzero(to_true[rims[0]] <= 2) + np.count_nonzero(to_predicted[rims[1]] <= 2)
    return hd95, float(near / (sum(map(np.count_nonzero, rims)) + 1e-8))


def _unibiomed(cases: Sequence[Case]) -> Scores:
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for case in cases:
        groups[case.group].append((_unibiomed_row(case), *_unibiomed_surfaces(case)))
    means = np.array([np.mean(rows, axis=0) for rows in groups.values()]).mean(axis=0)
    return dict(zip(("mdice", "hd95_voxels", "nsd"), map(float, means), strict=True))


def _core_seg_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true)


def _core_seg(cases: Sequence[Case]) -> Scores:
    rows = [_core_seg_row(case) for case in cases]
    return {
        "mdice": _mean(rows),
        "miou": _mean([case.painted.both / case.painted.either for case in cases]),
        "fail": _mean([float(not (value and case.valid)) for case, value in zip(cases, rows, strict=True)]),
    }


def _segrl_row(case: Case) -> float:
    counts = case.overlap
    return counts.both / counts.either if counts.either else 1.0


def _segrl_dice(case: Case) -> float:
    counts = case.overlap
    return 2 * counts.both / (counts.predicted + counts.true) if counts.either else 1.0


def _segrl(cases: Sequence[Case]) -> Scores:
    ious = [_segrl_row(case) for case in cases]
    dices = [_segrl_dice(case) for case in cases]
    both, either = (sum(getattr(case.overlap, part) for case in cases) for part in ("both", "either"))
    found: Scores = {
        "giou": _mean(ious),
        "ciou": both / either if either else 1.0,
        "mdice": _mean(dices),
        "miou": _mean(ious),
        "fail": _mean([float(not (value and case.valid)) for case, value in zip(cases, dices, strict=True)]),
    }
    targeted = [value for case, value in zip(cases, ious, strict=True) if case.overlap.true]
    for threshold in (0.5, 0.7, 0.9):
        if targeted:
            found[f"p@{threshold}"] = _mean([float(value > threshold) for value in targeted])
    for name, rows in (
        ("n_acc", [not case.overlap.predicted for case in cases if not case.overlap.true]),
        ("t_acc", [bool(case.overlap.predicted) for case in cases if case.overlap.true]),
    ):
        if rows:
            found[name] = _mean([float(right) for right in rows])
    return found


_BOTH, _NONE, _MISS, _IGNORED, _MEAN = (
    *("both masks empty", "no target, and a mask", "no mask where there is a target"),
    *("ignored pixels", "means"),
)

CONVENTIONS: dict[str, Convention] = {
    one.name: one
    for one in (
        Convention(
            "lisa",
            "dvlab-research/LISA, 4b17762, train_ds.py, validate",
            {
                _BOTH: "IoU 1",
                _NONE: "IoU 0; its pixels add to the union of cIoU",
                _MISS: "no rule: answers are given, and always have a mask",
                _IGNORED: "left out",
                _MEAN: "gIoU over masks, I / (U + 1e-5); cIoU over pixels",
            },
            *("giou", _lisa_row, _lisa, ("no mask",)),
        ),
        Convention(
            "mmr",
            "jdg900/MMR, 702a7b6, train_ds.py, validate; there every mask of an answer by itself, a row here has one",
            {
                _BOTH: "IoU 1; skipped where there is no mask",
                _NONE: "IoU 0; its pixels add to the union of cIoU",
                _MISS: "the row is skipped: `continue` where there is no mask",
                _IGNORED: "left out",
                _MEAN: "as LISA, over the rows that are not skipped",
            },
            *("giou", lambda case: _lisa_row(case) if case.answered else None, _mmr),
        ),
        Convention(
            "rela",
            "henghuiding/ReLA, gres_model/evaluation/refer_evaluation.py, ReferEvaluator.evaluate; where its head says "
            "that there is no target, the mask is empty or absent here",
            {
                _BOTH: "IoU 1; cIoU adds nothing",
                _NONE: "IoU 0; its pixels add to the union of cIoU",
                _MISS: "IoU 0; the target adds to the union of cIoU",
                _IGNORED: "no rule",
                _MEAN: "gIoU over questions; P@X over those with a target, IoU >= X; N-acc, T-acc 0 if all have one",
            },
            *("giou", _rela_row, _rela, ("ignored pixels",)),
        ),
        Convention(
            "vision_reasoner",
            "VisionReasoner, evaluation_scripts/calculate_iou_with_bbox.py and evaluation_vision_manus.py, as in "
            "BrownsugarZeer/VisionReasoner, a6cfd1d",
            {
                _BOTH: "the row is lost to an error that is caught; IoU 0 where the text cannot be read",
                _NONE: "IoU 0; its pixels add to the union of cIoU",
                _MISS: "IoU 0; the target adds to the union of cIoU",
                _IGNORED: "background: what is predicted there is wrong",
                _MEAN: "gIoU over rows; cIoU over pixels",
            },
            *("giou", _vision_reasoner_row, _vision_reasoner),
        ),
        Convention(
            "m3d",
            "BAAI-DCAI/M3D, ac364a9, Bench/eval/metrics.py, BinaryDice; there of probabilities on a grid of 32 x 256 x "
            "256, here of masks on their own grid",
            {
                _BOTH: "Dice 0",
                _NONE: "Dice 0",
                _MISS: "no rule: the model always gives logits",
                _IGNORED: "-1 counts as background",
                _MEAN: "2 I / (P + T + 1) over rows",
            },
            *("mdice", _m3d_row, _m3d, ("no mask",)),
        ),
        Convention(
            "unibiomed",
            "Luffy03/UniBiomed, 0b2be93, demo/eval_utils/cal_3d_metrics.py, calculate_metrics; there on slices resized "
            "to 512 x 512 px, here on their own grid",
            {
                _BOTH: "Dice 0, HD95 NaN, NSD 0",
                _NONE: "Dice 0, HD95 NaN, NSD 0",
                _MISS: "no rule: rows are the files that are there",
                _IGNORED: "no rule",
                _MEAN: "over volumes, then over classes; one NaN makes HD95 NaN",
            },
            *("mdice", _unibiomed_row, _unibiomed, ("no mask", "ignored pixels")),
        ),
        Convention(
            "core_seg",
            "CORE-Seg, section 5.1: means over samples; no public code",
            {
                _BOTH: "no rule",
                _NONE: "Dice 0, a failure",
                _MISS: "Dice 0, a failure",
                _IGNORED: "no rule",
                _MEAN: "over samples; a failure is Dice 0 or an invalid format",
            },
            *("mdice", _core_seg_row, _core_seg, ("both empty", "ignored pixels")),
        ),
        Convention(
            "segrl",
            "segrl.metrics: dice, iou, failure",
            {
                _BOTH: "1",
                _NONE: "0; its pixels add to the union of cIoU",
                _MISS: "0; the target adds to the union of cIoU",
                _IGNORED: "left out",
                _MEAN: "over rows; cIoU over pixels; P@X over rows with a target, IoU > X",
            },
            *("giou", _segrl_row, _segrl),
        ),
    )
}
