"""The documentation's Python runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import segrl

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
    exported = {f"segrl.{module}.{name}" for module, names in segrl._EXPORTS.items() for name in names}
    assert exported - listed == set()
