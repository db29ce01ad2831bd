"""Evaluation on volumes: the 3D mask in voxels and millimetres, and the key slice that the answer names.

The ceiling beside the model is the mask that the frozen segmenter makes of the true boxes on the best slice: no answer
of the same form can be expected to do better.
"""

# D slices, H/W pixels of a slice

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset

from segrl.data.volumes.case import Case, CaseReader
from segrl.data.volumes.prompts import NOTHING, format_slice_answer
from segrl.evaluation.base import OnAnswer, check_questions, counted_masks, overlap_record, score_rows
from segrl.inference.volumes import VolumeSegmenter
from segrl.metrics.registry import Metric
from segrl.metrics.summary import summarise
from segrl.metrics.surfaces import hausdorff, surface_dice
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_completion, parse_completion
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import VolumePromptSettings
from segrl.predictions.target import VolumeTarget
from segrl.rewards.factory import make_reward
from segrl.segmenters.propagated_masks import add_volume_masks
from segrl.segmenters.propagation import VolumePropagator

__all__ = [
    "VOLUME_GROUPINGS",
    "VOLUME_METRICS",
    "evaluate_oracle_boxes",
    "evaluate_volumes",
    "summarise_volumes",
    "volume_record",
]

VOLUME_METRICS = {
    "mdice": "dice",
    "miou": "iou",
    "fail": "fail",
    "hd95_mm": "hd95_mm",
    "nsd": "nsd",
    "slice_visibility": "slice_visibility",
    "slice_boxes": "slice_boxes",
}
VOLUME_GROUPINGS = ("lesion",)  # the structure: a data set of organs names them in this column
_UNDEFINED = ("hd95_mm", "nsd")
_OF_TEXTS = ("slice_visibility", "slice_boxes")  # absent where masks without texts are scored


def volume_record(
    prediction: Prediction, target: VolumeTarget, *, nsd_tolerance_mm: float = 2.0, metrics: Sequence[str | Metric] = ()
) -> dict[str, Any]:
    """Score one answer about a volume; plain Python values, ready for JSON.

    Args:
        prediction: Its (D, H, W) mask is compared with the ground truth; its slice and boxes with that slice of it.
        target: Ground truth, spacing in millimetres, None if it is not known, and texts.
        nsd_tolerance_mm: Distance up to which two surfaces agree, millimetres; at least 0.
        metrics: More metrics, see `segrl.metrics.register_metric`.

    Returns:
        What `segrl.evaluation.overlap_record` says of the voxels, and

        - "hd95_mm": `segrl.metrics.hausdorff`, 95th percentile, millimetres; both empty 0.0, exactly one empty None,
        - "nsd": `segrl.metrics.surface_dice`, in [0, 1]; both empty 1.0, exactly one empty 0.0,
        - "slice_visibility", "slice_boxes": the rewards of these names, 0.0 for an invalid text,
        - "slice_index" of the prediction, "spacing_mm" of the target.

        Without a spacing nobody knows the millimetres: "hd95_mm" and "nsd" are None.

    Raises:
        DataError: The mask has another shape than the ground truth, which is named, or a tolerance below 0.

    Example:
        >>> import numpy as np
        >>> from segrl.predictions import Frame, parse_completion
        >>> mask = np.zeros((4, 8, 8), dtype=bool)
        >>> mask[1, 2:6, 2:6] = True
        >>> text = '<think>a</think><answer>{"slice": 2, "bbox_2d_list": [[2, 2, 6, 6]]}</answer>'
        >>> answer = parse_completion(text, Frame("original_px", (8, 8)), require_seg=False, answer_format="json")
        >>> record = volume_record(answer.with_mask(mask), VolumeTarget.from_mask(mask, (5.0, 1.0, 1.0)))
        >>> record["dice"], record["hd95_mm"], record["nsd"], record["slice_visibility"], record["slice_index"]
        (1.0, 0.0, 1.0, 1.0, 1)
    """
    record = overlap_record(prediction, target, metrics)
    distance = nsd = None
    if target.spacing_mm is not None:
        masks = counted_masks(prediction, target)
        distance = hausdorff(*masks, spacing=target.spacing_mm)
        nsd = surface_dice(*masks, nsd_tolerance_mm, target.spacing_mm)
    return {
        **record,
        "hd95_mm": distance if distance is not None and math.isfinite(distance) else None,
        "nsd": nsd,
        "slice_visibility": make_reward("slice_visibility").score(prediction, target),
        "slice_boxes": make_reward("slice_boxes").score(prediction, target),
        "slice_index": prediction.slice_index,
        "spacing_mm": None if target.spacing_mm is None else list(map(float, target.spacing_mm)),
    }


