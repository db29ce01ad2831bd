"""Metrics by name: `register_metric`, and the entry points of installed packages.

A metric is a function `fn(prediction, target) -> float | None` of a `Prediction` and its `Target` or `VolumeTarget`;
None where it does not apply. A prediction without a mask counts as an empty one, as in `segrl.evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from segrl.metrics import overlap, structure, surfaces
from segrl.registry import Registry

__all__ = ["METRICS", "Metric", "make_metric", "register_metric"]

Metric = Callable[[Any, Any], float | None]
Item = TypeVar("Item", bound=Callable[..., Any])

METRICS = Registry("metric", "segrl.metrics", preload=("segrl.heads",))


def register_metric(name: str) -> Callable[[Item], Item]:
    """Register a function `fn(prediction, target) -> float | None` under a name for `make_metric`.

    Raises:
        SegRLError: The name is taken, or it cannot be called.

    Example:
        >>> @register_metric("boxes_written")
        ... def boxes_written(prediction, target):
        ...     return float(len(prediction.boxes))
        >>> make_metric("boxes_written") is boxes_written
        True
    """
    return METRICS.register(name)


def make_metric(metric: str | Metric) -> Metric:
    """Return the metric that a name or "module:function" stands for; a function is returned as it is.

    Raises:
        UnknownNameError: No such metric; the closest name is suggested.

    Example:
        >>> from segrl.predictions import Frame, Target, parse_completion
        >>> true = np.array([[True, True, False]])
        >>> answer = parse_completion("", Frame("original_px", (3, 1), None)).with_mask(np.array([[False, True, True]]))
        >>> make_metric("dice")(answer, Target.from_mask(true))
        0.5
    """
    return METRICS.get(metric) if isinstance(metric, str) else metric


@register_metric("dice")
def _dice(prediction: Any, target: Any) -> float:
    """Dice coefficient of the masks, in [0, 1]; both empty 1.0."""
    return overlap.dice(_mask(prediction, target), target.mask)


@register_metric("iou")
def _iou(prediction: Any, target: Any) -> float:
    """Intersection over union of the masks, in [0, 1]; both empty 1.0."""
    return overlap.iou(_mask(prediction, target), target.mask)


@register_metric("boundary_iou")
def _boundary_iou(prediction: Any, target: Any) -> float:
    """Intersection over union of the masks' rims, in [0, 1]; both empty 1.0."""
    return surfaces.boundary_iou(_mask(prediction, target), target.mask)


@register_metric("s_measure")
def _s_measure(prediction: Any, target: Any) -> float | None:
    """Structural similarity of the masks of an image, in [0, 1]; does not apply to volumes."""
    return None if target.mask.ndim > 2 else structure.s_measure(_mask(prediction, target), target.mask)


@register_metric("hd95")
def _hd95(prediction: Any, target: Any) -> float | None:
    """95th percentile of the surface distances, pixels of an image, mm of a volume; one empty or no spacing: None."""
    spacing = getattr(target, "spacing_mm", None)
    if spacing is None and target.mask.ndim > 2:
        return None
    distance = surfaces.hausdorff(_mask(prediction, target), target.mask, 95.0, spacing)
    return distance if math.isfinite(distance) else None


def _mask(prediction: Any, target: Any) -> np.ndarray:
    return np.zeros_like(target.mask) if prediction.mask is None else prediction.mask
