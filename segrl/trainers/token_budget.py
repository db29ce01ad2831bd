"""`tokens_per_micro_batch`: the rows of an optimizer step, divided into micro-batches by the tokens that they compute.

`per_device_train_batch_size` times `gradient_accumulation_steps` still says how many rows an optimizer step has. The
settings fold both into one batch (`fold_accumulation`), so that TRL hands over all of its rows at once;
`compute_loss` divides them, runs the backward pass of every micro-batch but the last, and returns the last one's loss
with the value of the sum. TRL's own code computes every one of these losses; here each gets its weight, so that the sum
is the loss of the undivided batch.
"""

# B rows of the batch

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from segrl.errors import SegRLError

__all__ = ["NORMALIZERS", "Part", "RowCollator", "TokenBudgetMixin", "fold_accumulation", "join_rows", "select_batch"]

# What TRL divides a GRPO loss by: the rows of the micro-batch, its tokens, or a number of the whole rollout.
NORMALIZERS = {
    **dict.fromkeys(("grpo", "sapo", "dr_grpo", "luspo"), "rows"),
    "bnpo": "tokens",
    **dict.fromkeys(("dapo", "cispo", "vespo"), "rollout"),
}
_FILLERS = {"labels": -100, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "completion_mask": 0}


@dataclass(frozen=True, eq=False)
class Part:
    """One micro-batch of a batch that was divided.

    Attributes:
        inputs: Its inputs.
        rows: Share of the batch's rows: the weight of means over rows, such as dense losses.
        loss: Weight of TRL's own loss.
        tokens: Tokens that it computes.
    """

    inputs: dict[str, Any]
    rows: float
    loss: float
    tokens: int


def fold_accumulation(config: Any) -> None:
    """Make one batch of the rows of an optimizer step, if `tokens_per_micro_batch` is set; changes `config`.

    Args:
        config: Trainer settings, before transformers has read them.

    Raises:
        SegRLError: The budget is below 1, or one rollout is less than an optimizer step.
    """
    budget, steps = config.tokens_per_micro_batch, config.gradient_accumulation_steps
    if budget is None:
        return
    if budget < 1:
        raise SegRLError(f"tokens_per_micro_batch={budget}: expected a number of tokens, such as 16384, or None")
    rollouts = getattr(config, "steps_per_generation", None)
    if rollouts is not None:
        if rollouts % steps:
            raise SegRLError(
                f"tokens_per_micro_batch={budget}: steps_per_generation={rollouts} is not a multiple of "
                f"gradient_accumulation_steps={steps}, so an optimizer step takes rows of two rollouts; make it "
                f"{-(-rollouts // steps) * steps}, or leave tokens_per_micro_batch out"
            )
        config.steps_per_generation = rollouts // steps
    config.per_device_train_batch_size *= steps
    config.gradient_accumulation_steps = 1


