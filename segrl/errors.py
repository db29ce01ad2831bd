"""The errors segrl raises for its users: each says the name, the value, what was expected and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "FrameError",
    "RewardCheckError",
    "RewardError",
    "SegRLError",
    "UnknownNameError",
    "unknown_name",
]


class SegRLError(ValueError):
    """Base of every error that segrl raises on purpose; a `ValueError`, so generic handlers work too."""


class DataError(SegRLError):
    """Images, masks, boxes or rows that cannot be what they claim to be."""


class FrameError(SegRLError):
    """A coordinate frame is unknown or does not fit the image or the model."""


class RewardError(SegRLError):
    """A reward could not be computed; the message names the reward and the row."""


class RewardCheckError(SegRLError, AssertionError):
    """A reward does not do what it should; an `AssertionError`, so that test runners count a failed test.

    Attributes:
        reward: Name of the reward.
        property: Name of the property that does not hold.
        expected: What should have been.
        found: What was.
        example: The smallest example that was found, as text; "" where it is the text named in `found`.
    """

    def __init__(self, reward: str, property: str, expected: str, found: str, example: str = "") -> None:
        message = f"reward {reward!r} fails {property!r}\nexpected: {expected}\nfound: {found}"
        super().__init__(message + (f"\nsmallest example:\n{example}" if example else ""))
        self.reward, self.property, self.expected = reward, property, expected
        self.found, self.example = found, example

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.reward, self.property, self.expected, self.found, self.example)


class UnknownNameError(SegRLError):
    """A name that was looked up is not registered."""


class CheckpointError(SegRLError):
    """A checkpoint is missing, incomplete or does not fit the model."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a failed look-up, with the closest known name as a suggestion.

    Args:
        kind: What was looked up, for example `"reward"`.
        name: The name that was not found.
        known: All names that would have been accepted; may be empty.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> print(unknown_name("reward", "box_f2", ["format", "box_f1"]))
        unknown reward 'box_f2'; did you mean 'box_f1'? Known: box_f1, format
    """
    names = sorted(known)
    closest = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {closest[0]!r}?" if closest else ""
    return UnknownNameError(f"unknown {kind} {name!r};{hint} Known: {', '.join(names) or 'none'}")
