"""A trained model, asked about an image or a volume."""

from __future__ import annotations

import os
from typing import Any

from segrl.errors import CheckpointError
from segrl.inference.base import SegmenterBase, find_run
from segrl.inference.confidence import Confidence, combine_answers
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.result import InferenceResult
from segrl.inference.volumes import VolumeSegmenter
from segrl.predictions.prompt_settings import SETTINGS_FILE, load_prompt_settings

__all__ = [
    "Confidence",
    "InferenceResult",
    "ReasoningSegmenter",
    "SegmenterBase",
    "VolumeSegmenter",
    "combine_answers",
    "load",
]


def load(name: str | os.PathLike, **kwargs: Any) -> ReasoningSegmenter | VolumeSegmenter:
    """Load a run of either task: `segrl.json` says which segmenter it needs.

    Args:
        name: The run's output directory, one of its checkpoints, or a hub repository `owner/name`.
        kwargs: See `ReasoningSegmenter.from_pretrained` and `VolumeSegmenter.from_pretrained`.

    Raises:
        CheckpointError: There is no run, or its files do not fit together.

    Example:
        >>> from segrl.models import tiny_qwen3_vl
        >>> VolumeSegmenter(*tiny_qwen3_vl()).save_pretrained("run")
        >>> type(load("run", device="cpu")).__name__
        'VolumeSegmenter'
    """
    path = find_run(name)
    settings = load_prompt_settings(path)
    if settings is None:
        raise CheckpointError(f"{str(name)!r}: no {SETTINGS_FILE}; expected the output directory of a run")
    kinds = {kind.settings_class.task: kind for kind in (ReasoningSegmenter, VolumeSegmenter)}
    return kinds[settings.task].from_pretrained(path, **kwargs)
