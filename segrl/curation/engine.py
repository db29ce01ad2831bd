"""The one seam of the expensive maps: asynchronous work runs in one event loop, other work in threads.

Results are in the order of the items, so that another way to spread the work would give the same files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

from rich.progress import Progress

from segrl.reports.terminal import console

__all__ = ["map_async", "map_items"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Opened = Callable[[Item], Awaitable[Result]]


def map_async(
    make: Callable[[], AbstractAsyncContextManager[Opened[Item, Result]]],
    items: Sequence[Item],
    *,
    concurrency: int = 1,
    title: str = "",
) -> list[Result]:
    """Apply an asynchronous function to every item.

    If one fails, no other begins, those under way come to their end, and the first error is raised.

    Args:
        make: Opens what the function needs, such as a client, and closes it at the end.
        items: Items.
        concurrency: Largest number at a time.
        title: Of the progress bar; "" shows none.

    Returns:
        Results in the order of the items.

    Example:
        >>> from contextlib import asynccontextmanager
        >>> @asynccontextmanager
        ... async def doubling():
        ...     async def double(item):
        ...         await asyncio.sleep(0.001 * (3 - item))
        ...         return 2 * item
        ...     yield double
        >>> map_async(doubling, [1, 2, 3], concurrency=3)
        [2, 4, 6]
    """

    async def run() -> list[Result]:
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        waiting = iter(enumerate(items))

        async def work(function: Opened[Item, Result], done: Callable[[], None]) -> None:
            for number, item in waiting:
                if errors:
                    return
                try:
                    results[number] = await function(item)
                except Exception as error:  # of any kind: raised below, when those under way have ended
                    errors.append(error)
                    return
                done()

        async with make() as function:
            with _progress(title, len(items)) as done:
                await asyncio.gather(*(work(function, done) for _ in range(min(concurrency, len(items)))))
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(items))]

    return asyncio.run(run())


def map_items(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 1, title: str = ""
) -> list[Result]:
    """Apply a function to every item, in threads if there are several workers.

    Args:
        function: Of one item.
        items: Items.
        workers: Largest number at a time.
        title: Of the progress bar; "" shows none.

    Returns:
        Results in the order of the items.

    Example:
        >>> map_items(str.upper, ["a", "b"], workers=2)
        ['A', 'B']
    """
    with _progress(title, len(items)) as done:
        if workers == 1:
            return list(_counted(map(function, items), done))
        with ThreadPoolExecutor(workers) as pool:
            return list(_counted(pool.map(function, items), done))


def _counted(results: Iterable[Any], done: Callable[[], None]) -> Iterator[Any]:
    for result in results:
        yield result
        done()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    if not title:
        yield lambda: None
        return
    with Progress(console=console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
