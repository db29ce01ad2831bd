"""`fuse_lora` and `compile_layers` of the trainers: faster layers, or one warning that says why not."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from segrl.errors import SegRLError, unknown_name
from segrl.models.lora_layers import forget_copies, fuse_lora
from segrl.sharing.compiling import compile_layers

__all__ = ["leave_unpacked", "prepare_layers"]


def prepare_layers(trainer: Any) -> None:
    """Fuse LoRA and compile the decoder layers of a trainer's policy and reference model, as its settings ask.

    Args:
        trainer: A trainer of TRL, after its construction.

    Raises:
        SegRLError: `compile_layers` and `torch_compile` are set, or there is no such backend.
    """
    if getattr(trainer.args, "fuse_lora", False):
        _fuse(trainer)
    if getattr(trainer.args, "compile_layers", False):
        _compile(trainer)


def leave_unpacked(model: Any) -> None:
    """Keep layers in 4 bit as they are stored, on processors for which bitsandbytes packs them anew.

    It does so in the first pass without gradients, such as a rollout's, where there is AVX512-BF16; a pass with
    gradients of the packed layers then fails (bitsandbytes 0.50).

    Args:
        model: A model that is going to be trained.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


class _FreshCopies(TrainerCallback):
    """TRL's `sync_ref_model` writes through `.data`, which LoRA layers do not notice."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        forget_copies(self.trainer.model)


def _fuse(trainer: Any) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    reason = "FSDP and DeepSpeed keep weights of their own" if sharded else fuse_lora(trainer.model)
    if reason is None:
        trainer.add_callback(_FreshCopies(trainer))
        return
    warnings.warn(
        f"fuse_lora: {reason}. LoRA layers, if any, run as PEFT's; fuse_lora=False says that this is meant.",
        stacklevel=5,
    )


def _compile(trainer: Any) -> None:
    args = trainer.args
    import torch.compiler  # slow to import

    backends = torch.compiler.list_backends(exclude_tags=())
    if args.compile_backend not in backends:
        raise unknown_name("backend of torch.compile", args.compile_backend, backends)
    if args.torch_compile:
        raise SegRLError("torch_compile=True compiles the whole model, compile_layers=True its layers; set one of them")
    reason = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        reason = "layers that FSDP or DeepSpeed shards have not been tried"
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None and reason is None:
            reason = compile_layers(trainer.accelerator.unwrap_model(model), args.compile_backend)
    if reason is not None:
        warnings.warn(
            f"compile_layers: {reason}. The layers run uncompiled; compile_layers=False says that this is meant.",
            stacklevel=5,
        )
