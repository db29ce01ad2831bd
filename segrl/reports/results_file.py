"""Results as JSON, and the versions of the packages behind them."""

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
from segrl.files.whole import write_whole

__all__ = ["versions", "write_results"]

EVALUATION_TIME = "evaluation_time.json"  # seconds, beside results.json, which is the same each time
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "sam2")


def versions() -> dict[str, str | None]:
    """Return the versions of Python, segrl and the packages that a result depends on; `None` if not installed.

    Example:
        >>> list(versions())
        ['python', 'segrl', 'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'sam2']
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "segrl": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write results as JSON with sorted keys. The file is replaced at once: a reader never sees half of it.

    Args:
        path: Path of the file; missing folders are created, an existing file is replaced.
        results: Mappings, sequences, strings, numbers (also of numpy), booleans, `None` and paths, nested at will.

    Returns:
        The path.

    Raises:
        DataError: A number that is not finite or a value that JSON cannot hold; its position is named, and nothing is
            written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_results(Path(folder, "results.json"), {"b": np.float32(0.5), "a": (1, None)}).read_text().split()
        ['{', '"a":', '[', '1,', 'null', '],', '"b":', '0.5', '}']
    """
    text = json.dumps(_plain(results, "results"), indent=2, sort_keys=True, allow_nan=False) + "\n"
    return write_whole(path, text)


def _plain(value: Any, where: str) -> Any:
    """Convert `value` to types that JSON can hold."""
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
