"""Answers of language models on disk: what has arrived is never asked again, also after a kill."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from segrl.errors import DataError

__all__ = ["Answer", "AnswerStatus", "CallCache"]

AnswerStatus = Literal["answered", "truncated", "refused", "empty", "failed"]
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, label TEXT NOT NULL, status TEXT NOT NULL, text TEXT NOT NULL,
    reason TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (model TEXT PRIMARY KEY, calls INTEGER NOT NULL, cost REAL NOT NULL) WITHOUT ROWID;
"""


_FIXES = {  # by SQLite's primary code
    sqlite3.SQLITE_FULL: "free some space on the disk, and give the command again",
    sqlite3.SQLITE_IOERR: "free some space on the disk or repair it, and give the command again",
    sqlite3.SQLITE_READONLY: "make file and folder writable",
    sqlite3.SQLITE_PERM: "make file and folder writable",
    sqlite3.SQLITE_CANTOPEN: "make file and folder writable",
    sqlite3.SQLITE_BUSY: "end the other program that writes into it",
}


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Raise what SQLite raises with the file and the fix."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of the number is a detail
        fix = _FIXES.get(code, "move it away, and its answers are asked for again")
        raise DataError(f"{path}: the kept calls cannot be used ({error}); {fix}") from error


@dataclass(frozen=True)
class Answer:
    """Result of a call.

    Attributes:
        status: "answered"; "truncated" at the limit of tokens, "refused" or "empty", which arrived as well and are kept
            too; "failed", where no answer arrived: that is never kept, and asked again by the next run.
        text: The answer, as it is.
        reason: Why it is not "answered"; "" otherwise.
        tokens_in: Tokens of the question, as the server counted them.
        tokens_out: Tokens of the answer.
        cost: At the endpoint's prices.
        cached: Whether it was on disk.

    Example:
        >>> Answer("answered", "A small nodule.").cost
        0.0
    """

    status: AnswerStatus
    text: str
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    cached: bool = False


class CallCache:
    """Answers by the content of their questions, in one SQLite file.

    An answer is on disk when `put` returns. Several processes of one machine may use the file at the same time; the
    log of SQLite does not work on a network file system.

    Args:
        path: The file; made if it is absent.

    Raises:
        DataError: It is no SQLite file or a damaged one, one of another version, not writable, or its disk is full; all
            methods raise it.

    Example:
        >>> with CallCache(Path("calls.sqlite")) as cache:
        ...     cache.put("key", "model", "case 1", Answer("answered", "Dark.", cost=0.5))
        >>> with CallCache(Path("calls.sqlite")) as cache:
        ...     cache.get("key").text, cache.get("other"), cache.spent("model")
        ('Dark.', None, (1, 0.5))
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, tuple[int, float]] = {}  # by model: calls that are under way, and what they may cost
        with _said(path):
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise DataError(f"{path}: version {version} of the kept calls, expected {_VERSION}; move the file away")
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")  # an answer costs more than a write to the disk
            self._file.executescript(_SCHEMA)
            self._file.execute(f"PRAGMA user_version={_VERSION}")

    def get(self, key: str) -> Answer | None:
        """Return the answer to a question; None if none has arrived."""
        columns = "status, text, reason, tokens_in, tokens_out, cost"
        with _said(self.path):
            row = self._file.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(*row, cached=True)

    def put(self, key: str, model: str, label: str, answer: Answer) -> None:
        """Keep an answer; one that is there stays."""
        values = (key, model, label, answer.status, answer.text, answer.reason)
        values += (answer.tokens_in, answer.tokens_out, answer.cost)
        with _said(self.path):
            self._file.execute("BEGIN IMMEDIATE")
            try:
                new = self._file.execute(f"INSERT OR IGNORE INTO answers VALUES ({','.join('?' * 9)})", values).rowcount
                if new:
                    self._file.execute(
                        "INSERT INTO spent VALUES (?, 1, ?) "
                        "ON CONFLICT (model) DO UPDATE SET calls = calls + 1, cost = cost + excluded.cost",
                        (model, answer.cost),
                    )
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:  # a full disk ends it by itself
                    self._file.execute("ROLLBACK")
                raise

    def spent(self, model: str) -> tuple[int, float]:
        """Return how many answers of a model are kept, and what they cost."""
        with _said(self.path):
            row = self._file.execute("SELECT calls, cost FROM spent WHERE model = ?", (model,)).fetchone()
        return row or (0, 0.0)

    def reserve(self, model: str, worst: float, max_calls: int | None, max_cost: float | None) -> str:
        """Hold a call, and what it may cost, until it is released.

        Args:
            model: Of the call.
            worst: What it may cost.
            max_calls: Limit of kept calls and of those under way; None has none.
            max_cost: Limit of what they cost; None has none.

        Returns:
            The limit that the call would pass, in words; then nothing is held. "" if there is none.
        """
        held_calls, held_cost = self._held.get(model, (0, 0.0))
        if max_calls is not None or max_cost is not None:
            calls, cost = self.spent(model)
            if max_calls is not None and calls + held_calls >= max_calls:
                return f"max_calls={max_calls} is reached"
            if max_cost is not None and cost + held_cost + worst > max_cost:
                said = f"{calls} calls have cost {cost:.4g}, the next may cost {worst:.2g}"
                return f"max_cost={max_cost:g} is reached: {said}"
        self._held[model] = held_calls + 1, held_cost + worst
        return ""

    def release(self, model: str, worst: float) -> None:
        """Let go of a call that was reserved."""
        calls, cost = self._held[model]
        self._held[model] = calls - 1, cost - worst

    @staticmethod
    def read_spent(path: Path) -> dict[str, tuple[int, float]]:
        """Return `spent` of every model of a file, which is left as it is; none without a file.

        Raises:
            DataError: It is no file of kept calls.

        Example:
            >>> CallCache.read_spent(Path("no/calls.sqlite"))
            {}
        """
        if not path.is_file():
            return {}
        whole = not path.with_name(f"{path.name}-wal").exists()  # nothing waits in a log: no lock, and no file made
        address = f"{path.absolute().as_uri()}?{'immutable=1' if whole else 'mode=ro'}"
        with _said(path), contextlib.closing(sqlite3.connect(address, uri=True)) as file:
            if not file.execute("SELECT 1 FROM sqlite_master WHERE name = 'spent'").fetchone():
                return {}
            return {model: (calls, cost) for model, calls, cost in file.execute("SELECT * FROM spent")}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
