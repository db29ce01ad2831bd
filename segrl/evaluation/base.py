"""The loop and the record that evaluations of images and of volumes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from rich.progress import track

from segrl.data.read_ahead import read_ahead
from segrl.data.row_texts import texts_of_rows
from segrl.errors import DataError, SegRLError
from segrl.geometry.masks import mask_to_rle
from segrl.metrics.overlap import overlaps
from segrl.metrics.registry import Metric, make_metric
from segrl.predictions.prediction import Prediction
from segrl.predictions.reserved_text import check_reserved
from segrl.predictions.target import METADATA_COLUMNS, Target, VolumeTarget

__all__ = ["OnAnswer", "check_questions", "counted_masks", "overlap_record", "score_rows"]

_RECORD_KEYS = {
    *(*METADATA_COLUMNS, "dice", "iou", "fail", "status", "text", "boxes"),
    *("predicted_mask", "target_mask", "ignored_mask", "spacing_mm", "confidence"),
}
OnAnswer = Callable[[int, Any, Prediction, Any], None]
"""Called for every row with its number, what was shown (image or grey values), the prediction and the target."""

Shown = TypeVar("Shown")
AnyTarget = TypeVar("AnyTarget", Target, VolumeTarget)


def check_questions(dataset: Dataset, segmenter: Any) -> None:
    """Refuse, before the first answer, rows whose question holds a token with a meaning for the segmenter's processor.

    Raises:
        DataError: Names the first of these rows.
    """
    processor = getattr(segmenter, "processor", None)
    if processor is not None:  # anything with `predict_batch` can be evaluated
        asked = texts_of_rows(dataset, ("query",))
        check_reserved(asked, processor, seg_token=segmenter.settings.seg_token)


def score_rows(
    rows: Dataset | Sequence[Mapping[str, Any]],
    read: Callable[[dict[str, Any]], tuple[Any, Any]],
    answer: Callable[[list[tuple[Any, Any]]], Sequence[Prediction]],
    record: Callable[[Prediction, Any], dict[str, Any]],
    *,
    title: str,
    batch_size: int,
    progress: bool,
    on_answer: OnAnswer | None,
    ahead: bool = False,
) -> list[dict[str, Any]]:
    """Return a record of every row, in order.

    Args:
        rows: The rows, by number; each is read once, in order.
        read: A row to what is shown and its target.
        answer: What was read of a batch to its predictions.
        record: A prediction and its target to a record.
        title: Of the progress bar.
        batch_size: Rows read and answered together.
        progress: Whether the bar is shown.
        on_answer: Sees every answer.
        ahead: Read the next batch in a thread while one is answered; two are in memory then.

    Raises:
        DataError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: expected 1 or more rows per generation")
    records: list[dict[str, Any]] = []
    starts = range(0, len(rows), batch_size)

    def read_batch(start: int) -> list[tuple[Any, Any]]:
        return [read(dict(rows[n])) for n in range(start, min(start + batch_size, len(rows)))]

    batches = read_ahead(read_batch, starts) if ahead else map(read_batch, starts)
    for batch in track(batches, title, len(starts), disable=not progress):
        for prediction, (shown, target) in zip(answer(batch), batch, strict=True):
            if on_answer is not None:
                on_answer(len(records), shown, prediction, target)
            records.append(record(prediction, target))
    return records


def overlap_record(
    prediction: Prediction, target: Target | VolumeTarget, metrics: Sequence[str | Metric] = ()
) -> dict[str, Any]:
    """Score one answer; plain Python values, ready for JSON.

    A prediction without a mask counts as an empty one, so that an answer which names nothing is right where there is
    nothing.

    Args:
        prediction: Its mask is compared with the ground truth.
        target: Ground truth and texts.
        metrics: More metrics (`segrl.metrics.register_metric`), whose values are added under their names.

    Returns:
        - "query", "modality", "anatomy", "lesion", "name" of the target,
        - "dice", "iou": in [0, 1]; both masks empty 1.0, exactly one empty 0.0,
        - "fail": `segrl.metrics.failure`, Dice is 0 or the text is invalid (CORE-Seg),
        - "confidence": `segrl.inference.Confidence.to_dict`, where the answer has one,
        - "boxes" (original pixels), "status", "text" of the prediction, and the values of `metrics`,
        - "predicted_mask", None without one, "target_mask" and, where some pixels or voxels are ignored,
        "ignored_mask", as compressed run lengths (`segrl.geometry.mask_to_rle`). What is ignored counts in no score of
        the record but `metrics`.

    Raises:
        DataError: The mask has another shape than the ground truth; names the row.

    Example:
        >>> from segrl.predictions import Frame, Target, parse_completion
        >>> text = "<think>a</think><answer>The cyst is located at [0, 0, 2, 2].<seg></answer>"
        >>> prediction = parse_completion(text, Frame("original_px", (4, 4))).with_mask(np.eye(4, dtype=bool))
        >>> record = overlap_record(prediction, Target.from_mask(np.ones((4, 4), dtype=bool), lesion="cyst"))
        >>> record["dice"], record["iou"], record["fail"], record["boxes"], record["lesion"]
        (0.4, 0.25, False, [[0.0, 0.0, 2.0, 2.0]], 'cyst')
    """
    if prediction.mask is not None and prediction.mask.shape != target.mask.shape:
        raise DataError(
            f"{target.name or 'row'}: the predicted mask has shape {prediction.mask.shape}, the true one "
            f"{target.mask.shape}; put the prediction on the grid of the image or scan"
        )
    score, overlap = overlaps(*counted_masks(prediction, target))
    return {
        **target.to_dict(),
        "dice": score,
        "iou": overlap,
        "fail": not prediction.valid or score == 0.0,
        "status": str(prediction.status.value),
        "text": prediction.text,
        "boxes": prediction.boxes.tolist(),
        **_masks(prediction, target),
        **_confidence(prediction),
        **{name: metric(prediction, target) for name, metric in _named(metrics).items()},
    }


def counted_masks(prediction: Prediction, target: Target | VolumeTarget) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted mask, empty where there is none, and the true one, both without what is ignored."""
    mask = np.zeros_like(target.mask) if prediction.mask is None else prediction.mask
    if target.ignored is None:
        return mask, target.mask
    return mask & ~target.ignored, target.mask & ~target.ignored


def _masks(prediction: Prediction, target: Target | VolumeTarget) -> dict[str, Any]:
    """Both masks, so that records can be drawn and scored again."""
    found = None if prediction.mask is None else mask_to_rle(prediction.mask, compressed=True)
    ignored = {} if target.ignored is None else {"ignored_mask": mask_to_rle(target.ignored, compressed=True)}
    return {"predicted_mask": found, "target_mask": mask_to_rle(target.mask, compressed=True), **ignored}


def _confidence(prediction: Prediction) -> dict[str, Any]:
    """The certainty of an answer of inference, where it was asked for."""
    sure = getattr(prediction, "confidence", None)
    return {} if sure is None else {"confidence": sure.to_dict()}


def _named(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    made = {metric if isinstance(metric, str) else metric.__name__: make_metric(metric) for metric in metrics}
    if clash := sorted(made.keys() & _RECORD_KEYS):
        raise SegRLError(f"metrics {clash}: these names are taken by the record itself; leave them out")
    return made
