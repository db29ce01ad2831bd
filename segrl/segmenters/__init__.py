"""Promptable segmenters: an image is encoded once, any number of prompts are decoded against its features."""

from segrl.segmenters.base import ImageFeatures, Segmenter
from segrl.segmenters.propagation import PropagationRequest, VolumePropagator
from segrl.segmenters.sam2 import Sam2Config, Sam2Segmenter
from segrl.segmenters.tracking import FrameMasks, track_clip, tracking_loss

__all__ = [
    "FrameMasks",
    "ImageFeatures",
    "PropagationRequest",
    "Sam2Config",
    "Sam2Segmenter",
    "Segmenter",
    "VolumePropagator",
    "track_clip",
    "tracking_loss",
]
