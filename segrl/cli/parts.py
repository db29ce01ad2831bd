"""`segrl parts`: list and describe adapters, probes, segmenters, dense losses and metrics."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from segrl.cli.output import OK, print_json, search_here
from segrl.errors import SegRLError, unknown_name
from segrl.registry import Registry, argument_docs, path_of, resolve_attribute, summary_of

__all__ = ["add_parts_commands"]

# kind: where its registry is (imported when a command needs it), and what a part of it takes and returns
_KINDS = {
    "adapter": (
        "segrl.heads.adapters:ADAPTERS",
        "states (N, K, D), state_mask (N, K) -> prompts (N, P, C), or (prompts, {name: (N, ...)})",
    ),
    "probe": ("segrl.heads.probes:PROBES", "ids (B, T), completion_mask (B, T) -> index (B, K), valid (B, K)"),
    "segmenter": (
        "segrl.segmenters.registry:SEGMENTERS",
        "images (B, 3, S, S), prompts (N, K, C), index (N,) -> mask logits (N, h, h)",
    ),
    "dense_loss": ("segrl.heads.dense:DENSE_LOSSES", "mask logits (N, h, h), target (N, h, h) in 0..1 -> (N,)"),
    "metric": ("segrl.metrics.registry:METRICS", "prediction, target -> a number, or None where it does not apply"),
}


def add_parts_commands(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl parts list` and `segrl parts describe` to the areas of the command."""
    commands = areas.add_parser("parts", help="list and describe adapters, probes, segmenters, losses and metrics")
    commands = commands.add_subparsers(metavar="COMMAND", required=True)
    text = "list all parts: built in, imported, and from installed packages"
    commands.add_parser("list", help=text, description=f"{text}.", parents=parents).set_defaults(run=_list)
    text = "show what a part takes, returns and can be set to"
    describe = commands.add_parser("describe", help=text, description=f"{text}.", parents=parents)
    describe.add_argument("kind", metavar="KIND", nargs="?", help=f"{', '.join(_KINDS)}; may be left out")
    describe.add_argument(
        "name", metavar="NAME", help="a name from 'segrl parts list', or with a kind module:attribute"
    )
    describe.set_defaults(run=_describe)


def _registry(kind: str) -> Registry:
    return resolve_attribute(_KINDS[kind][0])


def _list(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.reports.terminal import console, printable

    parts = [{"kind": kind, **vars(report)} for kind in _KINDS for report in _registry(kind).reports()]
    if arguments.json:
        return print_json(
            [{key: part[key] for key in ("kind", "name", "origin", "summary", "broken")} for part in parts]
        )
    table = Table("kind", "name", "origin", "summary")
    for part in parts:
        summary = f"broken: {part['broken']}" if part["broken"] else part["summary"]
        cells = (part["kind"], part["name"], part["origin"], summary)
        table.add_row(*(Text(printable(cell), style="red" if part["broken"] else "") for cell in cells))
    console().print(table)
    return OK


def _describe(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from segrl.reports.terminal import console, printable

    part = _described(arguments.kind, arguments.name)
    if arguments.json:
        return print_json(part)
    out = console()
    out.print(Text(printable(part["name"]), style="bold"), Text(printable(part["summary"])), sep="\n")
    facts = Table(box=None, show_header=False)
    for fact in ("kind", "shapes", "origin", "path"):
        facts.add_row(Text(fact), Text(printable(part[fact] or "-")))
    out.print(facts)
    if part["settings"]:
        settings = Table("setting", "default", "meaning")
        for setting in part["settings"]:
            default = "(required)" if setting["required"] else setting["default"]
            settings.add_row(*(Text(printable(cell)) for cell in (setting["name"], default, setting["doc"])))
        out.print(settings)
    return OK


def _described(kind: str | None, name: str) -> dict[str, Any]:
    """Everything that is known about a part, as plain values."""
    if kind is not None and kind not in _KINDS:
        raise unknown_name("kind of part", kind, _KINDS)
    if ":" in name:
        if kind is None:
            raise SegRLError(f"{name!r}: expected a kind before module:attribute, one of {', '.join(_KINDS)}")
        search_here()
    kinds = [known for known in _KINDS if name in _registry(known).names()] if kind is None else [kind]
    if len(kinds) > 1:
        raise SegRLError(f"{name!r} is a {' and a '.join(kinds)}; write segrl parts describe {kinds[0]} {name}")
    if not kinds:
        raise unknown_name("part", name, {other for known in _KINDS for other in _registry(known).names()})
    registry = _registry(kinds[0])
    origin = f"module {name.partition(':')[0]}"
    for report in registry.reports():  # before anything is imported here: a package may never return
        if report.name == name:
            if report.broken:
                raise SegRLError(f"{registry.kind} {name!r} ({report.origin}) {report.broken}")
            origin = report.origin
            break
    item = registry.get(name)
    docs = argument_docs(item)
    return {
        "kind": kinds[0],
        "name": name,
        "summary": summary_of(item),
        "shapes": _KINDS[kinds[0]][1],
        "origin": origin,
        "path": path_of(item),
        "settings": [
            {
                "name": parameter.name,
                "required": parameter.default is parameter.empty,
                "default": None if parameter.default is parameter.empty else repr(parameter.default),
                "doc": docs.get(parameter.name, ""),
            }
            for parameter in _settings(item)
        ],
    }


def _settings(item: Any) -> list[inspect.Parameter]:
    """The arguments of a class, or of a function behind the two that every call fills in."""
    parameters = list(inspect.signature(item).parameters.values())
    named = [item for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
    return named if inspect.isclass(item) else named[2:]
