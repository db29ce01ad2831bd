"""Evaluation on a data set: one record per row, and the best constant mask as the floor that any model must beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset
from rich.progress import track

from segrl.errors import DataError
from segrl.geometry.masks import binarize
from segrl.inference.images import ReasoningSegmenter
from segrl.metrics.overlap import dice, failure, iou
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import Target

_GROUPS = ("query", "modality", "anatomy", "lesion", "name")


def evaluate(
    segmenter: ReasoningSegmenter, dataset: Dataset, *, batch_size: int = 16, progress: bool = True
) -> tuple[list[dict[str, Any]], list[Prediction], list[Target]]:
    """Ask the model about every row, greedily.

    Args:
        segmenter: the model.
        dataset: columns image, mask, query, and modality, anatomy, lesion, name where known.
        batch_size: rows per generation.
        progress: show a progress bar.

    Returns:
        Records for `segrl.metrics.summarise` (dice and iou in 0..1 at the mask's own size, fail, the row's texts, the
        model's text), predictions and targets, all in the order of the rows. A prediction without a mask counts as an
        empty one, so that an empty truth without a lesion is met by it; `fail` is Dice = 0 or an invalid format
        (CORE-Seg).

    Raises:
        DataError: `batch_size` is below 1, or a mask is not binary.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: expected 1 or more rows per generation")
    records, predictions, targets = [], [], []
    starts: Iterable[int] = range(0, len(dataset), batch_size)
    for start in track(starts, "evaluate", disable=not progress):
        rows = [dataset[n] for n in range(start, min(start + batch_size, len(dataset)))]
        truths = [_target(row) for row in rows]
        answers = segmenter.predict_batch(
            [row["image"] for row in rows], [row["query"] for row in rows], sizes=[(t.width, t.height) for t in truths]
        )
        for answer, truth in zip(answers, truths, strict=True):
            records.append(_record(answer, truth))
        predictions += answers
        targets += truths
    return records, predictions, targets


def _record(prediction: Prediction, target: Target) -> dict[str, Any]:
    mask = prediction.mask if prediction.mask is not None else np.zeros_like(target.mask)
    return {
        **_texts(target),
        "dice": dice(mask, target.mask),
        "iou": iou(mask, target.mask),
        "fail": failure(prediction.mask, target.mask, prediction.valid),
        "status": str(prediction.status.value),
        "text": prediction.text,
        "boxes": prediction.boxes.tolist(),
    }


def _texts(target: Target) -> dict[str, str]:
    return {name: getattr(target, name) for name in _GROUPS}


def _target(row: Any) -> Target:
    name = str(row.get("name") or "row")
    return Target.from_mask(
        binarize(np.asarray(row["mask"]), name), **{key: str(row.get(key) or "") for key in _GROUPS}
    )


def _without_images(dataset: Dataset) -> Dataset:
    return dataset.remove_columns("image") if "image" in dataset.column_names else dataset
