"""Which runs the rows of published tables need."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segrl.errors import DataError, unknown_name
from segrl.reports.published import PublishedRow, load_published

__all__ = ["Job", "distinct_jobs", "plan_sweep"]


@dataclass(frozen=True)
class Job:
    """A command of an example: a script with its flags, and the run of stage 1 that it goes on with.

    Attributes:
        script: Path of the script.
        flags: Its flags, without those that all jobs share.
        stage1: The job whose run is `--model`; None if there is none.
        example: Folder of the script, where it is not that of the published scores; "" where it is.
    """

    script: Path
    flags: tuple[str, ...]
    stage1: Job | None = None
    example: str = ""

    @property
    def title(self) -> str:
        """The command as a person would say it."""
        return " ".join([f"{self.example}/{self.script.stem}".lstrip("/"), *self.flags])

    @property
    def name(self) -> str:
        """Name of the folder of its runs.

        Example:
            >>> Job(Path("train_grpo.py"), ("--dense_weight", "0"), Job(Path("train_sft.py"), ())).name
            'train_grpo--dense_weight-0--after-train_sft'
        """
        words = re.sub(r"[^\w.,=+-]+", "-", self.title.replace(" --", "--"))
        return words if self.stage1 is None else f"{words}--after-{self.stage1.name}"

    def command(self, seed: int, home: Path, shared: Sequence[str]) -> list[str]:
        """Return the script and its flags for one seed.

        Args:
            seed: Of data, weights and batches.
            home: The folder of the sweep.
            shared: Flags of all jobs.
        """
        model = [] if self.stage1 is None else ["--model", str(self.stage1.folder(seed, home))]
        return [
            *(str(self.script), "--output_dir", str(self.folder(seed, home)), "--seed", str(seed)),
            *(*self.flags, *model, *shared),
        ]

    def folder(self, seed: int, home: Path) -> Path:
        """Return the folder of one seed's run."""
        return home / self.name / f"seed{seed}"


def plan_sweep(path: str | Path, tables: Sequence[str]) -> list[tuple[PublishedRow, Job | None]]:
    """Return the rows of some published tables, each with the job that gives it here.

    Args:
        path: A file of published scores, such as `examples/core_seg/published.yaml`; scripts are beside it.
        tables: Tables of the paper; none means all.

    Returns:
        Rows in the order of the file; None for systems that are not run. Rows with one command share their job.

    Raises:
        DataError: As `segrl.reports.load_published`, or a command whose script is not there.
        UnknownNameError: No such table.

    Example:
        >>> row = "{table: '1', data: A, method: ours, scores: {mdice: 37.1}, command: train_sft --probe answer}"
        >>> _ = Path("published.yaml").write_text(f"unit: percent\\nrows:\\n- {row}")
        >>> _ = Path("train_sft.py").write_text("")
        >>> [(found.method, job.name) for found, job in plan_sweep("published.yaml", ["1"])]
        [('ours', 'train_sft--probe-answer')]
    """
    published = load_published(path)
    known = list(dict.fromkeys(row.table for row in published))
    for table in tables:
        if table not in known:
            raise unknown_name(f"table of {path}", table, known)
    return [(row, _job(row, Path(path).absolute().parent)) for row in published if not tables or row.table in tables]


def _job(row: PublishedRow, folder: Path) -> Job | None:
    if not row.command:
        return None
    return _made(row.command, folder, None if not row.stage1 else _made(row.stage1, folder, None))


def _made(command: Sequence[str], folder: Path, stage1: Job | None) -> Job:
    name, *flags = command
    path = (folder / f"{name}.py").resolve()
    if not path.is_file():
        raise DataError(f"command {name!r}: no {path}; expected a script beside the file of published scores, or that "
                        "of another example, such as ../lisa/train_sft")  # fmt: skip
    own = path.parent == folder.resolve()
    return Job(path if not own else folder / f"{name}.py", tuple(flags), stage1, "" if own else path.parent.name)


def distinct_jobs(rows: Sequence[tuple[PublishedRow, Job | None]]) -> list[Job]:
    """Return every job once, each after the stage 1 that it needs."""
    found: Mapping[Job, None] = dict.fromkeys(
        job for _, wanted in rows if wanted is not None for job in (wanted.stage1, wanted) if job is not None
    )
    return sorted(found, key=lambda job: job.stage1 is not None)
