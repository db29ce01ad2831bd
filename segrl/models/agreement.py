"""Settings that a model and its processor both have, compared before anything runs.

Where they differ, the model ends in an error of transformers in the first step, or reads other patches than were cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from segrl.errors import SegRLError
from segrl.models.backbone import base_instance

__all__ = ["check_call_settings", "check_processor"]

_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def check_processor(model: Any, processor: Any) -> None:
    """Refuse a processor that was not made for the model.

    Args:
        model: Any transformers model, or one wrapped by PEFT.
        processor: Its processor; what it does not say is not compared, so a tokenizer always passes.

    Raises:
        SegRLError: An id of a placeholder token, or a size of the patches, differs; names each with both values.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> model, processor = tiny_qwen2_5_vl(layers=1, vision_layers=1)
        >>> check_processor(model, processor)
        >>> processor.image_processor.merge_size = 4
        >>> check_processor(model, processor)
        Traceback (most recent call last):
        segrl.errors.SegRLError: Qwen2_5_VLProcessor does not fit Qwen2_5_VLForConditionalGeneration: merge_size=4, ...
    """
    model = base_instance(model)
    different = [
        f"{name}={ours}, the model's is {theirs}"
        for name, ours, theirs in _pairs(model.config, processor)
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs
    ]
    if different:
        raise SegRLError(
            f"{type(processor).__name__} does not fit {type(model).__name__}: {'; '.join(different)}; expected equal "
            "values: use the processor that comes with the model, and leave these settings of it alone"
        )


def check_call_settings(settings: Mapping[str, Any] | None, processor: Any, name: str) -> None:
    """Refuse settings of images that are given for single calls, past the processor.

    Frames of boxes are read off the processor, and inference knows nothing of a trainer's arguments.

    Args:
        settings: What every call gets, such as TRL's `chat_template_kwargs`; None for nothing.
        processor: The model's processor.
        name: The argument, for the error.

    Raises:
        SegRLError: One of them changes how images are read.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> _, processor = tiny_qwen2_5_vl(layers=1, vision_layers=1)
        >>> check_call_settings({"enable_thinking": False}, processor, "chat_template_kwargs")
        >>> check_call_settings({"max_pixels": 200_000}, processor, "chat_template_kwargs")
        Traceback (most recent call last):
        segrl.errors.SegRLError: chat_template_kwargs: ['max_pixels'] change how single calls read images, ...
    """
    images = getattr(processor, "image_processor", None)
    kinds = getattr(images, "valid_kwargs", None)
    known = {*getattr(kinds, "__annotations__", ()), "images_kwargs", "videos_kwargs", "processor_kwargs"}
    given = sorted(known & set(settings or ())) if images is not None else []
    if given:
        raise SegRLError(
            f"{name}: {given} change how single calls read images, expected settings of the chat template only; set "
            "them on processor.image_processor, or load with load_vlm(..., processor_kwargs=...)"
        )


def _pairs(config: Any, processor: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value of the processor and value of the model of every setting that both have."""
    for name in _TOKENS:
        theirs = getattr(config, name, None)
        if theirs is None and name == "image_token_id":
            theirs = getattr(config, "image_token_index", None)
        ours = getattr(processor, name, None)
        if name == "image_token_id" and theirs in (getattr(processor, "image_token_ids", None) or ()):
            ours = theirs  # Gemma 3's processor calls the token that begins an image by this name
        yield name, ours, theirs
    images, vision = getattr(processor, "image_processor", None), getattr(config, "vision_config", None)
    if getattr(vision, "spatial_merge_size", None) is None or getattr(images, "merge_size", None) is None:
        return  # other families call other things by these names
    for name, theirs in _PATCHES.items():
        yield name, getattr(images, name, None), getattr(vision, theirs, None)
