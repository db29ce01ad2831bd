"""The groups of a packed row as batches of groups of similar shape, so that one call of attention serves many prompts.

A batch has U rows of P + G*T places: `prompt | completion 1 | ... | completion G`, each part filled up to the longest.
Filled places hold some token of the row; nothing that is real ever reads them.
"""

# U groups of a batch, G completions, P prompt tokens and T completion tokens with padding, L packed tokens
# S places of all batches

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Batch", "Batches", "Group", "batch_groups"]

WASTE = 1.25  # products of queries and keys that a batch may compute, beside those of its groups one by one
LARGEST_MASK = 2**26  # elements


@dataclass(frozen=True)
class Group:
    """One prompt and its completions in a packed row.

    Attributes:
        start: Position of the first prompt token; the completions follow the prompt.
        prompt: Number of prompt tokens, at least 1.
        lengths: Number of tokens of each completion that has any.
    """

    start: int
    prompt: int
    lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        """Return the position after the last completion."""
        return self.start + self.prompt + sum(self.lengths)


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups of similar shape.

    Attributes:
        prompts: Number of prompt tokens of each group, U numbers.
        completions: Number of completions G.
        longest: Number of completion tokens T.
        device: Where the attention is computed.
    """

    prompts: tuple[int, ...]
    completions: int
    longest: int
    device: torch.device

    @property
    def prompt(self) -> int:
        """Return the number of prompt places P."""
        return max(self.prompts)

    @property
    def width(self) -> int:
        """Return the number of places P + G*T of a row."""
        return self.prompt + self.completions * self.longest

    @property
    def work(self) -> float:
        """Return the number of products of a query and a key."""
        return len(self.prompts) * _work(self.prompt, self.completions, self.longest)

    @property
    def ragged(self) -> bool:
        """Return whether the prompts differ in length."""
        return len(set(self.prompts)) > 1

    @cached_property
    def visible(self) -> Tensor:
        """Which keys `prompt | completion` each completion token sees: (T, P+T), or (U*G, 1, T, P+T) if `ragged`."""
        shape = (self.longest, self.prompt + self.longest)
        own = torch.ones(shape, dtype=torch.bool, device=self.device).tril(self.prompt)
        if not self.ragged:
            return own
        lengths = torch.tensor(self.prompts, device=self.device).repeat_interleave(self.completions)
        columns = torch.arange(shape[1], device=self.device)
        return (own & ((columns < lengths[:, None]) | (columns >= self.prompt))[:, None]).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Batches:
    """All groups of a packed row.

    Attributes:
        parts: The batches.
        index: Packed position of each place of all batches, (S,); None if the places are the packed row itself.
        places: Place of each token of the packed row, (L,); None if `index` is.
    """

    parts: tuple[Batch, ...]
    index: Tensor | None
    places: Tensor | None


def batch_groups(groups: Sequence[Group], device: torch.device | str) -> Batches:
    """Divide the groups of a packed row into batches of similar shape.

    Args:
        groups: In the order of the row.
        device: Device of the index tensors.

    Example:
        >>> batches = batch_groups([Group(0, 3, (2, 1)), Group(6, 3, (2, 2))], "cpu")
        >>> [(part.prompts, part.completions, part.longest) for part in batches.parts], batches.index.tolist()
        ([((3, 3), 2, 2)], [0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 11, 12])
    """
    device = torch.device(device)
    order = sorted(groups, key=lambda group: (group.prompt, max(group.lengths, default=0), len(group.lengths)))
    parts: list[tuple[Batch, list[Group]]] = []
    apart = 0.0  # products of the groups of the last batch, one by one
    for group in order:
        own = _batch([group], device)
        if parts:
            chosen = [*parts[-1][1], group]
            joined = _batch(chosen, device)
            masked = len(chosen) * joined.completions * joined.longest * (joined.prompt + joined.longest)
            small = not joined.ragged or masked <= LARGEST_MASK
            if small and joined.work <= WASTE * (apart + own.work):
                parts[-1] = joined, chosen
                apart += own.work
                continue
        parts.append((own, [group]))
        apart = own.work
    index: list[int] = []
    places = [0] * max(group.end for group in groups)
    for batch, chosen in parts:
        for group in chosen:
            for begin, length, width in _spans(group, batch):
                places[begin : begin + length] = range(len(index), len(index) + length)
                index += [*range(begin, begin + length), *[group.start] * (width - length)]
    plain = index == list(range(len(index)))
    return Batches(
        tuple(batch for batch, _ in parts),
        None if plain else torch.tensor(index, device=device),
        None if plain else torch.tensor(places, device=device),
    )


def _work(prompt: int, completions: int, longest: int) -> float:
    return prompt * prompt / 2 + completions * longest * (prompt + longest / 2)


def _batch(groups: Sequence[Group], device: torch.device) -> Batch:
    lengths = [group.lengths for group in groups]
    longest = max((max(own, default=0) for own in lengths), default=0)
    return Batch(tuple(group.prompt for group in groups), max(map(len, lengths)), longest, device)


def _spans(group: Group, batch: Batch) -> list[tuple[int, int, int]]:
    """Packed position, number of tokens and number of places of each part of a row of a batch."""
    spans, begin = [(group.start, group.prompt, batch.prompt)], group.start + group.prompt
    for length in group.lengths:
        spans.append((begin, length, batch.longest))
        begin += length
    absent = batch.completions - len(group.lengths)
    return spans + [(group.start, 0, batch.longest)] * absent