def summarise_volumes(
    records: Sequence[Mapping[str, Any]], *, groupings: Sequence[str] = VOLUME_GROUPINGS
) -> dict[str, Any]:
    """Compute means, 95 % bootstrap intervals and a breakdown by structure of `volume_record`s.

    A mean of "hd95_mm" leaves out the volumes in which exactly one mask was empty, so a model that often finds nothing
    may look good by it: read it beside "n_scored", the number of volumes that it is over, and beside "fail". "hd95_mm"
    and "nsd" leave out volumes whose spacing is not known.

    Args:
        records: At least one record of `volume_record`.
        groupings: Keys of the records that the breakdowns are by.

    Returns:
        As `segrl.metrics.summarise`: "mdice", "miou", "fail", "nsd", "slice_visibility" and "slice_boxes" in [0, 1],
        "hd95_mm" in millimetres (it and "nsd" None if they apply to no volume), "n", "n_scored": {"hd95_mm": ...,
        "nsd": ...}, "ci95", "groups". Without the slice scores if no record has them.

    Raises:
        DataError: As `segrl.metrics.summarise`.

    Example:
        >>> scores = {"dice": 0.5, "iou": 0.4, "nsd": 0.6, "slice_visibility": 1.0, "slice_boxes": 0.0}
        >>> records = [{**scores, "fail": False, "hd95_mm": distance, "lesion": "cyst"} for distance in (4.0, None)]
        >>> summary = summarise_volumes(records)
        >>> summary["mdice"], summary["hd95_mm"], summary["n_scored"]
        (0.5, 4.0, {'hd95_mm': 1, 'nsd': 2})
    """
    known = {
        name: key for name, key in VOLUME_METRICS.items() if name not in _OF_TEXTS or any(key in r for r in records)
    }
    return summarise(records, metrics=known, groupings=groupings, optional=_UNDEFINED)


