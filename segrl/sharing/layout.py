"""Layout of a packed row: each prompt once, followed by its completions.

    prompt a | completion 1 | completion 2 | ... | prompt b | completion 1 | ...

Nothing is padded: a packed row has exactly the tokens that are computed.
"""

# B completions, G completions of one prompt, P prompt tokens, T completion tokens with padding, L packed tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "Layout", "build_group", "build_layout"]


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its completions in a packed row.

    Attributes:
        start: Position of the first prompt token; the completions follow the prompt.
        prompt: Number of prompt tokens P, at least 1.
        lengths: Number of tokens of each completion that has any.
        gather: Positions (G, T) of the completions' tokens, counted from the end of the prompt, filled with 0; None if
            all completions are equally long and a reshape suffices.
        scatter: Positions of the tokens in the flattened (G, T), in order; None if `gather` is.
    """

    start: int
    prompt: int
    lengths: tuple[int, ...]
    gather: Tensor | None = None
    scatter: Tensor | None = None

    @property
    def end(self) -> int:
        """Return the position after the last completion."""
        return self.start + self.prompt + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest completion, 0 without completions."""
        return max(self.lengths, default=0)


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of B completions in one packed row, passed to the model as the keyword `shared_prompt`.

    Attributes:
        groups: The prompts in order, together L tokens.
        rows: Packed positions of each row's last prompt token and completion tokens, (B, T+1); after the end of a
            completion, the position of its last prompt token.
    """

    groups: tuple[Group, ...]
    rows: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of tokens L of the packed row."""
        return self.groups[-1].end


def build_layout(
    members: Sequence[Sequence[int]],
    prompts: Sequence[int],
    completions: Sequence[int],
    width: int,
    device: torch.device | str,
) -> Layout:
    """Build the layout of rows, some of which share a prompt.

    Args:
        members: Rows of each group; every row is in exactly one.
        prompts: Number of prompt tokens of each row; the rows of a group have the same prompt.
        completions: Number of completion tokens of each row.
        width: Number of completion tokens T, with padding.
        device: Device of the index tensors.

    Example:
        >>> layout = build_layout([[0, 1]], prompts=[3, 3], completions=[2, 1], width=2, device="cpu")
        >>> layout.tokens, layout.rows.tolist()  # 3 + 2 + 1 tokens; row 1 has its only token at position 5
        (6, [[2, 3, 4], [2, 5, 2]])
    """
    groups: list[Group] = []
    rows = [[0] * (width + 1) for _ in prompts]
    start = 0
    for group in members:
        prompt = prompts[group[0]]
        position = start + prompt
        for row in group:
            length = completions[row]
            last = start + prompt - 1
            rows[row] = [last, *range(position, position + length), *[last] * (width - length)]
            position += length
        groups.append(build_group(start, prompt, tuple(completions[row] for row in group if completions[row]), device))
        start = position
    return Layout(tuple(groups), torch.tensor(rows, device=device))


def build_group(start: int, prompt: int, lengths: tuple[int, ...], device: torch.device | str) -> Group:
    """Build a group from the number of tokens of each completion that has any; see `Group`."""
    if len(set(lengths)) < 2:
        return Group(start, prompt, lengths)
    longest = max(lengths)
    gather, scatter, begin = [], [], 0
    for number, length in enumerate(lengths):
        gather.append([*range(begin, begin + length), *[0] * (longest - length)])
        scatter += range(number * longest, number * longest + length)
        begin += length
    return Group(start, prompt, lengths, torch.tensor(gather, device=device), torch.tensor(scatter, device=device))
