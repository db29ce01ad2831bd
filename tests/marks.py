"""Marks of tests that take long: `slow` for one or a few of each feature, `long` for the others."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

Function = TypeVar("Function", bound=Callable[..., Any])


def sampled(cases: Iterable[Any], keep: int = 1) -> list[Any]:
    """Return cases for `parametrize`: the first `keep` marked slow, the others long."""
    marks = [pytest.mark.slow, pytest.mark.long]
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=marks[number >= keep]) for number, value in enumerate(values)]


def slow_to_build(fixture: Function) -> Function:
    """Mark a fixture that trains or starts a process: tests that use it are slow. It goes below `pytest.fixture`."""
    fixture.__dict__["slow_to_build"] = True
    return fixture


# small data that is learned by heart is trained and tested on, which `segrl.data` warns of
learned_by_heart = pytest.mark.filterwarnings(r"ignore:.*images are in the splits:UserWarning")
