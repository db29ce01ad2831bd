"""A trained model, asked about an image or a volume."""

from segrl.inference.base import SETTINGS, SegmenterBase, save_settings
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.volumes import VolumeSegmenter

__all__ = ["SETTINGS", "ReasoningSegmenter", "SegmenterBase", "VolumeSegmenter", "save_settings"]
