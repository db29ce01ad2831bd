"""Read the next items in a thread while the current ones are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["read_ahead"]

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], waiting: int = 1) -> Iterator[Read]:
    """Yield `read(item)` of each item, in order, while a thread reads the next ones.

    Decoders and models compute outside of Python's lock, so both run at a time on two cores.

    Args:
        read: Called in one thread, one item after the other.
        items: Taken as they are needed.
        waiting: Items that are read before they are asked for, at most, 1 or more; so many are in memory beside the
            current one.

    Raises:
        Exception: What `read` raises, when its item is asked for.

    Example:
        >>> list(read_ahead(str, [1, 2, 3]))
        ['1', '2', '3']
    """
    rest = iter(items)
    with ThreadPoolExecutor(1) as pool:
        found: deque[Future[Read]] = deque(pool.submit(read, item) for item in islice(rest, waiting))
        try:
            while found:
                current = found.popleft().result()
                found.extend(pool.submit(read, item) for item in islice(rest, 1))
                yield current
        finally:
            for future in found:
                future.cancel()
