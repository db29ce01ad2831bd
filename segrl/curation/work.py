"""The work of one worker of an asynchronous map, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from segrl.curation.call_cache import CallCache

__all__ = ["Make", "Worker", "run_async"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Opened = Callable[[Item], Awaitable[Result]]


@dataclass(frozen=True)
class Worker:
    """Who does a part of the work, and what it shares with the others.

    Attributes:
        cache: File of kept calls; None where no work needs it.
        workers: Number of workers that share the limits of an endpoint.

    Example:
        >>> with Worker(Path("calls.sqlite")).open_cache() as cache:
        ...     cache.spent("model")
        (0, 0.0)
    """

    cache: Path | None = None
    workers: int = 1

    def open_cache(self) -> AbstractContextManager[CallCache]:
        """Open the kept calls, which are one for all workers."""
        assert self.cache is not None
        return CallCache(self.cache)


Make = Callable[[Worker], AbstractAsyncContextManager[Opened[Item, Result]]]


def run_async(
    make: Make[Item, Result], worker: Worker, items: Sequence[Item], concurrency: int, done: Callable[[], None]
) -> list[Result]:
    """Do the work of one worker, as `map_async` says; `done` is called after each item."""

    async def run() -> list[Result]:
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        waiting = iter(enumerate(items))

        async def work(function: Opened[Item, Result]) -> None:
            for number, item in waiting:
                if errors:
                    return
                try:
                    results[number] = await function(item)
                except Exception as error:  # of any kind: raised below, when those under way have ended
                    errors.append(error)
                    return
                done()

        async with make(worker) as function:
            await asyncio.gather(*(work(function) for _ in range(min(concurrency, len(items)))))
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(items))]

    return asyncio.run(run())
