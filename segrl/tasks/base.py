"""The task protocol: what a trainer, inference and evaluation need to know about images or volumes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from segrl.errors import DataError
from segrl.heads.decoding import Completions
from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import SegInput
from segrl.metrics.overlap import dice, failure
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import PromptSettings
from segrl.predictions.target import Target, VolumeTarget
from segrl.rewards.reward import Reward

__all__ = ["Task", "TaskRow", "check_columns", "rollout_metrics"]


class TaskRow(Protocol):
    """One data set row, read."""

    @property
    def target(self) -> Target | VolumeTarget | None:
        """The ground truth; None in inference."""
        ...

    @property
    def frame(self) -> Frame:
        """Of the boxes (and slice numbers) that the model writes."""
        ...


class Task(Protocol):
    """The differences between images and volumes; implemented by `ImageTask` and `VolumeTask`.

    Attributes:
        settings: How the model is asked and how its answers are read.
        head: The mask head that decodes masks from the states of answers, if there is one.
        columns: Data set columns that `read` looks at, and that a trainer must not drop.
        needed: Columns that a data set must have; `image` may be the first of `images`.
    """

    head: MaskHead | None

    @property
    def settings(self) -> PromptSettings: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def needed(self) -> tuple[str, ...]: ...

    @property
    def makes_masks(self) -> bool:
        """Whether `add_masks` gives predictions a mask."""
        ...

    def check(self, rewards: Sequence[Reward], tokenizer: Any) -> None:
        """Refuse rewards that read what this task does not make, and a head whose token is not the tokenizer's."""
        ...

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Read rows of a batch, in order; repeated rows (the G samples of a group) share one result."""
        ...

    def seg_inputs(self, rows: Sequence[Any], predictions: Sequence[Prediction] | None = None) -> list[SegInput | None]:
        """Return the segmenter's input and dense target of each answer; None where there is nothing to see.

        Args:
            rows: From `read`.
            predictions: The answers; None for reference answers (supervised fine-tuning).
        """
        ...

    def add_masks(
        self,
        predictions: Sequence[Prediction],
        rows: Sequence[Any],
        completions: Completions | None,
        inputs: Sequence[SegInput | None],
        *,
        probabilities: bool = False,
    ) -> list[Prediction]:
        """Predictions with their masks in original pixels.

        Args:
            predictions: Parsed answers.
            rows: What each answer is about.
            completions: Tokens and states of the answers, for a head.
            inputs: From `seg_inputs`.
            probabilities: Whether predictions also carry the foreground probabilities of their masks.
        """
        ...

    def view(self, given: Mapping[str, Any], row: Any) -> tuple[Image.Image | None, int | None]:
        """Return a picture of what a row asks about, and of a volume the index of the slice that it shows.

        Args:
            given: The row of the data set.
            row: The same, from `read`.
        """
        ...

    def log(self) -> dict[str, float]:
        """Counts since the last call, for the trainer's log; empty where there are none."""
        ...


def rollout_metrics(
    predictions: Sequence[Prediction], targets: Sequence[Target | VolumeTarget], *, masks: bool
) -> dict[str, list[float]]:
    """Compute what a trainer logs of a batch of answers, for images and volumes alike.

    Args:
        predictions: The answers.
        targets: Their ground truth.
        masks: Whether answers have masks; one without counts as empty.

    Returns:
        One number per answer: "valid", and with masks "dice" and "fail" (`segrl.metrics.failure`).

    Example:
        >>> from segrl.predictions import Frame, Target, parse_completion
        >>> answer = parse_completion("no answer", Frame("original_px", (4, 4)))
        >>> rollout_metrics([answer], [Target.from_mask(np.eye(4, dtype=bool))], masks=True)
        {'valid': [0.0], 'dice': [0.0], 'fail': [1.0]}
    """
    found = {"valid": [float(prediction.valid) for prediction in predictions]}
    if masks:
        pairs = list(zip(predictions, targets, strict=True))
        found["dice"] = [dice(p.mask if p.mask is not None else np.zeros_like(t.mask), t.mask) for p, t in pairs]
        found["fail"] = [float(failure(p.mask, t.mask, p.valid)) for p, t in pairs]
    return found


def check_columns(datasets: Mapping[str, Any], needed: Collection[str]) -> None:
    """Check before training that every data set has the columns that masks need; a stream may not know its columns.

    Args:
        datasets: `{"train_dataset": ..., "eval_dataset": ...}`; a value may be None or a dict of data sets.
        needed: Column names; `images` counts as `image`.

    Raises:
        DataError: A column is missing; names the data set and the columns that it has.

    Example:
        >>> from datasets import Dataset
        >>> check_columns({"train_dataset": Dataset.from_dict({"images": [1], "mask": [2]})}, ("image", "mask"))
        >>> check_columns({"train_dataset": Dataset.from_dict({"images": [1]})}, ("image", "mask"))
        Traceback (most recent call last):
        segrl.errors.DataError: train_dataset: no column ['mask'] (it has ['images']); masks and their rewards need ...
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            check_columns({f"{name}[{key!r}]": value for key, value in dataset.items()}, needed)
            continue
        columns = getattr(dataset, "column_names", None)
        if not columns:
            continue
        have = set(columns) | ({"image"} if "images" in columns else set())
        missing = sorted(set(needed) - have)
        if missing:
            raise DataError(
                f"{name}: no column {missing} (it has {sorted(columns)}); masks and their rewards need {sorted(needed)}"
            )
