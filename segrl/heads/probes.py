"""Probes: which hidden states of a completion prompt the segmenter.

A probe maps token ids "B T" and the completion mask "B T" (True on tokens that the model wrote, never on the prompt) to
positions "B K" in T and their validity "B K". A row with no valid position has no mask. B rows, T tokens, K states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SegTokenProbe:
    """The state at the `<seg>` token (CORE-Seg, LISA). Of several in one completion the last counts; the prompt's
    never do.

    Args:
        token_id: id of `<seg>` in the tokenizer.
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


class AnswerProbe:
    """All states of the answer, from the token after `<answer>` up to and with `<seg>` (an ablation of CORE-Seg).

    A row has states only if its last `<seg>` comes after an `<answer>`. The tag is looked for in the text of the
    tokens, since tokenizers merge its brackets with their neighbours; a token that holds the end of the tag and more
    belongs to the answer only if it does not also hold the tag's last letter.

    Args:
        token_id: id of `<seg>` in the tokenizer.
        tokenizer: the tokenizer that made the ids.
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
