"""Ask a language model: at most so many calls at a time, within rates and budgets, and each question once.

Every answer that arrives is kept in a `CallCache` before anything else happens to it. What did not arrive is repeated
by the `openai` client, with growing pauses; if it never arrives, the answer says so and the build goes on.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from PIL import Image

from segrl.caching.content import content_key
from segrl.curation.call_cache import Answer, CallCache
from segrl.curation.endpoints import Endpoint
from segrl.curation.packages import require
from segrl.errors import SegRLError

__all__ = ["BudgetError", "Caller", "Question", "call_key", "estimate_tokens", "image_tokens", "text_tokens"]

_PATCH = 28  # pixels of an image that one token stands for on each side, as in Qwen2.5-VL; only for estimates
_CHARACTERS = 4  # of a token of English


class BudgetError(SegRLError):
    """A limit of calls or cost is reached; what has arrived is kept, and the build goes on when the limit is raised."""


@dataclass(frozen=True, eq=False)
class Question:
    """Question to a model.

    Attributes:
        text: The prompt.
        images: Shown before it, in this order.
        schema: JSON schema of the answer; None asks for text.
        label: What it is for, in the file of kept calls and in messages; it is not sent.

    Example:
        >>> Question("What is seen?").images
        ()
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    schema: Mapping[str, Any] | None = None
    label: str = ""


def call_key(endpoint: Endpoint, question: Question) -> str:
    """Compute the key of a call: model, parameters, prompt, schema and pixels count, the server's address does not.

    Example:
        >>> here, there = (Endpoint(url=f"http://{host}:8000/v1", model="m") for host in ("a", "b"))
        >>> call_key(here, Question("Where?")) == call_key(there, Question("Where?"))
        True
        >>> call_key(here, Question("Where?")) == call_key(here, Question("Where?", (Image.new("L", (2, 2)),)))
        False
    """
    schema = None if question.schema is None else [endpoint.structured, json.dumps(question.schema, sort_keys=True)]
    pixels = [[image.mode, image.size, image.tobytes()] for image in _shrunk(endpoint, question)]
    parameters = json.dumps(endpoint.parameters(), sort_keys=True)
    return content_key("call 1", parameters, question.text, schema, pixels)


def estimate_tokens(question: Question, max_edge: int) -> int:
    """Estimate the tokens of a question: 4 characters are one, and 28 x 28 pixels are one.

    Example:
        >>> estimate_tokens(Question("four" * 10, (Image.new("L", (280, 280)),)), max_edge=140)
        35
    """
    return sum(image_tokens(image.size, max_edge) for image in question.images) + text_tokens(question.text)


def image_tokens(size: tuple[int, int], max_edge: int) -> int:
    """Estimate the tokens of an image of (width, height) pixels, which is shrunk to its longest edge.

    Example:
        >>> image_tokens((280, 560), max_edge=280)
        50
    """
    scale = min(1.0, max_edge / max(size))
    return math.ceil(size[0] * scale / _PATCH) * math.ceil(size[1] * scale / _PATCH)


def text_tokens(text: str) -> int:
    """Estimate the tokens of a text.

    Example:
        >>> text_tokens("A nodule.")
        3
    """
    return math.ceil(len(text) / _CHARACTERS)


