"""Scripts of a folder as modules."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def script_modules(folder: Path) -> Iterator[dict[str, ModuleType]]:
    """Import every script of a folder by its name, as Python does for one that runs there.

    Two folders may have scripts of one name: what was imported before comes back at the end.
    """
    names = [path.stem for path in sorted(folder.glob("*.py"))]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
