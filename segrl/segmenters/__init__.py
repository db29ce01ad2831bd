"""Promptable segmenters: an image is encoded once, any number of prompts are decoded against its features."""

from segrl.segmenters.base import ImageFeatures, Segmenter
from segrl.segmenters.sam2 import Sam2Config, Sam2Segmenter

__all__ = ["ImageFeatures", "Sam2Config", "Sam2Segmenter", "Segmenter"]
