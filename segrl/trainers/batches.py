"""Published batch sizes, held for any number of processes: gradient accumulation computed from the global batch."""

from __future__ import annotations

import os
from typing import Any

from segrl.errors import SegRLError

__all__ = ["check_processes", "fit_accumulation"]


def fit_accumulation(config: Any, rows: int, unit: str) -> int:
    """Set `gradient_accumulation_steps` so that an optimizer step covers a number of rows over all processes.

    Args:
        config: Trainer settings, before transformers has read them; changed in place.
        rows: Rows of the trainer's batches (for GRPO completions) of one optimizer step.
        unit: Names the global batch in errors, such as "global_batch_size=16 prompts (64 completions)".

    Returns:
        The number of processes that was assumed, of the environment variable `WORLD_SIZE`; see `check_processes`.

    Raises:
        SegRLError: The processes cannot share the rows evenly, or another number of accumulation steps was asked for.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=1)
        >>> fit_accumulation(config, 64, "global_batch_size=16 prompts (64 completions)")
        1
        >>> config.gradient_accumulation_steps
        8
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each, asked = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps, rest = divmod(rows, processes * each)
    if rest or not steps:
        share = rows // processes if rows % processes == 0 else 0
        fitting = [size for size in range(1, min(share, each) + 1) if share % size == 0]
        fix = (
            f"--per_device_train_batch_size {fitting[-1]}" if fitting else f"a number of processes that divides {rows}"
        )
        raise SegRLError(
            f"{unit}: {processes} processes of per_device_train_batch_size={each} take {processes * each} at a time, "
            f"which does not divide {rows}; use {fix}"
        )
    if asked not in (1, steps):
        raise SegRLError(
            f"{unit} takes gradient_accumulation_steps={steps} with {processes} processes of {each} rows, but {asked} "
            "was asked for; pass one of the two"
        )
    config.gradient_accumulation_steps = steps
    return processes


def check_processes(config: Any, assumed: int) -> None:
    """Refuse a run whose number of processes is not the one that `fit_accumulation` assumed.

    Args:
        config: Trainer settings that transformers has read.
        assumed: What `fit_accumulation` returned.

    Raises:
        SegRLError: Another number of processes, or several GPUs in one process.
    """
    if config.world_size != assumed or config.n_gpu > 1:
        raise SegRLError(
            f"global_batch_size={config.global_batch_size} was computed for WORLD_SIZE={assumed} with one GPU each, "
            f"but there are {config.world_size} processes with {max(1, config.n_gpu)} GPUs each; start the script with "
            "accelerate launch or torchrun, one process a GPU"
        )
