"""A trained model, asked about an image or a volume."""

from segrl.inference.base import SegmenterBase
from segrl.inference.confidence import Confidence, combine_answers
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.loading import load, push
from segrl.inference.result import InferenceResult
from segrl.inference.volumes import VolumeSegmenter

__all__ = [
    "Confidence",
    "InferenceResult",
    "ReasoningSegmenter",
    "SegmenterBase",
    "VolumeSegmenter",
    "combine_answers",
    "load",
    "push",
]
