"""The errors that segrl raises for its users. A message states the name, the value, what was expected and the fix."""

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
    """Base of every error that segrl raises on purpose; a `ValueError`, so generic handlers work too.

    Example:
        >>> issubclass(SegRLError, ValueError), issubclass(DataError, SegRLError)
        (True, True)
    """


class DataError(SegRLError):
    """Images, masks, boxes or rows are invalid.

    Example:
        >>> from segrl.geometry import validate_boxes
        >>> validate_boxes([[0, 0, 1]])
        Traceback (most recent call last):
        segrl.errors.DataError: boxes: expected shape (N, 4), got (1, 3)
    """


class FrameError(SegRLError):
    """A coordinate frame is unknown or does not fit the image or the model.

    Example:
        >>> from segrl.predictions import Frame
        >>> Frame("pixels", (64, 64))
        Traceback (most recent call last):
        segrl.errors.FrameError: frame kind 'pixels'; expected one of original_px, resized_px, relative_1000.
    """


class RewardError(SegRLError):
    """A reward could not be computed; the message names the reward and the row."""


class RewardCheckError(SegRLError, AssertionError):
    """A reward lacks a property that it claims; an `AssertionError`, so that test runners count a failed test.

    Attributes:
        reward: Name of the reward.
        property: Name of the property that does not hold.
        expected: The expected behaviour.
        found: The observed behaviour.
        example: The smallest example that was found, as text; "" if `found` already holds it.

    Example:
        >>> print(RewardCheckError("mine", "range", "scores in [0, 1]", "2.0"))
        reward 'mine' fails 'range'
        expected: scores in [0, 1]
        found: 2.0
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


def unknown_name(kind: str, name: str, known: Iterable[str], *, shown: Iterable[str] | None = None) -> UnknownNameError:
    """Build the error for a failed look-up, with the closest known name as a suggestion.

    Args:
        kind: Kind of the name, for example `"reward"`.
        name: The name that was not found.
        known: All accepted names; may be empty.
        shown: Those that the message lists, where all would be too many.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> print(unknown_name("reward", "box_f2", ["format", "box_f1"]))
        unknown reward 'box_f2'; did you mean 'box_f1'? Known: box_f1, format
    """
    names = sorted(known)
    closest = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {closest[0]!r}?" if closest else ""
    listed = ", ".join(names) or "none" if shown is None else f"{', '.join(shown)} ..."
    return UnknownNameError(f"unknown {kind} {name!r};{hint} Known: {listed}")
