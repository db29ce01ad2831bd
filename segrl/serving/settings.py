"""Limits of a server, and where it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from segrl.errors import SegRLError

__all__ = ["ServingSettings"]


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Settings of a server.

    Attributes:
        host: Address to listen on; "127.0.0.1" is reached from this machine only, "0.0.0.0" from everywhere.
        port: Port to listen on; 0 takes a free one.
        max_size_mb: Largest upload, megabytes (1e6 bytes).
        max_pixels: Most pixels of an image, or voxels of a volume.
        time_limit: Seconds until a question is given up, its time in the queue included.
        max_waiting: Questions that wait, at most; further ones are refused at once.
        max_samples: Answers that are drawn to one question, at most.
        max_question: Characters of a question, at most.

    Raises:
        SegRLError: A number that is out of its range.

    Example:
        >>> ServingSettings(port=70000)
        Traceback (most recent call last):
        segrl.errors.SegRLError: port=70000: expected a number from 0 to 65535
    """

    host: str = "127.0.0.1"
    port: int = 7860
    max_size_mb: float = 64
    max_pixels: int = 80_000_000
    time_limit: float = 120
    max_waiting: int = 32
    max_samples: int = 16
    max_question: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SegRLError(f"port={self.port}: expected a number from 0 to 65535")
        for name in ("max_size_mb", "max_pixels", "time_limit", "max_waiting", "max_samples", "max_question"):
            if not getattr(self, name) > 0:
                raise SegRLError(f"{name}={getattr(self, name)}: expected a number above 0")

    @property
    def max_bytes(self) -> int:
        """Largest upload, bytes."""
        return int(self.max_size_mb * 1e6)

    @property
    def is_local(self) -> bool:
        """Whether the server is reached from this machine only."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
