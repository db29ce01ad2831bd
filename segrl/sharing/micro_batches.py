"""Fill micro-batches up to a number of computed tokens; the rows of a prompt stay together."""

# B rows, P prompt tokens, T completion tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from segrl.sharing.packing import PromptKey

__all__ = ["RowGroup", "consecutive_parts", "fill_micro_batches", "fill_padded", "prompt_groups"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class RowGroup:
    """Rows that are computed together.

    Attributes:
        rows: Their numbers.
        tokens: Tokens that a pass computes for them: the prompt once, and every completion.

    Example:
        >>> RowGroup((0, 1), tokens=12).tokens
        12
    """

    rows: tuple[int, ...]
    tokens: int


def prompt_groups(keys: Sequence[PromptKey], completions: Sequence[int]) -> list[RowGroup]:
    """Group rows by prompt, in order of the first row.

    Args:
        keys: Key of each row.
        completions: Number of completion tokens of each row.

    Example:
        >>> prompt_groups([PromptKey((5, 6)), PromptKey((7,)), PromptKey((5, 6))], completions=[3, 4, 1])
        [RowGroup(rows=(0, 2), tokens=6), RowGroup(rows=(1,), tokens=5)]
    """
    found: dict[PromptKey, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return [
        RowGroup(tuple(rows), len(key.tokens) + sum(completions[row] for row in rows)) for key, rows in found.items()
    ]


def fill_micro_batches(groups: Sequence[RowGroup], budget: int, at_least: int = 1) -> list[list[int]]:
    """Put groups into as few micro-batches as the budget allows: the largest first, each into the first that has room.

    Args:
        groups: Groups, which stay whole; one above the budget gets a micro-batch of its own.
        budget: Most tokens of a micro-batch.
        at_least: Smallest number of micro-batches, where another process has so many. Micro-batches are then divided,
            at last within groups, as far as there are rows.

    Returns:
        Rows of each micro-batch, those of a group side by side.

    Example:
        >>> groups = [RowGroup((0, 1), 6), RowGroup((2, 3), 5), RowGroup((4, 5), 4)]
        >>> fill_micro_batches(groups, budget=10)
        [[0, 1, 4, 5], [2, 3]]
        >>> fill_micro_batches(groups[:1], budget=10, at_least=2)
        [[0], [1]]
    """
    parts: list[list[RowGroup]] = []
    for group in sorted(groups, key=lambda group: -group.tokens):
        for part in parts:
            if sum(item.tokens for item in part) + group.tokens <= budget:
                part.append(group)
                break
        else:
            parts.append([group])
    parts = _divided(parts, at_least)
    return _divided([[row for group in part for row in group.rows] for part in parts], at_least)


def fill_padded(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Put rows, of similar length, into micro-batches that are padded to their longest row.

    Args:
        lengths: Number of tokens of each row.
        budget: Most tokens of a micro-batch, padding included; a longer row gets a micro-batch of its own.
        at_least: As in `fill_micro_batches`.

    Returns:
        Rows of each micro-batch, the longest first.

    Example:
        >>> fill_padded([3, 9, 8, 2], budget=18)
        [[1, 2], [0, 3]]
    """
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return _divided(parts, at_least)


def consecutive_parts(keys: Sequence[PromptKey], completions: Sequence[int], budget: int) -> list[range]:
    """Divide rows, in their order, into parts of at most `budget` computed tokens; runs of a prompt stay whole.

    Args:
        keys: Key of each row.
        completions: Number of completion tokens of each row.
        budget: Most tokens of a part; a run above it gets a part of its own.

    Example:
        >>> keys = [PromptKey((5, 6))] * 2 + [PromptKey((7,))] * 2
        >>> consecutive_parts(keys, [3, 1, 2, 2], budget=8), consecutive_parts(keys, [3, 1, 2, 2], budget=11)
        ([range(0, 2), range(2, 4)], [range(0, 4)])
    """
    parts: list[range] = []
    used = 0
    start = 0
    for stop in range(1, len(keys) + 1):
        if stop < len(keys) and keys[stop] == keys[stop - 1]:
            continue
        tokens = len(keys[start].tokens) + sum(completions[start:stop])
        if parts and used + tokens <= budget:
            parts[-1] = range(parts[-1].start, stop)
            used += tokens
        else:
            parts.append(range(start, stop))
            used = tokens
        start = stop
    return parts


def _divided(parts: list[list[Item]], at_least: int) -> list[list[Item]]:
    """Halve the part with the most items until there are enough, or every part has one item."""
    while len(parts) < at_least and (longest := max(parts, key=len, default=[])) and len(longest) > 1:
        middle = (len(longest) + 1) // 2
        parts = [half for part in parts for half in ([part[:middle], part[middle:]] if part is longest else [part])]
    return parts
