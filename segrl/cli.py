"""The command `segrl`: rewards listed, described, checked, audited, and applied to stored completions.

Exit status: 0 if all is well, 1 if a check fails or gaming a reward pays, 2 for wrong arguments or unreadable data.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import segrl
from segrl.errors import RewardCheckError, RewardError, SegRLError

if TYPE_CHECKING:  # imported when a command needs it, so that --help is quick
    from segrl.rewards import Reward

__all__ = ["main"]

OK, BAD, WRONG = 0, 1, 2
YAML_SUFFIXES = (".yaml", ".yml")
REWARD_HELP = "a name from 'segrl rewards list', or module:attribute"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    try:
        _import(arguments.modules)
        status = arguments.run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return status
    except SegRLError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return BAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segrl", description=(segrl.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"segrl {segrl.__version__}")
    areas = parser.add_subparsers(metavar="AREA", required=True)
    rewards = areas.add_parser("rewards", help="list, describe, score, audit and check rewards")
    commands = rewards.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[],
                        help="import a module that registers rewards; the current folder is searched too")  # fmt: skip
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    def command(name: str, run: Any, text: str, *parents: argparse.ArgumentParser, **more: Any):
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                   parents=[common, *parents], **more)  # fmt: skip
        made.set_defaults(run=run)
        return made

    command("list", _list, "list all rewards: built in, imported, and from installed packages", as_json)

    describe = command("describe", _describe, "show what a reward computes, its settings and what it declares", as_json)
    describe.add_argument("reward", metavar="NAME", help=f"{REWARD_HELP}, or a YAML file")

    score = command(
        "score", _score, "score stored completions", as_json,
        usage="segrl rewards score --rewards FILE|NAME [NAME ...] [options] PREDICTIONS",
        epilog="How-to with all columns: 'Score completions' in the documentation.",
    )  # fmt: skip
    score.add_argument("predictions", nargs="?", metavar="PREDICTIONS",
                       help="JSON lines with completions, a TRL completions parquet, or a folder of those")  # fmt: skip
    score.add_argument("--rewards", nargs="+", required=True, metavar="FILE|NAME",
                       help=f"a YAML file, or {REWARD_HELP}; of several the sum is taken")  # fmt: skip
    score.add_argument("--truth", metavar="FILE", help="where the truth is, unless it is beside the predictions: "
                       "JSON lines, CSV, parquet, or a folder with a manifest.csv")  # fmt: skip
    score.add_argument(
        "--on", default="name", metavar="COLUMN", help="what joins predictions and truth (default: name)"
    )
    score.add_argument("--rows", type=_count, default=10, metavar="N", help="rows to print (default: 10)")
    score.add_argument(
        "--output", type=Path, metavar="FILE", help="write all scores to a .jsonl, .csv or .parquet file"
    )
    score.add_argument("--progress", type=_share, default=1.0, metavar="SHARE",
                       help="training progress from 0 to 1, for schedules (default: 1)")  # fmt: skip
    reading = score.add_argument_group("how completions are read, instead of as the rewards say")
    reading.add_argument("--frame", metavar="KIND", help="frame of the written boxes, such as relative_1000")
    reading.add_argument("--answer-format", metavar="FORMAT", help="text or json")
    reading.add_argument("--no-seg", action="store_true", help="a valid text needs no segmentation token")
    reading.add_argument("--no-reasoning", action="store_true", help="a valid text needs no reasoning block")

    audit = command("audit", _audit, "pay degenerate policies and honest ones; exit status 1 if gaming pays", as_json)
    audit.add_argument("names", nargs="*", metavar="NAME", help=f"{REWARD_HELP}; each is judged on its own")
    audit.add_argument("--rewards", metavar="FILE", help="a YAML file, judged as a whole with its parts shown")
    audit.add_argument("--sum", action="store_true", help="judge the sum of all names")

    check = command("check", _check, "test what a reward declares on generated examples; exit status 1 if it fails")
    check.add_argument("names", nargs="+", metavar="NAME", help=REWARD_HELP)
    check.add_argument("--examples", type=_positive, metavar="N", help="generated examples per property")
    return parser


# --- commands


def _list(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.rewards.describe import describe_info
    from segrl.rewards.registry import all_reward_infos
    from segrl.terminal import console, limits, printable

    described = [describe_info(info) for info in all_reward_infos()]
    if arguments.json:
        return _print_json(described)
    table = Table("name", "form", "range", "origin", "summary")
    for reward in described:
        style = "red" if reward["broken"] else ""
        cells = (reward["name"], reward["form"], limits(reward["range"]), reward["origin"], reward["summary"])
        table.add_row(*(Text(printable(cell), style=style) for cell in cells))
    console().print(table)
    return OK


def _describe(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.rewards.describe import describe_reward
    from segrl.terminal import console, limits, number, printable, printable_lines

    if ":" in arguments.reward:
        _search_here()
    composed = Path(arguments.reward).suffix in YAML_SUFFIXES
    reward = describe_reward(_reward(arguments.reward) if composed else arguments.reward)
    if arguments.json:
        return _print_json(reward)
    empty = ", ".join(f"{side} {number(score)}" for side, score in (reward["empty"] or {}).items())
    facts = {
        "form": reward["form"],
        "equation": reward["equation"],
        "range": limits(reward["range"]),
        "empty sides": empty,
        "invariant under": ", ".join(reward["invariant"]),
        "monotone in": ", ".join(reward["monotone"]),
        "needs": ", ".join(reward["needs"]),
        "source": reward["source"],
        "origin": reward["origin"],
    }
    out = console()
    out.print(Text(printable(reward["name"]), style="bold"), Text(printable(reward["summary"])), sep="\n")
    table = Table(box=None, show_header=False)
    for name, fact in facts.items():
        table.add_row(Text(name), Text(printable(fact) or "-"))
    out.print(table)
    if reward["settings"]:
        settings = Table("setting", "default", "meaning")
        for setting in reward["settings"]:
            default = "(required)" if setting["required"] else repr(setting["default"])
            settings.add_row(*(Text(printable(cell)) for cell in (setting["name"], default, setting["doc"])))
        out.print(settings)
    if "yaml" in reward:
        out.print(Text(printable_lines(reward["yaml"])))
    return OK


def _score(arguments: argparse.Namespace) -> int:
    from segrl.scoring import score_file
    from segrl.scoring.scores import check_output

    names = list(arguments.rewards)
    if arguments.predictions is None and len(names) > 1:  # they were written behind --rewards
        arguments.predictions = names.pop()
    path = Path(arguments.predictions or "")
    if not path.name or not (path.suffix or path.exists()):
        raise RewardError("no file of predictions; expected segrl rewards score --rewards FILE|NAME PREDICTIONS")
    if arguments.output is not None:
        check_output(arguments.output)
    reading = {
        "frame": arguments.frame,
        "answer_format": arguments.answer_format,
        "require_seg": False if arguments.no_seg else None,
        "require_reasoning": False if arguments.no_reasoning else None,
    }
    reward = _sum(names, **{key: value for key, value in reading.items() if value is not None})
    scores = score_file(reward, path, truth=arguments.truth, on=arguments.on, progress=arguments.progress)
    if arguments.output is not None:
        scores.write(arguments.output)
    if arguments.json:
        return _print_json(scores.summary(arguments.rows))
    from segrl.scoring.report import print_scores

    print_scores(scores, arguments.rows)
    return OK


def _audit(arguments: argparse.Namespace) -> int:
    from segrl.audit import audit

    if bool(arguments.names) == bool(arguments.rewards):
        raise RewardError("expected names of rewards, or --rewards FILE")
    if arguments.rewards:
        rewards: list[Reward] = [_reward(arguments.rewards)]
    else:
        rewards = [_sum(arguments.names)] if arguments.sum else [_reward(name) for name in arguments.names]
    report = audit(rewards)
    if arguments.json:
        _print_json(report.to_dict())
    else:
        from segrl.terminal import console

        console().print(report)
    return BAD if report.gamed else OK


def _check(arguments: argparse.Namespace) -> int:
    from segrl.terminal import console, printable_lines

    try:
        from segrl.testing import check_reward
    except ImportError as error:  # hypothesis is not installed; the message says so
        return _complain(str(error))
    settings = {} if arguments.examples is None else {"max_examples": arguments.examples}
    status = OK
    for name in arguments.names:
        try:
            told = str(check_reward(_reward(name), **settings))
        except RewardCheckError as error:
            told, status = str(error), BAD
        console().print(printable_lines(told), soft_wrap=True)
    return status


# --- parts


def _reward(reference: str, **reading: Any) -> Reward:
    """A reward from a YAML file or by name."""
    from segrl.rewards import load_reward, make_reward

    if Path(reference).suffix in YAML_SUFFIXES:
        return make_reward(load_reward(reference), **reading)
    if ":" in reference:
        _search_here()
    return make_reward(reference, **reading)


def _sum(references: Sequence[str], **reading: Any) -> Reward:
    """One reward, or the sum of several."""
    from segrl.rewards import make_reward, weighted_sum

    if len(references) == 1:
        return _reward(references[0], **reading)
    return make_reward(weighted_sum([(_reward(reference), 1.0) for reference in references]), **reading)


def _import(modules: Sequence[str]) -> None:
    if modules:
        _search_here()
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises: its place is all that helps
            frames = traceback.extract_tb(error.__traceback__)
            place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
            raise RewardError(f"--import {module}: {type(error).__name__}: {error}{place}") from error


def _search_here() -> None:
    """Let modules of the current folder be imported; a command does not, other than `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _complain(message: str) -> int:
    from segrl.terminal import console, printable_lines

    console(stderr=True).print(f"segrl: error: {printable_lines(message)}", soft_wrap=True)
    return WRONG


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, allow_nan=False))
    return OK


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected 0 or more")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected 1 or more")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a number from 0 to 1")
    return number
