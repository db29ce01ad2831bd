"""A reward that only counts where a lesion is small, so that those are not lost in the average."""

from __future__ import annotations

from segrl import Prediction, Target, register_reward
from segrl.geometry import match_boxes


@register_reward(
    "small_lesion_bonus",
    range=(0.0, 1.0),
    empty={"both": None, "target": None},
    invariant=("box_order", "flip", "rescale"),
    monotone=("boxes",),
    equation="Σ IoU of matched boxes / max(N, M) where the lesions cover at most max_area",
)
def small_lesion_bonus(prediction: Prediction, target: Target, *, max_area: float = 0.01) -> float | None:
    """Score the boxes of small lesions; None for images with large lesions or none.

    Args:
        prediction: Boxes in original pixels.
        target: True mask and boxes.
        max_area: Largest share of the image that counts as small.

    Returns:
        A score in [0, 1], 0.0 for an invalid text; None where the lesions cover more of the image, or there are none.
    """
    if target.empty or target.mask.mean() > max_area:
        return None
    if not prediction.valid:
        return 0.0
    matched = match_boxes(prediction.boxes, target.boxes, 0.0)
    return float(matched.iou.sum()) / max(len(prediction.boxes), len(target.boxes))
