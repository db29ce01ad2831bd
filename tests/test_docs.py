"""The documentation's Python runs as it is printed."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import segrl
from segrl.rewards import make_reward
from segrl.rewards.registry import all_reward_infos

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in PAGES}


def test_the_quick_start_has_code():
    assert len(CODE[ROOT / "docs" / "quickstart.md"]) >= 3


@pytest.mark.parametrize(
    "page", [page for page in PAGES if CODE[page]], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_code_of_page_runs(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(CODE[page]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_export_has_its_place_in_the_reference():
    reference = "\n".join(page.read_text() for page in PAGES if page.parent.name == "reference")
    listed = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    documented = {id(_imported(path)) for path in listed}
    exported = [name for name in dir(segrl) if not isinstance(getattr(segrl, name), str | ModuleType)]
    assert [name for name in exported if id(getattr(segrl, name)) not in documented] == []


def _imported(path):
    """The module or the attribute of a module that a page names."""
    module, name = path.rpartition(".")[::2]
    if (ROOT / path.replace(".", "/")).with_suffix(".py").exists():
        return import_module(path)
    return getattr(import_module(module), name)


def reward_table() -> str:
    """What the built-in rewards declare, as the table of the reference."""
    lines = ["| name | equation | range | needs | source |", "| --- | --- | --- | --- | --- |"]
    for info in all_reward_infos():
        if info.form == "preset" or not info.origin.startswith("segrl "):
            continue
        scores = make_reward(info.name).range
        assert scores is not None
        needs = [word for word, wanted in (("mask", info.needs_mask), ("volume", info.volume)) if wanted]
        cells = [f"`{info.name}`", info.equation, f"{scores[0]:g} to {scores[1]:g}", ", ".join(needs), info.source]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def test_the_reference_says_what_the_rewards_declare():
    assert reward_table() in (ROOT / "docs" / "reference" / "rewards.md").read_text()


def test_every_built_in_reward_has_its_place_in_the_reference():
    reference = "\n".join(page.read_text() for page in PAGES if page.parent.name == "reference")
    for info in all_reward_infos():
        if info.origin.startswith("segrl ") and info.function is not None:
            assert f"::: {info.function.__module__}.{info.function.__qualname__}\n" in reference
