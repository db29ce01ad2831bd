"""The command `segrl`: projects begun; rewards and parts listed and described; rewards checked, audited, and applied to
completions; runs asked, evaluated, compared and reported; data converted and checked.

Exit status: 0 if all is well, 1 if a check fails or a reward can be hacked, 2 for wrong arguments or unreadable data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segrl._version import __version__
from segrl.cli.compare import add_compare_command
from segrl.cli.curate import add_curate_commands
from segrl.cli.data import add_data_commands
from segrl.cli.evaluate import add_eval_command
from segrl.cli.init import add_init_command
from segrl.cli.output import BAD, CommandParser, add_command, complain, count, import_modules, positive, share
from segrl.cli.parts import add_parts_commands
from segrl.cli.predict import add_predict_command
from segrl.cli.push import add_push_command
from segrl.cli.report import add_report_command
from segrl.cli.rewards import REWARD_HELP, audit_command, check_command, describe_command, list_command, score_command
from segrl.cli.serve import add_serve_command
from segrl.cli.sweep import add_sweep_command
from segrl.errors import SegRLError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    from segrl.reports.terminal import escaped_warnings

    try:
        with escaped_warnings():
            import_modules(arguments.modules)
            status = arguments.run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return status
    except SegRLError as error:
        return complain(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return BAD
    except OSError as error:  # a full disk, a folder that may not be written, a file in the place of a folder
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror or error}; pass another path")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what follows `--` is for the scripts that a command starts, if it starts some."""
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    arguments = _parser().parse_args(own)
    if not getattr(arguments, "takes_flags", False):
        return _parser().parse_args(argv)
    arguments.flags = list(argv[len(own) + 1 :])
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="segrl", description="Reasoning segmentation with reinforcement learning.")
    parser.add_argument("--version", action="version", version=f"segrl {__version__}")
    areas = parser.add_subparsers(metavar="AREA", required=True)
    rewards = areas.add_parser("rewards", help="list, describe, score, audit and check rewards")
    commands = rewards.add_subparsers(metavar="COMMAND", required=True)

    common = CommandParser(add_help=False)
    common.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[],
                        help="import a module with rewards or parts; the current folder is searched too")  # fmt: skip
    as_json = CommandParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    add_init_command(areas, common)
    add_parts_commands(areas, common, as_json)
    add_predict_command(areas, common)
    add_eval_command(areas, common)
    add_compare_command(areas, common, as_json)
    add_report_command(areas, common)
    add_sweep_command(areas, common)
    add_push_command(areas, common)
    add_serve_command(areas, common)
    add_data_commands(areas, common, as_json)
    add_curate_commands(areas, common)

    def command(name: str, run: Any, text: str, *parents: CommandParser, **more: Any):
        made = add_command(commands, name, text, common, *parents, **more)
        made.set_defaults(run=run)
        return made

    command("list", list_command, "list all rewards: built in, imported, and from installed packages", as_json)

    describe = command(
        "describe", describe_command, "show what a reward computes, its settings and its claims", as_json
    )
    describe.add_argument("reward", metavar="NAME", help=f"{REWARD_HELP}, or a YAML file")

    score = command(
        "score", score_command, "score stored completions", as_json,
        usage="segrl rewards score --rewards FILE|NAME [NAME ...] [options] PREDICTIONS",
        epilog="How-to with all columns: 'Score completions' in the documentation.",
    )  # fmt: skip
    score.add_argument("predictions", nargs="?", metavar="PREDICTIONS",
                       help="JSON lines with completions, a TRL completions parquet, or a folder of those")  # fmt: skip
    score.add_argument("--rewards", nargs="+", required=True, metavar="FILE|NAME",
                       help=f"a YAML file, or {REWARD_HELP}; several are summed")  # fmt: skip
    score.add_argument("--ground-truth", metavar="FILE", help="ground truths, unless beside the predictions: "
                       "JSON lines, CSV, parquet, or a folder with a manifest.csv")  # fmt: skip
    score.add_argument(
        "--on", default="name", metavar="COLUMN", help="column that joins predictions and ground truths (default: name)"
    )
    score.add_argument("--rows", type=count, default=10, metavar="N", help="rows to print (default: 10)")
    score.add_argument(
        "--output", type=Path, metavar="FILE", help="write all scores to a .jsonl, .csv or .parquet file"
    )
    score.add_argument("--progress", type=share, default=1.0, metavar="SHARE",
                       help="training progress from 0 to 1, for schedules (default: 1)")  # fmt: skip
    form = score.add_argument_group("completion format, instead of that of the rewards")
    form.add_argument("--frame", metavar="KIND", help="frame of the written boxes, such as relative_1000")
    form.add_argument("--answer-format", metavar="FORMAT", help="text or json")
    form.add_argument("--no-seg", action="store_true", help="accept texts without the segmentation token as valid")
    form.add_argument("--no-reasoning", action="store_true", help="accept texts without a reasoning block as valid")

    audit = command(
        "audit",
        audit_command,
        "search for reward hacking by degenerate policies; exit status 1 if a reward can be hacked",
        as_json,
    )
    audit.add_argument("names", nargs="*", metavar="NAME", help=f"{REWARD_HELP}; each is judged on its own")
    audit.add_argument("--rewards", metavar="FILE", help="a YAML file, judged as a whole with its parts shown")
    audit.add_argument("--sum", action="store_true", help="judge the sum of all names")

    check = command(
        "check", check_command, "test a reward and its claims on generated examples; exit status 1 if it fails"
    )
    check.add_argument("names", nargs="+", metavar="NAME", help=REWARD_HELP)
    check.add_argument("--examples", type=positive, metavar="N", help="generated examples per property")
    return parser
