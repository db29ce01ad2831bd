"""Conventions of published evaluators: the same masks, other numbers.

Each follows what its source does, edge cases included, in double precision. Where a source states no rule for a kind of
row, the convention refuses such rows. Sources were read on 2026-11-29.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from segrl.errors import SegRLError
from segrl.evaluation.conventions import scores
from segrl.evaluation.conventions.cases import VOLUMES, Case

__all__ = ["CONVENTIONS", "Convention", "ConventionError"]


class ConventionError(SegRLError):
    """A convention has no rule for some rows."""


@dataclass(frozen=True)
class Convention:
    """Rules by which one evaluator turns masks into numbers.

    Attributes:
        name: In `CONVENTIONS`.
        source: The public evaluator: repository, revision, file and function.
        rules: What it does about each question on which evaluators disagree.
        mean: The score whose mean over rows `row` explains.
        row: The score of one row; None where the row is left out.
        score: All scores of some rows, fractions in [0, 1] but for distances.
        refuses: Kinds of rows (`KINDS`, `VOLUMES`) for which the source states no rule.
        more: As `row`, of further means.

    Example:
        >>> import numpy as np
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
    score: Callable[[Sequence[Case]], dict[str, float]]
    refuses: tuple[str, ...] = ()
    more: Mapping[str, Callable[[Case], float | None]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Callable[[Case], float | None]]:
        """The score of one row, by the name of the mean that it explains."""
        return {self.mean: self.row, **self.more}

    def __call__(self, cases: Sequence[Case]) -> dict[str, float]:
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


_BOTH, _NONE, _MISS, _IGNORED, _MEAN, _VOLUMES = (
    *("both masks empty", "no target, and a mask", "no mask where there is a target"),
    *("ignored pixels", "means", VOLUMES),
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
                _VOLUMES: "no rule",
            },
            *("giou", scores.lisa_row, scores.lisa, ("no mask", VOLUMES)),
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
                _VOLUMES: "no rule",
            },
            *("giou", scores.mmr_row, scores.mmr, (VOLUMES,)),
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
                _VOLUMES: "no rule",
            },
            *("giou", scores.rela_row, scores.rela, ("ignored pixels", VOLUMES)),
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
                _VOLUMES: "no rule",
            },
            *("giou", scores.vision_reasoner_row, scores.vision_reasoner, (VOLUMES,)),
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
                _VOLUMES: "its own case: Dice of voxels",
            },
            *("mdice", scores.m3d_row, scores.m3d, ("no mask",)),
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
                _VOLUMES: "its own case: HD95 in voxels, NSD within 2 voxels",
            },
            *("mdice", scores.unibiomed_row, scores.unibiomed, ("no mask", "ignored pixels")),
        ),
        Convention(
            "nnunet",
            "MIC-DKFZ/nnUNet, 0a50fa0, nnunetv2/evaluation/evaluate_predictions.py, compute_metrics_on_folder",
            {
                _BOTH: "NaN, left out of the mean of its class",
                _NONE: "Dice 0",
                _MISS: "the row is left out: rows are the files that are there",
                _IGNORED: "left out",
                _MEAN: "over cases, then over classes",
                _VOLUMES: "its own case: Dice of voxels",
            },
            *("mdice", scores.nnunet_row, scores.nnunet),
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
                _VOLUMES: "no rule",
            },
            *("mdice", scores.core_seg_row, scores.core_seg, ("both empty", "ignored pixels", VOLUMES)),
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
                _VOLUMES: "as pixels; HD95 (both masks not empty) and NSD at 2 mm, where the spacing is known",
            },
            *("giou", scores.segrl_row, scores.segrl, (), {"mdice": scores.segrl_dice}),
        ),
    )
}
