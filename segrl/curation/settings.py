"""`curate.yaml`: the settings of a build, a section a stage. Each section is a dataclass in the module of its stage."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml

from segrl.curation.difficulty import DifficultySettings
from segrl.curation.judges import JudgeSettings, check_judge
from segrl.curation.publish import PublishSettings
from segrl.curation.sources import SourceSettings
from segrl.curation.texts import TextSettings
from segrl.errors import DataError, SegRLError, unknown_name

__all__ = ["CurationSettings"]


@dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """Settings of a build.

    Attributes:
        sources: The data sets, at least one; their paths are relative to the file's folder.
        difficulty: How hard cases are found.
        write: How questions and reasoning are written; the path of its prompts is relative to the file's folder.
        judge: How they are judged, and written again.
        publish: How the data set is written.
        build: Folder of the build, relative to the file's folder.

    Example:
        >>> _ = Path("curate.yaml").write_text("sources: [{path: mine, licence: CC0-1.0, lesion: polyp}]")
        >>> CurationSettings.read("curate.yaml").sources[0].licence
        'CC0-1.0'
    """

    sources: tuple[SourceSettings, ...]
    difficulty: DifficultySettings = field(default_factory=DifficultySettings)
    write: TextSettings = field(default_factory=TextSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    publish: PublishSettings = field(default_factory=PublishSettings)
    build: Path = Path("build")

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("sources: expected at least one")
        check_judge(self.write, self.judge)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file.

        Raises:
            DataError: The file cannot be read or is not YAML, an unknown section or key, or a value of another type;
                names file and key.

        Example:
            >>> _ = Path("wrong.yaml").write_text("sources: [{pth: mine}]")
            >>> CurationSettings.read("wrong.yaml")
            Traceback (most recent call last):
            segrl.errors.DataError: wrong.yaml: sources[0]: unknown key 'pth'; did you mean 'path'? Known: ...
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
        try:
            settings = _section(cls, content, "")
        except SegRLError as error:
            raise DataError(f"{path}: {error}") from error
        home = Path(path).absolute().parent
        sources = tuple(
            dataclasses.replace(source, path=home / source.path, images=source.images and home / source.images)
            for source in settings.sources
        )
        write = settings.write
        given = {
            name: home / path for name in ("prompts", "descriptions") if (path := getattr(write, name)) is not None
        }
        write = dataclasses.replace(write, **given)
        return dataclasses.replace(settings, sources=sources, write=write, build=home / settings.build)


def _section(kind: Any, content: Any, where: str) -> Any:
    """Build a dataclass from a mapping; `where` is its key in the file, "" at the top."""
    if not isinstance(content, Mapping):
        raise DataError(f"{where or 'the file'} holds {content!r:.80}; expected keys and values")
    hints = get_type_hints(kind)
    items = {item.name: item for item in dataclasses.fields(kind)}
    prefix = f"{where}: " if where else ""
    values = {}
    for key, value in content.items():
        if key not in items:
            raise DataError(f"{prefix}{unknown_name('key', str(key), items)}")
        values[key] = _value(hints[key], value, f"{where}.{key}" if where else key)
    for name, item in items.items():
        if name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise DataError(f"{prefix}no {name}; add it")
    try:
        return kind(**values)
    except SegRLError as error:
        raise DataError(f"{prefix}{error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return a value of the file as its annotation asks, a list as a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _of_union(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {_value(inner[0], k, where): _value(inner[1], item, f"{where}.{k}") for k, item in value.items()}
    if origin is Literal:
        if value not in inner:
            raise unknown_name(where, str(value), map(str, inner))
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if (hint in (int, bool, str) and type(value) is hint) or (hint is type(None) and value is None):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    number = " (in YAML write 1.0e-3, not 1e-3)" if hint in (float, int) and isinstance(value, str) else ""
    raise DataError(f"{where}={value!r:.80}; expected {_described(hint)}{number}")


def _of_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _section(option, value, where)
        try:
            return _value(option, value, where)
        except DataError:
            continue
    raise DataError(f"{where}={value!r:.80}; expected {' or '.join(map(_described, options))}")


def _described(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(hint)))
    if hint is type(None):
        return "nothing"
    return names.get(hint) or ("a list" if origin is tuple else "keys and values")
