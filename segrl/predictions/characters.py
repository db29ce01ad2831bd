"""Characters that a reader does not see: blank texts, invisible characters, and end tokens left by a framework."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

__all__ = ["END_TOKENS", "is_blank", "strip_end_tokens", "visible_text"]

# End-of-turn, end-of-text and padding tokens as text: Qwen and ChatML, Llama 2 and 3, Gemma, Phi, BERT-like, T5.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "[EOS]",
)
_INVISIBLE = frozenset(("Cc", "Cf", "Cn", "Co", "Cs"))  # controls, formats, unassigned, private, halves of pairs
_COMBINING = frozenset(("Mn", "Mc", "Me"))
# Fillers of Hangul, a blank of Braille and one of music: letters and symbols by their category, without ink.
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159")


def visible_text(text: str) -> str:
    """Return a text without its invisible characters: zero-width and control characters, fillers, variation selectors.

    White space and combining marks stay, apart from variation selectors and the combining grapheme joiner.

    Example:
        >>> visible_text("da\\u200brk\\x00 spot\\ufe0f")
        'dark spot'
    """
    invisible = [letter for letter in set(text) if not letter.isspace() and _is_invisible(letter)]
    return text.translate(dict.fromkeys(map(ord, invisible))) if invisible else text


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it is empty, or holds only spaces, invisible characters and loose marks.

    Example:
        >>> is_blank(" \\u200b\\u3164\\u0301"), is_blank("...")
        (True, False)
    """
    return not any(
        not letter.isspace() and not _is_invisible(letter) and unicodedata.category(letter) not in _COMBINING
        for letter in set(text)
    )


def strip_end_tokens(text: str, more: Collection[str] = (), *, keep: str = "") -> str:
    """Return a text without white space around it and without the end tokens behind it. Takes linear time.

    Args:
        text: What a framework decoded without `skip_special_tokens`.
        more: End tokens besides `END_TOKENS`, such as the tokenizer's own.
        keep: A token that is not removed: the segmentation token.

    Example:
        >>> strip_end_tokens("<answer>None.</answer><|im_end|>\\n<|endoftext|>")
        '<answer>None.</answer>'
    """
    tokens = tuple(token for token in (*END_TOKENS, *more) if token and token != keep)
    end = len(text)
    while end:
        if text[end - 1].isspace():
            end -= 1
        elif text.endswith(tokens, 0, end):
            end -= max(len(token) for token in tokens if text.endswith(token, 0, end))
        else:
            break
    return text[:end].lstrip()


def _is_invisible(letter: str) -> bool:
    if letter in _FILLERS or letter == "\u034f" or "\ufe00" <= letter <= "\ufe0f" or "\u180b" <= letter <= "\u180f":
        return True
    return unicodedata.category(letter) in _INVISIBLE or "\U000e0100" <= letter <= "\U000e01ef"
