"""Entry points of installed packages: found by name, imported when named, inspected in child processes.

A package may raise anything when it is imported, end Python, or never return. A listing must survive that, so it
imports every package in a process of its own and reads a short answer from it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from segrl.errors import SegRLError, unknown_name
from segrl.registry.resolve import resolve_attribute, summary_of

__all__ = ["PluginReport", "find_plugins", "inspect_plugins", "load_plugin", "plugin_origin"]

# The child knows nothing yet: sys.path comes first, since the parent may have found segrl by it.
_CHILD = """
import json, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job.pop("path")
from segrl.registry.plugins import run_child
run_child(**job)
"""
_AT_ONCE = 4  # child processes; each takes the memory of its imports


@dataclass(frozen=True)
class PluginReport:
    """One name of a registry, as a listing shows it.

    Attributes:
        name: Its name.
        origin: Package and version, or module, that it comes from.
        summary: First paragraph of its docstring.
        broken: Why it cannot be used, or None.
        details: What `describe` of `inspect_plugins` returned.

    Example:
        >>> PluginReport("my_adapter", "my_package 1.0").broken is None
        True
    """

    name: str
    origin: str
    summary: str = ""
    broken: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def find_plugins(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name, without importing anything; more than one per name is a conflict.

    Example:
        >>> find_plugins("segrl.no_such_group")
        {}
    """
    found: dict[str, list[EntryPoint]] = {}
    for plugin in entry_points(group=group):
        known = found.setdefault(plugin.name, [])
        if plugin not in known:
            known.append(plugin)
    return found


def plugin_origin(plugin: EntryPoint) -> str:
    """Return package and version of an entry point, or its module where no package is known.

    Example:
        >>> plugin_origin(EntryPoint("box", "my_rewards:box", "segrl.rewards"))
        'my_rewards'
    """
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist is not None else plugin.module


def load_plugin(group: str, name: str, kind: str, error: type[SegRLError] = SegRLError) -> Any:
    """Import what the entry point `name` of a group names.

    Args:
        group: Entry-point group, such as "segrl.adapters".
        name: Name of the entry point.
        kind: What it is, named in errors.
        error: The error to raise.

    Raises:
        UnknownNameError: No such entry point.
        SegRLError: Of the class `error`: its import fails, or two packages bring the name.

    Example:
        >>> load_plugin("segrl.no_such_group", "dice", "metric")
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown metric 'dice'; Known: none
    """
    known = find_plugins(group)
    if name not in known:
        raise unknown_name(kind, name, known)
    plugin = known[name][0]
    if conflict := _conflict(known[name]):
        raise error(f"{kind} {name!r}: {conflict}")
    try:
        return plugin.load()
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # whatever a package's import raises
        raise error(f"{kind} {name!r} of {plugin_origin(plugin)} {_failed(plugin, _error_text(problem))}") from problem


def inspect_plugins(
    group: str, timeout: float = 10.0, *, preload: Sequence[str] = (), describe: str | None = None
) -> dict[str, PluginReport]:
    """Import every entry point of a group in a child process and return what was found, by name.

    This process imports none of them. A plugin that raises anything (also `KeyboardInterrupt`), ends Python or does
    not return in time is reported as broken, with the reason.

    Args:
        group: Entry-point group, such as "segrl.rewards".
        timeout: Seconds that one plugin's import may take.
        preload: Modules that are imported before that time begins, such as "segrl.heads" for its torch.
        describe: "module:function" of a ``function(name, plugin)`` that returns `details` as JSON-ready values; it runs
            in the child process.

    Returns:
        One report per name, sorted by name; empty for a group without plugins.

    Example:
        >>> inspect_plugins("segrl.no_such_group")
        {}
    """

    def report(item: tuple[str, list[EntryPoint]]) -> PluginReport:
        name, plugins = item
        origin = ", ".join(plugin_origin(plugin) for plugin in plugins)
        if conflict := _conflict(plugins):
            return PluginReport(name, origin, broken=conflict)
        answer = _ask_child(plugins[0], timeout, preload, describe)
        broken = None if answer["error"] is None else _failed(plugins[0], answer["error"])
        return PluginReport(name, origin, answer["summary"], broken, answer.get("details") or {})

    found = sorted(find_plugins(group).items())
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return {made.name: made for made in threads.map(report, found)}


def _conflict(plugins: Sequence[EntryPoint]) -> str | None:
    if len(plugins) == 1:
        return None
    origins = " and ".join(plugin_origin(plugin) for plugin in plugins)
    return f"{origins} both bring it; uninstall one, or name one as {plugins[0].value!r}"


def _failed(plugin: EntryPoint, reason: str) -> str:
    return f"cannot be imported from {plugin.value!r}: {reason}"


def _error_text(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}".removesuffix(": ")


def _ask_child(plugin: EntryPoint, timeout: float, preload: Sequence[str], describe: str | None) -> dict[str, Any]:
    job = {"path": sys.path, "preload": list(preload), "describe": describe}
    job |= {"name": plugin.name, "value": plugin.value, "group": plugin.group}
    # Unbuffered: `communicate` reads on where `readline` stopped. A session of its own: killed with its children.
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdout.readline()  # "ready": Python and `preload` are there, the plugin's own time begins
        try:
            text, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"summary": "", "error": f"the import did not end within {timeout:g} s"}
        finally:
            _kill_group(child.pid)
    if not text:
        return {"summary": "", "error": f"the import ended Python, with exit status {child.returncode}"}
    return json.loads(text)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(pid, signal.SIGKILL)


def run_child(preload: Sequence[str], describe: str | None, name: str, value: str, group: str) -> None:
    """Run in the child: import the plugin, write the answer, and end whatever the plugin left running."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a plugin prints is no answer
    for module in preload:
        __import__(module)
    channel.write(b"ready\n")
    try:
        item = EntryPoint(name, value, group).load()
        details = None if describe is None else resolve_attribute(describe)(name, item)
        answer = {"summary": summary_of(item), "error": None, "details": details}
        text = json.dumps(answer)
    except BaseException as problem:  # whatever it is, it is the answer
        text = json.dumps({"summary": "", "error": _error_text(problem)})
    channel.write(text.encode())
    os._exit(0)
