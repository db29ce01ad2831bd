"""`compile_layers` of the trainers: compiled decoder layers, or one warning that says why not."""

from __future__ import annotations

import warnings
from typing import Any

from segrl.errors import SegRLError, unknown_name
from segrl.sharing.compiling import compile_layers

__all__ = ["compile_trained_layers"]


def compile_trained_layers(trainer: Any) -> bool:
    """Compile the decoder layers of a trainer's policy and reference model, if its settings ask for it.

    Args:
        trainer: A trainer of TRL, after its construction.

    Returns:
        Whether they are compiled.

    Raises:
        SegRLError: `torch_compile` is set as well, or there is no such backend.
    """
    args = trainer.args
    if not getattr(args, "compile_layers", False):
        return False
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
            stacklevel=4,
        )
    return reason is None
