"""Tools for tests: a conformance check for rewards, hypothesis strategies, and tiny models built in memory, offline.

Names are imported on first use: the strategies and `check_reward` need hypothesis (`pip install 'segrl[testing]'`), the
tiny models need torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_EXPORTS = {
    "checks": ["CheckReport", "check_reward"],
    "tiny": ["tiny_causal_lm", "tiny_llava", "tiny_qwen2_5_vl", "tiny_qwen3_vl", "tiny_tokenizer"],
}

if TYPE_CHECKING:
    from segrl.testing import strategies as strategies
    from segrl.testing.checks import CheckReport as CheckReport
    from segrl.testing.checks import check_reward as check_reward
    from segrl.testing.tiny import tiny_causal_lm as tiny_causal_lm
    from segrl.testing.tiny import tiny_llava as tiny_llava
    from segrl.testing.tiny import tiny_qwen2_5_vl as tiny_qwen2_5_vl
    from segrl.testing.tiny import tiny_qwen3_vl as tiny_qwen3_vl
    from segrl.testing.tiny import tiny_tokenizer as tiny_tokenizer
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
