"""Scores of rows by each evaluator, step by step as in its source; `published.py` names the sources and their rules."""

# I, U, P, T: pixels (of volumes voxels) of intersection, union, prediction and truth of one row; N rows

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from segrl.evaluation.conventions.cases import Case
from segrl.metrics.surfaces import hausdorff, surface_dice

__all__ = [
    "core_seg",
    "core_seg_row",
    "lisa",
    "lisa_row",
    "m3d",
    "m3d_row",
    "mmr",
    "mmr_row",
    "nnunet",
    "nnunet_row",
    "rela",
    "rela_row",
    "segrl",
    "segrl_dice",
    "segrl_row",
    "unibiomed",
    "unibiomed_row",
    "vision_reasoner",
    "vision_reasoner_nonobj",
    "vision_reasoner_nonobj_row",
    "vision_reasoner_row",
]

Scores = dict[str, float]

_TOLERANCE_MM = 2.0  # as of `segrl.evaluation.volume_record`


def _divided(above: float, below: float, what: str) -> float:
    if not below:
        raise ZeroDivisionError(what)
    return above / below


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- LISA, MMR -------------------------------------------------------------------------------------------------------


def lisa_row(case: Case) -> float:
    counts = case.overlap
    return 1.0 if not counts.either else counts.both / (counts.either + 1e-5)


def lisa(cases: Sequence[Case]) -> Scores:
    both, either = (sum(getattr(case.overlap, part) for case in cases) for part in ("both", "either"))
    return {
        "giou": math.fsum(map(lisa_row, cases)) / (len(cases) + 1e-5),  # its meters add 1e-5 to their counts
        "ciou": both / (either + 1e-10),
    }


def mmr_row(case: Case) -> float | None:
    if case.answered:
        return lisa_row(case)
    return 0.0 if case.others else None  # one of several: divided by all, of which `zip` leaves this one out


def mmr(cases: Sequence[Case]) -> Scores:
    rows = [value for case in cases if (value := mmr_row(case)) is not None]
    if not rows:
        raise ZeroDivisionError("no row has a mask")
    given = [case for case in cases if case.answered]
    both, either = (sum(getattr(case.overlap, part) for case in given) for part in ("both", "either"))
    return {"giou": math.fsum(rows) / (len(rows) + 1e-5), "ciou": both / (either + 1e-10)}


# ---- ReLA ------------------------------------------------------------------------------------------------------------


def _says_none(case: Case) -> bool:
    return not case.overlap.predicted


def rela_row(case: Case) -> float:
    counts = case.overlap
    if not counts.true:
        return float(_says_none(case))
    return 0.0 if _says_none(case) else counts.both / counts.either


def rela(cases: Sequence[Case]) -> Scores:
    ious = [rela_row(case) for case in cases]
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


def vision_reasoner_row(case: Case) -> float | None:
    counts = case.filled
    if not case.answered:  # "penalty": no intersection, the truth as union
        return 0.0
    return counts.both / counts.either if counts.either else None


def vision_reasoner(cases: Sequence[Case]) -> Scores:
    ious = [value for case in cases if (value := vision_reasoner_row(case)) is not None]
    if not ious:
        raise ZeroDivisionError("every row is left out")
    return {"giou": _mean(ious), "ciou": _filled_ciou(cases)}


def _filled_ciou(cases: Sequence[Case]) -> float:
    both, either = (sum(getattr(case.filled, part) for case in cases) for part in ("both", "either"))
    return both / either if either else 0.0


def _nothing_found(case: Case) -> bool:
    """Its `non_object`: no target, and an answer that can be read and names no box."""
    return not case.filled.true and not case.filled.predicted and case.valid


def vision_reasoner_nonobj_row(case: Case) -> float:
    counts = case.filled
    if _nothing_found(case):
        return 1.0
    return counts.both / counts.either if case.answered and counts.either else 0.0


def vision_reasoner_nonobj(cases: Sequence[Case]) -> Scores:
    without = [case for case in cases if not case.filled.true]
    n_acc = sum(map(_nothing_found, without)) / len(without) if without else 0.0
    return {"giou": _mean(list(map(vision_reasoner_nonobj_row, cases))), "ciou": _filled_ciou(cases), "n_acc": n_acc}


# ---- M3D, UniBiomed, CORE-Seg, segrl ---------------------------------------------------------------------------------


def m3d_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true + 1)


def m3d(cases: Sequence[Case]) -> Scores:
    return {"mdice": _mean([m3d_row(case) for case in cases])}


def unibiomed_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true + 1e-8)


