"""Auxiliary dense losses: named terms with a weight, on mask logits that a policy or text forward gave for free.

N masks, B rows of the micro-batch, h mask side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from segrl import losses
from segrl.errors import SegRLError, unknown_name
from segrl.heads.mask_head import MaskRequest

_NAMED: dict[str, Callable[..., Tensor]] = {
    "dice_ce": losses.dice_ce,
    "dice": losses.dice,
    "cross_entropy": losses.cross_entropy,
    "focal": losses.focal,
}


class DenseLoss:
    """One dense term of the objective: `weight * mean over rows of fn(mask_logits, target)`.

    Args:
        name: the term's name in the logs; without `fn` one of `dice_ce`, `dice`, `cross_entropy`, `focal`.
        weight: factor of the term; 0 logs it without training on it.
        fn: `fn(mask_logits "N h h", target "N h h" in 0..1) -> "N"`, a function or an `nn.Module` without parameters
            of its own.
    """

    def __init__(self, name: str, weight: float = 1.0, fn: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        if fn is None and name not in _NAMED:
            raise unknown_name("dense loss", name, _NAMED)
        if not 0 <= weight < math.inf:
            raise SegRLError(f"DenseLoss({name!r}, weight={weight}): expected a finite weight of at least 0")
        self.name, self.weight, self.fn = name, float(weight), fn if fn is not None else _NAMED[name]

    def __call__(self, mask_logits: Tensor, target: Tensor) -> Tensor:
        values = self.fn(mask_logits, target)
        if values.shape != mask_logits.shape[:1]:
            raise SegRLError(
                f"dense loss {self.name!r} returned shape {tuple(values.shape)} for {len(mask_logits)} masks; "
                f"expected one value per mask, shape ({len(mask_logits)},)"
            )
        return values

    def __repr__(self) -> str:
        return f"DenseLoss({self.name!r}, weight={self.weight})"


def check_dense_losses(dense_losses: Iterable[DenseLoss] | None) -> list[DenseLoss]:
    """The list, after checking that all are `DenseLoss` and that no two share a name."""
    checked = list(dense_losses or [])
    for item in checked:
        if not isinstance(item, DenseLoss):
            raise SegRLError(f"dense_losses: expected DenseLoss objects such as DenseLoss('dice_ce'), got {item!r}")
    names = [item.name for item in checked]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise SegRLError(f"dense_losses: the names {sorted(doubled)} occur twice; give each term its own name")
    return checked


def dense_terms(dense_losses: Sequence[DenseLoss], request: MaskRequest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raw terms, and detached statistics of the masks.

    A term is the **sum over the rows with a mask, divided by all B rows**: a row without `<seg>` counts as zero. So
    the term of a batch is the mean of the terms of its micro-batches and ranks, however the rows with masks fall.

    Returns:
        `{name: scalar}` with gradients, and `{"dice": mean Dice of the decoded masks or None, "masks": N / B}`.
    """
    logits, rows = request.logits, request.rows
    if logits is None or rows is None:
        raise SegRLError("the forward pass decoded no masks: the model's backbone was not called")
    targets = [request.inputs[n].target for n in rows.tolist()]
    stacked = [t for t in targets if t is not None]
    if len(stacked) < len(targets):
        raise SegRLError("a dense loss needs a target mask for every row; some rows have none")
    target = torch.stack(stacked).to(logits.device, torch.float32) / 255 if stacked else logits.float().detach()
    total = len(request.index)
    terms = {item.name: item(logits.float(), target).sum() / total for item in dense_losses}
    with torch.no_grad():
        predicted, true = (logits > 0).flatten(1), (target > 0.5).flatten(1)
        both = (predicted & true).sum(1)
        size = predicted.sum(1) + true.sum(1)
        overlap = torch.where(size > 0, 2 * both / size.clamp(min=1), 1.0)
    return terms, {"dice": overlap.mean() if len(rows) else None, "masks": len(rows) / max(total, 1)}
