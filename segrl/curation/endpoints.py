"""Where a language model answers: any server with OpenAI's interface, its limits and its prices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from segrl.errors import SegRLError

__all__ = ["Endpoint"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind a server that speaks OpenAI's chat completions: a vendor, vLLM, Ollama, `transformers serve`.

    Attributes:
        url: Such as `https://api.openai.com/v1`, or `http://localhost:8000/v1` of a server of your own.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; "" for a server that needs none.
        concurrency: Largest number of calls at a time.
        calls_per_minute: Limit of new calls; None has none.
        retries: How often a call is repeated that no answer came to (429, 500, time-out), with growing pauses, or those
            that the server asks for.
        timeout: Seconds until a call counts as unanswered.
        max_failures: So many unanswered calls in a row stop the build.
        max_tokens: Of one answer.
        token_limit: Name of that parameter; newer models of OpenAI want "max_completion_tokens".
        temperature: Of sampling; None leaves it to the server.
        seed: Of sampling; None leaves it to the server.
        structured: How JSON is asked for: by a schema, as an object, or in the prompt alone.
        max_edge: Pictures are shrunk to this longest edge, pixels.
        price_in: Of a million tokens of questions.
        price_out: Of a million tokens of answers.
        max_cost: Stop before calls of this model have cost more in this build folder; None has no limit.
        max_calls: Stop before more calls of this model are kept in this build folder; None has no limit.
        extra: More parameters of each call, for servers that have some of their own.

    Raises:
        SegRLError: A number out of range, or a price limit without prices.

    Example:
        >>> Endpoint(url="http://localhost:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct", key_variable="").concurrency
        8
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    calls_per_minute: float | None = None
    retries: int = 6
    timeout: float = 180.0
    max_failures: int = 50
    max_tokens: int = 1024
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: float | None = 0.0
    seed: int | None = 0
    structured: Literal["json_schema", "json_object", "prompt"] = "json_schema"
    max_edge: int = 1024
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_calls: int | None = None
    extra: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SegRLError(f"url={self.url!r}; expected one such as http://localhost:8000/v1")
        if not self.model.strip():
            raise SegRLError("model is empty; expected the name of a model")
        for name, least in (
            ("concurrency", 1),
            ("retries", 0),
            ("max_failures", 1),
            ("max_tokens", 1),
            ("max_edge", 28),
        ):
            if getattr(self, name) < least:
                raise SegRLError(f"{name}={getattr(self, name)}; expected at least {least}")
        for name in ("timeout", "calls_per_minute"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise SegRLError(f"{name}={value}; expected a positive number")
        for name in ("price_in", "price_out", "max_cost", "max_calls"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise SegRLError(f"{name}={value}; expected at least 0")
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise SegRLError(f"max_cost={self.max_cost} without prices; give price_in and price_out of {self.model}")

    def key(self) -> str:
        """Return the key of the server.

        Raises:
            SegRLError: The environment variable is not set; it is named.

        Example:
            >>> Endpoint(url="https://a.example/v1", model="m", key_variable="NO_SUCH_KEY").key()
            Traceback (most recent call last):
            segrl.errors.SegRLError: https://a.example/v1 needs a key: NO_SUCH_KEY is not set; set this environment \
variable, or key_variable: "" for a server that needs none
        """
        if not self.key_variable:
            return "none"  # the client wants some text
        if value := os.environ.get(self.key_variable, "").strip():
            return value
        raise SegRLError(
            f"{self.url} needs a key: {self.key_variable} is not set; set this environment variable, or "
            'key_variable: "" for a server that needs none'
        )

    def shared(self, workers: int) -> Endpoint:
        """Return the settings for one of several workers, which keep the limits together.

        Example:
            >>> Endpoint(url="http://localhost:8000/v1", model="m", concurrency=8).shared(3).concurrency
            2
        """
        rate = self.calls_per_minute and self.calls_per_minute / workers
        return replace(self, concurrency=max(1, self.concurrency // workers), calls_per_minute=rate)

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of a call.

        Example:
            >>> Endpoint(url="https://a.example/v1", model="m", price_in=2.0, price_out=8.0).cost(1_000_000, 500_000)
            6.0
        """
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def parameters(self) -> dict[str, Any]:
        """Return what is sent with every call beside its messages; a call with other parameters is another call."""
        optional = {"temperature": self.temperature, "seed": self.seed}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": self.model, self.token_limit: self.max_tokens, **given, **self.extra}
