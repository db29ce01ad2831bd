"""The one seam of the expensive maps: one machine, or the machines of a Ray cluster.

On one machine asynchronous work runs in one event loop, other work in this process or in several. With Ray, batches of
the same work run in the workers of a cluster. Results keep the numbers of their items: both give the same files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Literal, TypeVar

from rich.progress import Progress

from segrl.curation.ray_engine import ray_async, ray_connected, ray_items
from segrl.curation.work import Make, Worker, run_async
from segrl.reports.terminal import console

__all__ = ["Engine", "connected", "map_async", "map_items"]

Engine = Literal["local", "ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")


def connected(engine: Engine) -> AbstractContextManager[None]:
    """Hold the connection to an engine: maps inside of the block share it.

    Raises:
        SegRLError: The extra `ray` is not installed, or no cluster can be reached or started.

    Example:
        >>> with connected("local"):
        ...     pass
    """
    if engine == "local":
        return nullcontext()
    return ray_connected()


def map_async(
    make: Make[Item, Result],
    items: Sequence[Item],
    *,
    concurrency: int = 1,
    title: str = "",
    cache: Path | None = None,
    engine: Engine = "local",
) -> list[Result]:
    """Apply an asynchronous function to every item.

    If one fails, no other begins, those under way come to their end, and the first error is raised.

    Args:
        make: Opens what the function needs, such as a client, for one worker, and closes it at the end.
        items: Items; with Ray, they and `make` can be pickled.
        concurrency: Largest number at a time, of all workers together.
        title: Of the progress bar; "" shows none.
        cache: File of kept calls, for `Worker.open_cache`.
        engine: "local", or "ray" for the workers of a cluster.

    Returns:
        Results in the order of the items.

    Example:
        >>> import asyncio
        >>> from contextlib import asynccontextmanager
        >>> @asynccontextmanager
        ... async def doubling(worker):
        ...     async def double(item):
        ...         await asyncio.sleep(0.001 * (3 - item))
        ...         return 2 * item
        ...     yield double
        >>> map_async(doubling, [1, 2, 3], concurrency=3)
        [2, 4, 6]
    """
    with connected(engine), _progress(title, len(items)) as done:
        if engine == "local":
            return run_async(make, Worker(cache), items, concurrency, done)
        return ray_async(make, items, concurrency, cache, done)


def map_items(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int = 1,
    gpus: float = 0,
    engine: Engine = "local",
) -> Iterator[tuple[int, Result]]:
    """Apply a function to every item; yields the number of an item and its result when it is there.

    Args:
        function: Of one item. With several workers, or Ray, it can be pickled, and so can items and results.
        items: Items.
        workers: Processes of the local engine; 1 works in this one.
        gpus: Of one item, for Ray.
        engine: "local", or "ray" for the workers of a cluster.

    Example:
        >>> list(map_items(str.upper, ["a", "b"]))
        [(0, 'A'), (1, 'B')]
    """
    if engine == "ray":
        yield from ray_items(function, items, gpus)
    elif workers == 1:
        yield from enumerate(map(function, items))
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
            yield from enumerate(pool.map(function, items))


def _end_with_parent() -> None:
    """Let a process end when the one that started it is killed."""
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    if not title:
        yield lambda: None
        return
    with Progress(console=console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
