"""The web application: a page, and an endpoint that answers one question about one uploaded file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from segrl._version import __version__
from segrl.errors import DataError, SegRLError
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.volumes import VolumeSegmenter
from segrl.serving.answers import FORMATS, SUFFIXES, Upload, answer_upload
from segrl.serving.settings import ServingSettings
from segrl.serving.worker import BusyError, Question, TimeLimitError, Worker

__all__ = ["make_app"]

_PAGES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    # nothing from elsewhere, no inline script: a text of the model cannot become code even if it were not escaped
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LOCAL = ["localhost", "127.0.0.1", "[::1]"]
_POLL = 0.1  # seconds between looks at whether a client is still there


def make_app(
    segmenter: ReasoningSegmenter | VolumeSegmenter,
    settings: ServingSettings | None = None,
    *,
    name: str = "",
    examples: Sequence[tuple[Path, str]] = (),
) -> Starlette:
    """Return the application, for a server of your own; `segrl.serving.serve` runs it.

    Args:
        segmenter: The model.
        settings: Limits.
        name: Of the model, shown on the page.
        examples: Files with a question each, offered on the page. They are read when they are asked for, by number.

    Returns:
        An ASGI application. `GET /` is the page, `POST /api/predict` the endpoint, `GET /api/info` says what it takes.
        Nothing of an upload is kept when it is answered.
    """
    limits = settings or ServingSettings()
    made = _Endpoints(segmenter, limits, name, examples)
    return Starlette(
        routes=[
            Route("/", _page("page.html")),
            Route("/page.css", _page("page.css")),
            Route("/page.js", _page("page.js")),
            Route("/api/info", made.info),
            Route("/api/predict", made.predict, methods=["POST"]),
            Route("/examples/{number:int}", made.example),
        ],
        # a local server answers under local names only, so that no page from elsewhere reads it by a name of its own
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL if limits.is_local else ["*"])],
        exception_handlers={
            SegRLError: _refused,
            HTTPException: _refused,
            MultiPartException: _refused,
            ClientDisconnect: _left,
            Exception: _failed,
        },
        lifespan=made.lifespan,
    )


class _Endpoints:
    """The model behind its worker, and what the routes answer."""

    def __init__(
        self, segmenter: Any, limits: ServingSettings, name: str, examples: Sequence[tuple[Path, str]]
    ) -> None:
        self.segmenter, self.limits, self.examples = segmenter, limits, examples
        self.worker = Worker(limits.max_waiting, limits.time_limit)
        self.files = SUFFIXES[segmenter.settings.task]
        self.shown = {
            **{"name": name, "task": segmenter.settings.task, "segrl": __version__},
            **{"files": self.files, "formats": FORMATS, "max_size_mb": limits.max_size_mb},
            **{"time_limit": limits.time_limit, "max_samples": limits.max_samples},
            "examples": [{"number": number, "question": text} for number, (_, text) in enumerate(examples)],
        }

    async def info(self, request: Request) -> Response:
        return _json({**self.shown, "waiting": self.worker.waiting})

    async def example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if not 0 <= number < len(self.examples):
            raise HTTPException(404, f"example {number}: there are {len(self.examples)}")
        path = self.examples[number][0]
        suffix = next(kind for kind in self.files if path.name.lower().endswith(kind))
        return _file(path.read_bytes(), "application/octet-stream", f"example_{number}{suffix}")

    async def predict(self, request: Request) -> Response:
        _same_origin(request)
        form = request.query_params.get("format", "json")
        if form not in FORMATS:
            raise HTTPException(400, f"format={form!r}: expected one of {', '.join(FORMATS)}")
        upload = await _read_upload(request, self.limits)
        question = self.worker.put(partial(answer_upload, self.segmenter, upload, form, self.limits))
        del upload
        answer = await _wait(request, question)
        if answer.media_type == "application/json":
            return _json(answer.content)
        return _file(answer.content, answer.media_type, answer.name)

    @asynccontextmanager
    async def lifespan(self, app: Starlette):
        yield
        await asyncio.to_thread(self.worker.close)


def _page(file: str) -> Any:
    """Return the endpoint of a file of the page, read once."""
    content = (Path(__file__).parent / file).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=f"{_PAGES[file]}; charset=utf-8", headers=_HEADERS)

    return send


def _file(content: bytes, media_type: str, name: str) -> Response:
    """Return a file that a browser saves under a name."""
    headers = {**_HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=media_type, headers=headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(content, status, headers={**_HEADERS, **(headers or {})})


def _same_origin(request: Request) -> None:
    """Refuse a page of another site that lets its visitor's browser ask."""
    origin = request.headers.get("origin")
    if origin and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, f"origin {origin!r}: this server answers its own page, and programs")


async def _read_upload(request: Request, limits: ServingSettings) -> Upload:
    """Read the form; one that is too large is refused while it comes."""
    too_large = HTTPException(413, f"the upload is larger than {limits.max_size_mb:g} MB")
    most = limits.max_bytes + 65536  # room for the form around the file
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "expected multipart/form-data with the parts file and question")
    counted = _counted(request, most, too_large)
    async with counted.form(max_files=1, max_fields=4, max_part_size=65536) as form:
        file, question, samples = form.get("file"), form.get("question"), form.get("samples") or "1"
        if file is None or isinstance(file, str):
            raise HTTPException(400, "file: expected a part with the image or volume")
        if not isinstance(question, str) or not question.strip():
            raise HTTPException(400, "question: expected a text, such as 'Where is the nodule?'")
        if len(question) > limits.max_question:
            raise HTTPException(400, f"question: {len(question)} characters; expected at most {limits.max_question}")
        number = int(samples) if isinstance(samples, str) and samples.isascii() and samples.isdigit() else 0
        if not 1 <= number <= limits.max_samples:
            raise HTTPException(400, f"samples: {str(samples)[:20]!r}; expected 1 to {limits.max_samples}")
        content = await file.read()
        if not content:
            raise HTTPException(400, "file: it is empty")
        return Upload(file.filename or "upload", content, question.strip(), number)


def _counted(request: Request, most: int, too_large: HTTPException) -> Request:
    """The request, which raises where its body exceeds what may come, whatever its header says."""
    seen = 0

    async def receive() -> Any:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_large
        return message

    return Request(request.scope, receive)


async def _wait(request: Request, question: Question) -> Any:
    """Wait for an answer as long as the client does, and the time limit allows."""
    answer = asyncio.wrap_future(question.answer)
    try:
        while not answer.done():
            await asyncio.wait([answer], timeout=_POLL)
            if not answer.done() and await request.is_disconnected():
                raise ClientDisconnect
            if not answer.done() and question.given_up:
                raise TimeLimitError("no answer within the time limit of this server; ask again, or about less")
        return answer.result()
    finally:
        question.left.set()
        if not answer.done():
            answer.cancel()  # one that has not begun never does; one that has is ended by its next token


async def _refused(request: Request, error: Any) -> Response:
    """An answer with the status that says whose fault it is, and one line that says which."""
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code)
    if isinstance(error, BusyError):
        return _json({"error": str(error)}, 503, {"Retry-After": "5"})
    if isinstance(error, TimeLimitError):
        return _json({"error": str(error)}, 504)
    status = 422 if isinstance(error, DataError) else 400
    return _json({"error": getattr(error, "message", str(error))}, status)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of ours: the client learns that there was one, and the terminal shows where."""
    return _json({"error": "the server failed at this request; its terminal says why"}, 500)
