"""Probes: which hidden states of a completion prompt the segmenter.

A probe maps token ids (B, T) and the completion mask (B, T) (True on tokens that the model wrote, never on the prompt)
to positions (B, K) in T and their validity (B, K). A row with no valid position has no mask.
"""

# B rows, T tokens, K states

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from segrl.errors import SegRLError
from segrl.registry import Registry

__all__ = ["PROBES", "AnswerProbe", "SegTokenProbe", "register_probe"]

Item = TypeVar("Item", bound=Callable[..., Any])

PROBES = Registry("probe", "segrl.probes", preload=("segrl.heads",))


def register_probe(name: str) -> Callable[[Item], Item]:
    """Register a probe under a name, for `MaskHead.build` and for files.

    A class is built as `cls.from_config(config, tokenizer=..., **context)` or, without that method, as
    `cls(**config)`; `MaskHead.build` passes `{"token_id": id}` as config. A function is the probe itself.

    Raises:
        SegRLError: The name is taken, or it cannot be called.

    Example:
        >>> @register_probe("last_token")
        ... def last_token(ids, completion_mask):
        ...     written = completion_mask.int().cumsum(1).argmax(1, keepdim=True)
        ...     return written, completion_mask.any(1, keepdim=True)
        >>> PROBES.get("last_token")(torch.zeros(1, 4), torch.tensor([[False, True, True, False]]))
        (tensor([[2]]), tensor([[True]]))
    """
    return PROBES.register(name)


@register_probe("seg_token")
class SegTokenProbe:
    """Pick the state at the last `<seg>` that the model wrote (CORE-Seg, LISA).

    Args:
        token_id: Id of `<seg>` in the tokenizer.

    Example:
        >>> ids = torch.tensor([[9, 1, 9, 2, 9], [9, 1, 2, 3, 4]])
        >>> written = torch.tensor([[False, True, True, True, True]] * 2)  # behind a prompt of one token
        >>> SegTokenProbe(9)(ids, written)
        (tensor([[4],
                [0]]), tensor([[ True],
                [False]]))
    """

    def __init__(self, token_id: int) -> None:
        self.token_id = int(token_id)

    def __call__(self, ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
        found = (ids == self.token_id) & completion_mask.bool()
        position = torch.arange(ids.size(1), device=ids.device)
        last = torch.where(found, position, -1).amax(1, keepdim=True)
        return last.clamp(min=0), last >= 0

    def to_config(self) -> dict[str, Any]:
        return {"token_id": self.token_id}


@register_probe("answer")
class AnswerProbe:
    """Pick all states of the answer, from the token after `<answer>` to `<seg>` (an ablation of CORE-Seg).

    A row has states only if its last `<seg>` comes after an `<answer>`. The tag is looked for in the text of the
    tokens, since tokenizers merge its brackets with their neighbours; a token that holds the end of the tag and more
    belongs to the answer only if it does not also hold the tag's last letter.

    Args:
        token_id: Id of `<seg>` in the tokenizer.
        tokenizer: The tokenizer that made the ids.

    Example:
        >>> from segrl.models import seg_token_id, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> ids = torch.tensor([tokenizer("A.<answer>B.<seg></answer>")["input_ids"]])
        >>> index, valid = AnswerProbe(seg_token_id(tokenizer), tokenizer)(ids, torch.ones_like(ids))
        >>> tokenizer.decode(ids[0, index[0]])
        'B.<seg>'
    """

    def __init__(self, token_id: int, tokenizer) -> None:
        self.token_id = int(token_id)
        self.tokenizer = tokenizer

    def __call__(self, ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
        end, has_seg = SegTokenProbe(self.token_id)(ids, completion_mask)
        spans: list[range] = []
        for row, mask, last, has in zip(
            ids.tolist(), completion_mask.bool().tolist(), end[:, 0].tolist(), has_seg, strict=True
        ):
            written = [t for t in range(last) if mask[t]] if has else []
            pieces = [str(piece) for piece in self.tokenizer.convert_ids_to_tokens([row[t] for t in written])]
            tag = "".join(pieces).rfind("<answer>")
            tag_end, start, length = tag + len("<answer>"), last + 1, 0
            for t, piece in zip(written, pieces, strict=True):
                length += len(piece)
                if tag >= 0 and length >= tag_end:
                    start = t + 1
                    break
            spans.append(range(start, last + 1) if has and tag >= 0 else range(0))
        width = max(1, *(len(span) for span in spans)) if spans else 1
        index, valid = (
            torch.zeros(len(spans), width, dtype=torch.long),
            torch.zeros(len(spans), width, dtype=torch.bool),
        )
        for n, span in enumerate(spans):
            index[n, : len(span)] = torch.tensor(span, dtype=torch.long)
            valid[n, : len(span)] = True
        return index.to(ids.device), valid.to(ids.device)

    def to_config(self) -> dict[str, Any]:
        return {"token_id": self.token_id}

    @classmethod
    def from_config(cls, config: dict[str, Any], *, tokenizer=None, **context: Any) -> AnswerProbe:
        """Build the probe; the tokenizer is not in its config.

        Raises:
            SegRLError: No tokenizer.
        """
        if tokenizer is None:
            raise SegRLError("probe 'answer' looks for <answer> in the text of the tokens: pass tokenizer=")
        return cls(**config, tokenizer=tokenizer)
