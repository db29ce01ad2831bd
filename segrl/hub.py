"""Names of models and data sets on disk or on the hub, and one-line errors for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from segrl.errors import CheckpointError, SegRLError

__all__ = [
    "check_source",
    "check_token",
    "download_run",
    "hub_licence",
    "hub_problem",
    "is_hub_name",
    "reraise_as",
    "upload_files",
]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")  # may run code
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_hub_name(text: str) -> bool:
    """Return whether `text` looks like `owner/name`, not like a path.

    Example:
        >>> is_hub_name("Qwen/Qwen2.5-VL-3B-Instruct"), is_hub_name("./runs/mine"), is_hub_name("mine")
        (True, False, False)
    """
    return re.fullmatch(r"(?!\.)[\w.-]{1,96}/[\w.-]{1,96}", text) is not None


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


def hub_problem(error: BaseException) -> str:
    """Return what went wrong with a download or an upload, and the fix, in one line.

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
    if isinstance(error, errors.HfHubHTTPError):
        said = " ".join((error.server_message or str(error)).split())
        known = {
            401: f"the hub does not know the token; {LOG_IN}",
            403: f"the token may not write there ({said}); take your own name, or a token that may write",
            409: "the name is taken; pass --overwrite to add a commit to your own repository, or another name",
        }
        return known.get(error.response.status_code, f"the hub says {error.response.status_code}: {said}")
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # what a thread of an upload makes of it
        return f"{said} {hub_problem(error.__cause__)}"
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


def download_run(name: str, revision: str | None = None) -> Path:
    """Return the folder into which a repository was downloaded, without files that could run code when they are read.

    Args:
        name: `owner/name` on the hub.
        revision: A branch, tag or commit; the main branch when None.

    Raises:
        CheckpointError: There is no such repository, it is not open to this account, the hub cannot be reached and the
            repository was not downloaded before, or its weights are not in safetensors files.

    Example:
        >>> download_run("acme/never_seen")  # without a network
        Traceback (most recent call last):
        segrl.errors.CheckpointError: 'acme/never_seen': no such folder, and offline mode is on (HF_HUB_OFFLINE) and ...
    """
    from huggingface_hub import snapshot_download

    with _one_line(f"{name!r}: no such folder, and ", CheckpointError):
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=list(PICKLES)))
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{name!r}: no *.safetensors in the repository; other files of weights are not read")
    return folder


def check_token(repository: str) -> None:
    """Raise before an upload that needs an account if there is none.

    Raises:
        SegRLError: The name is no `owner/name`, or there is no token.

    Example:
        >>> check_token("nodules")
        Traceback (most recent call last):
        segrl.errors.SegRLError: 'nodules': expected owner/name, of letters, digits, '.', '_' and '-'
    """
    from huggingface_hub import get_token

    if not is_hub_name(repository):
        raise SegRLError(f"{repository!r}: expected owner/name, of letters, digits, '.', '_' and '-'")
    if get_token() is None:
        raise SegRLError(f"{repository!r}: the hub asks who you are; {LOG_IN}")


def hub_licence(name: str) -> str | None:
    """Return the licence that a repository's card names; None if it names none, or cannot be asked.

    Example:
        >>> hub_licence("acme/base") is None  # without a network
        True
    """
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(name).card_data
    except (OSError, ValueError):
        return None
    licence = None if card is None else card.to_dict().get("license")
    return licence if isinstance(licence, str) else None


def upload_files(
    files: Mapping[str, Path], card: str, repository: str, *, private: bool = False, overwrite: bool = False
) -> str:
    """Create a repository with these files, in one commit.

    The hub checks the card before anything is created, and the hash of every large file.

    Args:
        files: Local files by their names in the repository; none may be a pickle.
        card: Text of `README.md`.
        repository: `owner/name`.
        private: Let only its owner see a new repository.
        overwrite: Add the commit to a repository that exists; its other files stay.

    Returns:
        The commit's address.

    Raises:
        SegRLError: No token, a name that is taken or not allowed, a card that the hub refuses, no connection, or an
            upload that failed.

    Example:
        >>> upload_files({}, "# A card", "nodules")
        Traceback (most recent call last):
        segrl.errors.SegRLError: 'nodules': expected owner/name, of letters, digits, '.', '_' and '-'
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    assert not any(Path(name).match(pattern) for name in files for pattern in PICKLES)
    check_token(repository)
    api, made = HfApi(), False
    operations = [CommitOperationAdd("README.md", card.encode())]
    operations += [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    try:
        with _one_line(f"{repository!r}: ", SegRLError):
            api._validate_yaml(card)  # what `create_commit` does, too, after the repository was made
            api.create_repo(repository, private=private or None, exist_ok=overwrite)
            made = True
            found = api.create_commit(repository, operations, commit_message="Upload a segrl run")
    except SegRLError as error:
        left = "; what was created stays, push again with --overwrite" if made and not overwrite else ""
        raise SegRLError(f"{error}{left}") from error.__cause__
    return found.commit_url


@contextmanager
def _one_line(prefix: str, error: type[SegRLError]) -> Iterator[None]:
    """Inside the context, reraise what the hub or its client says as one line with the fix, `hub_problem`."""
    from httpx2 import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as problem:
        if isinstance(problem, SegRLError):
            raise
        raise error(f"{prefix}{hub_problem(problem)}") from problem
