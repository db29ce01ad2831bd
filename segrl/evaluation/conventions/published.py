"""Conventions of published evaluators: the same masks, other numbers.

Each follows what its source does, edge cases included, in double precision. Where a source states no rule for a kind of
row, the convention refuses such rows. Sources were read on 2026-11-29 and 2026-11-30; numbers in brackets are
lines of the file that is named first, unless another one is named with them.
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
            "dvlab-research/LISA, 4b17762, train_ds.py, lines 551 to 573 (validate), and utils/utils.py",
            {
                _BOTH: "IoU 1 (559)",
                _NONE: "IoU 0; its pixels add to the union of cIoU (556 to 558)",
                _MISS: "no rule: answers are given, and always have a mask",
                _IGNORED: "left out (utils/utils.py, 122)",
                _MEAN: "gIoU over masks, I / (U + 1e-5) (558, 561 to 564; utils/utils.py, 94); cIoU over pixels (570)",
                _VOLUMES: "no rule",
            },
            *("giou", scores.lisa_row, scores.lisa, ("no mask", VOLUMES)),
        ),
        Convention(
            "mmr",
            "jdg900/MMR, 702a7b6, train_ds.py, lines 569 to 602 (validate), and utils/utils.py; of an answer with "
            "several masks every mask is a row (names that end in #0, #1, ...)",
            {
                _BOTH: "IoU 1 (585); skipped where there is no mask",
                _NONE: "IoU 0; its pixels add to the union of cIoU (583, 584)",
                _MISS: "an answer without any mask is skipped (575, 576); a missing one of several is 0 in gIoU (589), "
                "and not in cIoU (577)",
                _IGNORED: "left out (utils/utils.py, 198)",
                _MEAN: "as LISA (584, 589, 600), over the masks of answers that are not skipped",
                _VOLUMES: "no rule",
            },
            *("giou", scores.mmr_row, scores.mmr, (VOLUMES,)),
        ),
        Convention(
            "rela",
            "henghuiding/ReLA, 3ca9551, gres_model/evaluation/refer_evaluation.py, lines 114 to 202 "
            "(ReferEvaluator.evaluate); where its head says that there is no target, the mask is empty or absent here",
            {
                _BOTH: "IoU 1; cIoU adds nothing (134 to 138)",
                _NONE: "IoU 0; its pixels add to the union of cIoU (145 to 148)",
                _MISS: "IoU 0; the target adds to the union of cIoU (156 to 168)",
                _IGNORED: "no rule",
                _MEAN: "gIoU over questions (190); P@X over those with a target, IoU >= X (173, 202); N-acc, T-acc 0 "
                "if all have one (194 to 198)",
                _VOLUMES: "no rule",
            },
            *("giou", scores.rela_row, scores.rela, ("ignored pixels", VOLUMES)),
        ),
        Convention(
            "vision_reasoner",
            "VisionReasoner, evaluation_scripts/evaluation_vision_manus.py and calculate_iou_with_bbox.py, as in "
            "BrownsugarZeer/VisionReasoner, a6cfd1d; its masks as dvlab-research/Seg-Zero, 42a3345, writes them, "
            "evaluation_scripts/create_reasonseg_hf.py",
            {
                _BOTH: "the row is lost to an error that is caught (51, 228 to 232); IoU 0 where no text can be read",
                _NONE: "IoU 0; its pixels add to the union of cIoU (calculate_iou_with_bbox.py, 38, 46)",
                _MISS: "IoU 0; the target adds to the union of cIoU (188 to 202)",
                _IGNORED: "part of the target: 255, then astype(bool) (create_reasonseg_hf.py, 53, 60)",
                _MEAN: "gIoU over rows; cIoU over pixels (calculate_iou_with_bbox.py, 50, 52)",
                _VOLUMES: "no rule",
            },
            *("giou", scores.vision_reasoner_row, scores.vision_reasoner, (VOLUMES,)),
        ),
        Convention(
            "vision_reasoner_nonobj",
            "JIA-Lab-research/VisionReasoner, c013132, evaluation/evaluation_segmentation.py and "
            "calculate_iou_with_bbox_nonobj.py; no boxes there is an empty mask here",
            {
                _BOTH: "IoU 1 where the text can be read (207; calculate_iou_with_bbox_nonobj.py, 48), else 0",
                _NONE: "IoU 0; its pixels add to the union of cIoU (calculate_iou_with_bbox_nonobj.py, 47, 59)",
                _MISS: "IoU 0; the target adds to the union of cIoU (211 to 219)",
                _IGNORED: "part of the target, as in vision_reasoner",
                _MEAN: "gIoU over rows; cIoU over pixels (calculate_iou_with_bbox_nonobj.py, 77, 79); N-acc of rows "
                "without a target, 0 where there are none (87)",
                _VOLUMES: "no rule",
            },
            *("giou", scores.vision_reasoner_nonobj_row, scores.vision_reasoner_nonobj, (VOLUMES,)),
        ),
        Convention(
            "m3d",
            "BAAI-DCAI/M3D, ac364a9, Bench/eval/metrics.py, lines 17 to 32 (BinaryDice); there soft, of probabilities "
            "on a grid of 32 x 256 x 256, here of masks on their own grid",
            {
                _BOTH: "Dice 0 (27 to 30)",
                _NONE: "Dice 0 (27 to 30)",
                _MISS: "no rule: the model always gives logits",
                _IGNORED: "-1 counts as background (22)",
                _MEAN: "2 I / (P + T + 1) over rows (28, 30)",
                _VOLUMES: "its own case: Dice of voxels",
            },
            *("mdice", scores.m3d_row, scores.m3d, ("no mask",)),
        ),
        Convention(
            "unibiomed",
            "Luffy03/UniBiomed, 0b2be93, demo/eval_utils/cal_3d_metrics.py, lines 30 to 170; there on slices resized "
            "to 512 x 512 px (22), here on their own grid",
            {
                _BOTH: "Dice 0 (37), HD95 NaN (41, 42), NSD 0 (59, 60)",
                _NONE: "Dice 0 (37), HD95 NaN (41, 42), NSD 0 (59, 60)",
                _MISS: "no rule: rows are the files that are there (93, 108)",
                _IGNORED: "no rule",
                _MEAN: "over volumes, then over classes (158 to 170); one NaN makes HD95 NaN",
                _VOLUMES: "its own case: HD95 in voxels (45 to 54), NSD within 2 voxels (58, 71 to 75)",
            },
            *("mdice", scores.unibiomed_row, scores.unibiomed, ("no mask", "ignored pixels")),
        ),
        Convention(
            "nnunet",
            "MIC-DKFZ/nnUNet, 0a50fa0, nnunetv2/evaluation/evaluate_predictions.py, lines 70 to 152",
            {
                _BOTH: "NaN (101), left out of the mean of its class (142)",
                _NONE: "Dice 0 (101)",
                _MISS: "the row is left out: rows are the files that are there (121, 124)",
                _IGNORED: "left out (74, 90)",
                _MEAN: "over cases (142), then over classes (152)",
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
