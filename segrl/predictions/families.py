"""Chat models that write boxes without training: how each family is asked, and the frame of its boxes, with sources."""

from __future__ import annotations

from dataclasses import dataclass

from segrl.errors import FrameError
from segrl.predictions.frames import FrameKind
from segrl.predictions.prompt_settings import ImagePromptSettings

__all__ = ["FAMILIES", "ChatFamily", "zero_shot_settings"]

_JSON = 'Report the bounding box of each one in JSON, [{"bbox_2d": [x1, y1, x2, y2], "label": "name"}].'
_BOX_TAGS = "Answer with the bounding box of each one, <box>[[x1, y1, x2, y2]]</box>."
_BRACKETS = "Answer with the bounding box of each one, [[x1, y1, x2, y2]]."


@dataclass(frozen=True)
class ChatFamily:
    """Models that share a notation of boxes.

    Attributes:
        frame_kind: Of the boxes that they write.
        instruction: Follows every question.
        source: Where the makers say so.
        models: Names on the hub; those of CORE-Seg's Table 1 among them.

    Example:
        >>> FAMILIES["qwen2_5_vl"].frame_kind, FAMILIES["qwen3_vl"].frame_kind
        ('resized_px', 'relative_1000')
    """

    frame_kind: FrameKind
    instruction: str
    source: str
    models: tuple[str, ...]


# by `model_type` of config.json
FAMILIES: dict[str, ChatFamily] = {
    "qwen2_vl": ChatFamily("relative_1000", _JSON, "arXiv:2409.12191, section 2.2", ("Qwen/Qwen2-VL-7B-Instruct",)),
    "qwen2_5_vl": ChatFamily(
        "resized_px",
        _JSON,
        "arXiv:2502.13923, section 2.2: absolute coordinates of the image as it is fed to the model",
        (
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "Qwen/Qwen2.5-VL-72B-Instruct",
            "lingshu-medical-mllm/Lingshu-7B",
            "Ricky06662/Seg-Zero-7B",
            "omlab/VLM-R1-Qwen2.5VL-3B-REC-500steps",
            "FreedomIntelligence/HuatuoGPT-Vision-7B-Qwen2.5VL",
        ),
    ),
    "qwen3_vl": ChatFamily(
        "relative_1000",
        _JSON,
        "github.com/QwenLM/Qwen3-VL, issue 1741, which cites the cookbook on 2D grounding: 0 to 1000",
        ("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    ),
    "internvl": ChatFamily(
        "relative_1000",
        _BOX_TAGS,
        "internvl.readthedocs.io, chat data format, grounding: integers from 0 to 1000",
        ("OpenGVLab/InternVL3-8B-hf",),
    ),
    "glm4v": ChatFamily(
        "relative_1000",
        _BRACKETS,
        "github.com/zai-org/GLM-V, skills/glmv-grounding: round(x / width * 1000)",
        ("zai-org/GLM-4.1V-9B-Thinking",),
    ),
}


def zero_shot_settings(model_type: str, frame_kind: FrameKind | None = None) -> ImagePromptSettings:
    """Return how a chat model is asked that was not trained by segrl: no token, tags and reasoning if it likes.

    Args:
        model_type: Of its `config.json`, such as "qwen2_5_vl".
        frame_kind: Frame of its boxes, in place of the family's.

    Raises:
        FrameError: The family is not known, and no frame is given.

    Example:
        >>> zero_shot_settings("qwen2_5_vl").frame_kind, zero_shot_settings("llava", "original_px").frame_kind
        ('resized_px', 'original_px')
        >>> zero_shot_settings("llava")
        Traceback (most recent call last):
        segrl.errors.FrameError: model_type 'llava': the frame of its boxes is not known; pass frame_kind, ...
    """
    family = FAMILIES.get(model_type)
    if family is None and frame_kind is None:
        raise FrameError(
            f"model_type {model_type!r}: the frame of its boxes is not known; pass frame_kind, one of original_px, "
            f"resized_px and relative_1000 (known: {', '.join(FAMILIES)})"
        )
    return ImagePromptSettings(
        instruction=_JSON if family is None else family.instruction,
        reasoning=False,
        frame_kind=frame_kind or (None if family is None else family.frame_kind),
        seg_token="",
        answer_tags=False,
    )
