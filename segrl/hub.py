"""Names of models and data sets on disk or on the hub, and one-line errors for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segrl.errors import SegRLError

__all__ = ["check_source", "hub_problem", "is_hub_name", "reraise_as"]


def is_hub_name(text: str) -> bool:
    """Return whether `text` looks like `owner/name`, not like a path.

    Example:
        >>> is_hub_name("Qwen/Qwen2.5-VL-3B-Instruct"), is_hub_name("./runs/mine"), is_hub_name("mine")
        (True, False, False)
    """
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def check_source(argument: str, value: str, kind: str, error: type[SegRLError] = SegRLError) -> None:
    """Raise for a value that is neither a folder nor a possible name on the hub, before it is looked up there.

    Args:
        argument: Name of the value in the error, as the user knows it, for example `"--model"`.
        value: A path or a name.
        kind: Kind of the value, for example `"model"`.
        error: Class of the error.

    Raises:
        SegRLError: Of the class `error`; names argument and value.

    Example:
        >>> check_source("--model", "no_such_model", "model")
        Traceback (most recent call last):
        segrl.errors.SegRLError: --model 'no_such_model': no such folder, nor a model name owner/name
    """
    if not value or not (Path(value).is_dir() or is_hub_name(value)):
        raise error(f"{argument} {value!r}: no such folder, nor a {kind} name owner/name")


def hub_problem(error: Exception) -> str:
    """Return what went wrong with a download, and the fix, in one line.

    Args:
        error: As `huggingface_hub` raised it.

    Example:
        >>> from huggingface_hub.errors import HFValidationError
        >>> hub_problem(HFValidationError("Repo id must use ..."))
        'the name is none of the hub (Repo id must use ...); correct it, or pass a folder'
    """
    from huggingface_hub import errors

    said = " ".join(str(error).split())
    if isinstance(error, errors.GatedRepoError):
        return "the hub asks for consent to its terms first; give it on the repository's page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private; correct the name, or log in with `hf auth login`"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        switched = "offline mode is on (HF_HUB_OFFLINE)" if "HF_HUB_OFFLINE" in said else "the hub cannot be reached"
        return f"{switched} and this machine's cache does not hold it; connect, or pass a folder"
    if isinstance(error, errors.HFValidationError):
        return f"the name is none of the hub ({said}); correct it, or pass a folder"
    return f"the hub says: {said}"


@contextmanager
def reraise_as(prefix: str, error: type[SegRLError] = SegRLError) -> Iterator[None]:
    """Inside the context, reraise errors of other libraries about files as one line that begins with `prefix`.

    transformers, datasets and the hub raise `OSError` and `ValueError` of many lines for a name that does not exist.
    Errors of segrl pass unchanged.

    Args:
        prefix: Start of the line: argument and value, for example `"--model 'mine'"`.
        error: Class of the error that is raised instead.

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
        raise error(f"{prefix}: {' '.join(str(problem).split())}") from problem
