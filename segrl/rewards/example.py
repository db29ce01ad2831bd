"""One made-up answer and its ground truth, on which a reward is tried before it is used."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np

from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.records import read_answer
from segrl.predictions.target import Target, VolumeTarget

__all__ = ["example_pair"]

_HEIGHT, _WIDTH, _DEPTH = 24, 32, 4
_BOX, _POINT = [4, 4, 16, 14], [9, 8]  # original pixels


@cache
def example_pair(volume: bool, completion_format: CompletionFormat) -> tuple[Prediction, Target | VolumeTarget]:
    """Return a right answer with its mask, and the ground truth: one lesion in an image, or on two of four slices.

    Args:
        volume: Whether the ground truth is a `VolumeTarget`.
        completion_format: How the answer is written.

    Example:
        >>> prediction, target = example_pair(False, CompletionFormat())
        >>> prediction.valid, prediction.boxes.tolist() == target.boxes.tolist()
        (True, True)
    """
    lesion = np.zeros((_HEIGHT, _WIDTH), dtype=bool)
    lesion[_BOX[1] : _BOX[3], _BOX[0] : _BOX[2]] = True
    texts: dict[str, Any] = {"name": "example", "query": "Where is the lesion?", "lesion": "lesion"}
    target: Target | VolumeTarget
    if volume:
        mask = np.zeros((_DEPTH, _HEIGHT, _WIDTH), dtype=bool)
        mask[1:3] = lesion
        target = VolumeTarget.from_mask(mask, **texts)
        said = json.dumps({"slice": 2, "bbox_2d_list": [_BOX]})
    else:
        mask = lesion
        target = Target.from_mask(mask, **texts)
        said = f"The lesion is located at {_BOX}."
        if completion_format.answer_format == "json":
            said = json.dumps([{"bbox_2d": _BOX, "point_2d": _POINT, "score": 0.9}])
    token = completion_format.seg_token if completion_format.require_seg else ""
    text = f"<think>A dark spot.</think><answer>{said}{token}</answer>"
    frame = Frame("original_px", (_WIDTH, _HEIGHT))
    return read_answer(text, completion_format, target, frame=frame, mask=mask, probability=mask * 1.0), target
