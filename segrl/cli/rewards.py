"""`segrl rewards`: list, describe, score, audit and check."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segrl.cli.output import BAD, OK, complain, print_json, search_here
from segrl.errors import RewardCheckError, RewardError

__all__ = [
    "REWARD_HELP",
    "audit_command",
    "check_command",
    "describe_command",
    "list_command",
    "score_command",
]

if TYPE_CHECKING:  # imported when a command needs it, so that --help is quick
    from segrl.rewards.reward import Reward

REWARD_HELP = "a name from 'segrl rewards list', or module:attribute"


def list_command(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.reports.terminal import console, limits, printable
    from segrl.rewards.describe import describe_all

    described = describe_all()
    if arguments.json:
        return print_json(described)
    table = Table("name", "form", "range", "origin", "summary")
    for reward in described:
        style = "red" if reward["broken"] else ""
        cells = (reward["name"], reward["form"], limits(reward["range"]), reward["origin"], reward["summary"])
        table.add_row(*(Text(printable(cell), style=style) for cell in cells))
    console().print(table)
    return OK


def describe_command(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.reports.terminal import console, limits, number, printable, printable_lines
    from segrl.rewards.describe import describe_reward

    search_here()
    reward = describe_reward(arguments.reward)
    if arguments.json:
        return print_json(reward)
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


def score_command(arguments: argparse.Namespace) -> int:
    from segrl.scoring.scores import check_output, score_file

    names = list(arguments.rewards)
    if arguments.predictions is None and len(names) > 1:  # they were written behind --rewards
        arguments.predictions = names.pop()
    path = Path(arguments.predictions or "")
    if not path.name or not (path.suffix or path.exists()):
        raise RewardError("no file of predictions; expected segrl rewards score --rewards FILE|NAME PREDICTIONS")
    if arguments.output is not None:
        check_output(arguments.output)
    completion_format = {
        "frame": arguments.frame,
        "answer_format": arguments.answer_format,
        "require_seg": False if arguments.no_seg else None,
        "require_reasoning": False if arguments.no_reasoning else None,
    }
    reward = _sum(names, **{key: value for key, value in completion_format.items() if value is not None})
    scores = score_file(reward, path, ground_truth=arguments.ground_truth, on=arguments.on, progress=arguments.progress)
    if arguments.output is not None:
        scores.write(arguments.output)
    if arguments.json:
        return print_json(scores.summary(arguments.rows))
    from segrl.scoring.report import print_scores

    print_scores(scores, arguments.rows)
    return OK


def audit_command(arguments: argparse.Namespace) -> int:
    from segrl.audit.judging import audit

    if bool(arguments.names) == bool(arguments.rewards):
        raise RewardError("expected names of rewards, or --rewards FILE")
    if arguments.rewards:
        rewards: list[Reward] = [_reward(arguments.rewards)]
    else:
        rewards = [_sum(arguments.names)] if arguments.sum else [_reward(name) for name in arguments.names]
    report = audit(rewards)
    if arguments.json:
        print_json(report.to_dict())
    else:
        from segrl.reports.terminal import console

        console().print(report)
    return BAD if report.hackable else OK


def check_command(arguments: argparse.Namespace) -> int:
    from segrl.reports.terminal import say

    try:
        from segrl.testing.checks import check_reward
    except ImportError as error:  # hypothesis is not installed; the message says so
        return complain(str(error))
    settings = {} if arguments.examples is None else {"max_examples": arguments.examples}
    status = OK
    for name in arguments.names:
        try:
            outcome = str(check_reward(_reward(name), **settings))
        except RewardCheckError as error:
            outcome, status = str(error), BAD
        say(outcome)
    return status


def _reward(reference: str, **completion_format: Any) -> Reward:
    """Make a reward from a YAML file, a name or "module:attribute"; modules of the current folder are found too."""
    from segrl.rewards.factory import make_reward

    search_here()
    return make_reward(reference, **completion_format)


def _sum(references: Sequence[str], **completion_format: Any) -> Reward:
    """Return one reward, or the sum of several."""
    from segrl.rewards.factory import make_reward, weighted_sum

    if len(references) == 1:
        return _reward(references[0], **completion_format)
    return make_reward(weighted_sum([(_reward(reference), 1.0) for reference in references]), **completion_format)
