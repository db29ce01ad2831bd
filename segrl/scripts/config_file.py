"""`--config my.yaml`: flags in a file, in TRL's format; and the file that a run writes, which repeats it.

The file becomes a part of the command line, before the other flags, so that what holds for flags holds for it: types,
choices, suggestions for misspelt names, and flags on the command line override it. TRL's own parser sets its values as
defaults without looking at them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from segrl.errors import SegRLError
from segrl.files.whole import write_whole

__all__ = ["CONFIG_FILE", "expand_config", "flag_values", "write_config"]

CONFIG_FILE = "config.yaml"
_FLAG = "--config"
_SECRET = re.compile("token|key|secret|passw|credential", re.IGNORECASE)  # in names of variables
_OF_ONE_RUN = ("output_dir", "overwrite", "resume_from_checkpoint", "check_only", "dry_run")  # repeated by no other run


def flag_values(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each flag on a command line, by its name; none for a flag alone.

    Example:
        >>> flag_values(["--max-steps=2", "--rewards", "format", "box_f1", "--no_reasoning", "--seed", "-1"])
        {'max_steps': ['2'], 'rewards': ['format', 'box_f1'], 'no_reasoning': [], 'seed': ['-1']}
    """
    found: dict[str, list[str]] = {}
    name = None
    for item in argv:
        if item.startswith("--"):
            flag, equals, value = item.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            found[name] = [value] if equals else []
        elif name is not None:
            found[name].append(item)
    return found


def expand_config(argv: Sequence[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Return a command line with the flags of `--config FILE` in its place, before all others; set its `env`.

    Args:
        argv: The command line.

    Returns:
        The whole command line; the file by the name of each flag that comes from it and from nowhere else; and the
        environment variables that it has set.

    Raises:
        SegRLError: No such file, or it holds something else than flags and their values; names the file.

    Example:
        >>> _ = Path("my.yaml").write_text("max_steps: 5\\nrewards: [format, box_f1]\\nbf16: false\\n")
        >>> expand_config(["--config", "my.yaml", "--seed", "3"])[0]
        ['--max_steps', '5', '--rewards', 'format', 'box_f1', '--bf16', 'false', '--seed', '3']
    """
    rest, path = [], None
    items = iter(argv)
    for item in items:
        flag, equals, value = item.partition("=")
        if flag != _FLAG:
            rest.append(item)
            continue
        if path is not None:
            raise SegRLError("--config is given twice; expected one file")
        path = value if equals else next(items, None)
        if not path or path.startswith("--"):
            raise SegRLError("--config: expected a YAML file of flags, such as --config my.yaml")
    if path is None:
        return rest, {}, {}
    settings = _read(Path(path))
    variables = {str(name): str(value) for name, value in settings.pop("env", {}).items()}
    os.environ.update(variables)
    flags = [part for name, value in settings.items() if value is not None for part in _flag(path, name, value)]
    given = flag_values(rest)
    files = {name.replace("-", "_"): path for name in settings if name.replace("-", "_") not in given}
    return [*flags, *rest], files, variables


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SegRLError(f"--config {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SegRLError(f"--config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise SegRLError(f"--config {str(path)!r}: expected flags and their values, such as 'max_steps: 100'")
    if "config" in content:
        raise SegRLError(f"--config {str(path)!r}: a file of flags cannot name another one; drop 'config'")
    if not isinstance(content.get("env", {}), dict):
        raise SegRLError(f"--config {str(path)!r}: env: expected names and values of environment variables")
    return content


def _flag(path: str, name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    if name.replace("-", "_") == "report_to":
        values = [",".join(map(str, values))]  # one value on a command line
    if any(isinstance(item, list | dict) for item in values):
        raise SegRLError(f"--config {path!r}: {name}: expected a value or a list of values")
    return [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]


def write_config(
    folder: Path, argv: Sequence[str], arguments: Any, config: Any, variables: Mapping[str, str] | None = None
) -> Path:
    """Write `config.yaml` into a run: the flags that were given; and, as comments, the settings that a preset made.

    With `--config` the file repeats the run. Tokens of accounts, and variables whose names say that they hold a secret,
    are left out.

    Args:
        folder: The run's.
        argv: The command line, after `expand_config`.
        arguments: The script's own flags as they were read.
        config: The trainer's settings as they were read.
        variables: Environment variables that a file of flags has set.

    Example:
        >>> from segrl import SegSFTConfig
        >>> from segrl.scripts import RunArguments
        >>> config = SegSFTConfig("run", max_steps=7, use_cpu=True, bf16=False, report_to="none")
        >>> flags = ["--data", "lesions", "--output_dir", "run"]
        >>> text = write_config(Path("."), flags, RunArguments(), config).read_text()
        >>> text.splitlines()[2], "# max_steps: 7" in text, "output_dir:" in text
        ('data: lesions', True, False)
    """
    given: dict[str, Any] = {}
    shown = {name: value for name, value in (variables or {}).items() if not _SECRET.search(name)}
    if shown:
        given["env"] = shown
    known = {item.name for part in (arguments, config) for item in fields(part)}
    for name, values in flag_values(argv).items():
        turned_off = name not in known and name.startswith("no_") and not values
        name = name.removeprefix("no_") if turned_off else name
        if name in _OF_ONE_RUN or name.endswith("_token"):
            continue
        read = [_typed(value) for value in values]
        given[name] = not turned_off if not read else read[0] if len(read) == 1 else read
    derived = {}
    plain = config.to_dict() if hasattr(config, "to_dict") else {}
    for part in (arguments, config):
        for item in fields(part):
            value = plain.get(item.name, getattr(part, item.name))
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            skipped = item.name in given or item.name in _OF_ONE_RUN or item.name.endswith("_token")
            if not skipped and value != default and _is_plain(value):
                derived[item.name] = value
    lines = [
        "# Written by segrl. Repeats this run: pass --config with this file, and another --output_dir.",
        "# Flags that were given:",
        _dump(given) if given else "# none\n",
        "# Settings of the preset, and what follows from them:",
        "".join(f"# {line}\n" for line in _dump(derived).splitlines()),
    ]
    text = "\n".join(part.rstrip("\n") for part in lines) + "\n"
    return write_whole(folder / CONFIG_FILE, text)


def _typed(text: str) -> Any:
    """A value of the command line as YAML would show it: a number, true or false, or else the text itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # such as a regular expression
    return value if isinstance(value, bool | int | float) and str(value).casefold() == text.casefold() else text


def _dump(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return isinstance(value, str | int | float | bool)
