"""From recorded states to predictions with masks: what a rollout and the inference API share.

B rows, T completion tokens, D language-model width, h mask side, H x W original pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.errors import SegRLError
from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import Recording, SegInput
from segrl.predictions.parsing import SEG_TOKEN
from segrl.predictions.prediction import Prediction, Status

__all__ = ["Completions", "add_masks", "append_tokens", "check_token", "generation_states", "masks_at"]


@dataclass(eq=False)
class Completions:
    """Completion tokens of a batch, which of them the model wrote, and the backbone's states at them.

    Attributes:
        ids: (B, T) token ids, 0 behind the end of a row.
        exists: (B, T) bool, False on padding.
        own: (B, T) bool, True where the model wrote the token: not padding, and not what tools or environments said.
        states: (B, T', D), or None while there are none. T' may be T - 1: the last token of a cut-off completion was
            never fed back.
        queries: (B, T) bool, True on the query tokens of a probe, which nobody wrote; None without any.
        known: (B, T) bool, False where a state means nothing, as in a completion that was hidden from attention; None:
            all mean something.
    """

    ids: Tensor
    exists: Tensor
    own: Tensor
    states: Tensor | None = None
    known: Tensor | None = None
    queries: Tensor | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        device: torch.device | str,
        own: Sequence[Sequence[int]] | None = None,
        queries: tuple[int, int] | None = None,
    ) -> Completions:
        """Build from nested lists.

        Args:
            ids: Tokens of each completion.
            device: Where the tensors go.
            own: For each token 1 where the model wrote it, 0 for others; None: the model wrote all.
            queries: Token and number of those that a probe wants behind each completion.

        Example:
            >>> batch = Completions.of([[5, 6, 7], [8]], "cpu", own=[[1, 0, 1], [1]])
            >>> batch.own.tolist(), batch.last_text_ids()
            ([[True, False, True], [True, False, False]], [[7], [8]])
        """
        longest = max(len(row) for row in ids)
        written = own if own is not None else [[1] * len(row) for row in ids]
        filled = [[*map(int, row), *[0] * (longest - len(row))] for row in ids]
        exists = [[True] * len(row) + [False] * (longest - len(row)) for row in ids]
        mask = [[*map(bool, row), *[False] * (longest - len(row))] for row in written]
        batch = cls(*(torch.tensor(values, device=device) for values in (filled, exists, mask)))
        return batch if queries is None else batch.with_queries(*queries)

    def last_text_ids(self) -> list[list[int]]:
        """The last run of tokens that the model wrote in each row; with tools or environments, its last turn."""
        result = []
        for ids, own in zip(self.ids.tolist(), self.own.tolist(), strict=True):
            end = next((n + 1 for n in reversed(range(len(ids))) if own[n]), 0)
            start = next((n + 1 for n in reversed(range(end)) if not own[n]), 0)
            result.append(ids[start:end])
        return result

    def probed(self) -> Tensor:
        """(B, T) bool: tokens that a probe may choose."""
        own = self.own if self.queries is None else self.own | self.queries
        return own if self.known is None else own & self.known

    def with_queries(self, token_id: int, count: int) -> Completions:
        """The completions with `count` query tokens behind each, without states."""
        ids, exists, queries = append_tokens(self.ids, self.exists, token_id, count)
        return Completions(ids, exists, F.pad(self.own, (0, count)), queries=queries)


def append_tokens(ids: Tensor, mask: Tensor, token_id: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append tokens behind the last one of each row that the mask holds; a row without any gets none.

    Args:
        ids: (B, T).
        mask: (B, T), 1 or True on the tokens of a row.
        token_id: The token.
        count: How many, Q.

    Returns:
        Ids and mask (B, T + Q) with the dtype they had, and (B, T + Q) bool, True on the new tokens.

    Example:
        >>> ids, mask, new = append_tokens(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]]), 9, 1)
        >>> ids.tolist(), mask.tolist(), new.tolist()
        ([[5, 6, 9], [7, 9, 0]], [[1, 1, 1], [1, 1, 0]], [[False, False, True], [False, True, False]])
    """
    position = torch.arange(ids.size(1) + count, device=ids.device)
    last = torch.where(mask.bool(), position[: ids.size(1)], -1).amax(1, keepdim=True)
    new = (position > last) & (position <= last + count) & (last >= 0)
    return F.pad(ids, (0, count)).masked_fill(new, token_id), F.pad(mask, (0, count)).masked_fill(new, 1), new


def check_token(head: MaskHead, tokenizer: Any) -> None:
    """Refuse a head whose probe looks for a token that is not this tokenizer's normal `<seg>`.

    Raises:
        SegRLError: Another token, or a special one, which TRL drops from the text that rewards read.
    """
    token_id = getattr(head.probe, "token_id", None)
    if token_id is None:
        return
    known = tokenizer.added_tokens_decoder.get(token_id)
    if known is None or known.content != SEG_TOKEN:
        found = "no added token" if known is None else repr(known.content)
        raise SegRLError(
            f"{type(head.probe).__name__}(token_id={token_id}): {found} of this tokenizer, expected {SEG_TOKEN!r}; "
            "add it with segrl.models.ensure_seg_token(model, processor) and build the head with the id it returns"
        )
    if known.special:
        raise SegRLError(
            f"{known.content!r} is a special token: TRL drops those from the text that rewards read. "
            "Add it as a normal token (segrl.models.ensure_seg_token)"
        )


def generation_states(recording: Recording, ids: Sequence[Sequence[int]], synced: bool = False) -> Tensor | None:
    """States (B, T - 1, D) of the completion tokens `ids` from a generation recorded with `last_only=True`.

    Token t's state is the backbone's output when t was fed back. The last token of the longest completion never was;
    what comes before the fed tokens is the prompt. None if nothing was fed back.

    Args:
        recording: Of the generation.
        ids: Tokens of each completion.
        synced: Whether a process that is done goes on until all are (`synced_gpus`); then the prompt is one forward,
            and what comes behind the fed tokens means nothing.
    """
    fed = max(len(row) for row in ids) - 1
    first = 1 if synced else len(recording.calls) - fed
    return torch.cat(recording.calls[first : first + fed], dim=1) if fed > 0 else None


@torch.no_grad()
def add_masks(
    head: MaskHead,
    predictions: Sequence[Prediction],
    completions: Completions,
    inputs: Sequence[SegInput | None],
    sizes: Sequence[tuple[int, int]],
    *,
    probabilities: bool = False,
) -> list[Prediction]:
    """Return the predictions with masks in original pixels, decoded in one batched call.

    Args:
        head: The mask head.
        predictions: One per row, parsed from the text.
        completions: Tokens and states. A `<seg>` that is the last token of a cut-off completion was never fed back, its
            answer is not closed, and it gets no mask.
        inputs: The segmenter's input per row; the same object for the same image; None where there is nothing to see.
        sizes: (H, W) of each row's mask.
        probabilities: Whether predictions also carry the foreground probabilities of their masks.

    Returns:
        Predictions with `mask`, or without one and with `has_seg=False` where the token itself is not in the
        completion, even if its letters are.
    """
    found: dict[int, np.ndarray] = {}
    states = completions.states
    index, valid = head.probe(completions.ids, completions.probed())
    if states is not None:
        usable = valid & (index < states.size(1))
        rows = [n for n in usable.any(1).nonzero()[:, 0].tolist() if inputs[n] is not None]
        if rows:
            position = index[rows].clamp(max=states.size(1) - 1).unsqueeze(-1).expand(-1, -1, states.size(-1))
            chosen = states[rows].gather(1, position)
            # Not through the module's hooks, with which an engine would gather weights on this process alone.
            logits = head.forward(chosen, usable[rows], [item for n in rows if (item := inputs[n]) is not None])
            full = masks_at(logits, [sizes[n] for n in rows], probabilities=probabilities)
            found = dict(zip(rows, full, strict=True))
    return [
        prediction if inputs[n] is None else _with_mask(prediction, found.get(n))
        for n, prediction in enumerate(predictions)
    ]


def masks_at(logits: Tensor, sizes: Sequence[tuple[int, int]], *, probabilities: bool = False) -> list[np.ndarray]:
    """Mask logits "N h h" in original pixels "H W": bilinear, then bool (logit > 0), or float32 probabilities.

    One call per size.
    """
    result: dict[int, np.ndarray] = {}
    for size in dict.fromkeys(sizes):
        rows = [n for n, other in enumerate(sizes) if other == size]
        full = F.interpolate(logits[rows].float().unsqueeze(1), size=size, mode="bilinear", align_corners=False)[:, 0]
        result.update(zip(rows, (full.sigmoid() if probabilities else full > 0).cpu().numpy(), strict=True))
    return [result[n] for n in range(len(sizes))]


def _with_mask(prediction: Prediction, found: np.ndarray | None) -> Prediction:
    """The prediction with a mask, which is given as such or as probabilities."""
    if found is not None:
        return prediction.with_mask(found) if found.dtype == np.bool_ else prediction.with_mask(found > 0.5, found)
    if not prediction.has_seg:
        return prediction
    status = Status.NO_SEG_TOKEN if prediction.status is Status.VALID else prediction.status
    return replace(prediction, has_seg=False, status=status)
