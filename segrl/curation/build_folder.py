"""The folder of a build: one process at a time works in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from segrl.errors import SegRLError

__all__ = ["build_lock"]


@contextmanager
def build_lock(build: Path) -> Iterator[None]:
    """Keep other processes out of a build folder, which is made if it is absent. A killed process keeps nobody out.

    Stages take it, and so do the functions that they call: in one process the lock is the same.

    Raises:
        SegRLError: Another process works there, or it is no folder.

    Example:
        >>> with build_lock(Path("build")), build_lock(Path("build")):
        ...     Path("build").is_dir()
        True
    """
    if build.exists() and not build.is_dir():
        raise SegRLError(f"{build}: is no folder; pass another --build")
    build.mkdir(parents=True, exist_ok=True)
    lock = FileLock(build.absolute() / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SegRLError(
            f"another process works in the build folder {str(build)!r}; wait for it, or use another"
        ) from error
    try:
        yield
    finally:
        lock.release()
