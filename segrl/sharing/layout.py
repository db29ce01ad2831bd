"""Where everything is in a packed row: each prompt once, then the completions that answer it.

    prompt a | completion 1 | completion 2 | ... | prompt b | completion 1 | ...

Nothing is padded: a packed row has exactly the tokens that are to be computed.

Shape legend: B completions, G of one prompt, P prompt tokens, T completion tokens with padding, L packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its completions in a packed row.

    Attributes:
        start: position of the first prompt token; the completions follow the prompt.
        prompt: prompt tokens P, at least 1.
        lengths: tokens of each completion that has any.
        gather: positions "G T" of the completions' tokens, counted from the end of the prompt, filled with 0; None if
            all are equally long, and a reshape does it.
        scatter: where the tokens are in "G T" flattened, in order; None as before.
    """

    start: int
    prompt: int
    lengths: tuple[int, ...]
    gather: Tensor | None = None
    scatter: Tensor | None = None

    @property
    def end(self) -> int:
        """Position after the last completion."""
        return self.start + self.prompt + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest completion, 0 without completions."""
        return max(self.lengths, default=0)


@dataclass(frozen=True, eq=False)
class Layout:
    """How B completions lie in one packed row, handed to the model as the keyword `shared_prompt`.

    Attributes:
        groups: the prompts in order, together L tokens.
        rows: packed position of each row's last prompt token and completion tokens, "B T+1"; where a completion has
            ended, the position of its last prompt token.
    """

    groups: tuple[Group, ...]
    rows: Tensor

    @property
    def tokens(self) -> int:
        """Tokens L of the packed row."""
        return self.groups[-1].end


def build_layout(
    members: Sequence[Sequence[int]],
    prompts: Sequence[int],
    completions: Sequence[int],
    width: int,
    device: torch.device | str,
) -> Layout:
    """The layout of rows of which some share a prompt.

    Args:
        members: rows of each group; every row in exactly one.
        prompts, completions: lengths in tokens, by row; the rows of a group have the same prompt.
        width: completion tokens T, the longest with padding.
        device: where the index tensors go.
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
        groups.append(_group(start, prompt, tuple(completions[row] for row in group if completions[row]), device))
        start = position
    return Layout(tuple(groups), torch.tensor(rows, device=device))


def _group(start: int, prompt: int, lengths: tuple[int, ...], device: torch.device | str) -> Group:
    if len(set(lengths)) < 2:
        return Group(start, prompt, lengths)
    longest = max(lengths)
    gather, scatter, begin = [], [], 0
    for number, length in enumerate(lengths):
        gather.append([*range(begin, begin + length), *[0] * (longest - length)])
        scatter += range(number * longest, number * longest + length)
        begin += length
    return Group(start, prompt, lengths, torch.tensor(gather, device=device), torch.tensor(scatter, device=device))
