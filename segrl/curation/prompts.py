"""Prompts in files: packaged ones, or those of a folder that a user edits. Each text records with which it was made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from segrl.errors import DataError, unknown_name

__all__ = ["PROMPT_NAMES", "Prompt", "read_prompts", "write_prompts"]

_PACKAGED = Path(__file__).parent / "prompts"
_CASE = ("lesion", "anatomy", "modality", "count", "size", "location", "query", "outline")
_FIELDS: dict[str, tuple[str, ...]] = {
    "perception": _CASE,
    "reasoning": (*_CASE, "perception"),
    "remarks": (*_CASE, "text", "remarks"),
    "judge": (*_CASE, "reasoning"),
}
PROMPT_NAMES = tuple(_FIELDS)


@dataclass(frozen=True)
class Prompt:
    """A prompt with fields in braces.

    Attributes:
        name: One of `PROMPT_NAMES`.
        template: The text; lines that begin with # are notes, and not part of it.
        version: The number that such a note gives, and the first digits of the file's SHA-256.

    Example:
        >>> prompt = read_prompts(None)["remarks"]
        >>> prompt.fill({"text": "Dark.", "remarks": "Name the side."}).splitlines()[-2]
        'Remarks: Name the side.'
        >>> prompt.version[:3]
        '1, '
    """

    name: str
    template: str
    version: str

    def fill(self, fields: Mapping[str, str]) -> str:
        """Return the text with its fields filled in; those that it does not use are ignored."""
        return self.template.format_map(fields).strip()


def read_prompts(folder: str | Path | None) -> dict[str, Prompt]:
    """Read all prompts.

    Args:
        folder: With files such as `judge.txt`; a prompt without a file is the packaged one. None takes these alone.

    Raises:
        DataError: No such folder, a file that is no prompt, cannot be read or is empty, a brace without its partner, or
            an unknown field; file and field are named.

    Example:
        >>> Path("mine").mkdir(exist_ok=True)
        >>> _ = Path("mine/judge.txt").write_text("Is {leson} described?")
        >>> read_prompts("mine")
        Traceback (most recent call last):
        segrl.errors.DataError: mine/judge.txt, line 1: unknown field 'leson'; did you mean 'lesion'? Known: ...
    """
    home = _PACKAGED if folder is None else Path(folder)
    if not home.is_dir():
        raise DataError(f"prompts: no folder {str(folder)!r}; `write_prompts` makes one with the packaged prompts")
    for path in sorted(home.glob("*.txt")):
        if path.stem not in _FIELDS:
            raise DataError(f"{path}: {unknown_name('prompt', path.stem, _FIELDS)}; rename or remove the file")
    found = {}
    for name, fields in _FIELDS.items():
        path = home / f"{name}.txt"
        found[name] = _read(path if path.is_file() else _PACKAGED / path.name, name, fields)
    return found


def write_prompts(folder: str | Path) -> list[Path]:
    """Copy the packaged prompts into a folder, to be edited. Files that are there stay.

    Example:
        >>> [path.name for path in write_prompts("my_prompts")]
        ['judge.txt', 'perception.txt', 'reasoning.txt', 'remarks.txt']
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(_PACKAGED.glob("*.txt")):
        if not (home / path.name).exists():
            (home / path.name).write_bytes(path.read_bytes())
            written.append(home / path.name)
    return written


def _read(path: Path, name: str, fields: tuple[str, ...]) -> Prompt:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("#"):
            _check(line, f"{path}, line {number}", fields)
    template = "\n".join(line for line in lines if not line.startswith("#")).strip()
    if not template:
        raise DataError(f"{path}: is empty; write a prompt, or remove the file for the packaged one")
    notes = " ".join(line for line in lines if line.startswith("#"))
    version = found.group(1) if (found := re.search(r"\bversion (\S+?)[:,;.]?(?:\s|$)", notes)) else "none"
    return Prompt(name, template, f"{version}, {hashlib.sha256(content.encode()).hexdigest()[:12]}")


def _check(line: str, where: str, known: tuple[str, ...]) -> None:
    try:
        parts = list(Formatter().parse(line))
    except ValueError as error:
        raise DataError(f"{where}: {error}; a brace that is meant is written twice, {{{{ or }}}}") from error
    for _, field, specification, conversion in parts:
        if field is None:
            continue
        if field not in known:
            raise DataError(f"{where}: {unknown_name('field', field, known)}")
        if specification or conversion:
            raise DataError(f"{where}: field {{{field}}} has a format; expected the name alone")
