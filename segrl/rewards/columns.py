"""Predictions and targets from the columns of a batch, for trainers that pass neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from segrl.errors import RewardError
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.parsing import completion_text
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import METADATA_COLUMNS, Target, VolumeTarget, read_spacing, text_of

__all__ = ["AnyTarget", "check_target", "position", "read_rows", "same_target"]

_UNKNOWN_SIZE = (1000, 1000)  # of an image when neither the ground truth nor the image is given
AnyTarget = Target | VolumeTarget | None


def read_rows(
    call: Mapping[str, Any], completion_format: CompletionFormat, name: str, reads_target: bool
) -> tuple[Sequence[Prediction], Sequence[AnyTarget]]:
    """Return the predictions and targets of a trainer's call: its own, or built from its columns.

    Args:
        call: TRL's keyword arguments.
        completion_format: How completions are parsed.
        name: Name of the reward, for errors.
        reads_target: Whether targets are read; otherwise they are None.

    Raises:
        RewardError: Lengths differ, or a row cannot be read; the message names the reward, the row and the column.
    """
    completions, targets, predictions = call["completions"], call["target"], call["prediction"]
    if targets is None:
        targets = [_target(call, row, name) if reads_target else None for row in range(len(completions))]
    _check_length("target", targets, completions, name)
    if predictions is None:
        predictions = [
            _prediction(text, targets[n], call, n, completion_format, name) for n, text in enumerate(completions)
        ]
    _check_length("prediction", predictions, completions, name)
    return predictions, targets


def check_target(target: object, volume: bool, where: str) -> None:
    """Raise if the ground truth is missing, or is a volume where an image is expected or the other way round."""
    expected = VolumeTarget if volume else Target
    if not isinstance(target, expected):
        column = "volume" if volume else "mask"
        raise RewardError(
            f"{where}: the ground truth is a {type(target).__name__}, expected a {expected.__name__}; "
            f"give the column {column!r}, or targets of this type"
        )


def same_target(a: AnyTarget, b: AnyTarget) -> bool:
    """Return whether two rows have the same ground truth."""
    if a is b:
        return True
    if a is None or b is None or type(a) is not type(b) or a.mask.shape != b.mask.shape:
        return False
    return all(getattr(a, key) == getattr(b, key) for key in METADATA_COLUMNS) and bool((a.mask == b.mask).all())


def position(name: str, row: int | None, row_name: str) -> str:
    """Return the reward and the row, for an error."""
    number = "" if row is None else f", row {row}"
    return f"reward {name!r}{number}" + (f" ({row_name})" if row_name else "")


def _check_length(column: str, values: Sequence[Any], completions: Sequence[Any], name: str) -> None:
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r}: column {column!r} has {len(values)} rows for {len(completions)} completions"
        )


def _target(call: Mapping[str, Any], row: int, name: str) -> Target | VolumeTarget:
    source = next((column for column in ("volume", "mask") if call.get(column) is not None), None)
    if source is None:
        found = ", ".join(sorted(key for key, value in call.items() if value is not None))
        raise RewardError(
            f"reward {name!r} needs a column 'mask' or 'target'; columns passed: {found} (for a volume: 'volume')"
        )
    column, where = "name", position(name, row, "")
    texts: dict[str, str] = {}
    try:
        for column in reversed(METADATA_COLUMNS):
            if call.get(column) is not None:
                texts[column] = text_of(call[column][row], column)
        where = position(name, row, texts.get("name", ""))
        column = source
        if source == "volume":
            spacing = None if call.get("spacing_mm") is None else call["spacing_mm"][row]
            return VolumeTarget.from_mask(call[source][row], read_spacing(spacing, "spacing_mm"), **texts)
        target = Target.from_mask(call[source][row], **texts)
        column = "boxes"
        boxes = None if call.get("boxes") is None else call["boxes"][row]
        return target if boxes is None else Target(target.mask, np.asarray(boxes, dtype=np.float64), **texts)
    except (ValueError, TypeError, LookupError, OSError) as error:
        raise RewardError(f"{where}: cannot build the target from column {column!r}: {error}") from error


def _prediction(
    completion: Any,
    target: AnyTarget,
    call: Mapping[str, Any],
    row: int,
    completion_format: CompletionFormat,
    name: str,
) -> Prediction:
    try:
        shown = _image_size(call, row)
        original = (target.width, target.height) if target is not None else shown or _UNKNOWN_SIZE
        known = completion_format.frame_of(shown or original, original)
        if isinstance(target, VolumeTarget) and call.get("slices") is not None:
            known = replace(known, slices=tuple(call["slices"][row]))  # of a volume the model saw these
        text = completion_text(completion)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        where = position(name, row, target.name if target is not None else "")
        raise RewardError(f"{where}: cannot read the completion: {error}") from error
    return completion_format.parse(text, known)


def _image_size(call: Mapping[str, Any], row: int) -> tuple[int, int] | None:
    if call.get("image") is not None:
        return call["image"][row].size
    return call["images"][row][0].size if call.get("images") is not None else None
