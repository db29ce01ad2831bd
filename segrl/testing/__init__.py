"""Tools for tests: a conformance check for rewards and Hypothesis strategies.

Names are imported on first use: both need hypothesis (`pip install 'segrl[testing]'`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

_EXPORTS = {
    "checks": ["CheckReport", "check_reward"],
}

if TYPE_CHECKING:
    from segrl.testing import strategies as strategies
    from segrl.testing.checks import CheckReport as CheckReport
    from segrl.testing.checks import check_reward as check_reward
else:
    _HOME = {name: module for module, names in _EXPORTS.items() for name in names}
    __all__ = [*sorted(_HOME), "strategies"]

    def __getattr__(name):
        if name == "strategies":
            return import_module(f"{__name__}.strategies")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # the next look-up is an ordinary one
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
