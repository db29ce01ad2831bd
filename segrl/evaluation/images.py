"""Evaluation on a data set of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from segrl.data.images.prompts import FULL_IMAGE
from segrl.evaluation.base import OnAnswer, check_questions, overlap_record, score_rows
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import binarize
from segrl.inference.images import ReasoningSegmenter
from segrl.metrics.registry import Metric
from segrl.predictions.target import Target

__all__ = ["evaluate", "read_image_target", "whole_image"]


def evaluate(
    segmenter: ReasoningSegmenter,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
) -> list[dict[str, Any]]:
    """Ask the model about every row, greedily.

    Args:
        segmenter: The model.
        dataset: Columns image, mask, query, and modality, anatomy, lesion, name where known.
        batch_size: Rows per generation.
        metrics: More metrics for the records, see `segrl.metrics.register_metric`.
        progress: Show a progress bar.
        on_answer: Called for every row with its number, the image, the prediction and the target; to draw or keep what
            the records do not hold.

    Returns:
        One record per row for `segrl.metrics.summarise`, in order: dice and iou in [0, 1] at the mask's own size, fail,
        the row's texts, the model's text, status and boxes.

    Raises:
        DataError: `batch_size` is below 1, a question holds a token with a meaning for the processor, or a mask is not
            binary.

    Example:
        >>> from segrl.data import make_synthetic
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.predictions import ImagePromptSettings
        >>> segmenter = ReasoningSegmenter(*tiny_qwen2_5_vl(), ImagePromptSettings(max_new_tokens=2))
        >>> records = evaluate(segmenter, make_synthetic(2, size=56), progress=False)
        >>> [(record["fail"], record["dice"]) for record in records]  # two random tokens are no valid answer
        [(True, 0.0), (True, 0.0)]
    """

    check_questions(dataset, segmenter)

    def answer(batch: list[tuple[Any, Target]]) -> Any:
        images, targets = [image for image, _ in batch], [target for _, target in batch]
        sizes = [(target.width, target.height) for target in targets]
        return segmenter.predict_batch(images, [target.query for target in targets], sizes=sizes)

    return score_rows(
        dataset,
        lambda row: (whole_image(row), read_image_target(row)),
        answer,
        partial(overlap_record, metrics=metrics),
        title="evaluate",
        batch_size=batch_size,
        progress=progress,
        on_answer=on_answer,
    )


def whole_image(row: dict[str, Any]) -> Any:
    """The image; of a row of `prepare` the original, since the model is shown it as small as in training anyway."""
    full = row.get(FULL_IMAGE)
    return row["image"] if full is None else read_image(full, f"{row.get('name') or 'row'}: {FULL_IMAGE}")


def read_image_target(row: dict[str, Any]) -> Target:
    """The ground truth of a row with the column `mask`.

    Raises:
        DataError: The mask is not binary; names the row.
    """
    texts = Target.texts_of(row)
    return Target.from_mask(binarize(row["mask"], texts["name"] or "row"), **texts)
