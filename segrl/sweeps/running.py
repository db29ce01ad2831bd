"""Run the jobs of a sweep: each once, in processes of their own, on one machine or on several that share a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from segrl.errors import SegRLError
from segrl.models.saved_files import read_object
from segrl.reports.terminal import say
from segrl.sweeps.jobs import Job

__all__ = ["check_jobs", "claim_sweep", "evaluation_folder", "is_done", "run_sweep"]

WAIT = 5.0  # seconds between two looks at what another process runs
_LAST_LINES = 3  # of a log, in errors


def is_done(folder: Path) -> bool:
    """Return whether a run has ended: its results are written last."""
    return (folder / "results.json").is_file()


def claim_sweep(home: Path, settings: dict[str, object]) -> None:
    """Make a folder the sweep's, or go on with the one that it holds.

    Args:
        home: The folder.
        settings: What the sweep runs; a folder of a sweep with other settings is refused.

    Raises:
        SegRLError: The folder holds another sweep, or something else.
    """
    marker = home / "sweep.json"
    with FileLock(home.with_name(f".{home.name}.lock")):
        if marker.is_file():
            earlier = read_object(marker)
            changed = [f"{k}: {earlier.get(k)!r}, now {v!r}" for k, v in settings.items() if earlier.get(k) != v]
            if changed:
                raise SegRLError(
                    f"{home} holds another sweep ({'; '.join(changed)}); pass another --output_dir, or its settings"
                )
        elif home.exists() and any(home.iterdir()):
            raise SegRLError(f"{home} is not empty and holds no sweep; pass another --output_dir")
        else:
            home.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_jobs(jobs: Sequence[Job], seed: int, home: Path, shared: Sequence[str]) -> None:
    """Let every script check its flags, data and parts, and start nothing.

    A stage 2 that goes on with a stage 1 that is still to be trained is checked as if it trained one.

    Raises:
        SegRLError: What the scripts say, with the commands.
    """
    problems = []
    for job in jobs:
        if job.folder(seed, home).exists():
            continue  # it passed before it began
        there = job.stage1 is None or is_done(job.stage1.folder(seed, home))
        checked = job if there else replace(job, stage1=None)
        command = [sys.executable, *checked.command(seed, home, shared), "--check_only"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problems.append(f"{job.title}: {_last_lines(done.stderr)}")
    if problems:
        raise SegRLError("nothing was started:\n" + "\n".join(problems))


@dataclass(frozen=True)
class _Task:
    """A process whose results go into a folder, started once another folder has its own."""

    title: str
    folder: Path
    command: tuple[str, ...]
    needs: Path | None = None
    resumes: bool = True


def run_sweep(
    jobs: Sequence[Job],
    seeds: Sequence[int],
    home: Path,
    shared: Sequence[str] = (),
    *,
    elsewhere: Mapping[str, str] | None = None,
    at_once: int = 1,
    launcher: Sequence[str] = (sys.executable,),
) -> None:
    """Run every job under every seed that is not done; one that was killed goes on where it was.

    Args:
        jobs: Each after its stage 1, see `distinct_jobs`.
        seeds: Seeds, at least one.
        home: The folder of the sweep. Other processes, also of other machines that see the folder, may run the same
            sweep at the same time; a lock beside each run, which ends with its process, keeps it from being run twice.
        shared: Flags of all jobs.
        elsewhere: Other data, by its name in the tables, that every run is evaluated on, too.
        at_once: Runs at a time.
        launcher: What starts a script, such as ("accelerate", "launch").

    Raises:
        SegRLError: After everything else is run, for runs that failed: each with its log's last lines.

    Example:
        >>> run_sweep([], [1, 2, 3], Path("sweep"))  # nothing to run
    """
    tasks = []
    for job in jobs:
        for seed in seeds:
            folder = job.folder(seed, home)
            needs = None if job.stage1 is None else job.stage1.folder(seed, home)
            title = f"{job.title}, seed {seed}"
            tasks.append(_Task(title, folder, (*launcher, *job.command(seed, home, shared)), needs))
            for name, data in (elsewhere or {}).items():
                other = evaluation_folder(folder, name)
                flags = ("--model", str(folder), "--data", data, "--output_dir", str(other), "--pictures", "0")
                command = (sys.executable, "-m", "segrl", "eval", *flags)
                tasks.append(_Task(f"{title}, on {name}", other, command, folder, resumes=False))
    _run_all(tasks, at_once)


def _run_all(tasks: Sequence[_Task], at_once: int) -> None:
    failed: dict[Path, str] = {}
    running: set[Path] = set()

    def work() -> None:
        while True:
            unfinished = [task for task in tasks if not is_done(task.folder) and task.folder not in failed]
            for task in unfinished:  # what goes on with a run that failed can never run
                if task.needs in failed:
                    failed[task.folder] = f"{task.title}: {task.needs.name if task.needs else ''} before it failed"
            mine = [task for task in unfinished if task.folder not in failed and task.folder not in running]
            if not mine:
                return
            if not any((task.needs is None or is_done(task.needs)) and _try(task) for task in mine):
                time.sleep(WAIT)

    def _try(task: _Task) -> bool:
        """Run a task unless somebody else does; return whether it was run."""
        task.folder.parent.mkdir(parents=True, exist_ok=True)
        if task.folder in running:
            return False
        running.add(task.folder)
        try:
            with FileLock(task.folder.with_suffix(".lock"), timeout=0):
                if not is_done(task.folder) and (problem := _run(task)) is not None:
                    failed[task.folder] = problem
            return True
        except Timeout:
            return False
        finally:
            running.discard(task.folder)

    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()
    if failed:
        listed = "\n".join(failed.values())
        raise SegRLError(f"{len(failed)} of {len(tasks)} runs failed; the others are done\n{listed}")


def _run(task: _Task) -> str | None:
    """Run a task in a process; return what went wrong."""
    log, command = task.folder.with_suffix(".log"), list(task.command)
    if (task.folder / "segrl_run.json").is_file():
        command += ["--resume_from_checkpoint", "last"] if task.resumes else ["--overwrite"]
    say(f"{task.title}: {'goes on' if task.folder.exists() else 'begins'}")
    began = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        status = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    if status or not is_done(task.folder):
        ends = _last_lines(log.read_text(encoding="utf-8", errors="replace"))
        return f"{task.title}: exit status {status}, {log}: {ends}"
    say(f"{task.title}: done in {(time.monotonic() - began) / 60:.1f} min")
    return None


def evaluation_folder(run: Path, name: str) -> Path:
    """Return the folder of a run's evaluation on other data.

    Example:
        >>> evaluation_folder(Path("train_sft/seed1"), "TN-SCUI 2020").as_posix()
        'train_sft/seed1_on_TN-SCUI-2020'
    """
    return run.with_name(f"{run.name}_on_{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}")


def _last_lines(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("error")] or lines[-_LAST_LINES:]
    return "\n".join(wrong)
