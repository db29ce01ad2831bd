"""Dense losses: named terms with a weight, on masks that a forward pass of policy or text loss decodes anyway."""

# N masks, B rows of the micro-batch, h mask side

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segrl import losses
from segrl.errors import SegRLError, unknown_name
from segrl.heads.requests import MaskRequest
from segrl.registry import Registry

__all__ = ["DENSE_LOSSES", "DenseLoss", "check_dense_losses", "dense_terms", "register_dense_loss"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
Item = TypeVar("Item", bound=Callable[..., Any])

DENSE_LOSSES = Registry("dense loss", "segrl.dense_losses", preload=("segrl.heads",))


def register_dense_loss(name: str) -> Callable[[Item], Item]:
    """Register a function `fn(mask_logits, target) -> (N,)` under a name for `DenseLoss`.

    Raises:
        SegRLError: The name is taken, or it cannot be called.

    Example:
        >>> @register_dense_loss("area")
        ... def area(mask_logits, target):
        ...     return (mask_logits.sigmoid().mean((1, 2)) - target.mean((1, 2))).abs()
        >>> DenseLoss("area")(torch.zeros(1, 4, 4), torch.ones(1, 4, 4))
        tensor([0.5000])
    """
    return DENSE_LOSSES.register(name)


for _loss in (losses.dice_ce, losses.dice, losses.cross_entropy, losses.focal):
    register_dense_loss(_loss.__name__)(_loss)


class DenseLoss:
    """One dense term of the objective: `weight * mean over rows of fn(output, target)`.

    Args:
        loss: A name (`dice_ce`, `dice`, `cross_entropy`, `focal`, or a registered one), "module:function", or a
            function or `nn.Module` without parameters of its own,
            `fn(mask_logits (N, h, h), target (N, h, h) in 0..1) -> (N,)`. With `fn`, the term's name.
        weight: Factor of the term; 0 logs it without training on it.
        fn: The function, where the term has a name of its own.
        on: "mask" for the mask logits, or the name of an auxiliary output of the adapter, which the function then gets
            as it is, with the target still (N, h, h).

    Attributes:
        name: The term's name in the logs; a function's own name.

    Raises:
        UnknownNameError: No such loss.
        SegRLError: A weight below 0 or not finite, or a function without a name.

    Example:
        >>> term = DenseLoss("dice", weight=0.5)
        >>> term(torch.full((1, 2, 2), 30.0), torch.ones(1, 2, 2)), term.weight
        (tensor([0.]), 0.5)
        >>> DenseLoss(losses.focal, on="heatmap")
        DenseLoss('focal', weight=1.0, on='heatmap')
    """

    def __init__(
        self,
        loss: str | LossFunction,
        weight: float = 1.0,
        fn: str | LossFunction | None = None,
        *,
        on: str = "mask",
    ) -> None:
        found = loss if fn is None else fn
        self.fn: LossFunction = DENSE_LOSSES.get(found) if isinstance(found, str) else found
        self.name = loss.rpartition(":")[2] if isinstance(loss, str) else _name_of(loss)
        if not 0 <= weight < math.inf:
            raise SegRLError(f"DenseLoss({self.name!r}, weight={weight}): expected a finite weight of at least 0")
        self.weight, self.on = float(weight), on

    def __call__(self, mask_logits: Tensor, target: Tensor) -> Tensor:
        """Return (N,) values for `mask_logits`, the output that `on` names, and `target` (N, h, h)."""
        values = self.fn(mask_logits, target)
        if values.shape != mask_logits.shape[:1]:
            raise SegRLError(
                f"dense loss {self.name!r} returned shape {tuple(values.shape)} for {len(mask_logits)} masks; "
                f"expected one value per mask, shape ({len(mask_logits)},)"
            )
        return values

    def __repr__(self) -> str:
        return f"DenseLoss({self.name!r}, weight={self.weight}{'' if self.on == 'mask' else f', on={self.on!r}'})"


def _name_of(fn: Any) -> str:
    name = getattr(fn, "__name__", type(fn).__name__ if isinstance(fn, nn.Module) else "")
    if not callable(fn) or not name.isidentifier():
        raise SegRLError(f"DenseLoss({fn!r}): expected a name or a named function; write DenseLoss('name', fn=...)")
    return name


def check_dense_losses(dense_losses: Iterable[DenseLoss] | None) -> list[DenseLoss]:
    """Return the list, after checking that all are `DenseLoss` and that no two share a name."""
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
    """Compute raw terms, and detached statistics of the masks.

    A term is the **sum over the rows with a mask, divided by all B rows**: a row without `<seg>` counts as zero. So
    the term of a batch is the mean of the terms of its micro-batches and ranks, however the rows with masks fall.

    Returns:
        `{name: scalar}` with gradients, and `{"dice": mean Dice of the decoded masks or None, "masks": N / B}`.
    """
    logits, rows = request.logits, request.rows
    if logits is None or rows is None:
        raise SegRLError("the forward pass decoded no masks: the model's backbone was not called")
    targets = [item.target for n in rows.tolist() if (item := request.inputs[n]) is not None]
    stacked = [t for t in targets if t is not None]
    if len(stacked) < len(targets):
        raise SegRLError("a dense loss needs a target mask for every row; some rows have none")
    target = torch.stack(stacked).to(logits.device, torch.float32) / 255 if stacked else logits.float().detach()
    total = len(request.index)
    outputs = {"mask": logits, **request.aux}
    terms = {item.name: item(_output(item, outputs), target).sum() / total for item in dense_losses}
    with torch.no_grad():
        predicted, true = (logits > 0).flatten(1), (target > 0.5).flatten(1)
        both = (predicted & true).sum(1)
        size = predicted.sum(1) + true.sum(1)
        overlap = torch.where(size > 0, 2 * both / size.clamp(min=1), 1.0)
    return terms, {"dice": overlap.mean() if len(rows) else None, "masks": len(rows) / max(total, 1)}


def _output(item: DenseLoss, outputs: dict[str, Tensor]) -> Tensor:
    if item.on not in outputs:
        raise unknown_name(f"output of the adapter for {item!r}", item.on, outputs)
    return outputs[item.on].float()
