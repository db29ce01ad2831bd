"""From recorded states to predictions with masks: what a rollout and the inference API share.

B rows, T completion tokens, D language-model width, h mask side, H x W original pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import Recording, SegInput
from segrl.predictions.prediction import Prediction, Status


def generation_states(recording: Recording, ids: Sequence[Sequence[int]]) -> Tensor | None:
    """States "B T D" of the completion tokens `ids` from a generation recorded with `last_only=True`.

    Token t's state is the backbone's output when t was fed back. The last token of the longest completion never was,
    so T is one less than its length; what comes before the fed tokens is the prompt. None if nothing was fed back.
    """
    fed = max(len(row) for row in ids) - 1
    return torch.cat(recording.calls[-fed:], dim=1) if fed > 0 else None


def pad_ids(ids: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """Completions as one tensor "B T", filled with -1."""
    longest = max(len(row) for row in ids)
    return torch.tensor([list(row) + [-1] * (longest - len(row)) for row in ids], device=device)


@torch.no_grad()
def add_masks(
    head: MaskHead,
    predictions: Sequence[Prediction],
    ids: Tensor,
    states: Tensor | None,
    inputs: Sequence[SegInput],
    sizes: Sequence[tuple[int, int]],
    *,
    probabilities: bool = False,
) -> list[Prediction]:
    """The predictions with masks in original pixels, decoded in one batched call.

    Args:
        head: the mask head.
        predictions: one per row, parsed from the text.
        ids: completion tokens "B T", -1 where there is none (`pad_ids`).
        states: backbone states of these tokens "B T' D". T' may be T - 1: a `<seg>` that is the last token of a
            cut-off completion was never fed back, its answer is not closed, and it gets no mask.
        inputs: the segmenter's input per row; the same object for the same image.
        sizes: (H, W) of each row's mask.
        probabilities: whether predictions also carry the foreground probabilities of their masks.

    Returns:
        Predictions with `mask`, or without one and with `has_seg=False` where the token itself is not in the
        completion, even if its letters are.
    """
    found: dict[int, np.ndarray] = {}
    if states is not None:
        index, valid = head.probe(ids.clamp(min=0), ids >= 0)
        valid = valid & (index < states.size(1))
        rows = valid.any(1).nonzero()[:, 0]
        if len(rows):
            position = index[rows].clamp(max=states.size(1) - 1).unsqueeze(-1).expand(-1, -1, states.size(-1))
            chosen = states[rows].gather(1, position)
            logits = head(chosen, valid[rows], [inputs[n] for n in rows.tolist()])
            full = masks_at(logits, [sizes[n] for n in rows.tolist()], probabilities=probabilities)
            found = dict(zip(rows.tolist(), full, strict=True))
    return [_settled(prediction, found.get(n)) for n, prediction in enumerate(predictions)]


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


def _settled(prediction: Prediction, found: np.ndarray | None) -> Prediction:
    """The prediction with a mask, which is given as such or as probabilities."""
    if found is not None:
        return prediction.with_mask(found) if found.dtype == np.bool_ else prediction.with_mask(found > 0.5, found)
    if not prediction.has_seg:
        return prediction
    status = Status.NO_SEG_TOKEN if prediction.status is Status.VALID else prediction.status
    return replace(prediction, has_seg=False, status=status)
