"""Find reserved text: tokens with a meaning for the processor, which text of a data set must not hold.

`<|image_pad|>` in a question is one more image to the processor, `<|im_end|>` ends the turn, and `<seg>` asks for a
mask. The tokenizer itself is asked, since it may match a token in other spellings too.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from segrl.errors import DataError
from segrl.predictions.parsing import SEG_TOKEN, TAGS

__all__ = ["check_reserved", "message_texts"]

_BATCH, _LISTED = 1000, 5
_BRACKETS = frozenset("<>[]{}|")  # a special token without any, such as the padding "!" of some models, is plain text


def check_reserved(
    texts: Iterable[tuple[str, str, Any]], processor: Any, *, seg_token: str = SEG_TOKEN, messages: bool = False
) -> None:
    """Refuse text of a data set that holds a token with a meaning for the processor.

    These are the special tokens of the tokenizer, the placeholders of images and videos, the segmentation token, and
    the tags of an answer (`<think>`) where they are tokens. Other tokens that were added, such as HTML tags, are text.

    Args:
        texts: (row, column, text), in any number; what is no text is skipped. Each different text is read once.
        processor: A processor or tokenizer; None knows the segmentation token only.
        seg_token: The segmentation token; "" is taken as `<seg>`.
        messages: The texts are whole messages, whose author may use tokens that the model knows, such as
            `<|box_start|>`, `<seg>` or the tags. Only placeholders, end and padding tokens and those that the chat
            template writes are refused then.

    Raises:
        DataError: Names the first rows with column, text and token.

    Example:
        >>> from segrl.models import tiny_tokenizer
        >>> check_reserved([("a.png", "query", "Where is it?<|im_end|>")], tiny_tokenizer())
        Traceback (most recent call last):
        segrl.errors.DataError: a.png, query 'Where is it?<|im_end|>' holds '<|im_end|>', a token of the model; ...
    """
    literal, by_id = _reserved(processor, seg_token or SEG_TOKEN, messages)
    tokenizer = getattr(processor, "tokenizer", processor)
    found: list[str] = []
    checked: dict[str, str | None] = {}
    rows = (item for item in texts if isinstance(item[2], str) and item[2])
    while batch := list(itertools.islice(rows, _BATCH)):
        new = [text for text in dict.fromkeys(text for _, _, text in batch) if text not in checked]
        checked |= {text: next((token for token in literal if token in text), None) for text in new}
        # every token has a bracket, also in a spelling that a tokenizer normalises
        asked = [text for text in new if by_id and _BRACKETS & set(unicodedata.normalize("NFKC", text))]
        ids_of_texts = tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
        for text, ids in zip(asked, ids_of_texts, strict=True):
            checked[text] = checked[text] or next((by_id[token] for token in ids if token in by_id), None)
        found += [_problem(*item, token) for item in batch if (token := checked[item[2]]) is not None]
    if found:
        more = f" ({len(found)} in all)" if len(found) > _LISTED else ""
        raise DataError(
            f"{'; '.join(found[:_LISTED])}, a token of the model{more}; expected plain text: remove it, or break it "
            "with a space"
        )


def message_texts(messages: Any) -> Iterator[str]:
    """Yield the texts of a conversation; a prompt that is one string, with tokens of its own, has none.

    Example:
        >>> list(message_texts([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]))
        ['Where?']
    """
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            yield content
        for block in content if isinstance(content, list | tuple) else ():
            if isinstance(block, Mapping) and isinstance(block.get("text"), str):
                yield block["text"]


def _problem(row: str, column: str, text: str, token: str) -> str:
    start = max(0, text.find(token) - 40)
    shown = f"{'...' if start else ''}{text[start : start + 80 + len(token)]}"
    return f"{row}, {column} {shown!r} holds {token!r}"


def _reserved(processor: Any, seg_token: str, messages: bool) -> tuple[list[str], dict[int, str]]:
    """Return the tokens that are found as text, and those that the tokenizer makes of a text, by id."""
    tokenizer = getattr(processor, "tokenizer", processor)
    placeholders = [
        text
        for owner in (processor, tokenizer)
        for name, text in getattr(owner, "__dict__", {}).items()
        if name.endswith(("image_token", "video_token", "audio_token")) and isinstance(text, str) and text
    ]
    literal = list(dict.fromkeys(placeholders if messages else [*placeholders, seg_token]))
    if tokenizer is None:
        return literal, {}
    special, own = set(tokenizer.all_special_tokens), {seg_token, *TAGS}
    ends = {str(token) for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)}
    template = str(getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None) or "")
    by_id: dict[int, str] = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        counts = token.special or text in special
        if messages:
            counts = counts and text not in own and (text in ends or text in template or not template)
        else:
            counts = counts or text in own
        unknown = text == tokenizer.unk_token and text not in ends  # what any unreadable character becomes
        if counts and not unknown and _BRACKETS & set(text):
            by_id[token_id] = text
    return literal, by_id
