"""A fresh environment into which packages are really installed, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


def fresh_environment(folder: Path, *packages: Path) -> Run:
    """Return what runs a program of a new environment that has segrl and these packages, and sees our dependencies."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    binaries = folder / "venv" / "bin"
    own = subprocess.run(
        [binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(own.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    # without PYTHONPATH: nothing comes from the checkout
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python", "--disable-pip-version-check"]
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    done = subprocess.run(
        [*pip, *install, ROOT, *packages], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [binaries / program, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def write_package(folder: Path, name: str, entries: str, code: str) -> Path:
    """Write a package of one module, `name`, with entry points, into a new folder."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    (folder / "pyproject.toml").write_text(f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name.replace("_", "-")}"
version = "2.5"
{entries}
[tool.hatch.build.targets.wheel]
only-include = ["{name}.py"]
""")
    return folder
