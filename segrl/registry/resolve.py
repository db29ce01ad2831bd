"""From "module:attribute" to an object and back."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from segrl._version import __version__
from segrl.errors import SegRLError

__all__ = ["argument_docs", "origin_of", "path_of", "resolve_attribute", "same_definition", "summary_of"]


def resolve_attribute(path: str, kind: str = "attribute", error: type[SegRLError] = SegRLError) -> Any:
    """Import what "module:attribute" names; the attribute may have dots.

    Args:
        path: The text, such as "my_package.parts:MyAdapter".
        kind: What it is for, named in errors, such as "adapter".
        error: The error to raise.

    Raises:
        SegRLError: Of the class `error`: the text has another form, the module cannot be imported, or it has no such
            attribute.

    Example:
        >>> resolve_attribute("math:hypot")(3, 4)
        5.0
        >>> resolve_attribute("math:hypo", "metric")
        Traceback (most recent call last):
        segrl.errors.SegRLError: metric 'math:hypo' cannot be imported: AttributeError: module 'math' has no attribute 'hypo'
    """  # noqa: E501  the message is one line
    module, _, attribute = path.partition(":")
    if not (module and attribute):
        raise error(f"{kind} {path!r}: expected 'module:attribute'")
    try:
        found = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # whatever a user's module raises
        raise error(f"{kind} {path!r} cannot be imported: {type(problem).__name__}: {problem}") from problem
    return found


def path_of(item: Any) -> str | None:
    """Return "module:attribute" of a class or function, or None where it cannot be looked up by it (local ones).

    Example:
        >>> import json
        >>> path_of(json.JSONDecoder), path_of(lambda: 0)
        ('json.decoder:JSONDecoder', None)
    """
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    return None if not module or not name or "<" in name else f"{module}:{name}"


def same_definition(old: Any, new: Any) -> bool:
    """Return whether `new` is `old` defined again at the same location, as when a notebook's cell is run twice.

    Example:
        >>> def make():
        ...     return type("Part", (), {"__qualname__": "Part"})
        >>> same_definition(make(), make()), same_definition(make(), dict)
        (True, False)
    """
    return old is new or (path_of(new) is not None and path_of(old) == path_of(new))


def origin_of(item: Any) -> str:
    """Return where a class or function comes from: segrl with its version, or its module.

    Example:
        >>> import json
        >>> origin_of(json.dumps)
        'module json'
    """
    module = getattr(item, "__module__", "") or ""
    return f"segrl {__version__}" if module.partition(".")[0] == "segrl" else f"module {module}"


def summary_of(item: Any) -> str:
    """Return the first paragraph of a docstring as one line, "" without one.

    Example:
        >>> summary_of(summary_of)
        'Return the first paragraph of a docstring as one line, "" without one.'
    """
    return " ".join((inspect.getdoc(item) or "").partition("\n\n")[0].split())


def argument_docs(item: Any) -> dict[str, str]:
    """Return the sentences on each argument in the Google-style docstring of a function or class.

    Example:
        >>> argument_docs(summary_of), argument_docs(resolve_attribute)["error"]
        ({}, 'The error to raise.')
    """
    docs: dict[str, str] = {}
    for source in (item, getattr(item, "__init__", None) if inspect.isclass(item) else None):
        section = re.search(r"^Args:\n((?:(?:[ \t]+.*)?\n?)*)", inspect.getdoc(source) or "", re.MULTILINE)
        lines = [] if section is None else inspect.cleandoc("\n" + section[1]).splitlines()
        name = ""
        for line in lines:
            head = re.match(r"\*{0,2}(\w+)(?: \([^)]*\))?: ?(.*)", line)
            if head is not None:
                name = head[1]
                docs[name] = head[2]
            elif line.strip() and name:
                docs[name] += " " + line.strip()
    return docs
