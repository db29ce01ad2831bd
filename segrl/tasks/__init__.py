"""Tasks: images or volumes. Trainers, inference and evaluation ask a task, and branch on neither."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from segrl.errors import SegRLError
from segrl.heads.mask_head import MaskHead
from segrl.predictions.prompt_settings import ImagePromptSettings, PromptSettings, VolumePromptSettings
from segrl.rewards.reward import Reward
from segrl.segmenters.box_segmenter import BoxSegmenter
from segrl.segmenters.propagation import VolumePropagator
from segrl.tasks.base import Task, check_columns, rollout_metrics
from segrl.tasks.images import ImageTask
from segrl.tasks.volumes import VolumeTask

__all__ = ["ImageTask", "Task", "VolumeTask", "check_columns", "make_task", "rollout_metrics"]


def make_task(
    processor: Any,
    settings: PromptSettings | None = None,
    *,
    head: MaskHead | None = None,
    propagator: VolumePropagator | None = None,
    box_segmenter: BoxSegmenter | None = None,
    rewards: Sequence[Reward] = (),
    columns: Collection[str] = (),
    **volume_settings: Any,
) -> Task:
    """Return the task that settings, propagator, rewards or data ask for: volumes if one of them is about volumes.

    Args:
        processor: The model's processor.
        settings: How the model is asked; decides if it is given.
        head: The model's mask head.
        propagator: A frozen segmenter for volumes.
        box_segmenter: A frozen segmenter for images.
        rewards: Rewards to train with.
        columns: Columns of the training rows; `scan` and `slices` are those of volumes.
        **volume_settings: More settings of `VolumeTask`.

    Raises:
        SegRLError: The settings are those of images, and the rest is about volumes, or the other way round.

    Example:
        >>> from segrl.rewards import make_reward
        >>> type(make_task(None)).__name__, type(make_task(None, rewards=[make_reward("slice_boxes")])).__name__
        ('ImageTask', 'VolumeTask')
    """
    volumes = propagator is not None or any(reward.volume for reward in rewards) or {"scan", "slices"} <= set(columns)
    if isinstance(settings, ImagePromptSettings) and volumes:
        raise SegRLError(
            "prompt_settings are those of images, but propagator, rewards or rows are about volumes; pass "
            "VolumePromptSettings(...)"
        )
    if isinstance(settings, VolumePromptSettings) or volumes:
        assert settings is None or isinstance(settings, VolumePromptSettings)
        if box_segmenter is not None:
            raise SegRLError("box_segmenter is for images; pass propagator=VolumePropagator(segmenter) for volumes")
        return VolumeTask(processor, settings, head, propagator, **volume_settings)
    assert settings is None or isinstance(settings, ImagePromptSettings)
    return ImageTask(processor, settings, head, box_segmenter)
