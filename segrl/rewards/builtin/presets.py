"""The rewards of published systems, as sums of segrl's parts with the published weights and thresholds.

The page "Presets" of the reference lists how each differs from the original: ways of reward hacking that the originals
allow are closed here. Weights are given in the order of the parts; a part with weight 0 is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.rewards.builtin.boxes import box_ap, box_confidence, box_hungarian, box_iou, box_l1
from segrl.rewards.builtin.core_seg import box_f1, dual_granularity_mask, format_reward
from segrl.rewards.builtin.masks import mask_iou, s_measure
from segrl.rewards.builtin.medvol_r1 import propagated_dice, slice_boxes, slice_format, slice_visibility
from segrl.rewards.builtin.points import point_distance, point_in_mask
from segrl.rewards.builtin.text import json_format, length_budget, non_repeat, think_answer_format
from segrl.rewards.factory import make_reward, weighted_sum
from segrl.rewards.registry import register_preset
from segrl.rewards.reward import Reward

__all__ = [
    "core_seg",
    "lens",
    "med_reasoner",
    "medvol_r1",
    "pixel_think",
    "seg_r1",
    "seg_zero",
    "vision_reasoner",
    "visual_rft",
    "vlm_r1",
    "vlm_r1_ovd",
]

JSON = CompletionFormat(require_seg=False, answer_format="json")
JSON_AND_MASK = CompletionFormat(answer_format="json")  # the mask comes from the token behind the JSON
BOX_AND_POINT = ("bbox_2d", "point_2d")
SEG_ZERO_EDGE = 840  # edge of the squares to which Seg-Zero's and VisionReasoner's data are resized


@register_preset("core_seg", equation="r_fmt + r_bbox + r_mask", source="CORE-Seg")
def core_seg(
    *,
    min_iou: float = 0.5,
    mean_over: Literal["matched", "true_positives"] = "matched",
    dice_threshold: float = 0.05,
    dice_weight: float = 2.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> Reward:
    """CORE-Seg: format, boxes and mask, from an answer in words with the segmentation token.

    Args:
        min_iou: See `box_f1`.
        mean_over: See `box_f1`.
        dice_threshold: See `dual_granularity_mask`.
        dice_weight: See `dual_granularity_mask`.
        weights: Of format, boxes, mask; (1, 1, 0) and (1, 0, 1) are the ablations of the paper.

    Example:
        >>> [(part.name, weight) for part, weight in core_seg(weights=(1, 2, 0)).parts]
        [('format', 1.0), ('box_f1', 2.0)]
    """
    mask = make_reward(dual_granularity_mask, dice_threshold=dice_threshold, dice_weight=dice_weight)
    boxes = make_reward(box_f1, min_iou=min_iou, mean_over=mean_over)
    return _sum("core_seg", [make_reward(format_reward), boxes, mask], weights)


@register_preset("medvol_r1", equation="R_f + R_a + R_s + R_c", source="MedVol-R1")
def medvol_r1(*, delta: int = 5, allow_empty: bool = True, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Reward:
    """MedVol-R1: format, visibility of the named slice, boxes on it, and the mask that is propagated from them.

    Args:
        delta: See `propagated_dice`; 2, 5, 10 and 15 are the ablation of the paper.
        allow_empty: See `slice_format`; the paper is silent on volumes without foreground.
        weights: Of format, visibility, boxes, propagated mask; one of them 0 is an ablation of the paper. Without the
            propagated mask no masks are needed.

    Example:
        >>> [part.name for part, _ in medvol_r1(delta=2).parts]
        ['slice_format', 'slice_visibility', 'slice_boxes', 'propagated_dice']
    """
    form = make_reward(slice_format, allow_empty=allow_empty)
    parts = [form, make_reward(slice_visibility), make_reward(slice_boxes)]
    return _sum("medvol_r1", [*parts, make_reward(propagated_dice, delta=delta)], weights, JSON)


@register_preset("seg_zero", equation="think + json + [IoU > 0.5] + [box L1 < 10] + [point < 100]", source="Seg-Zero")
def seg_zero(
    *,
    strict: bool = True,
    min_iou: float = 0.5,
    box_px: float = 10.0,
    point_px: float = 100.0,
    resized_to: int | None = SEG_ZERO_EDGE,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
) -> Reward:
    """Seg-Zero: two formats, and box and point within thresholds.

    Args:
        strict: Score the JSON format 1 only for objects with all keys; False scores the share of the keys.
        min_iou: IoU that a box must exceed.
        box_px: See `box_l1`.
        point_px: See `point_distance`.
        resized_to: Edge of the square in whose pixels both are measured; None for original pixels.
        weights: Of reasoning format, JSON format, IoU, box L1, point distance.

    Example:
        >>> seg_zero(point_px=50.0).range, seg_zero().parts[-1][0].settings["within_px"]
        ((0.0, 5.0), 100.0)
    """
    parts = _seg_zero_parts(strict, min_iou, box_px, point_px, resized_to)
    return _sum("seg_zero", parts, weights, JSON)


@register_preset(
    "vision_reasoner",
    equation="think + 2 json + non-repeat + [IoU > 0.5] + [box L1 < 10] + [point < 30]",
    source="VisionReasoner",
)
def vision_reasoner(
    *,
    min_iou: float = 0.5,
    box_px: float = 10.0,
    point_px: float = 30.0,
    resized_to: int | None = SEG_ZERO_EDGE,
    weights: Sequence[float] = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0),
) -> Reward:
    """VisionReasoner: Seg-Zero's parts for several objects, and no repeated sentences.

    Args:
        min_iou: IoU that a box must exceed.
        box_px: See `box_l1`.
        point_px: See `point_distance`.
        resized_to: As in `seg_zero`.
        weights: Of reasoning format, JSON format, IoU, box L1, point distance, non-repeat.

    Example:
        >>> {part.name: weight for part, weight in vision_reasoner().parts}["json_format"], vision_reasoner().range
        (2.0, (0.0, 7.0))
    """
    parts = [*_seg_zero_parts(False, min_iou, box_px, point_px, resized_to), make_reward(non_repeat)]
    return _sum("vision_reasoner", parts, weights, JSON)


@register_preset("vlm_r1", equation="format + IoU", source="VLM-R1, referring expressions (REC)")
def vlm_r1(*, weights: Sequence[float] = (1.0, 1.0)) -> Reward:
    """VLM-R1 for one object: valid JSON, and the IoU of its box.

    Args:
        weights: Of format, IoU.

    Example:
        >>> [part.name for part, _ in vlm_r1().parts]
        ['format', 'box_iou']
    """
    return _sum("vlm_r1", [make_reward(format_reward), make_reward(box_iou)], weights, JSON)


@register_preset("vlm_r1_ovd", equation="format + AP · min(1, M / N)", source="VLM-R1, detection (OVD), odLength")
def vlm_r1_ovd(*, weights: Sequence[float] = (1.0, 1.0)) -> Reward:
    """VLM-R1 for detection: average precision with a penalty for boxes too many.

    Args:
        weights: Of format, average precision.

    Example:
        >>> [part.name for part, _ in vlm_r1_ovd().parts]
        ['think_answer_format', 'box_ap']
    """
    return _sum("vlm_r1_ovd", [make_reward(think_answer_format), make_reward(box_ap)], weights, JSON)


@register_preset("lens", equation="think + box IoU² + mask IoU²", source="LENS")
def lens(*, power: float = 2.0, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Reward:
    """LENS: format, and the squared IoU of box and mask.

    Args:
        power: Exponent of both IoUs.
        weights: Of format, box, mask.

    Example:
        >>> [(part.name, dict(part.settings)) for part, _ in lens(power=3.0).parts[1:]]
        [('box_iou', {'power': 3.0}), ('mask_iou', {'power': 3.0})]
    """
    iou = [make_reward(box_iou, power=power), make_reward(mask_iou, power=power)]
    return _sum("lens", [make_reward(think_answer_format), *iou], weights, JSON_AND_MASK)


@register_preset("med_reasoner", equation="think + json + IoU + point (+ box L1 + distance)", source="MedReasoner")
def med_reasoner(
    *,
    mode: Literal["soft", "hard"] = "soft",
    box_px: float = 100.0,
    point_px: float = 100.0,
    weights: Sequence[float] | None = None,
) -> Reward:
    """MedReasoner: graded formats, and box and point without thresholds.

    Args:
        mode: "soft" scores overlap, "hard" also distances.
        box_px: Mean distance at which `box_l1` is 0, in "hard".
        point_px: Distance at which `point_distance` is 0, in "hard".
        weights: Of reasoning format, JSON format, box IoU, point in mask; in "hard" also box L1, point distance. All 1
            by default.

    Example:
        >>> med_reasoner().range, med_reasoner(mode="hard").range
        ((0.0, 4.0), (0.0, 6.0))
    """
    parts = [
        make_reward(think_answer_format, graded=True),
        make_reward(json_format, graded=True, keys=BOX_AND_POINT),
        make_reward(box_iou),
        make_reward(point_in_mask),
    ]
    distances = [
        make_reward(box_l1, within_px=box_px, graded=True),
        make_reward(point_distance, within_px=point_px, graded=True),
    ]
    parts += distances if mode == "hard" else []
    return _sum("med_reasoner", parts, (1.0,) * len(parts) if weights is None else weights, JSON)


@register_preset("visual_rft", equation="think + Σ IoU / max(N, M) + confidence", source="Visual-RFT, detection")
def visual_rft(*, min_iou: float = 0.5, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Reward:
    """Visual-RFT for detection: format, IoU of the boxes that hit, and confidence in just these.

    Args:
        min_iou: IoU that a hit must exceed.
        weights: Of format, IoU, confidence.

    Example:
        >>> [part.name for part, _ in visual_rft().parts]
        ['think_answer_format', 'box_hungarian', 'box_confidence']
    """
    boxes = [make_reward(box_hungarian, min_iou=min_iou), make_reward(box_confidence, threshold=min_iou)]
    return _sum("visual_rft", [make_reward(think_answer_format), *boxes], weights, JSON)


@register_preset("seg_r1", equation="format + 0.7 mask IoU + 0.3 S-measure", source="Seg-R1")
def seg_r1(*, weights: Sequence[float] = (1.0, 0.7, 0.3)) -> Reward:
    """Seg-R1: format, and mask IoU with S-measure.

    Args:
        weights: Of format, mask IoU, S-measure.

    Example:
        >>> [(part.name, weight) for part, weight in seg_r1().parts]
        [('format', 1.0), ('mask_iou', 0.7), ('s_measure', 0.3)]
    """
    return _sum("seg_r1", [make_reward(part) for part in (format_reward, mask_iou, s_measure)], weights, JSON_AND_MASK)


@register_preset("pixel_think", equation="clip(Seg-Zero − 5 (1 − length score), 0, 5)", source="PixelThink")
def pixel_think(
    *,
    limit: int = 96,
    margin: int = 500,
    min_iou: float = 0.5,
    box_px: float = 10.0,
    point_px: float = 100.0,
    resized_to: int | None = SEG_ZERO_EDGE,
) -> Reward:
    """PixelThink: Seg-Zero's reward, less for words beyond a budget.

    Args:
        limit: Number of words without a penalty: 96 for easy images, 256 and more for hard ones.
        margin: Number of words beyond the limit at which the penalty is full.
        min_iou: IoU that a box must exceed; this and the following as in `seg_zero`.
        box_px: Box distance.
        point_px: Point distance.
        resized_to: Edge of the square.

    Example:
        >>> pixel_think().range
        (0.0, 5.0)
    """
    parts = _seg_zero_parts(True, min_iou, box_px, point_px, resized_to)
    highest = float(len(parts))
    length = make_reward(length_budget, limit=limit, margin=margin, minimum=0, require_valid=False)
    total = _sum("pixel_think", [*parts, length.scale(highest, -highest)], (1.0,) * (len(parts) + 1), JSON)
    return total.clip(0.0, highest)


def _seg_zero_parts(
    strict: bool, min_iou: float, box_px: float, point_px: float, resized_to: int | None
) -> list[Reward]:
    return [
        make_reward(think_answer_format),
        make_reward(json_format, graded=not strict, keys=BOX_AND_POINT),
        make_reward(box_iou, threshold=min_iou),
        make_reward(box_l1, within_px=box_px, resized_to=resized_to),
        make_reward(point_distance, within_px=point_px, inside_box=True, resized_to=resized_to),
    ]


def _sum(
    name: str, parts: Sequence[Reward], weights: Sequence[float], completion_format: CompletionFormat | None = None
) -> Reward:
    given: Any = list(weights)
    if len(given) != len(parts):
        names = ", ".join(part.name for part in parts)
        raise RewardError(f"{name}: weights={given}; expected {len(parts)} numbers, for {names}")
    return weighted_sum(
        [pair for pair in zip(parts, given, strict=True) if pair[1] != 0], name, completion_format=completion_format
    )