class TokenBudgetMixin:
    """Mixin before a TRL trainer whose settings have `tokens_per_micro_batch`."""

    _part: Part | None = None  # of the loss that is computed now; None: the whole batch

    @property
    def _budget(self) -> int | None:
        return getattr(self.args, "tokens_per_micro_batch", None)  # type: ignore[attr-defined]

    @property
    def _training_budget(self) -> int | None:
        """The budget while training, None in evaluation."""
        return self._budget if self.model.training else None  # type: ignore[attr-defined]

    def _check_budget(self) -> None:
        """Refuse settings under which losses of micro-batches do not add up to that of the batch."""
        trainer: Any = self
        args = trainer.args
        reasons = {
            f"optim={str(args.optim)!r} steps within the backward pass": "lomo" in str(args.optim),
            "several GPUs in one process are not supported": args.n_gpu > 1,
            "the router's auxiliary loss depends on the division": getattr(trainer, "aux_loss_enabled", False),
            "compute_loss_func depends on the division": getattr(trainer, "compute_loss_func", None) is not None,
            "packing and padding_free fill rows themselves": getattr(args, "packing", False)
            or getattr(args, "padding_free", False),
            f"top_entropy_quantile={getattr(args, 'top_entropy_quantile', 1.0)} takes a quantile of each micro-batch": (
                getattr(args, "top_entropy_quantile", 1.0) < 1.0
            ),
            "the entropy bonus is a mean over each micro-batch": getattr(trainer, "_entropy_bonus_enabled", False),
            f"loss_type={getattr(args, 'loss_type', None)!r} is not known": (
                hasattr(trainer, "num_generations") and args.loss_type not in NORMALIZERS
            ),
        }
        for reason, holds in reasons.items():
            if self._budget is not None and holds:
                raise SegRLError(f"tokens_per_micro_batch={self._budget}: {reason}; set tokens_per_micro_batch=None")

    def _micro_batch_count(self, count: int) -> int:
        """The largest number of micro-batches that a process has: all run as many, since they gather together."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.num_processes == 1:
            return count
        return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())

    def _loss_in_parts(self, model: Any, parts: Sequence[Part], loss: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Run the backward pass of all parts but the last; return the last one's loss with the value of the sum."""
        trainer: Any = self
        metrics = _MergedMetrics(trainer._metrics["train"])
        total = torch.zeros((), device=trainer.accelerator.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            self._part = part
            try:
                with nullcontext() if last else _accumulating(trainer.accelerator, model):
                    value = loss(part.inputs)
                    if last:
                        total = total + value
                    else:
                        trainer.accelerator.backward(value)
                        total = total + value.detach()
            finally:
                self._part = None
            metrics.take(part.rows)
        metrics.merge()
        trainer._metrics["train"]["micro_batches"].append(float(len(parts)))
        trainer._metrics["train"]["micro_batch_tokens"].append(sum(part.tokens for part in parts) / len(parts))
        return total


@contextmanager
def _accumulating(accelerator: Any, model: Any) -> Iterator[None]:
    """Inside the context gradients are added up on this process, as transformers does within an accumulation."""
    before = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(False)
    engine = accelerator.distributed_type == DistributedType.DEEPSPEED  # it asks for `sync_gradients`
    try:
        with nullcontext() if engine else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(before)


class _MergedMetrics:
    """What the parts of a batch log, joined to one value a name: the mean, weighted by rows."""

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self.metrics = metrics
        self.lists = {name: (values, len(values)) for name, values in metrics.items()}
        self.read = {name: len(values) for name, values in metrics.items()}
        self.found: dict[str, list[tuple[float, float]]] = {}

    def take(self, weight: float) -> None:
        """Take what was logged since the last call."""
        for name, values in self.metrics.items():
            known = self.lists.setdefault(name, (values, 0))[0]
            if values is not known:  # a running number, which TRL replaces
                self.found.pop(name, None)
                continue
            self.found.setdefault(name, []).extend((weight, value) for value in values[self.read.get(name, 0) :])
            self.read[name] = len(values)

    def merge(self) -> None:
        """Put one value in the place of those of the parts."""
        for name, items in self.found.items():
            whole = sum(weight for weight, _ in items)
            if items and whole > 0:
                values, start = self.lists[name]
                values[start:] = [sum(weight * value for weight, value in items if weight > 0) / whole]


def select_batch(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Select rows of a batch of TRL's GRPO trainer, with their images.

    Args:
        batch: Tensors (B, ...), lists of B, flattened images with `num_images`, and numbers, which stay.
        rows: Rows, in the order of the result.
    """
    whole: Any = split_pixel_values_by_grid(dict(batch))

    def chosen(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]

    return unsplit_pixel_values_by_grid({name: chosen(value) for name, value in whole.items()})


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


class RowCollator:
    """A collator whose rows stay apart, so that micro-batches can be made of them: `{"rows": [...], "labels": ...}`.

    `labels` (B, L) are there for transformers, which counts the tokens of an optimizer step.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        rows = [self.collator([example]) for example in examples]
        return {"rows": rows, "labels": _padded([row["labels"] for row in rows], -100)}


def join_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Join batches of one row to one batch, padded on the right to its longest row.

    Args:
        rows: Batches of one row each. A row may lack inputs that others have, such as images.
        pad_token_id: Fills `input_ids`.

    Raises:
        SegRLError: An input has shapes that do not fit together.
    """
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if isinstance(values[0], list):
            joined[name] = [item for value in values for item in value]
        elif name == "input_ids" or name in _FILLERS:
            full = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
            joined[name] = _padded(full, pad_token_id if name == "input_ids" else _FILLERS[name])
        else:
            shapes = {tuple(value.shape[1:]) for value in values}
            if len(shapes) > 1:
                raise SegRLError(
                    f"tokens_per_micro_batch: rows have {name} of the shapes {sorted(shapes)}, which do not make one "
                    "batch; set tokens_per_micro_batch=None"
                )
            joined[name] = torch.cat(values)
    return joined


def _padded(values: Sequence[Tensor], filler: int) -> Tensor:
    longest = max(value.size(1) for value in values)
    return torch.cat([F.pad(value, (0, longest - value.size(1)), value=filler) for value in values])
