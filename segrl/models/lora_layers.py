"""LoRA in the precision of the layer that it adapts: `fuse_lora`.

PEFT keeps adapters in float32 under a bfloat16 model, casts what goes into them and what comes out, and scales and
adds in operations of their own. Here the float32 matrices stay what an optimizer trains, a checkpoint holds and
gradients go to (master weights), and a layer computes with copies of them in its own precision, which are made when the
matrices have changed. Scaling is part of the copy, and the sums are part of the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from segrl.models.backbone import is_sharded

__all__ = ["forget_copies", "fuse_lora"]

_COPIES = "_segrl_lora_copies"  # attribute of a layer
_STEPS = [0]  # of all optimizers: fused ones change weights in ways that PyTorch does not count


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


def fuse_lora(model: Any) -> str | None:
    """Compute the LoRA layers of a model in the precision of their base layers, without casts.

    Values are PEFT's up to rounding: `base(x) + scaling * B(A(dropout(x)))`. A call that is not of this form (adapters
    off, merged or several at once, DoRA and other variants, a base layer that is quantized or trained, autocast to
    another precision) is PEFT's own.

    Args:
        model: A PEFT model, or one that holds its layers.

    Returns:
        None, or the reason why nothing can be gained; then nothing is changed.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from segrl.models import tiny_causal_lm
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> fuse_lora(model)
        'Qwen2ForCausalLM has no LoRA layers'
        >>> model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        >>> fuse_lora(model), sum(isinstance(module, FusedLoraLinear) for module in model.modules())
        (None, 2)
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return f"{type(model).__name__} has no LoRA layers"
    if is_sharded(model):
        return "the weights are sharded over processes"
    linear = [layer for layer in layers if type(layer) in (LoraLinear, FusedLoraLinear)]
    plain = [layer for layer in linear if type(layer.get_base_layer()) is nn.Linear and not layer.fan_in_fan_out]
    if not plain:
        return f"LoRA of {type(model).__name__} adapts no plain linear layers, but {type(layers[0]).__name__} ones"
    for layer in plain:
        layer.__class__ = FusedLoraLinear
    return None


def forget_copies(model: Any) -> None:
    """Let the LoRA layers of `fuse_lora` read their matrices anew in the next call.

    They notice steps of optimizers and changes that PyTorch counts; this is for writing through `.data` beside them.

    Args:
        model: A model after `fuse_lora`; of another one nothing is forgotten.

    Example:
        >>> from segrl.models import tiny_causal_lm
        >>> forget_copies(tiny_causal_lm(layers=1)[0])
    """
    for module in model.modules():
        module.__dict__.pop(_COPIES, None)


class FusedLoraLinear(LoraLinear):
    """A LoRA layer of PEFT whose usual call, (..., in) to (..., out), is one function; see `fuse_lora`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._adapter_of_call()
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        dtype = base.weight.dtype
        if x.dtype != dtype:
            if not torch.is_autocast_enabled(x.device.type):
                return super().forward(x)
            x = x.to(dtype)
        factors: Any = (self.lora_A[name], self.lora_B[name])
        down, up = (factor.weight for factor in factors)
        scaling = self.scaling[name]
        copies = self._copies(name, down, up, scaling, dtype)
        dropped = self.lora_dropout[name](x)
        return _LoraProduct.apply(x, dropped, base.weight, base.bias, down, up, *copies, scaling)

    def _adapter_of_call(self) -> str | None:
        """Name of the one adapter, if this call is of the usual form."""
        base: Any = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or names[0] in self.lora_variant:
            return None
        own = base.weight
        kind = own.device.type
        if own.requires_grad or (base.bias is not None and base.bias.requires_grad) or self.lora_bias[names[0]]:
            return None
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != own.dtype:
            return None
        return names[0]

    def _copies(self, name: str, down: Tensor, up: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and scaling * B in the base layer's precision, made again when they have changed."""
        if torch.compiler.is_compiling():  # where casts are fused with what is around them
            return down.detach().to(dtype), (up.detach() * scaling).to(dtype)
        state = (down.data_ptr(), up.data_ptr(), down._version, up._version, _STEPS[0], scaling, dtype)
        kept: dict[str, Any] = vars(self).setdefault(_COPIES, {})  # type: ignore[attr-defined]
        if name not in kept or kept[name][0] != state:
            with torch.inference_mode(False):  # a backward cannot keep what was made in it
                kept[name] = (state, (down.detach().to(dtype, copy=True), (up.detach() * scaling).to(dtype)))
        return kept[name][1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _COPIES}


class _LoraProduct(torch.autograd.Function):
    """`x @ W.T + bias + dropped @ A.T @ (scaling * B).T`, of which x, dropped, A and B have gradients.

    x and dropped are (..., in), W (out, in), A (r, in), B (out, r). Only `low_down` and `low_up`, A and scaling * B in
    W's precision, are computed with; gradients go to A and B (`down`, `up`). No rows give no rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        low_down: Tensor,
        low_up: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = dropped.reshape(-1, dropped.shape[-1])
        inner = rows @ low_down.T
        result = functional.linear(x, weight, bias).view(-1, weight.shape[0]).addmm_(inner, low_up.T)
        ctx.save_for_backward(rows, inner, weight, low_down, low_up)
        ctx.scaling, ctx.same = scaling, dropped is x
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        rows, inner, weight, low_down, low_up = ctx.saved_tensors
        (gradient,) = gradients
        shape, flat = (*gradient.shape[:-1], weight.shape[1]), gradient.reshape(-1, weight.shape[0])
        of_x, of_dropped, *_, of_down, of_up = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:6])
        of_inner = flat @ low_up
        x = dropped = None
        if of_x:
            x = flat @ weight
            if ctx.same:
                x.addmm_(of_inner, low_down)
            x = x.view(shape)
        if of_dropped and not ctx.same:
            dropped = (of_inner @ low_down).view(shape)
        down = of_inner.T @ rows if of_down else None
        up = torch.empty_like(low_up).addmm_(flat.T, inner, beta=0, alpha=ctx.scaling) if of_up else None
        return x, dropped, None, None, down, up, None, None, None
