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

from segrl.sharing.group_batches import Batches, Group, batch_groups

__all__ = ["Layout", "build_layout"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of B completions in one packed row, passed to the model as the keyword `shared_prompt`.

    Attributes:
        groups: The prompts in order, together L tokens.
        batches: The same groups as their attention is computed.
        rows: Packed positions of each row's last prompt token and completion tokens, (B, T+1); after the end of a
            completion, the position of its last prompt token.
    """

    groups: tuple[Group, ...]
    batches: Batches
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
        groups.append(Group(start, prompt, tuple(completions[row] for row in group if completions[row])))
        start = position
    return Layout(tuple(groups), batch_groups(groups, device), torch.tensor(rows, device=device))
