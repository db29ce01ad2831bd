"""A server of one model: its socket first, since a port may be in use, then the model, then the answers."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segrl.errors import SegRLError
from segrl.inference.base import find_run
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.loading import load
from segrl.inference.volumes import VolumeSegmenter
from segrl.predictions.prompt_settings import load_prompt_settings
from segrl.reports.terminal import say
from segrl.serving.settings import ServingSettings

__all__ = ["find_examples", "running_server", "serve"]

_EXAMPLES = 4


def serve(
    run: str | os.PathLike,
    settings: ServingSettings | None = None,
    *,
    examples: str | os.PathLike | None = None,
    **loading: Any,
) -> None:
    """Load a run and answer questions about uploads until the process is interrupted.

    Args:
        run: The run's output directory, one of its checkpoints, or `owner/name` on the hub.
        settings: Limits, and where to listen.
        examples: Folder of files that the page offers, see `find_examples`; by default samples of the run itself, if
            only this machine reaches the server.
        loading: To `segrl.inference.load`, such as `device="cpu"`.

    Raises:
        SegRLError: The extra `demo` is not installed, the port is in use, or the examples are no files to ask about.
        CheckpointError: There is no run.

    Example:
        >>> serve("no_run", ServingSettings(port=0))
        Traceback (most recent call last):
        segrl.errors.CheckpointError: model folder 'no_run' does not exist; pass an output directory of a segrl run, ...
    """
    _require_extra()
    limits = settings or ServingSettings()
    listening = _listen(limits)
    with listening:
        folder = find_run(run)
        known = load_prompt_settings(folder)
        kept = folder if limits.is_local else None
        offered = [] if known is None else find_examples(known.task, examples, kept)  # refused before the load
        segmenter = load(run, **loading)
        server = _server(segmenter, limits, Path(run).name, offered)
        say(f"Open {_address(listening)} in a browser. POST {_address(listening)}/api/predict answers programs; "
            "Ctrl-C ends the server.")  # fmt: skip
        server.run(sockets=[listening])


@contextmanager
def running_server(
    segmenter: ReasoningSegmenter | VolumeSegmenter,
    settings: ServingSettings | None = None,
    *,
    name: str = "",
    examples: Sequence[tuple[Path, str]] = (),
) -> Iterator[str]:
    """Inside the context, a server answers in a thread of this process; yields its address.

    Args:
        segmenter: The model; the server's thread asks it, so ask nothing else of it meanwhile.
        settings: Limits, and where to listen.
        name: Of the model, shown on the page.
        examples: Files with a question each, offered on the page.

    Raises:
        SegRLError: The extra `demo` is not installed, or the port is in use.

    Example:
        >>> import urllib.request
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> with running_server(ReasoningSegmenter(*tiny_qwen2_5_vl()), ServingSettings(port=0)) as address:
        ...     with urllib.request.urlopen(f"{address}/api/info") as response:
        ...         json.load(response)["task"]
        'images'
    """
    _require_extra()
    limits = settings or ServingSettings()
    with _listen(limits) as listening:
        server = _server(segmenter, limits, name, examples)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield _address(listening)
        finally:
            server.should_exit = True
            thread.join()


def find_examples(
    task: str, folder: str | os.PathLike | None, run: str | os.PathLike | None = None
) -> list[tuple[Path, str]]:
    """Return files that the page offers, with a question each.

    Args:
        task: "images" or "volumes".
        folder: Of files; `questions.json` in it may give the question of each by its name. None takes `run`.
        run: A run's folder, of which the first evaluated images with their questions are taken; None for none.

    Raises:
        SegRLError: The folder holds no file that can be asked about, or `questions.json` is no object of texts.

    Example:
        >>> find_examples("images", None, "no_run")
        []
    """
    from segrl.serving.answers import SUFFIXES

    if folder is None:
        return [] if run is None or task != "images" else _samples(Path(run))
    path = Path(folder)
    files = sorted(file for file in path.glob("*") if file.is_file() and file.name.lower().endswith(SUFFIXES[task]))
    if not files:
        raise SegRLError(f"--examples {path}: no file of {task} in it, expected {', '.join(SUFFIXES[task])}")
    questions: Any = {}
    if (path / "questions.json").is_file():
        try:
            questions = json.loads((path / "questions.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise SegRLError(f"{path / 'questions.json'}: not JSON: {error}") from error
        if not isinstance(questions, dict) or not all(isinstance(text, str) for text in questions.values()):
            raise SegRLError(f"{path / 'questions.json'}: expected an object of questions by the names of files")
    return [(file, questions.get(file.name, "")) for file in files]


def _samples(run: Path) -> list[tuple[Path, str]]:
    """The first images that an evaluation kept, with their questions."""
    try:
        records = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
        files = [(run / "samples" / f"{number:03d}.png", record["query"]) for number, record in enumerate(records)]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [(file, str(query)) for file, query in files[:_EXAMPLES] if file.is_file()]


def _require_extra() -> None:
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise SegRLError(f"{error.name} is not installed; pip install 'segrl[demo]'") from error


def _listen(settings: ServingSettings) -> socket.socket:
    """Take the port, so that one that is in use is known before the model is loaded."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SegRLError(f"--host {settings.host}: {error.strerror or error}; expected a name or address") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise SegRLError(f"{where}: the port is in use; pass another --port, 0 for a free one") from error
        raise SegRLError(f"{where}: {error.strerror or error}; pass another --host or --port") from error
    return made


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _server(segmenter: Any, limits: ServingSettings, name: str, examples: Sequence[tuple[Path, str]]) -> Any:
    import uvicorn

    from segrl.serving.app import make_app

    app = make_app(segmenter, limits, name=name, examples=examples)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=20, lifespan="on",
                            timeout_graceful_shutdown=5, server_header=False)  # fmt: skip
    return uvicorn.Server(config)
