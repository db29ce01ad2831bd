"""The examples in docstrings run, offline and in an empty folder; and the share of public names that have one."""

import doctest
import inspect
from importlib import import_module

import pytest
from public_names import FILES, is_callable, public_names

LINES = {module: path.read_text().count(">>> ") for module, path in FILES.items()}

# Without an example: what other functions return, flags, and the skeleton of a run, whose example is a page.
WITHOUT_EXAMPLE = 5


@pytest.mark.parametrize("module", [module for module, lines in LINES.items() if lines])
def test_examples_of_module(module, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(import_module(module)) if test.examples]
    assert sum(len(test.examples) for test in tests) == LINES[module]  # none is hidden by a decorator
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def has_example(value: object) -> bool:
    """Return whether the docstring of a function or class, or of a method that the class defines, has an example."""
    parts = [value, *(vars(value).values() if inspect.isclass(value) else [])]
    return any(">>> " in (getattr(part, "__doc__", None) or "") for part in parts)


def test_share_of_public_names_with_an_example():
    # Errors are raised, protocols are implemented; users call the others.
    called = {
        f"{surface}.{name}": has_example(value)
        for surface, name, value in public_names()
        if is_callable(value) and not getattr(value, "_is_protocol", False)
        if not (inspect.isclass(value) and issubclass(value, Exception))
    }
    without = [name for name, example in called.items() if not example]
    print(
        f"{len(called) - len(without)} of {len(called)} public functions and classes have an example; without:",
        *without,
    )
    assert len(without) <= WITHOUT_EXAMPLE
