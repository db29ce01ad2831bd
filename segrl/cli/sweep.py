"""`segrl sweep`: the rows of a paper's tables as runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, add_command, positive

__all__ = ["add_sweep_command"]


def add_sweep_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl sweep` to the areas of the command."""
    text = "run the rows of a paper's tables under several seeds, and print them beside the published scores"
    command = add_command(
        *(areas, "sweep", text, *parents),
        more="A sweep that was killed goes on where it was; several machines may run one sweep in a folder that they "
        "share.",
        usage="segrl sweep FILE --output_dir FOLDER [options] [-- FLAGS]",
        epilog="FLAGS go to every script, such as: -- --use_cpu --max_steps 20",
    )  # fmt: skip
    command.add_argument("file", type=Path, metavar="FILE", help="published scores with the command of each row, such "
                         "as examples/core_seg/published.yaml")  # fmt: skip
    command.add_argument("--table", dest="tables", nargs="+", default=[], metavar="NAME", help="default: all tables")
    command.add_argument("--seeds", type=positive, default=3, metavar="N", help="run the seeds 1 to N (default: 3)")
    command.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="a new folder, or the sweep's"
    )
    command.add_argument("--data", metavar="PATH", help="data of every run; default: the preset's synthetic data")
    command.add_argument("--on", nargs="+", default=[], metavar="NAME=PATH", help="evaluate every run on other data "
                         "as well, by its name in the tables")  # fmt: skip
    command.add_argument("--preset", metavar="NAME", help="preset of every run; default: that of the scripts")
    command.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    command.add_argument("--launcher", metavar="COMMAND", help="what starts a script, such as 'accelerate launch'; "
                         "default: python")  # fmt: skip
    command.add_argument(
        "--dry_run", action="store_true", help="check every command, and print them instead of running"
    )
    command.set_defaults(run=_sweep, takes_flags=True)


def _sweep(arguments: argparse.Namespace) -> int:
    from segrl.reports.terminal import say
    from segrl.sweeps import plan_sweep, run_sweep, summarise_sweep, sweep_table
    from segrl.sweeps.jobs import distinct_jobs
    from segrl.sweeps.running import check_jobs, claim_sweep
    from segrl.sweeps.summary import write_sweep

    home, seeds = arguments.output_dir.absolute(), list(range(1, arguments.seeds + 1))
    rows = plan_sweep(arguments.file, arguments.tables)
    elsewhere = _elsewhere(arguments.on, sorted({row.data for row, _ in rows}))
    jobs = distinct_jobs(rows)
    shared = [
        *(flag for name in ("data", "preset") if (value := getattr(arguments, name)) for flag in (f"--{name}", value))
    ]
    shared += arguments.flags
    launcher = shlex.split(arguments.launcher) if arguments.launcher else [sys.executable]
    check_jobs(jobs, seeds[0], home, shared)
    if arguments.dry_run:
        for job in jobs:
            for seed in seeds:
                say(shlex.join([*launcher, *job.command(seed, home, shared)]))
        return OK
    claim_sweep(home, {"file": str(arguments.file.absolute()), "shared": shared})
    try:
        run_sweep(jobs, seeds, home, shared, elsewhere=elsewhere, at_once=arguments.jobs, launcher=launcher)
    finally:
        found = summarise_sweep(rows, seeds, home)
        table = sweep_table(found, data=arguments.data or "synthetic data")
        written = write_sweep(home, rows, seeds, found, table)
    say(table)
    say(f"Written to {home}: {', '.join(written)}")
    return OK


def _elsewhere(given: list[str], known: list[str]) -> dict[str, str]:
    from segrl.errors import SegRLError, unknown_name

    found = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise SegRLError(f"--on {pair}: expected NAME=PATH, such as {known[0]}=path/to/folder")
        if name not in known:
            raise unknown_name("data of the tables", name, known)
        if not Path(path).exists() and path.count("/") != 1:
            raise SegRLError(f"--on {pair}: no such folder")
        found[name] = path
    return found