def _unibiomed_surfaces(case: Case) -> tuple[float, float]:
    """95th percentile of the distances of wrong pixels, and surface Dice within 2 voxels, both without spacing."""
    true, predicted, _ = case.masks()
    assert predicted is not None  # others are refused
    if not predicted.any() or not true.any():
        return math.nan, 0.0
    box = _around(true | predicted)  # the nearest pixel of either mask is in it, so that no distance changes
    true, predicted = true[box], predicted[box]
    to_predicted, to_true = (np.asarray(ndimage.distance_transform_edt(~mask)) for mask in (predicted, true))
    outside = predicted & ~true, true & ~predicted
    # its surfaces are whole masks, of which pixels at distance zero are dropped: the wrong pixels remain
    wrong = np.concatenate([to_true[outside[0]], to_predicted[outside[1]]])
    hd95 = float(np.percentile(wrong, 95)) if len(wrong) else math.nan
    rims = [mask & ~np.asarray(ndimage.binary_erosion(mask), dtype=bool) for mask in (predicted, true)]
    near = np.count_nonzero(to_true[rims[0]] <= 2) + np.count_nonzero(to_predicted[rims[1]] <= 2)
    return hd95, float(near / (sum(map(np.count_nonzero, rims)) + 1e-8))


def _around(mask: np.ndarray) -> tuple[slice, ...]:
    """The box around the foreground."""
    axes = range(mask.ndim)
    found = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(there[0]), int(there[-1]) + 1) for there in found)


def unibiomed(cases: Sequence[Case]) -> Scores:
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for case in cases:
        groups[case.group].append((unibiomed_row(case), *_unibiomed_surfaces(case)))
    means = np.array([np.mean(rows, axis=0) for rows in groups.values()]).mean(axis=0)
    return dict(zip(("mdice", "hd95_voxels", "nsd"), map(float, means), strict=True))


def nnunet_row(case: Case) -> float | None:
    counts = case.overlap
    return 2 * counts.both / (counts.predicted + counts.true) if case.answered and counts.either else None


def nnunet(cases: Sequence[Case]) -> Scores:
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for case in cases:
        if not case.answered:
            continue
        row, counts = nnunet_row(case), case.overlap
        undefined = row is None  # 0 / 0, which `nanmean` leaves out
        groups[case.group].append((math.nan, math.nan) if undefined else (row, counts.both / counts.either))
    means = [np.array(rows) for rows in groups.values()]
    if not means or any(np.isnan(rows).all() for rows in means):
        raise ZeroDivisionError("a class has no row with a true or predicted pixel, which makes its mean NaN")
    mdice, miou = np.array([np.nanmean(rows, axis=0) for rows in means]).mean(axis=0)
    return {"mdice": float(mdice), "miou": float(miou)}


def core_seg_row(case: Case) -> float:
    counts = case.painted
    return 2 * counts.both / (counts.predicted + counts.true)


def core_seg(cases: Sequence[Case]) -> Scores:
    rows = [core_seg_row(case) for case in cases]
    return {
        "mdice": _mean(rows),
        "miou": _mean([case.painted.both / case.painted.either for case in cases]),
        "fail": _mean([float(not (value and case.valid)) for case, value in zip(cases, rows, strict=True)]),
    }


def segrl_row(case: Case) -> float:
    counts = case.overlap
    return counts.both / counts.either if counts.either else 1.0


def segrl_dice(case: Case) -> float:
    counts = case.overlap
    return 2 * counts.both / (counts.predicted + counts.true) if counts.either else 1.0


def segrl(cases: Sequence[Case]) -> Scores:
    ious = [segrl_row(case) for case in cases]
    dices = [segrl_dice(case) for case in cases]
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
    return found | _segrl_surfaces(cases)


def _segrl_surfaces(cases: Sequence[Case]) -> Scores:
    """Distances in volumes whose spacing is known; a volume where one mask is empty has no HD95."""
    distances, shares = [], []
    for case in cases:
        if not case.volume or case.spacing_mm is None:
            continue
        true, predicted, ignored = case.masks()
        predicted = np.zeros_like(true) if predicted is None else predicted
        if ignored is not None:
            true, predicted = true & ~ignored, predicted & ~ignored
        distances.append(hausdorff(predicted, true, spacing=case.spacing_mm))
        shares.append(surface_dice(predicted, true, _TOLERANCE_MM, case.spacing_mm))
    finite = [distance for distance in distances if math.isfinite(distance)]
    found = {"hd95_mm": _mean(finite)} if finite else {}
    return found | ({"nsd": _mean(shares)} if shares else {})
