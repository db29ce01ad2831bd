"""The examples in docstrings run, offline and in an empty folder; and the share of public names that have one."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text().count(">>> ")
    for path in sorted((ROOT / "segrl").rglob("*.py"))
}
SURFACES = [f"segrl.{path.name}" for path in sorted((ROOT / "segrl").iterdir()) if (path / "__init__.py").exists()]
SURFACES += ["segrl.rewards.builtin", "segrl.losses", "segrl.hub", "segrl.errors"]

# How many public functions and classes have no example yet: the number only shrinks.
WITHOUT_EXAMPLE = 208


@pytest.mark.parametrize("module", [module for module, lines in LINES.items() if lines])
def test_examples_of_module(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(import_module(module)) if test.examples]
    assert sum(len(test.examples) for test in tests) == LINES[module]  # none is hidden by a decorator
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def public_callables() -> dict[str, object]:
    """Return what users call: functions and classes of every `__all__`, without errors and protocols, each once."""
    found = {}
    for surface in SURFACES:
        module = import_module(surface)
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            called = inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, Exception))
            if called and not getattr(value, "_is_protocol", False):
                found.setdefault(id(value), (f"{surface}.{name}", value))
    return dict(found.values())


def has_example(value: object) -> bool:
    """Return whether the docstring of a function or class, or of a method that the class defines, has an example."""
    parts = [value, *(vars(value).values() if inspect.isclass(value) else [])]
    return any(">>> " in (getattr(part, "__doc__", None) or "") for part in parts)


def test_share_of_public_names_with_an_example():
    names = public_callables()
    without = [name for name, value in names.items() if not has_example(value)]
    print(
        f"{len(names) - len(without)} of {len(names)} public functions and classes have an example; without:", *without
    )
    assert len(without) <= WITHOUT_EXAMPLE
