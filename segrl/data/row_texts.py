"""Text of data set rows that reaches a model, looked through for tokens with a meaning for the processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from segrl.predictions.reserved_text import check_reserved, message_texts

__all__ = ["TEXT_COLUMNS", "check_batch_texts", "check_row_texts", "texts_of_rows"]

TEXT_COLUMNS = ("query", "modality", "anatomy", "lesion", "reasoning")  # what prompts and completions are written from
_BATCH = 1000
_MESSAGES, _CELLS = ("prompt", "completion", "messages"), ("query",)


def texts_of_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (row, column, value) of those columns that a data set has; rows by their name, or by number.

    Example:
        >>> list(texts_of_rows(Dataset.from_dict({"query": ["Where?"]}), ["query", "lesion"]))
        [('row 0', 'query', 'Where?')]
    """
    have = [column for column in columns if column in dataset.column_names]
    named = ["name"] if "name" in dataset.column_names else []
    if not have:
        return
    rows = dataset.with_format(None).select_columns(list(dict.fromkeys([*have, *named])))  # no image is decoded
    for start in range(0, len(rows), _BATCH):
        batch: Any = rows[start : start + _BATCH]
        for n, name in enumerate(batch["name"] if named else [None] * len(batch[have[0]])):
            yield from ((str(name or f"row {start + n}"), column, batch[column][n]) for column in have)


def check_row_texts(datasets: Mapping[str, Any], processor: Any) -> bool:
    """Check prompts, completions and questions of data sets before training; see `check_reserved`.

    Args:
        datasets: `{"train_dataset": ..., "eval_dataset": ...}`; a value may be None or a dict of data sets.
        processor: The model's processor or tokenizer.

    Returns:
        Whether all were read. A stream is not; its batches are for `check_batch_texts`.

    Raises:
        DataError: Names the first rows with data set, column, text and token.

    Example:
        >>> from segrl.models import tiny_tokenizer
        >>> rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Where?<|image_pad|>"}]]})
        >>> check_row_texts({"train_dataset": rows}, tiny_tokenizer())
        Traceback (most recent call last):
        segrl.errors.DataError: train_dataset row 0, prompt 'Where?<|image_pad|>' holds '<|image_pad|>', a token ...
    """
    complete = True
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            complete &= check_row_texts({f"{name}[{key!r}]": value for key, value in dataset.items()}, processor)
        elif isinstance(dataset, Dataset):
            rows = ((f"{name} {row}", *rest) for row, *rest in texts_of_rows(dataset, _MESSAGES))
            check_reserved(_written(rows), processor, messages=True)
            cells = texts_of_rows(dataset, _CELLS)
            check_reserved(((f"{name} {row}", column, text) for row, column, text in cells), processor)
        else:
            complete &= dataset is None
    return complete


def check_batch_texts(rows: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """Check the rows of one batch, for streams, as `check_row_texts` checks whole data sets.

    Raises:
        DataError: As `check_row_texts`.

    Example:
        >>> from segrl.models import tiny_tokenizer
        >>> check_batch_texts([{"name": "a.png", "query": "Where is the <seg>?"}], tiny_tokenizer())
        Traceback (most recent call last):
        segrl.errors.DataError: a.png, query 'Where is the <seg>?' holds '<seg>', a token of the model; ...
    """

    def cells(columns: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
        for number, row in enumerate(rows):
            yield from ((_name(row, number), column, row[column]) for column in columns if column in row)

    check_reserved(_written(cells(_MESSAGES)), processor, messages=True)
    check_reserved(cells(_CELLS), processor)


def _written(cells: Iterable[Sequence[Any]]) -> Iterator[tuple[str, str, str]]:
    for row, column, messages in cells:
        yield from ((row, column, text) for text in message_texts(messages))


def _name(row: Mapping[str, Any], number: int) -> str:
    return str(row.get("name") or f"row {number}")
