"""Answers of language models on disk: what has arrived is never asked again, also after a kill."""

from __future__ import annotations

import sqlite3
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
        DataError: It is no SQLite file, or one of another version.

    Example:
        >>> with CallCache(Path("calls.sqlite")) as cache:
        ...     cache.put("key", "model", "case 1", Answer("answered", "Dark.", cost=0.5))
        >>> with CallCache(Path("calls.sqlite")) as cache:
        ...     cache.get("key").text, cache.get("other"), cache.spent("model")
        ('Dark.', None, (1, 0.5))
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise DataError(f"{path}: version {version} of the kept calls, expected {_VERSION}; move the file away")
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")  # an answer costs more than a write to the disk
            self._file.executescript(_SCHEMA)
            self._file.execute(f"PRAGMA user_version={_VERSION}")
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be used as a file of kept calls ({error}); move it away") from error

    def get(self, key: str) -> Answer | None:
        """Return the answer to a question; None if none has arrived."""
        columns = "status, text, reason, tokens_in, tokens_out, cost"
        row = self._file.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(*row, cached=True)

    def put(self, key: str, model: str, label: str, answer: Answer) -> None:
        """Keep an answer; one that is there stays."""
        values = (key, model, label, answer.status, answer.text, answer.reason)
        values += (answer.tokens_in, answer.tokens_out, answer.cost)
        self._file.execute("BEGIN IMMEDIATE")
        try:
            new = self._file.execute(f"INSERT OR IGNORE INTO answers VALUES ({','.join('?' * 9)})", values).rowcount
            if new:
                self._file.execute(
                    "INSERT INTO spent VALUES (?, 1, ?) "
                    "ON CONFLICT (model) DO UPDATE SET calls = calls + 1, cost = cost + excluded.cost",
                    (model, answer.cost),
                )
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    def spent(self, model: str) -> tuple[int, float]:
        """Return how many answers of a model are kept, and what they cost."""
        row = self._file.execute("SELECT calls, cost FROM spent WHERE model = ?", (model,)).fetchone()
        return row or (0, 0.0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
