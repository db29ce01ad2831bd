"""Checkpoints: which one is complete, and the newest complete one of a run.

transformers writes a checkpoint file by file, and `trainer_state.json` last. Just before that, the trainers of segrl
write `segrl_checkpoint.json`, with the size of every other file. So a checkpoint is complete if its state can be read,
every file has the size that was written, and what a resumed run needs is there and readable. Checkpoints without these
sizes, as TRL writes them, are judged by the last alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from segrl.errors import CheckpointError
from segrl.files.whole import is_unfinished, write_whole
from segrl.models.saved_files import file_problem, read_object

__all__ = ["CHECKPOINT_MANIFEST", "check_checkpoint", "checkpoint_problem", "newest_checkpoint", "write_manifest"]

CHECKPOINT_MANIFEST = "segrl_checkpoint.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors", "adapter_model.bin")
_SHARDED = ("global_step*", "pytorch_model_fsdp*")  # folders and files of DeepSpeed and FSDP, which have an optimizer
_HEAD = ("mask_head.json", "mask_head.safetensors")


def write_manifest(folder: str | os.PathLike) -> None:
    """Write `segrl_checkpoint.json`: the size in bytes of every other file in `folder`, but not of its state.

    The file appears whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "scheduler.pt").write_bytes(b"123")
        ...     write_manifest(folder)
        ...     json.loads(Path(folder, CHECKPOINT_MANIFEST).read_text())["files"]
        {'scheduler.pt': 3}
    """
    path = Path(folder)
    left_out = {CHECKPOINT_MANIFEST, TRAINER_STATE_NAME}
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in left_out and not is_unfinished(file)  # of a process that was killed
    }
    write_whole(path / CHECKPOINT_MANIFEST, json.dumps({"version": 1, "files": files}, indent=2) + "\n")


def checkpoint_problem(folder: str | os.PathLike) -> str | None:
    """Return why training cannot be resumed from a checkpoint, or None if it is complete.

    Files are not read in full: archives and safetensors files are opened, which fails where the end is cut off.

    Args:
        folder: The checkpoint's folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint_problem(folder)
        'no trainer_state.json'
    """
    path = Path(folder)
    if not path.is_dir():
        return "no such folder"
    return _state_problem(path / TRAINER_STATE_NAME) or _size_problem(path) or _content_problem(path)


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Refuse a checkpoint from which training cannot be resumed.

    Raises:
        CheckpointError: Folder and file are named, and what is wrong with it.

    Example:
        >>> check_checkpoint("no/checkpoint-1")
        Traceback (most recent call last):
        segrl.errors.CheckpointError: checkpoint 'no/checkpoint-1' cannot be resumed: no such folder; pass another \
one, or 'last' for the newest complete one
    """
    problem = checkpoint_problem(folder)
    if problem is not None:
        raise CheckpointError(
            f"checkpoint {os.fspath(folder)!r} cannot be resumed: {problem}; pass another one, or 'last' for the "
            "newest complete one"
        )


def newest_checkpoint(folder: str | os.PathLike) -> tuple[str | None, dict[str, str]]:
    """Return the newest complete checkpoint in a run's folder, and those newer than it with what is wrong with them.

    Args:
        folder: The run's folder, which holds `checkpoint-N`; it may be absent.

    Returns:
        The checkpoint's path, None if there is no complete one; and reasons by the names of the newer ones.

    Example:
        >>> newest_checkpoint("no/such/run")
        (None, {})
    """
    path, skipped = Path(folder), {}
    numbered = {}
    for entry in path.iterdir() if path.is_dir() else ():
        prefix, _, step = entry.name.rpartition("-")
        if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() and entry.is_dir():
            numbered[int(step)] = entry
    for _, entry in sorted(numbered.items(), reverse=True):
        problem = checkpoint_problem(entry)
        if problem is None:
            return str(entry), skipped
        skipped[entry.name] = problem
    return None, skipped


# ---- problems --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or what is wrong with it."""
    try:
        return read_object(path)
    except CheckpointError as error:
        return f"{path.name}: {str(error).removeprefix(f'{path}: ')}" if path.is_file() else f"no {path.name}"


def _state_problem(path: Path) -> str | None:
    state = _read(path)
    if isinstance(state, str):
        return state
    for key in ("global_step", "max_steps"):
        value = state.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"{path.name}: {key} is {value!r}, expected a count of steps"
    return None


def _size_problem(path: Path) -> str | None:
    if not (path / CHECKPOINT_MANIFEST).is_file():
        return None
    manifest = _read(path / CHECKPOINT_MANIFEST)
    sizes = manifest if isinstance(manifest, str) else manifest.get("files")
    if not isinstance(sizes, dict):
        return sizes if isinstance(sizes, str) else f"{CHECKPOINT_MANIFEST}: files is {sizes!r}, expected sizes by name"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None


def _content_problem(path: Path) -> str | None:
    if not any(next(path.glob(pattern), None) for pattern in _SHARDED):
        if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
            return "no weights (model.safetensors or adapter_model.safetensors)"
        for name in ("optimizer.pt", "scheduler.pt"):
            if not (path / name).is_file() and not (path / name).with_suffix(".bin").is_file():
                return f"no {name}"
    if next(path.glob("rng_state*.pth"), None) is None:
        return "no rng_state.pth"
    there = [(path / name).is_file() for name in _HEAD]
    if any(there) and not all(there):
        return f"no {_HEAD[there.index(False)]}"
    for file in sorted(path.iterdir()):
        if problem := file_problem(file):
            return f"{file.name}: {problem}"
    return None
