"""Engines that shard weights over processes, FSDP2 and DeepSpeed ZeRO-3, with a mask head in the model.

In the loss the head runs inside the forward of the wrapped model, as any other submodule: FSDP2 has gathered it with
the root's own weights, ZeRO-3 gathers and releases it as one leaf module, since SAM reads weights past the modules that
own them. Everywhere else (masks of a rollout, files) the engine's own means make it whole: `FSDPModule.unshard`,
`deepspeed.zero.GatheredParameters`. All processes enter these together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from segrl.errors import CheckpointError, SegRLError
from segrl.heads.head_file import HEAD_WEIGHTS
from segrl.heads.mask_head import MaskHead
from segrl.models.backbone import base_instance
from segrl.models.saved_files import read_weights

__all__ = [
    "CheckUnits",
    "any_process",
    "check_units",
    "check_written_by",
    "gather_output_embeddings",
    "head_state",
    "is_sharding",
    "load_head",
    "prepare_head",
    "synced_generation",
    "whole_head",
]


def _fsdp_version(accelerator: Any) -> int:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return 0 if plugin is None else int(getattr(plugin, "fsdp_version", 1))


def _is_zero3(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def is_sharding(accelerator: Any) -> bool:
    """Whether the engine keeps a part of the weights on each process: FSDP, or ZeRO-3."""
    return _fsdp_version(accelerator) > 0 or _is_zero3(accelerator)


def any_process(accelerator: Any, value: bool) -> bool:
    """Whether `value` is true on any process; all must call this. Without a sharding engine: on this process."""
    if not is_sharding(accelerator):
        return value
    return bool(accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum") > 0)


def prepare_head(accelerator: Any, head: MaskHead) -> None:
    """Tell the engine, before it takes the model, how the head is to be sharded.

    Raises:
        SegRLError: FSDP's first version, whose flat parameters the head cannot share.
    """
    if _fsdp_version(accelerator) == 1:
        raise SegRLError(
            "fsdp_version=1: a mask head trains on FSDP2 only; set fsdp_version: 2 in the accelerate config "
            '(fsdp_config={"version": 2} in the trainer settings)'
        )
    if is_sharding(accelerator):
        head.hold_fingerprint()
    if _is_zero3(accelerator):
        from deepspeed.utils import set_z3_leaf_modules  # type: ignore[import-not-found]

        set_z3_leaf_modules(head, [MaskHead])


def check_written_by(accelerator: Any, folder: str) -> None:
    """Refuse a checkpoint of another engine, or of another number of processes where that cannot be read.

    FSDP's checkpoints are read by any number of processes.

    Raises:
        CheckpointError: Says which engine wrote it and which one is to read it.
    """
    written, now = _written_by(Path(folder)), _engine(accelerator)
    if written != now:
        raise CheckpointError(
            f"checkpoint {folder!r} was written by {written}, and this run has {now}; go on with what wrote it, or "
            "start a new run from its weights"
        )


def _written_by(folder: Path) -> str:
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return "FSDP with FULL_STATE_DICT"
    if any(folder.glob("pytorch_model_fsdp_*")):
        return "FSDP with SHARDED_STATE_DICT"
    shards = len(list(folder.glob("global_step*/*_optim_states.pt")))
    if not shards:
        return "no engine that shards"
    third = any(folder.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
    return f"DeepSpeed ZeRO {'stage 3' if third else 'stage 1 or 2'} on {shards} processes"


def _engine(accelerator: Any) -> str:
    if _fsdp_version(accelerator):
        kind = str(accelerator.state.fsdp_plugin.state_dict_type)
        return f"FSDP with {'FULL' if 'FULL' in kind else 'SHARDED'}_STATE_DICT"
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or not plugin.zero_stage:
        return "no engine that shards"
    stage = "stage 3" if plugin.zero_stage == 3 else "stage 1 or 2"
    return f"DeepSpeed ZeRO {stage} on {accelerator.num_processes} processes"


def check_units(head: MaskHead, model: Any) -> None:
    """Refuse an engine's configuration that shards parts of the head apart from the model.

    Args:
        head: The head.
        model: The wrapped model.

    Raises:
        SegRLError: Parts of the head are units of FSDP2 on their own, of which processes would gather different
            numbers, or are not sharded at all, so that processes would train different ones.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return
    units = [name or "the whole head" for name, module in head.named_modules() if isinstance(module, FSDPModule)]
    if units:
        raise SegRLError(
            f"FSDP shards {', '.join(units[:3])} of the mask head apart from its model, and processes would gather it "
            "at different times; use fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP with "
            "fsdp_transformer_layer_cls_to_wrap naming layers of the language model only (or leave that out)"
        )
    model.reshard()
    alone = [name for name, p in head.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if alone:
        raise SegRLError(
            f"FSDP leaves {len(alone)} trained parameters of the mask head out ({alone[0]}, ...), so each process "
            "would train its own; take the head out of fsdp_ignored_modules"
        )


class CheckUnits(TrainerCallback):
    """Look at how an engine has sharded the head, when it has the model and before the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        check_units(self.trainer.mask_head, self.trainer.model_wrapped)


@contextmanager
def whole_head(accelerator: Any, model: Any, head: MaskHead | None) -> Iterator[None]:
    """Inside the context the head's weights are whole on every process. All must enter it.

    Args:
        accelerator: The trainer's.
        model: The wrapped model.
        head: The head; without one nothing is gathered.
    """
    from torch.distributed.fsdp import FSDPModule

    if head is None:
        yield
    elif _is_zero3(accelerator):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            yield
    elif isinstance(model, FSDPModule):
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    else:
        yield


def gather_output_embeddings(model: Any) -> None:
    """Make the output embeddings of a model on FSDP2 whole before a loss. All processes call this.

    TRL's losses read their weight past the module. Where no hook has gathered it (those of vision-language models are a
    unit of their own), TRL 1.16 calls `full_tensor` on it, whose backward keeps each process's own gradient instead of
    the mean.
    """
    from torch.distributed.fsdp import FSDPModule

    layer = model.get_output_embeddings() if isinstance(model, FSDPModule) else None  # type: ignore[attr-defined]
    if isinstance(layer, FSDPModule):
        layer.unshard()


def head_state(accelerator: Any, model: Any, head: MaskHead) -> dict[str, Tensor]:
    """Return the head's whole weights on the CPU of the main process, nothing on others. All must call this."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Tensor] = {}
    with whole_head(accelerator, model, head):
        for name, value in head.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if accelerator.is_main_process:
                state[name] = whole.detach().cpu().clone()
    return state


