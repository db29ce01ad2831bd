"""Text of a data set that the model's tokenizer would read as one of its tokens, such as a placeholder of an image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from segrl.errors import DataError

__all__ = ["TEXT_COLUMNS", "check_query", "check_texts", "reserved_tokens"]

TEXT_COLUMNS = ("query", "modality", "anatomy", "lesion", "reasoning")  # what prompts and completions are written from
_LISTED = 5


def reserved_tokens(processor: Any, seg_token: str = "") -> tuple[str, ...]:
    """Return the tokens that no text of a data set may hold: all that were added to the vocabulary as a whole.

    Args:
        processor: A processor or tokenizer; None has no tokens.
        seg_token: The segmentation token of the prompt settings, "" without one.

    Example:
        >>> from segrl.models import tiny_tokenizer
        >>> "<|image_pad|>" in reserved_tokens(tiny_tokenizer()), reserved_tokens(None, "<seg>")
        (True, ('<seg>',))
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    known = set() if tokenizer is None else {*tokenizer.get_added_vocab(), *map(str, tokenizer.all_special_tokens)}
    # a model may have runs of spaces or plain words among its added tokens, which are text
    marked = {token for token in known if not token.replace(" ", "").isalnum() and len(token.strip()) > 2}
    return tuple(sorted(marked | ({seg_token} if seg_token else set())))


def check_texts(dataset: Any, processor: Any, seg_token: str = "") -> None:
    """Refuse rows with a text that holds a token of the model.

    The tokenizer would not read it as text: `<|image_pad|>` in a question stops the first batch, a `<seg>` in it is
    taken for the model's own.

    Args:
        dataset: Rows with some of `TEXT_COLUMNS`.
        processor: The model's processor.
        seg_token: See `reserved_tokens`.

    Raises:
        DataError: Row, column and token of the first few, and how many there are.

    Example:
        >>> from datasets import Dataset
        >>> check_texts(Dataset.from_dict({"query": ["Where is the <seg>?"]}), None, "<seg>")
        Traceback (most recent call last):
        segrl.errors.DataError: row 0: query holds '<seg>', a token of the model; remove it from the text
    """
    tokens = reserved_tokens(processor, seg_token)
    found = []
    for column in TEXT_COLUMNS:
        if column in dataset.column_names:
            for number, text in enumerate(dataset[column]):
                found += [(number, column, token) for token in _inside(text, tokens)]
    if found:
        listed = "; ".join(
            f"row {number}: {column} holds {token!r}" for number, column, token in sorted(found)[:_LISTED]
        )
        more = f" ({len(found)} in all)" if len(found) > _LISTED else ""
        raise DataError(f"{listed}{more}, a token of the model; remove it from the text")


def check_query(query: str, processor: Any, seg_token: str = "") -> None:
    """Refuse a question that holds a token of the model.

    Raises:
        DataError: The token is named.
    """
    for token in _inside(query, reserved_tokens(processor, seg_token)):
        raise DataError(f"query {query!r:.200} holds {token!r}, a token of the model; remove it from the text")


def _inside(text: Any, tokens: Iterable[str]) -> list[str]:
    return [token for token in tokens if isinstance(text, str) and token in text]