@dataclass
class Caller:
    """Asks one endpoint; an asynchronous context manager.

    Args:
        endpoint: Where.
        cache: Kept answers.

    Raises:
        SegRLError: The extra `curation` is not installed, or there is no key.
    """

    endpoint: Endpoint
    cache: CallCache
    _locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _failures: int = 0  # in a row
    _next: float = 0.0  # when the rate allows the next call
    _stopped: SegRLError | None = None

    def __post_init__(self) -> None:
        openai, endpoint = require("openai"), self.endpoint
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.key(), max_retries=endpoint.retries, timeout=endpoint.timeout
        )
        self._slots = asyncio.Semaphore(endpoint.concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, question: Question) -> Answer:
        """Return the answer to a question, from the disk if it has ever arrived.

        Raises:
            BudgetError: The call could exceed a limit.
            SegRLError: The server refuses the key or does not know the model, or too many calls in a row failed.
        """
        key = await asyncio.to_thread(call_key, self.endpoint, question)
        async with self._locks[key]:  # of two equal questions at a time, one is asked
            if (kept := self.cache.get(key)) is not None:
                return kept
            async with self._slots:
                answer = await self._call(question)
                if answer.status != "failed":
                    self.cache.put(key, self.endpoint.model, question.label, answer)
        self._locks.pop(key, None)
        self._count_failures(answer, question)
        return answer

    async def _call(self, question: Question) -> Answer:
        await self._wait_for_rate()
        worst = self.endpoint.cost(estimate_tokens(question, self.endpoint.max_edge), self.endpoint.max_tokens)
        self._check_budget(worst)
        try:
            return await self._send(question)
        finally:
            self.cache.release(self.endpoint.model, worst)

    async def _send(self, question: Question) -> Answer:
        openai = require("openai")
        try:
            body = await asyncio.to_thread(_body, self.endpoint, question)
            response = await self._client.chat.completions.create(**body)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            self._stopped = SegRLError(f"{self.endpoint.url}, model {self.endpoint.model!r}: {_said(error)}")
            raise self._stopped from error
        except openai.OpenAIError as error:
            if getattr(error, "code", None) == "insufficient_quota":
                self._stopped = BudgetError(f"{self.endpoint.url}: {_said(error)}; what has arrived is kept")
                raise self._stopped from error
            return Answer("failed", "", f"{type(error).__name__}: {_said(error)}")
        except ValueError as error:  # the body is no JSON, or JSON of another kind
            return Answer("failed", "", f"the server's response cannot be read: {_said(error)}")
        return _read(self.endpoint, response)

    async def _wait_for_rate(self) -> None:
        if self._stopped is not None:
            raise self._stopped
        if self.endpoint.calls_per_minute is not None:
            now = asyncio.get_running_loop().time()
            start = max(now, self._next)
            self._next = start + 60 / self.endpoint.calls_per_minute
            await asyncio.sleep(start - now)

    def _check_budget(self, worst: float) -> None:
        endpoint = self.endpoint
        if self._stopped is None:
            passed = self.cache.reserve(endpoint.model, worst, endpoint.max_calls, endpoint.max_cost)
            if passed:
                goes_on = "what has arrived is kept; raise the limit, and the build goes on where it was"
                self._stopped = BudgetError(f"{endpoint.model}: {passed}; {goes_on}")
        if self._stopped is not None:
            raise self._stopped

    def _count_failures(self, answer: Answer, question: Question) -> None:
        self._failures = self._failures + 1 if answer.status == "failed" else 0
        if self._failures >= self.endpoint.max_failures:
            self._stopped = self._stopped or SegRLError(
                f"{self.endpoint.url}: {self._failures} calls in a row had no answer, the last for {question.label}: "
                f"{answer.reason}; what has arrived is kept, and the build goes on where it was"
            )
            raise self._stopped


def _body(endpoint: Endpoint, question: Question) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in _shrunk(endpoint, question)
    ]
    body = {
        **endpoint.parameters(),
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
    }
    own = {name: body.pop(name) for name in endpoint.extra}
    if question.schema is not None and endpoint.structured == "json_schema":
        schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif question.schema is not None and endpoint.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return {**body, "extra_body": own} if own else body


def _shrunk(endpoint: Endpoint, question: Question) -> list[Image.Image]:
    images = []
    for image in question.images:
        scale = endpoint.max_edge / max(image.size)
        plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        images.append(plain.resize(size, Image.Resampling.LANCZOS) if scale < 1 else plain)
    return images


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _read(endpoint: Endpoint, response: Any) -> Answer:
    choices = getattr(response, "choices", None)
    if not choices:
        return Answer("failed", "", f"the server's response has no choices: {str(response)[:200]}")
    message, finish = choices[0].message, choices[0].finish_reason
    text, refusal = _whole(message.content or ""), _whole(getattr(message, "refusal", None) or "")
    usage = getattr(response, "usage", None)
    tokens = (getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
    counts = {"tokens_in": tokens[0], "tokens_out": tokens[1], "cost": endpoint.cost(*tokens)}
    if refusal or finish == "content_filter":
        return Answer("refused", text, f"refused: {refusal or 'content filter'}", **counts)
    if finish == "length":
        return Answer("truncated", text, f"cut off after max_tokens={endpoint.max_tokens}", **counts)
    if not text.strip():
        return Answer("empty", text, f"empty answer (finish_reason {finish!r})", **counts)
    return Answer("answered", text, **counts)


def _whole(text: str) -> str:
    """A text without halves of characters, which no file can hold: servers that cut off at a limit may send one."""
    return text.encode("utf-8", "replace").decode()


def _said(error: BaseException) -> str:
    """The words of an error in one line, and those of the server where the client leaves them out."""
    text = " ".join(str(error).split())
    body = getattr(error, "body", None)
    if body and not (isinstance(body, Mapping) and "message" in body):  # not OpenAI's layout, such as FastAPI's detail
        text = f"{text}: {' '.join(str(body).split())}"
    return text[:300] or type(error).__name__
