"""How the work of a call grows with its input, counted instead of timed."""

import sys
import tracemalloc
from collections.abc import Callable


def work(call: Callable[[], object]) -> tuple[int, int]:
    """Return how many lines of Python a call executes, and the most bytes that it holds at once.

    Loops and comprehensions count once for each turn. What runs in C is not seen by the first number; a matrix of all
    pairs is by the second, and a regular expression that backtracks over a megabyte runs into the limit of pytest.
    """
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    tracemalloc.start()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return lines, peak


def grows_linearly(call: Callable[[int], Callable[[], object]], size: int) -> bool:
    """Return whether four times the input takes less than six times the work (squared: 16 times).

    Args:
        call: Makes the call for an input of a given size.
        size: The smaller of the two sizes.
    """
    small, large = work(call(size)), work(call(4 * size))
    return all(after < 6 * before + 10_000 for before, after in zip(small, large, strict=True))
