"""The output folder of a training script: claimed without losing anything, and continued.

`check_output` looks and `claim_output` writes, so that whatever else can be wrong is found between the two, while the
folder still is as it was. A run that two stages make keeps the first in `<output_dir>/stage1`. `Progress` says how far
the run in a folder has come.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from segrl.errors import CheckpointError, DataError, SegRLError
from segrl.reports.results_file import versions, write_results
from segrl.reports.terminal import say
from segrl.scripts.config_file import CONFIG_FILE
from segrl.scripts.stages import MARKER, STAGE1, is_finished
from segrl.trainers.checkpoints import checkpoint_problem, newest_checkpoint

__all__ = ["Progress", "check_batches", "check_output", "claim_output", "claimed"]


@dataclass(frozen=True)
class Progress:
    """Progress of a run that is continued; the defaults are a run that begins.

    Attributes:
        checkpoint: Where the training of the script's own stage goes on; None: from its beginning.
        stage1: The same of a stage 1 that the script trains itself, in `<output_dir>/stage1`.
        finished: Whether the script's own stage is trained and saved, so that only its evaluation is left.
        inside: Whether the folder holds the run that is continued; what it holds is kept.

    Example:
        >>> Progress().inside
        False
    """

    checkpoint: str | None = None
    stage1: str | None = None
    finished: bool = False
    inside: bool = False


def check_output(
    folder: Path, *, overwrite: bool = False, resume: Any = None, inputs: Mapping[str, str | None] | None = None
) -> Progress:
    """Refuse a folder that must not be written to, and change nothing.

    Args:
        folder: The run's `output_dir`. It may be absent or empty.
        overwrite: Whether a run that is there may be replaced (`--overwrite`).
        resume: `--resume_from_checkpoint`: a checkpoint's folder; `true` or `last` to go on wherever the run in
            `folder` was, at the newest complete checkpoint; None or `false` to begin.
        inputs: Paths that the run reads, by the names of their flags: they must not be removed along with an old run.

    Returns:
        Where the run goes on.

    Raises:
        SegRLError: The folder is a file, or holds something that may not be replaced: anything without `overwrite`,
            with it the run's own checkpoint or input, or a folder without `segrl_run.json`, which no run has written;
            or there is nothing to continue.
        CheckpointError: The checkpoint that `resume` names is incomplete; the file is named.

    Example:
        >>> check_output(Path("no/such/run")) == Progress()
        True
        >>> check_output(Path("no/such/run"), resume="last")
        Traceback (most recent call last):
        segrl.errors.SegRLError: --resume_from_checkpoint last: no checkpoint in 'no/such/run'; start without the flag
    """
    if folder.exists() and not folder.is_dir():
        raise SegRLError(f"output_dir {str(folder)!r} is a file; pass a folder")
    progress = _progress(folder, resume)
    if progress.inside:
        if overwrite:
            raise SegRLError(
                "--overwrite would remove the run that --resume_from_checkpoint continues; pass one of them"
            )
        return progress
    if not folder.is_dir() or not any(folder.iterdir()):
        return progress
    if not overwrite:
        raise SegRLError(
            f"output_dir {str(folder)!r} is not empty; pass another --output_dir, --resume_from_checkpoint to continue "
            "that run, or --overwrite to replace it"
        )
    if not (folder / MARKER).is_file():
        raise SegRLError(
            f"--overwrite: {str(folder)!r} was not written by a training script (no {MARKER}); remove it yourself"
        )
    for name, path in {**(inputs or {}), "resume_from_checkpoint": progress.checkpoint}.items():
        if path and _inside(path, folder):
            raise SegRLError(f"--overwrite would remove --{name} {path!r}; pass another --output_dir")
    return progress


def claim_output(folder: Path, arguments: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Make `folder`, which passed `check_output`, this run's. The run that it held is removed here.

    Called by every process: the first one writes, and none returns before that.

    Args:
        folder: The run's `output_dir`; made if it is absent, emptied unless it holds the run that is continued.
        arguments: What the run was asked to do, written to `segrl_run.json` with the versions.
        progress: What `check_output` returned.

    Raises:
        SegRLError: The folder cannot be written.

    Example:
        >>> import json
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as home:
        ...     claim_output(Path(home, "run"), {"preset": "tiny"})
        ...     sorted(json.loads(Path(home, "run", "segrl_run.json").read_text()))
        ['arguments', 'versions']
    """
    state = PartialState()
    state.wait_for_everyone()  # until the other processes have checked the folder too
    if state.is_main_process and not (progress is not None and progress.inside):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_results(folder / MARKER, {"arguments": dict(arguments), "versions": versions()})
        except OSError as error:
            raise SegRLError(f"output_dir {str(folder)!r} cannot be written: {error}; pass another") from error
    state.wait_for_everyone()


