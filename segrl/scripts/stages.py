"""Stages of a run: trained to their end and saved, found again, and what their trainers have logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import PartialState

from segrl.errors import CheckpointError, SegRLError
from segrl.models.saved_files import read_object
from segrl.reports.history import write_curves
from segrl.reports.results_file import write_results
from segrl.reports.run_files import CONTROL, HISTORY, MARKER, STAGE1
from segrl.trainers.mask_head_mixin import head_detached

__all__ = [
    "CONTROL",
    "HISTORY",
    "MARKER",
    "STAGE1",
    "began_without_model",
    "find_stage1",
    "is_finished",
    "parameter_counts",
    "read_history",
    "save_start",
    "stage_time",
    "steps_as_long",
    "train_and_save",
]


def train_and_save(trainer: Any) -> None:
    """Train a stage to its end and save it in the trainer's `output_dir`, on every process.

    The checkpoint that `resume_from_checkpoint` of the trainer's settings names is continued.

    Args:
        trainer: A trainer of segrl, TRL or transformers.
    """
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history: Any = [{key: _finite(value) for key, value in entry.items()} for entry in trainer.state.log_history]
        if history:
            history[-1] |= parameter_counts(trainer.model)
        write_curves(history, folder)
        write_results(folder / HISTORY, history)  # last: `is_finished` looks for it
    trainer.accelerator.wait_for_everyone()


def parameter_counts(model: Any) -> dict[str, int]:
    """Return the numbers of all parameters of a model and of those that are trained.

    Example:
        >>> import torch
        >>> parameter_counts(torch.nn.Linear(3, 2).requires_grad_(False))
        {'parameters': 8, 'trainable_parameters': 0}
    """
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "parameters": sum(count for count, _ in counts),
        "trainable_parameters": sum(count for count, trains in counts if trains),
    }


def save_start(model: Any, processor: Any, folder: Path) -> None:
    """Save a model that was loaded from nowhere, in `<output_dir>/start`, and name this folder in its config.

    TRL loads the reference model of its KL term by that name. A model that was loaded has one, and is left alone.

    Args:
        model: The language model; a mask head on it is left out, since no reference model has one.
        processor: Its processor.
        folder: The run's `output_dir`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> model, processor = tiny_qwen2_5_vl()
        >>> with TemporaryDirectory() as home:
        ...     save_start(model, processor, Path(home))
        ...     Path(model.config._name_or_path).name, Path(home, "start", "config.json").is_file()
        ('start', True)
    """
    if model.config._name_or_path:
        return
    state, start = PartialState(), folder / "start"
    if state.is_main_process:
        with head_detached(model):
            model.save_pretrained(start)
        processor.save_pretrained(start)
    state.wait_for_everyone()
    model.config._name_or_path = str(start)


def is_finished(folder: Path) -> bool:
    """Return whether `train_and_save` has trained a stage to its end and saved it in `folder`.

    Example:
        >>> is_finished(Path("no/such/run"))
        False
    """
    return (folder / HISTORY).is_file()


def began_without_model(run: Path) -> bool:
    """Return whether the run in a folder, or the run whose stage it holds, was begun without `--model`.

    Example:
        >>> began_without_model(Path("no/such/run"))
        False
    """
    markers = [folder / MARKER for folder in (run, run.absolute().parent) if (folder / MARKER).is_file()]
    if not markers:
        return False
    asked = read_object(markers[0]).get("arguments")
    return isinstance(asked, dict) and "model" in asked and not asked["model"]


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return what the trainer of a finished stage has logged, oldest first; empty if there is no file.

    Raises:
        CheckpointError: The file is damaged.

    Example:
        >>> read_history(Path("no/such/run"))
        []
    """
    path = folder / HISTORY
    if not path.is_file():
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); train the stage again") from error
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path}: expected a list of objects; train the stage again")
    return history


def stage_time(folder: Path) -> tuple[float, int]:
    """Return seconds and steps of a finished stage, as its trainer logged them.

    Raises:
        SegRLError: It logged none; the folder is named.
    """
    last = next((entry for entry in reversed(read_history(folder)) if "train_runtime" in entry), None)
    if last is None:
        raise SegRLError(f"--control: {str(folder)!r} does not say how long it took; train it again, or drop the flag")
    return float(last["train_runtime"]), int(last["step"])


def steps_as_long(stage1: Path, stage2: Path) -> int:
    """Return how many steps of stage 1 take as long as stage 2 took, at least 1.

    Raises:
        SegRLError: One of them logged no time.
    """
    (seconds, steps), (longer, _) = stage_time(stage1), stage_time(stage2)
    return max(1, round(longer * steps / seconds))


def find_stage1(model: str | None, home: Path | None, *, skip: bool = False, needed: bool = True) -> Path | None:
    """Return the stage 1 run that stage 2 starts from.

    Args:
        model: `--model`: a stage 1 run; None if the script trains stage 1 itself.
        home: The folder of the run that is continued, which has its stage 1 inside; None if none is.
        skip: `--skip_stage1`.
        needed: Whether stage 2 has begun there, so that stage 1 must be.

    Returns:
        The run's folder. None if stage 1 is skipped or still has to be trained.

    Raises:
        SegRLError: There is no finished stage 1 in the run that is continued; the run's own `--model` is named if it
            had one.

    Example:
        >>> str(find_stage1("runs/sft", None)), find_stage1(None, None), find_stage1("a/base", None, skip=True)
        ('runs/sft', None, None)
    """
    if skip:
        return None
    if model is not None:
        return Path(model)
    if home is None:
        return None
    if is_finished(home / STAGE1):
        return home / STAGE1
    if not needed:
        return None
    asked = read_object(home / MARKER).get("arguments") if (home / MARKER).is_file() else None
    was = (isinstance(asked, dict) and asked.get("model")) or "..."
    raise SegRLError(
        f"--resume_from_checkpoint: {str(home)!r} holds no stage 1; pass --model {was} or --skip_stage1, "
        "whichever the run began with"
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN, which the log gives a reward that applied to no row."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
