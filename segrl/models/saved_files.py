"""Saved files of a model: what is damaged is named before any library reads it, or allocates what it says."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from segrl.errors import CheckpointError

__all__ = [
    "ShapesOnly",
    "check_counts",
    "check_saved_files",
    "file_problem",
    "read_object",
    "read_weights",
    "require_shapes",
]

# files that transformers and PEFT read, each of which holds a JSON object
_OBJECTS = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json"),
)


class ShapesOnly(TorchFunctionMode):
    """Inside the context, new weights have shapes but no memory (the meta device).

    `torch.device("meta")` would also take the small tables that constructors read numbers from (`torch.linspace`).

    Example:
        >>> with ShapesOnly():
        ...     torch.nn.Linear(10**9, 10**6).weight.device
        device(type='meta')
    """

    _factories = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._factories:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        CheckpointError: There is no such file, it cannot be read, or it holds something else.

    Example:
        >>> read_object(Path("no/config.json"))
        Traceback (most recent call last):
        segrl.errors.CheckpointError: no/config.json: no such file
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}; copy the file again, or save the model anew") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def file_problem(path: Path) -> str | None:
    """Return what is wrong with a file of weights or states as a whole, or None; its content is not read.

    A file whose end is cut off is found: safetensors says at its beginning how long it is, PyTorch's archives have
    their list of contents at the end.

    Example:
        >>> Path("optimizer.pt").write_bytes(b"PK..")
        4
        >>> file_problem(Path("optimizer.pt"))
        'cut off or damaged'
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy"):
                return None
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return "cut off or damaged"
    except (OSError, SafetensorError) as error:
        return f"cannot be read: {' '.join(str(error).split())}"
    return None


def check_saved_files(folder: str | os.PathLike) -> None:
    """Refuse a folder in which a file of a model, processor or adapter is damaged.

    Args:
        folder: Of a saved model; a name on the hub has nothing to check.

    Raises:
        CheckpointError: The first damaged file, and what is wrong with it.
    """
    path = Path(folder)
    for name in _OBJECTS:
        if (path / name).is_file():
            read_object(path / name)
    for file in sorted(path.glob("*.safetensors")):
        if problem := file_problem(file):
            raise CheckpointError(f"{file}: {problem}; copy the file again, or take another checkpoint")


def require_shapes(path: Path, expected: Mapping[str, Iterable[int]]) -> None:
    """Compare the header of a safetensors file with the weights that a model has, before either is in memory.

    Args:
        path: The file.
        expected: Shapes by the names of the weights.

    Raises:
        CheckpointError: The file is damaged, or weights are missing, unexpected or of another shape.
    """
    if problem := file_problem(path):
        raise CheckpointError(f"{path}: {problem}; copy the file again, or take another checkpoint")
    with safe_open(path, "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    own = {name: tuple(shape) for name, shape in expected.items()}
    problems = [f"missing {name}" for name in own if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in own]
    problems += [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in own.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: does not fit what is beside it: {', '.join(problems[:5])}{more}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def check_counts(path: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Refuse counts in a config that the weights beside it cannot have, such as a billion blocks.

    For parts of segrl itself: each of their numbers is a size, a count or the id of a token, none of which exceeds both
    ten million and the bytes of all weights.

    Args:
        path: The config's file, for the error.
        config: What it holds; objects and lists are searched.
        weights: The file of weights.

    Raises:
        CheckpointError: File, key and number.
    """
    limit = max(10**7, weights.stat().st_size if weights.is_file() else 0)

    def check(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                check(item, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for item in value:
                check(item, key)
        elif isinstance(value, int) and abs(value) > limit:
            raise CheckpointError(f"{path}: {key}: {value} is more than {weights.name} can hold; restore the file")

    check(config, "")
