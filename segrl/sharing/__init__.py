"""A prompt that G completions share is computed once: packed rows for scoring, one prefill for generation."""

from segrl.caching.content import ImageKeys
from segrl.models.backbone import backbone_of
from segrl.sharing.generation import prefill_once
from segrl.sharing.images import images_of, preprocess_once
from segrl.sharing.packing import IMAGE_INPUTS, Packed, PromptKey, pack_rows, select_images, select_rows
from segrl.sharing.support import enable_sharing
from segrl.sharing.vision import VisionOnce, install_vision

__all__ = [
    "IMAGE_INPUTS",
    "ImageKeys",
    "Packed",
    "PromptKey",
    "VisionOnce",
    "backbone_of",
    "enable_sharing",
    "images_of",
    "install_vision",
    "pack_rows",
    "prefill_once",
    "preprocess_once",
    "select_images",
    "select_rows",
]