def evaluate_volumes(
    segmenter: VolumeSegmenter,
    dataset: Dataset,
    *,
    batch_size: int = 4,
    nsd_tolerance_mm: float = 2.0,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Ask the model about every row, greedily unless the settings say otherwise.

    Args:
        segmenter: The model with its frozen segmenter.
        dataset: Rows of `segrl.data.load_volumes`. A row without an intensity is scaled as the training rows of its
            modality were. A column `spacing_mm`, [z, y, x], gives the spacing of scans whose files do not say it.
        batch_size: Rows per generation; so many volumes are in memory at once.
        nsd_tolerance_mm: See `volume_record`.
        metrics: See `volume_record`.
        progress: Show a progress bar.
        on_answer: Called for every row with its number, the `segrl.data.Case`, the prediction and the target; to draw
            or keep what the records do not hold.
        settings: To `VolumeSegmenter.predict_batch`, such as `samples=8, seed=0`.

    Returns:
        One `volume_record` per row, in order.

    Raises:
        DataError: `batch_size` is below 1, a question holds a token with a meaning for the processor, or a file cannot
            be read.

    Example:
        >>> from segrl.data import make_synthetic_volumes
        >>> from segrl.models import tiny_qwen3_vl
        >>> from segrl.predictions import VolumePromptSettings
        >>> settings = VolumePromptSettings(slices=2, size=32, max_new_tokens=2)
        >>> rows = make_synthetic_volumes(1, "volumes", depth=4, size=32)
        >>> (record,) = evaluate_volumes(VolumeSegmenter(*tiny_qwen3_vl(), settings), rows, progress=False)
        >>> record["fail"], record["dice"], record["slice_index"]  # two random tokens are no valid answer
        (True, 0.0, None)
    """

    check_questions(dataset, segmenter)

    def answer(batch: list[tuple[Case, VolumeTarget]]) -> Sequence[Prediction]:
        asked = [target.query for _, target in batch]
        return segmenter.predict_batch([case for case, _ in batch], asked, **settings)

    record = partial(volume_record, nsd_tolerance_mm=nsd_tolerance_mm, metrics=metrics)
    return _scored("evaluate", dataset, answer, record, batch_size, progress, on_answer, segmenter.settings)


def evaluate_oracle_boxes(
    propagator: VolumePropagator,
    dataset: Dataset,
    *,
    batch_size: int = 4,
    nsd_tolerance_mm: float = 2.0,
    metrics: Sequence[str | Metric] = (),
    progress: bool = True,
    on_answer: OnAnswer | None = None,
    settings: VolumePromptSettings | None = None,
) -> list[dict[str, Any]]:
    """Score what the frozen segmenter makes of the true boxes on the slice with most foreground.

    Args:
        propagator: As the model's is used: with `reach=None`.
        dataset: Rows of `segrl.data.load_volumes`.
        batch_size: Rows that are propagated together; so many volumes are in memory at once.
        nsd_tolerance_mm: See `volume_record`.
        metrics: See `volume_record`.
        progress: Show a progress bar.
        on_answer: See `evaluate_volumes`.
        settings: Of the model that the scores are compared with, so that both see the same grey values.

    Returns:
        One `volume_record` per row, in order; a volume without foreground gets the answer that there is none.

    Raises:
        DataError: As `evaluate_volumes`.

    Example:
        >>> from segrl.data import make_synthetic_volumes
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> small = Sam2Config(image_size=64)
        >>> rows = make_synthetic_volumes(1, "volumes", depth=4, size=32)
        >>> (record,) = evaluate_oracle_boxes(VolumePropagator(Sam2Segmenter(small), reach=None), rows, progress=False)
        >>> record["slice_visibility"], record["slice_boxes"]  # the true boxes on the best slice
        (1.0, 1.0)
    """

    def answer(batch: list[tuple[Case, VolumeTarget]]) -> list[Prediction]:
        written = [_true_answer(target) for _, target in batch]
        return add_volume_masks(propagator, written, [case.grey for case, _ in batch], [""] * len(batch))

    record = partial(volume_record, nsd_tolerance_mm=nsd_tolerance_mm, metrics=metrics)
    trained = settings or VolumePromptSettings()
    return _scored("oracle", dataset, answer, record, batch_size, progress, on_answer, trained)


def _true_answer(target: VolumeTarget) -> Prediction:
    """The true boxes, original pixels, on the slice with most foreground; without any, an answer without a slice."""
    frame = Frame("original_px", (target.width, target.height))
    answer = NOTHING
    if not target.empty:
        key = int(target.slice_areas.argmax())
        answer = format_slice_answer(key, target.at(key).boxes, frame)
    return parse_completion(format_completion("The truth.", answer), frame, require_seg=False, answer_format="json")


def _scored(
    title: str,
    dataset: Dataset,
    answer: Callable[[list[Any]], Sequence[Prediction]],
    record: Callable[[Prediction, Any], dict[str, Any]],
    batch_size: int,
    progress: bool,
    on_answer: OnAnswer | None,
    trained: VolumePromptSettings,
) -> list[dict[str, Any]]:
    """Records of all rows, of which one scan is kept in memory beside those of a batch."""
    read_case = CaseReader(0)

    def read(row: dict[str, Any]) -> tuple[Case, VolumeTarget]:
        modality, intensity = trained.scaling_of_row(row)
        case = read_case({**row, "modality": modality, "intensity": intensity}, allow_empty=True)
        return case, case.target(row)

    settings: dict[str, Any] = {"title": title, "batch_size": batch_size, "progress": progress}
    return score_rows(dataset, read, answer, record, **settings, on_answer=on_answer)
