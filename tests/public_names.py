"""Where the package, its pages and its public names are, for the tests that read them."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "segrl").rglob("*.py"))
}
# The modules whose `__all__` is public: folders, and the files that are as public as a folder.
SURFACES = [module for module, path in FILES.items() if path.name == "__init__.py" and module != "segrl"]
SURFACES += ["segrl.errors", "segrl.hub", "segrl.losses"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r'^```python(?: title="(\w+\.py)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
# Blocks of Python in each page: the name of the file that it is, or "", and its code.
BLOCKS: dict[Path, list[tuple[str, str]]] = {page: _BLOCK.findall(page.read_text()) for page in PAGES}


def public_names() -> Iterator[tuple[str, str, Any]]:
    """Yield (surface, name, value) of all that is public; what an inner folder lists again is yielded by the outer."""
    seen = set()
    for surface in SURFACES:
        module = import_module(surface)
        for name in sorted(getattr(module, "__all__", []), key=str.lower):
            value = getattr(module, name)
            if not (is_callable(value) and id(value) in seen):
                yield surface, name, value
            seen.add(id(value))


def is_callable(value: object) -> bool:
    """Return whether a public name is a function or a class, and not a constant, a type alias or a module."""
    return inspect.isclass(value) or inspect.isroutine(value)
