"""Results as JSON, and the versions of the packages that made them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from segrl._version import __version__
from segrl.errors import DataError

__all__ = ["versions", "write_results"]

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "sam2")


def versions() -> dict[str, str | None]:
    """Versions of Python, segrl and the packages that a result depends on; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "segrl": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write results as JSON with sorted keys, whole or not at all: a reader never sees half a file.

    Args:
        path: The file; missing folders are made, an existing file is replaced.
        results: Mappings, sequences, strings, numbers (numpy's too), booleans, `None` and paths, nested as you like.

    Returns:
        The path.

    Raises:
        DataError: A number that is not finite or a value that JSON cannot hold; its place is named, nothing is written.
    """
    path = Path(path)
    text = json.dumps(_plain(results, "results"), indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _plain(value: Any, where: str) -> Any:
    """`value` in the types that JSON knows."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where} is {value}; expected a finite number, because JSON has no other. Use None for 'no value'"
        )
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise DataError(f"{where} is a {type(value).__name__}; expected numbers, text, mappings or sequences")
