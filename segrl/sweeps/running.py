"""Run the jobs of a sweep: each once, in processes of their own, on one machine or on several that share a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from segrl.errors import SegRLError
from segrl.reports.terminal import say
from segrl.sweeps.jobs import Job

__all__ = ["check_jobs", "claim_sweep", "is_done", "run_sweep"]

WAIT = 5.0  # seconds between two looks at what another process runs
_LAST_LINES = 3  # of a log, in errors
Task = tuple[Job, int]


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
            earlier = json.loads(marker.read_text(encoding="utf-8"))
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
        checked = job if there else Job(job.script, job.flags)
        command = [sys.executable, *checked.command(seed, home, shared), "--check_only"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problems.append(f"{_said(job)}: {_last_lines(done.stderr)}")
    if problems:
        raise SegRLError("nothing was started:\n" + "\n".join(problems))


def run_sweep(
    jobs: Sequence[Job],
    seeds: Sequence[int],
    home: Path,
    shared: Sequence[str] = (),
    *,
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
        at_once: Runs at a time.
        launcher: What starts a script, such as ("accelerate", "launch").

    Raises:
        SegRLError: After everything else is run, for runs that failed: each with its log's last lines.

    Example:
        >>> run_sweep([], [1, 2, 3], Path("sweep"))  # nothing to run
    """
    failed: dict[Task, str] = {}
    todo = [(job, seed) for job in jobs for seed in seeds]
    running: set[Task] = set()

    def ready(task: Task) -> bool:
        job, seed = task
        return job.stage1 is None or is_done(job.stage1.folder(seed, home))

    def work() -> None:
        while True:
            open_tasks = [task for task in todo if not is_done(task[0].folder(task[1], home)) and task not in failed]
            for job, seed in open_tasks:  # what goes on with a stage 1 that failed can never run
                if job.stage1 is not None and (job.stage1, seed) in failed:
                    failed[job, seed] = f"{_said(job)}, seed {seed}: its stage 1 failed"
            mine = [task for task in open_tasks if task not in failed and task not in running]
            if not mine:
                return
            if not any(ready(task) and _try(task) for task in mine):
                time.sleep(WAIT)

    def _try(task: Task) -> bool:
        """Run a task unless somebody else does; return whether it was run."""
        job, seed = task
        folder = job.folder(seed, home)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if task in running:
            return False
        running.add(task)
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=0):
                if not is_done(folder) and (problem := _run(task)) is not None:
                    failed[task] = problem
            return True
        except Timeout:
            return False
        finally:
            running.discard(task)

    def _run(task: Task) -> str | None:
        job, seed = task
        folder, log = job.folder(seed, home), job.folder(seed, home).with_suffix(".log")
        command = [*launcher, *job.command(seed, home, shared)]
        if (folder / "segrl_run.json").is_file():
            command += ["--resume_from_checkpoint", "last"]
        say(f"{_said(job)}, seed {seed}: {'goes on' if folder.exists() else 'begins'}")
        began = time.monotonic()
        with open(log, "a", encoding="utf-8") as file:
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            status = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if status or not is_done(folder):
            ends = _last_lines(log.read_text(encoding="utf-8", errors="replace"))
            return f"{_said(job)}, seed {seed}: exit status {status}, {log}: {ends}"
        say(f"{_said(job)}, seed {seed}: done in {(time.monotonic() - began) / 60:.1f} min")
        return None

    with ThreadPoolExecutor(at_once) as pool:
        for worker in [pool.submit(work) for _ in range(at_once)]:
            worker.result()
    if failed:
        raise SegRLError(
            f"{len(failed)} of {len(todo)} runs failed; the others are done\n" + "\n".join(failed.values())
        )


def _said(job: Job) -> str:
    return " ".join([job.script.stem, *job.flags])


def _last_lines(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("error")] or lines[-_LAST_LINES:]
    return "\n".join(wrong)
