"""Names of models and data sets, on disk or on the hub, and what can go wrong with them, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segrl.errors import SegRLError

__all__ = ["check_source", "is_hub_name", "reraise_as"]


def is_hub_name(text: str) -> bool:
    """Whether `text` looks like `owner/name`, and not like a path.

    Example:
        >>> is_hub_name("Qwen/Qwen2.5-VL-3B-Instruct"), is_hub_name("./runs/mine"), is_hub_name("mine")
        (True, False, False)
    """
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def check_source(argument: str, value: str, kind: str, error: type[SegRLError] = SegRLError) -> None:
    """Refuse a value that is neither a folder nor can be a name on the hub, before anything looks for it there.

    Args:
        argument: What the user knows the value by, for example `"--model"`.
        value: A path or a name.
        kind: What it stands for, for example `"model"`.
        error: The error to raise.

    Raises:
        SegRLError: Of the class `error`; argument and value are named.

    Example:
        >>> check_source("--model", "no_such_model", "model")
        Traceback (most recent call last):
        segrl.errors.SegRLError: --model 'no_such_model': no such folder, nor a model name owner/name
    """
    if not value or not (Path(value).is_dir() or is_hub_name(value)):
        raise error(f"{argument} {value!r}: no such folder, nor a {kind} name owner/name")


@contextmanager
def reraise_as(what: str, error: type[SegRLError] = SegRLError) -> Iterator[None]:
    """What other libraries say about files that are missing or broken, told in one line that begins with `what`.

    transformers, datasets and the hub raise `OSError` and `ValueError` of many lines for a name that does not exist.
    segrl's own errors pass as they are.

    Args:
        what: Begins the line: argument and value, for example `"--model 'mine'"`.
        error: The error to raise instead.

    Raises:
        SegRLError: Of the class `error`.

    Example:
        >>> with reraise_as("--model 'mine'"):
        ...     raise OSError("Can't load\\n  the model")
        Traceback (most recent call last):
        segrl.errors.SegRLError: --model 'mine': Can't load the model
    """
    try:
        yield
    except (OSError, ValueError) as problem:
        if isinstance(problem, SegRLError):
            raise
        raise error(f"{what}: {' '.join(str(problem).split())}") from problem
