"""Promptable segmenters: an image is encoded once, any number of prompts are decoded against its features."""

from segrl.segmenters.base import ImageFeatures, Segmenter
from segrl.segmenters.box_segmenter import BoxSegmenter
from segrl.segmenters.pretraining import pretrain_segmenter
from segrl.segmenters.propagated_masks import add_volume_masks
from segrl.segmenters.propagation import PropagationRequest, VolumePropagator
from segrl.segmenters.registry import register_segmenter
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, Sam2Config, Sam2Segmenter, sam2_config
from segrl.segmenters.stored import load_segmenter, save_segmenter
from segrl.segmenters.tracking import FrameMasks, track_clip, tracking_loss
from segrl.segmenters.transformers_sam import Sam2TransformersSegmenter, Sam3TrackerSegmenter, SamSegmenter

__all__ = [
    "SEGMENTER_CONFIG",
    "BoxSegmenter",
    "FrameMasks",
    "ImageFeatures",
    "PropagationRequest",
    "Sam2Config",
    "Sam2Segmenter",
    "Sam2TransformersSegmenter",
    "Sam3TrackerSegmenter",
    "SamSegmenter",
    "Segmenter",
    "VolumePropagator",
    "add_volume_masks",
    "load_segmenter",
    "pretrain_segmenter",
    "register_segmenter",
    "sam2_config",
    "save_segmenter",
    "track_clip",
    "tracking_loss",
]
