"""An estimate of the memory that a step of training takes on a GPU, from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["MemoryEstimate", "StepSizes", "estimate_memory", "read_sizes"]

_STATES = {"sgd": 0, "adafactor": 0.1, "lomo": 0, "8bit": 0.5}  # bytes of an optimizer's state for a byte of parameters
_ADAM = 2.0


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of a model and of a micro-batch.

    Attributes:
        weights: Bytes of all parameters.
        trained: Bytes of those that are trained.
        layers: Layers of the language model.
        hidden: Width of its states.
        intermediate: Width inside its feed-forward parts.
        cache_width: Numbers that the cache of keys and values holds for a token of a layer.
        width: Bytes of a number in computations: 2 under bfloat16, else 4.
        lora: Whether low-rank adapters are trained, which compute in single precision.
        checkpointing: Whether layers are computed again in the backward pass.
        tokens: Of a micro-batch in the loss.
        generated: Tokens of a batch that is generated at once, prompts included; 0 without generation.
        reference: Bytes of a second model for the KL term.
        states: Bytes of an optimizer's state for a byte of trained parameters.
    """

    weights: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    cache_width: int
    width: int
    lora: bool
    checkpointing: bool
    tokens: int
    generated: int = 0
    reference: int = 0
    states: float = _ADAM


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    generation: int

    @property
    def peak(self) -> int:
        """The largest sum that is there at once: the loss and generation are not."""
        return self.weights + self.optimizer + max(self.gradients + self.activations, self.generation)

    def text(self) -> str:
        """Return the parts in gigabytes (10^9 bytes)."""
        parts = {
            **{"weights": self.weights, "optimizer": self.optimizer, "gradients": self.gradients},
            **{"activations": self.activations, "cache while generating": self.generation},
        }
        said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        return f"about {self.peak / 1e9:.1f} GB: {said}"


def estimate_memory(sizes: StepSizes) -> MemoryEstimate:
    """Estimate the memory of a training step, without what a machine's libraries take and what caches may hold.

    In the loss, each layer keeps its input (with checkpointing) or all that its backward pass needs; one layer is
    computed at a time. TRL computes logits in chunks, which are small beside that.

    Args:
        sizes: Of model and micro-batch.

    Example:
        >>> small = dict(layers=2, hidden=8, intermediate=16, cache_width=4, width=4, lora=False, checkpointing=True)
        >>> estimate_memory(StepSizes(weights=1000, trained=100, tokens=0, **small)).peak
        1300
    """
    inside = sizes.width * (3 * sizes.intermediate + 12 * sizes.hidden)
    if sizes.lora:
        inside += 4 * (sizes.intermediate + 6 * sizes.hidden)
    kept = sizes.layers * sizes.hidden * sizes.width + inside if sizes.checkpointing else sizes.layers * inside
    return MemoryEstimate(
        weights=sizes.weights + sizes.reference,
        gradients=sizes.trained,
        optimizer=round(sizes.trained * sizes.states),
        activations=kept * sizes.tokens,
        generation=sizes.generated * sizes.layers * sizes.cache_width * sizes.width,
    )


def read_sizes(model: nn.Module, config: Any, *, prompt: int, answer: int, shares_prompt: bool) -> StepSizes:
    """Return the sizes of a model and of a micro-batch of its trainer.

    Args:
        model: As it is trained, with adapters and mask head.
        config: Settings of the trainer.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer, in stage 2 the longest that is generated.
        shares_prompt: Whether a prompt is computed once for its answers.
    """
    found: Any = model
    text = found.config.get_text_config()
    lora = hasattr(model, "peft_config")
    half = bool(config.bf16 or config.fp16)
    parameters = list(model.parameters())
    # adapters are trained in single precision beside a model in half precision
    sizes = [p.numel() * (4 if p.requires_grad and lora else p.element_size()) + _scales(p) for p in parameters]
    trained = sum(size for size, p in zip(sizes, parameters, strict=True) if p.requires_grad)
    rows, group = config.per_device_train_batch_size, getattr(config, "num_generations", None)
    prompts = rows // group if group and shares_prompt else rows
    optimizer = str(getattr(config.optim, "value", config.optim))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    at_once = rows * (getattr(config, "steps_per_generation", None) or 1)
    return StepSizes(
        weights=sum(sizes),
        trained=trained,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        cache_width=2 * heads * head_size,
        width=2 if half else 4,
        lora=lora,
        checkpointing=bool(config.gradient_checkpointing),
        tokens=prompts * prompt + rows * answer,
        generated=at_once * (prompt + answer) if group else 0,
        reference=sum(sizes) if group and config.beta and not lora else 0,
        states=_states(optimizer),
    )


def _scales(parameter: nn.Parameter) -> int:
    """Bytes of the scales beside a weight in 4 bit, which are no parameters."""
    absmax = getattr(getattr(parameter, "quant_state", None), "absmax", None)
    return 0 if absmax is None else absmax.numel() * absmax.element_size()


def _states(optimizer: str) -> float:
    return next((size for name, size in _STATES.items() if name in optimizer), _ADAM)
