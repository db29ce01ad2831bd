"""Examples as a user runs them: their scripts as `__main__`, in this process or in one of their own."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


@contextmanager
def script_modules(folder: Path, known: Mapping[str, ModuleType] | None = None) -> Iterator[dict[str, ModuleType]]:
    """Import every script of a folder by its name, as Python does for one that runs there.

    Two folders may have scripts of one name: what was imported before comes back at the end. Modules in `known` are not
    imported again.
    """
    names = [path.stem for path in sorted(folder.glob("*.py"))]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(known or {})
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class Example:
    """The scripts of a folder in `examples/`."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, ROOT / "examples" / name
        self._modules: dict[str, ModuleType] = {}

    @property
    def modules(self) -> dict[str, ModuleType]:
        with script_modules(self.folder, self._modules) as self._modules:
            return self._modules

    def run(self, script: str, *flags: object) -> tuple[int, str, str]:
        """Run a script inside this process; return exit code, stdout and stderr."""
        flags = (*flags, "--use_cpu", "true") if script.startswith("train") else flags
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        code = 0
        with (
            script_modules(self.folder, self._modules) as self._modules,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            sys.argv = [f"{script}.py", *map(str, flags)]
            try:
                runpy.run_path(str(self.folder / f"{script}.py"), run_name="__main__")
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                sys.argv = argv
        return code, out.getvalue(), err.getvalue()

    def done(self, script: str, *flags: object) -> str:
        """Run a script that must finish; return its stdout."""
        code, out, err = self.run(script, *flags)
        assert code == 0, err[-3000:]
        return out

    def refused(self, script: str, *flags: object) -> str:
        """Run a script that must be refused; return its message."""
        code, _, err = self.run(script, *flags)
        assert code == 2, err[-3000:]
        lines = err.splitlines()
        (start,) = [n for n, line in enumerate(lines) if line.startswith("error: ")]
        return "\n".join(lines[start:])

    def launch(self, script: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
        """Run a script in a process of its own, or in several by torchrun."""
        command: list[Any] = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
            flags = (*flags, "--use_cpu", "true")
        return subprocess.run(
            [str(part) for part in (*command, self.folder / f"{script}.py", *flags)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=280,
        )


def phases_of(out: str) -> list[str]:
    """The phases that a run printed: all of its plan, each once, in order."""
    found = re.findall(r"^phase (\d+) of (\d+), (.+?):", out, re.MULTILINE)
    whole = [str(number) for number in range(1, len(found) + 1)]
    assert [number for number, _, _ in found] == whole
    assert {count for _, count, _ in found} == set(whole[-1:])
    return [name for _, _, name in found]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, int]:
    """Every file of a folder with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}
