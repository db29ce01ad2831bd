"""`Phases`: the parts of a run, named as they begin, with their share of the whole and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from accelerate import PartialState

from segrl.reports.terminal import say

__all__ = ["Phases", "duration"]

EVERY = 30.0  # seconds between lines about one phase


def duration(seconds: float) -> str:
    """Format a time roughly.

    Example:
        >>> duration(41), duration(400), duration(9000)
        ('41 s', '7 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class Phases:
    """The plan of a run, and how far it is.

    The time that is left follows from the time that the work so far took; until the first phase is under way there is
    nothing to say it from. Nothing of it is written to a file, so runs stay equal to the byte.

    Attributes:
        plan: Names of the phases in order, with their estimated cost in any unit.
        clock: Seconds; another one in tests.

    Example:
        >>> now = iter([0.0, 30.0])
        >>> phases = Phases({"stage 1": 30.0, "stage 2": 60.0, "evaluation": 10.0}, clock=lambda: next(now))
        >>> phases.begin("stage 1")
        phase 1 of 3, stage 1: about 30 % of the whole
        >>> phases.begin("stage 2")
        phase 2 of 3, stage 2: about 60 % of the whole; 30 % done, about 70 s left
    """

    plan: Mapping[str, float]
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _current: str | None = field(default=None, init=False, repr=False)
    _began: float = field(default=0.0, init=False, repr=False)
    _said: float = field(default=0.0, init=False, repr=False)
    _skipped: float = field(default=0.0, init=False, repr=False)  # cost of what an earlier process has done
    _fraction: float = field(default=0.0, init=False, repr=False)

    def begin(self, name: str, fraction: float = 0.0) -> None:
        """Say that a phase begins; those before it that never began were done by the run that is continued.

        Args:
            name: One of the plan; another one is ignored, for example a part that an example adds by itself.
            fraction: How much of the phase is done already, by the run that is continued.
        """
        if name not in self.plan:
            return
        now = self.clock()
        if self._current is None:
            self._began = now
            self._skipped = self._before(name)
        if fraction:
            self._skipped += fraction * self.plan[name]
        self._current, self._fraction, self._said = name, fraction, now
        names = list(self.plan)
        line = f"phase {names.index(name) + 1} of {len(names)}, {name}: about {self._share(self.plan[name]):.0%} of the"
        self._say(f"{line} whole{self._rest(now)}".replace("%", " %"))

    def progress(self, fraction: float) -> str | None:
        """Note how much of the current phase is done, and say how long the run takes, every half minute.

        Args:
            fraction: From 0 to 1.

        Returns:
            What was said; None if it was not yet time.
        """
        now = self.clock()
        if self._current is None or now - self._said < EVERY:
            self._fraction = max(self._fraction, fraction)
            return None
        self._fraction, self._said = max(self._fraction, fraction), now
        line = f"{self._current}: {self._fraction:.0%} of it{self._rest(now)}".replace("%", " %")
        self._say(line)
        return line

    @property
    def done(self) -> float:
        """The share of the whole that is done, from 0 to 1."""
        if self._current is None:
            return 0.0
        return self._share(self._before(self._current) + self._fraction * self.plan[self._current])

    def left(self, now: float | None = None) -> float | None:
        """Return the seconds that the rest takes if it goes on like this; None before there is anything to go by."""
        if self._current is None:
            return None
        reached = self._before(self._current) + self._fraction * self.plan[self._current]
        here, elapsed = reached - self._skipped, (self.clock() if now is None else now) - self._began
        return (sum(self.plan.values()) - reached) * elapsed / here if here > 0 and elapsed > 0 else None

    def _before(self, name: str) -> float:
        names = list(self.plan)
        return sum(self.plan[other] for other in names[: names.index(name)])

    def _share(self, cost: float) -> float:
        return cost / max(sum(self.plan.values()), 1e-9)

    def _rest(self, now: float) -> str:
        left = self.left(now)
        return "" if left is None else f"; {self.done:.0%} done, about {duration(left)} left"

    @staticmethod
    def _say(line: str) -> None:
        if PartialState().is_main_process:
            say(line)
