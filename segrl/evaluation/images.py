"""Evaluation on a data set of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from segrl.data.images.kept import KeptPixels, KeptRows
from segrl.data.images.prompts import FULL_IMAGE
from segrl.evaluation.base import OnAnswer, check_questions, overlap_record, score_rows
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import binarize
from segrl.inference.images import ReasoningSegmenter
from segrl.metrics.registry import Metric
from segrl.predictions.prediction import Prediction, Status
from segrl.predictions.target import Target
from segrl.segmenters.box_segmenter import BoxSegmenter

__all__ = ["evaluate", "evaluate_true_boxes", "read_image_target", "whole_image"]


def evaluate(
    segmenter: ReasoningSegmenter,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
    kept: KeptPixels | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Ask the model about every row, greedily unless the settings say otherwise.

    Args:
        segmenter: The model.
        dataset: Columns image, mask, query, and modality, anatomy, lesion, name where known.
        batch_size: Rows per generation.
        metrics: More metrics for the records, see `segrl.metrics.register_metric`.
        progress: Show a progress bar.
        on_answer: Called for every row with its number, the image, the prediction and the target; to draw or keep what
            the records do not hold.
        kept: Pixels that `segrl.data.load_folder` read of these rows, or of more that begin with them; None reads their
            files.
        settings: To `ReasoningSegmenter.predict_batch`, such as `samples=8, seed=0`.

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
        return segmenter.predict_batch(images, [target.query for target in targets], sizes=sizes, **settings)

    return score_rows(
        dataset if kept is None else KeptRows(dataset, kept),
        lambda row: (whole_image(row), read_image_target(row)),
        answer,
        partial(overlap_record, metrics=metrics),
        title="evaluate",
        batch_size=batch_size,
        progress=progress,
        on_answer=on_answer,
        ahead=True,
    )


def evaluate_true_boxes(
    box_segmenter: BoxSegmenter,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
) -> list[dict[str, Any]]:
    """Score what a frozen segmenter makes of the true boxes, the ceiling of a cascade; `evaluate_oracle_boxes` in 3D.

    Args:
        box_segmenter: Prompted with the box of each component, and with a point in it if it takes points.
        dataset: As in `evaluate`.
        batch_size: Rows at a time.
        metrics: See `evaluate`.
        progress: Show a progress bar.
        on_answer: See `evaluate`.

    Returns:
        One record per row, in order.

    Raises:
        DataError: As `evaluate`.

    Example:
        >>> from segrl.data import make_synthetic
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> boxes = BoxSegmenter(Sam2Segmenter(Sam2Config(image_size=64)))
        >>> (record,) = evaluate_true_boxes(boxes, make_synthetic(1, size=56), progress=False)
        >>> record["status"], len(record["boxes"]) > 0
        ('valid', True)
    """

    def answer(batch: list[tuple[Any, Target]]) -> list[Prediction]:
        pixels = [box_segmenter.segmenter.preprocess(read_image(image)) for image, _ in batch]
        targets = [target for _, target in batch]
        sizes = [(target.height, target.width) for target in targets]
        boxes, points = [target.boxes for target in targets], [target.points for target in targets]
        masks = box_segmenter(pixels, boxes, sizes, points)
        return [
            Prediction("", None, None, target.boxes, Status.VALID, has_seg=False, mask=mask, points=target.points)
            for target, mask in zip(targets, masks, strict=True)
        ]

    return score_rows(
        dataset,
        lambda row: (whole_image(row), read_image_target(row)),
        answer,
        partial(overlap_record, metrics=metrics),
        title="oracle",
        batch_size=batch_size,
        progress=progress,
        on_answer=on_answer,
        ahead=True,
    )


def whole_image(row: dict[str, Any]) -> Any:
    """The image; of a row of `prepare` the original, since the model is shown it as small as in training anyway."""
    full = row.get(FULL_IMAGE)
    return row["image"] if full is None else read_image(full, f"{row.get('name') or 'row'}: {FULL_IMAGE}")


def read_image_target(row: dict[str, Any]) -> Target:
    """The ground truth of a row with the column `mask`, and perhaps `ignored`.

    Raises:
        DataError: The mask is not binary; names the row.
    """
    texts = Target.texts_of(row)
    where = texts["name"] or "row"
    target = Target.from_mask(binarize(row["mask"], where), **texts)
    ignored = row.get("ignored")
    return target if ignored is None else target.ignoring(binarize(ignored, f"ignored pixels of {where}"))
