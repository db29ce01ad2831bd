"""Probes: which hidden states of a completion prompt the segmenter.

A probe maps token ids (B, T) and the completion mask (B, T) (True on tokens that the model wrote, never on the prompt)
to positions (B, K) in T and their validity (B, K). A row with no valid position has no mask.

A probe with the attributes `query_token_id` and `num_queries` gets that many tokens behind every completion, which
attend to the prompt, the image and everything that was written; its completion mask is True on them too. With a method
`embed(ids, embeddings)` it decides what the backbone sees in their place. Such tokens were never generated, so a
rollout takes one more forward pass.
"""

# B rows, T tokens, K states

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segrl.errors import SegRLError
from segrl.registry import Registry

__all__ = ["PROBES", "AnswerProbe", "QueryProbe", "SegTokenProbe", "query_tokens", "register_probe"]

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


@register_probe("query")
class QueryProbe(nn.Module):
    """Choose the states of learned query tokens behind the completion, after LENS (arXiv:2508.14153).

    Args:
        token_id: Id of `<seg>`: only a completion that holds it has a mask.
        query_token_id: Id of a normal token that stands for the queries, and that no text holds:
            `segrl.models.ensure_seg_token(model, processor, "<query>")`.
        num_queries: Queries, K.
        width: Width of the language model, D.

    Example:
        >>> probe = QueryProbe(token_id=7, query_token_id=9, num_queries=2, width=4)
        >>> index, valid = probe(torch.tensor([[5, 7, 9, 9]]), torch.tensor([[True] * 4]))
        >>> index.tolist(), valid.tolist()
        ([[2, 3]], [[True, True]])
    """

    def __init__(self, token_id: int, query_token_id: int, num_queries: int, width: int) -> None:
        super().__init__()
        if num_queries < 1 or token_id == query_token_id:
            raise SegRLError(
                f"QueryProbe(token_id={token_id}, query_token_id={query_token_id}, num_queries={num_queries}): "
                "expected two different tokens and 1 query or more"
            )
        self.token_id, self.query_token_id, self.num_queries = int(token_id), int(query_token_id), int(num_queries)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)

    def forward(self, ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions (B, K) of the last K tokens of the mask, valid where the completion holds `<seg>`."""
        position = torch.arange(ids.size(1), device=ids.device)
        last = torch.where(completion_mask.bool(), position, -1).amax(1, keepdim=True)
        index = last - torch.arange(self.num_queries - 1, -1, -1, device=ids.device)
        written = ((ids == self.token_id) & completion_mask.bool()).any(1, keepdim=True)
        return index.clamp(min=0), (index >= 0) & written

    def embed(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Put the queries, in order, in the place of the embeddings (B, T, D) of their token."""
        here = ids == self.query_token_id
        order = (here.cumsum(-1) - 1).clamp(min=0) % self.num_queries
        return torch.where(here.unsqueeze(-1), self.queries.to(embeddings.dtype)[order], embeddings)

    def to_config(self) -> dict[str, Any]:
        return {
            "token_id": self.token_id,
            "query_token_id": self.query_token_id,
            "num_queries": self.num_queries,
            "width": self.queries.size(1),
        }


def query_tokens(probe: Any) -> tuple[int, int] | None:
    """The token that stands for a probe's queries and how many follow a completion; None for a probe without any."""
    count = getattr(probe, "num_queries", 0)
    return (int(probe.query_token_id), int(count)) if count else None
