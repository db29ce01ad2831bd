"""Scores of an answer about a whole volume: the 3D mask in voxels and millimetres, and the key slice that it names."""

# D slices, H/W pixels of a slice

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segrl.errors import DataError
from segrl.metrics import dice, iou, summarise
from segrl.prediction import Prediction, VolumeTarget
from segrl.rewards import make_reward
from segrl.surfaces import hausdorff, surface_dice

__all__ = ["VOLUME_GROUPINGS", "VOLUME_METRICS", "summarise_volumes", "volume_record"]

VOLUME_METRICS = {
    "mdice": "dice",
    "miou": "iou",
    "fail": "fail",
    "hd95_mm": "hd95_mm",
    "nsd": "nsd",
    "slice_visibility": "slice_visibility",
    "slice_boxes": "slice_boxes",
}
VOLUME_GROUPINGS = ("lesion",)  # the structure: a data set of organs names them in this column
_UNDEFINED = ("hd95_mm",)
_TEXTS = ("query", "modality", "anatomy", "lesion", "name")


def volume_record(prediction: Prediction, target: VolumeTarget, *, nsd_tolerance_mm: float = 2.0) -> dict[str, Any]:
    """Score one answer about a volume; plain Python values, ready for JSON.

    A prediction without a mask counts as an empty one, so that an answer which names nothing is right about a volume
    that holds nothing.

    Args:
        prediction: Its (D, H, W) mask is compared with the truth; its slice and boxes with that slice of it.
        target: Truth, spacing in millimetres and texts.
        nsd_tolerance_mm: Distance up to which two surfaces agree, millimetres; at least 0.

    Returns:
        A record for `summarise_volumes`:

        - "dice", "iou": of the voxels, in [0, 1]; both masks empty 1.0, exactly one empty 0.0.
        - "hd95_mm": `segrl.surfaces.hausdorff`, 95th percentile, millimetres; both empty 0.0, and None if exactly one
          is, because then there is no distance: such a volume counts in the other scores alone.
        - "nsd": `segrl.surfaces.surface_dice`, in [0, 1]; both empty 1.0, exactly one empty 0.0.
        - "fail": Dice is 0 or the text is invalid.
        - "slice_visibility", "slice_boxes": the rewards of these names, which pay nothing for an invalid text.
        - "slice_index", "boxes" (original pixels), "status", "text" of the prediction, and the texts of the target.

    Raises:
        DataError: The mask has another shape than the truth, which is named, or a tolerance below 0.
    """
    mask = prediction.mask if prediction.mask is not None else np.zeros_like(target.mask)
    if mask.shape != target.mask.shape:
        raise DataError(
            f"{target.name or 'volume'}: the predicted mask has shape {mask.shape}, the true one {target.mask.shape}; "
            "put the prediction on the grid of the scan"
        )
    overlap = dice(mask, target.mask)
    distance = hausdorff(mask, target.mask, spacing=target.spacing_mm)
    return {
        **{name: getattr(target, name) for name in _TEXTS},
        "dice": overlap,
        "iou": iou(mask, target.mask),
        "fail": not prediction.valid or overlap == 0.0,
        "hd95_mm": distance if math.isfinite(distance) else None,
        "nsd": surface_dice(mask, target.mask, nsd_tolerance_mm, target.spacing_mm),
        "slice_visibility": make_reward("slice_visibility").score(prediction, target),
        "slice_boxes": make_reward("slice_boxes").score(prediction, target),
        "slice_index": prediction.slice_index,
        "boxes": prediction.boxes.tolist(),
        "status": str(prediction.status.value),
        "text": prediction.text,
    }


def summarise_volumes(
    records: Sequence[Mapping[str, Any]], *, groupings: Sequence[str] = VOLUME_GROUPINGS
) -> dict[str, Any]:
    """Means, 95 % bootstrap intervals and a breakdown by structure of `volume_record`s.

    A mean of "hd95_mm" leaves out the volumes in which exactly one mask was empty, so a model that often finds nothing
    may look good by it: read it beside "n_scored", the number of volumes that it is over, and beside "fail".

    Args:
        records: At least one record of `volume_record`.
        groupings: Keys of the records that the breakdowns are by.

    Returns:
        As `segrl.metrics.summarise`: "mdice", "miou", "fail", "nsd", "slice_visibility" and "slice_boxes" in [0, 1],
        "hd95_mm" in millimetres (None if it applies to no volume), "n", "n_scored": {"hd95_mm": ...}, "ci95", "groups".

    Raises:
        DataError: As `segrl.metrics.summarise`.
    """
    return summarise(records, metrics=VOLUME_METRICS, groupings=groupings, optional=_UNDEFINED)
