"""The package as an object: what it exports, what importing it costs, and what the wheel holds."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from trove_classifiers import classifiers

import segrl

ROOT = Path(segrl.__file__).parents[1]
STUB = ast.parse((ROOT / "segrl" / "__init__.pyi").read_text())
EXPORTS = [
    (node.module, alias.name)
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.name != "__version__"
]
NAMES = [(module, name) for module, name in EXPORTS if module is not None]
FOLDERS = [name for module, name in EXPORTS if module is None]


def run_python(code: str, cwd: Path, pythonpath: Path) -> str:
    """Run `code` in a fresh interpreter that sees `pythonpath` first; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(pythonpath)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_import_loads_no_framework_and_little_else(tmp_path):
    code = "import sys; before = set(sys.modules); import segrl; print(*sorted(set(sys.modules) - before))"
    loaded = run_python(code, tmp_path, ROOT).split()
    assert {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) == {"segrl", "lazy_loader"}
    assert len(loaded) < 100


@pytest.mark.slow
def test_import_of_peft_and_transformers_says_nothing(tmp_path):
    """Whatever optional packages are installed, bitsandbytes for one."""
    code = "import sys; sys.stderr = sys.stdout; import segrl.sharing"
    assert run_python(code, tmp_path, ROOT) == ""


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_export_is_what_its_folder_lists(module, name):
    value = getattr(segrl, name)
    folder = sys.modules[f"segrl.{module}"]
    assert value is getattr(folder, name)
    assert name in folder.__all__
    assert value.__name__ == name
    assert value.__doc__


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_is_reachable(name):
    assert getattr(segrl, name) is sys.modules[f"segrl.{name}"]


@pytest.mark.slow
def test_dir_and_all_offer_the_same_names(tmp_path):
    code = "import segrl; print(sorted(segrl.__all__) == sorted(set(segrl.__all__) & set(dir(segrl))))"
    assert run_python(code, tmp_path, ROOT) == "True"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="SegPPOTrainer"):
        getattr(segrl, "SegPPOTrainer")  # noqa: B009


def check_metadata(found: Message) -> None:
    """What an index shows of the package: known classifiers, a text whose links work anywhere, extras that exist."""
    assert found["Name"] == "segrl"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert set(found.get_all("Classifier", [])) <= classifiers
    assert found["Description-Content-Type"] == "text/markdown"
    text = found.get_payload()
    assert isinstance(text, str)
    assert "# segrl" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    extras = set(found.get_all("Provides-Extra", []))
    used = {extra for need in found.get_all("Requires-Dist", []) for extra in re.findall(r"extra == '(\w+)'", need)}
    assert used == extras


@pytest.mark.slow
def test_wheel_holds_the_package_and_works_outside_the_checkout(tmp_path):
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("segrl-*.whl")

    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {path for path in (ROOT / "segrl").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    wanted = {path.relative_to(ROOT).as_posix() for path in sources}
    examples = {path for path in (ROOT / "examples").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    wanted |= {f"segrl/{path.relative_to(ROOT).as_posix()}" for path in examples}
    assert wanted == {name for name in packed if ".dist-info/" not in name}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in packed if name.endswith(".dist-info/METADATA"))
        check_metadata(message_from_bytes(archive.read(name)))
    assert "segrl/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)

    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    code = "import segrl; from segrl import Prediction; print(segrl.__file__); print(segrl.__version__)"
    file, version = run_python(code, elsewhere, site).splitlines()
    assert Path(file).is_relative_to(site)
    assert version == segrl.__version__ == wheel.name.split("-")[1]