@contextmanager
def claimed(folder: Path, arguments: Mapping[str, Any], progress: Progress | None = None) -> Iterator[None]:
    """Claim a folder as `claim_output` does, and take the claim back if the work fails before it has written a file.

    Args:
        folder: The run's `output_dir`.
        arguments: As in `claim_output`.
        progress: As in `claim_output`.

    Raises:
        SegRLError: The folder cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as home:
        ...     try:
        ...         with claimed(Path(home, "run"), {}):
        ...             raise SegRLError("too late")
        ...     except SegRLError:
        ...         Path(home, "run").exists()
        False
    """
    claim_output(folder, arguments, progress)
    try:
        yield
    except BaseException:
        own = PartialState().is_main_process and not (progress is not None and progress.inside)
        if own and {path.name for path in folder.rglob("*") if not path.is_dir()} <= {MARKER, CONFIG_FILE}:
            shutil.rmtree(folder)
        raise


def check_batches(config: Any, rows: Sized) -> None:
    """Refuse a data set smaller than one batch of GRPO's questions.

    TRL drops the last, incomplete batch, so nothing would be trained.

    Args:
        config: A `GRPOConfig`.
        rows: The training rows.

    Raises:
        DataError: Too few rows; both numbers and the settings are named.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(generation_batch_size=16, num_generations=4)
        >>> check_batches(config, range(4))
        >>> check_batches(config, range(3))
        Traceback (most recent call last):
        segrl.errors.DataError: 3 training rows, expected at least 4: one batch holds that many questions \
(generation_batch_size=16 / num_generations=4); lower --per_device_train_batch_size or add rows
    """
    questions = (config.generation_batch_size or 0) // (config.num_generations or 1)
    if len(rows) < questions:
        raise DataError(
            f"{len(rows)} training rows, expected at least {questions}: one batch holds that many questions "
            f"(generation_batch_size={config.generation_batch_size} / num_generations={config.num_generations}); "
            "lower --per_device_train_batch_size or add rows"
        )


def _progress(folder: Path, value: Any) -> Progress:
    if value is None or str(value).lower() == "false":
        return Progress()
    if str(value).lower() in ("true", "last"):
        return _last(folder, value)
    path = Path(value)
    problem = checkpoint_problem(path)
    if problem is not None:
        raise CheckpointError(
            f"--resume_from_checkpoint {str(value)!r}: {problem}; expected a complete folder checkpoint-N, or 'last' "
            "for the newest in output_dir"
        )
    inside = _inside(str(value), folder)
    if inside and path.resolve().parent == (folder / STAGE1).resolve():
        if is_finished(folder / STAGE1):
            raise SegRLError(f"--resume_from_checkpoint {str(value)!r}: stage 1 is finished; pass 'last' to go on")
        return Progress(stage1=str(value), inside=True)
    return Progress(str(value), inside=inside)


def _last(folder: Path, value: Any) -> Progress:
    """Where the run in `folder` was; says on stderr which checkpoints are left out and why."""
    own, stage1 = _newest(folder), _newest(folder / STAGE1)
    if own is None and stage1 is None and not (folder / MARKER).is_file():
        raise SegRLError(f"--resume_from_checkpoint {value}: no checkpoint in {str(folder)!r}; start without the flag")
    if is_finished(folder / STAGE1):
        stage1 = None
    return Progress(own, stage1, finished=is_finished(folder), inside=True)


def _newest(folder: Path) -> str | None:
    checkpoint, skipped = newest_checkpoint(folder)
    if skipped and PartialState().is_main_process:
        reasons = "; ".join(f"{name} ({problem})" for name, problem in skipped.items())
        goes_on = f"goes on from {Path(checkpoint).name}" if checkpoint else "none is complete"
        say(f"{folder}: left out {reasons}; {goes_on}", stderr=True)
    return checkpoint


def _inside(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())
