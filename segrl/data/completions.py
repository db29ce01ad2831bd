"""Target completions for supervised fine-tuning: written, and read back before they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from segrl.data.row_texts import TEXT_COLUMNS, texts_of_rows
from segrl.errors import DataError, SegRLError
from segrl.predictions.frames import Frame
from segrl.predictions.parsing import format_completion
from segrl.predictions.prediction import Status
from segrl.predictions.prompt_settings import PromptSettings
from segrl.predictions.reserved_text import check_reserved

__all__ = ["check_preparation", "target_completion"]


def check_preparation(
    dataset: Dataset,
    processor: Any,
    settings: PromptSettings,
    columns: Sequence[str],
    limits: Mapping[str, int | None],
    *,
    source: str,
    needs_frame: bool = True,
) -> None:
    """Refuse a data set that cannot be prepared, before any image or scan is read.

    Args:
        dataset: The rows.
        processor: The model's processor, or None.
        settings: The prompt settings.
        columns: Columns that must be there.
        limits: Numbers that must be 1 or more, or None, by the names of their arguments.
        source: The loader that gives these columns, for the error.
        needs_frame: Whether boxes are written, or frames computed, which takes a processor or a frame kind.

    Raises:
        DataError: No rows, a missing column, a number below 1, neither a processor nor a frame that needs none, or a
            text with a token that has a meaning for the processor (`check_reserved`).
    """
    if not len(dataset):
        raise DataError("dataset has no rows: expected at least one; check the split and the filters before it")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"dataset lacks the columns {missing}: expected {list(columns)}, found {dataset.column_names}; {source} "
            "gives them"
        )
    for name, value in limits.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value}: expected 1 or more, or None for no limit")
    if needs_frame and processor is None and settings.frame_kind not in ("original_px", "relative_1000"):
        raise DataError(
            f"processor=None with frame_kind={settings.frame_kind!r}: pass the model's processor, or one of the frames "
            "that need none, 'original_px' or 'relative_1000'"
        )
    instruction = [("prompt settings", "instruction", settings.full_instruction)]
    check_reserved(instruction, processor, messages=True)
    check_reserved(texts_of_rows(dataset, TEXT_COLUMNS), processor, seg_token=settings.seg_token)


def target_completion(
    name: str, reasoning: str | None, answer: Callable[[], str], frame: Frame, settings: PromptSettings
) -> list[dict[str, str]]:
    """Write a target completion and check that it reads back as valid.

    Args:
        name: The row, for errors.
        reasoning: Text of the `<think>` block; None leaves the block out.
        answer: Writes the text of the answer.
        frame: Of the written boxes.
        settings: How it will be read.

    Returns:
        One assistant message, `[{"role": "assistant", "content": ...}]`.

    Raises:
        DataError: The texts of the row cannot be written, or do not parse, such as reasoning that holds a tag.
    """
    try:
        text = format_completion(reasoning, answer(), tags=settings.completion_format.require_tags)
    except SegRLError as error:
        raise DataError(f"{name}: {error}") from error
    status = settings.completion_format.parse(text, frame).status
    if status is not Status.VALID:
        token = f" and {settings.seg_token!r}" if settings.seg_token else ""
        raise DataError(
            f"{name}: the completion {text[:200]!r} parses as {status.value!r} ({status.reason}), expected 'valid'; "
            f"remove tags{token} from the reasoning column, or write text into it"
        )
    return [{"role": "assistant", "content": text}]