def load_head(accelerator: Any, model: Any, head: MaskHead, folder: str) -> None:
    """Load the file of a head into its weights, sharded or not. All processes must call this.

    Raises:
        CheckpointError: See `MaskHead.load_weights`.
    """
    from torch.distributed.fsdp import FSDPModule

    if _is_zero3(accelerator):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(list(head.parameters()), modifier_rank=0):
            head.load_weights(folder)
    elif isinstance(model, FSDPModule):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        root: Any = model
        (prefix,) = (name for name, module in root.named_modules() if module is head)
        state = read_weights(Path(folder) / HEAD_WEIGHTS) if accelerator.is_main_process else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(root, {f"{prefix}.{name}": value for name, value in state.items()}, options=options)
    else:
        head.load_weights(folder)


@contextmanager
def synced_generation(accelerator: Any, model: Any) -> Iterator[None]:
    """Inside the context, `generate` goes on until all processes are done, as each forward gathers weights.

    transformers does this for ZeRO-3 and for models that it has sharded itself, not for those of accelerate's FSDP2.
    """
    if _fsdp_version(accelerator) != 2:
        yield
        return
    base: Any = base_instance(accelerator.unwrap_model(model))
    known = getattr(base, "_is_fsdp_managed_module", False)
    base._is_fsdp_managed_module = True
    try:
        yield
    finally:
        base._is_fsdp_managed_module = known
