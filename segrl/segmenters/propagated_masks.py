"""Answers about volumes to masks: the boxes on the named slice prompt a frozen segmenter, which propagates them."""

# D slices, H/W pixels of a slice

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from segrl.errors import SegRLError, unknown_name
from segrl.geometry.matching import match_boxes
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import VolumeTarget
from segrl.segmenters.propagation import PropagationRequest, VolumePropagator

__all__ = ["PromptBoxes", "add_volume_masks"]

PromptBoxes = Literal["matched", "all"]


def add_volume_masks(
    propagator: VolumePropagator,
    predictions: Sequence[Prediction],
    volumes: Sequence[np.ndarray],
    keys: Sequence[str],
    targets: Sequence[VolumeTarget] | None = None,
    *,
    prompt_boxes: PromptBoxes = "all",
    slice_masks: Sequence[np.ndarray | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Return the predictions with the mask of the whole volume.

    Args:
        propagator: The frozen segmenter.
        predictions: Their `slice_index` and `boxes` are read.
        volumes: Grey values of each prediction's volume, (D, H, W) uint8; the same object, or an equal key, is the same
            volume, whose features are computed once.
        keys: Content of each volume as text; "" keeps no features beyond the call.
        targets: The ground truth, which "matched" needs.
        prompt_boxes: "all" boxes prompt the segmenter, or, as MedVol-R1 trains, only those "matched" one-to-one to a
            true box on the named slice that they touch.
        slice_masks: For each prediction the mask (H, W) bool on its named slice that is propagated in place of the
            boxes; None for one that has none.
        progress: See `VolumePropagator`.

    Returns:
        Predictions in order. An answer that names no slice of the volume, or has no box that prompts, gets an empty
        mask.

    Raises:
        SegRLError: An unknown `prompt_boxes`, or "matched" without targets.

    Example:
        >>> from segrl.predictions import Frame, parse_completion
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter, VolumePropagator
        >>> small = Sam2Config(image_size=64)
        >>> said = parse_completion("nothing", Frame("original_px", (8, 8)), answer_format="json")
        >>> propagator = VolumePropagator(Sam2Segmenter(small))
        >>> (answer,) = add_volume_masks(propagator, [said], [np.zeros((3, 8, 8), np.uint8)], [""])
        >>> answer.mask.shape, answer.mask.any(), propagator.encoded_slices
        ((3, 8, 8), np.False_, 0)
    """
    if prompt_boxes not in get_args(PromptBoxes):
        raise unknown_name("prompt_boxes", prompt_boxes, get_args(PromptBoxes))
    if prompt_boxes == "matched" and targets is None:
        raise SegRLError("prompt_boxes='matched' needs the true boxes; pass targets, or prompt_boxes='all'")
    requests, rows = [], []
    masks = [np.zeros(volume.shape, dtype=bool) for volume in volumes]  # untouched zeros take no memory
    for row, (prediction, volume, key) in enumerate(zip(predictions, volumes, keys, strict=True)):
        index, boxes = prediction.slice_index, prediction.boxes
        if index is None or not 0 <= index < len(volume):
            continue
        if slice_masks is not None:
            start = slice_masks[row]
            if start is not None and start.any():
                requests.append(PropagationRequest(volume, key, index, mask=start))
                rows.append(row)
            continue
        if prompt_boxes == "matched" and targets is not None:
            boxes = boxes[match_boxes(boxes, targets[row].at(index).boxes).pred_index]
        if len(boxes):
            requests.append(PropagationRequest(volume, key, index, boxes))
            rows.append(row)
    for row, mask in zip(rows, propagator(requests, progress=progress), strict=True):
        masks[row] = mask
    return [prediction.with_mask(mask) for prediction, mask in zip(predictions, masks, strict=True)]
