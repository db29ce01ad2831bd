"""The example plugin of parts, installed into a fresh environment: trained, saved, loaded, evaluated, resumed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from plugin_environment import ROOT, Run, fresh_environment, write_package

PLUGIN = ROOT / "examples" / "parts_plugin"
RUNS = Path(__file__).with_name("plugin_runs.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def run(folder) -> Run:
    """Runs a program of a new environment that has segrl, the plugin, and two packages that break when imported."""
    interrupts = '[project.entry-points."segrl.adapters"]\ninterrupts = "interrupts:Adapter"'
    hangs = '[project.entry-points."segrl.segmenters"]\nhangs = "hangs:Segmenter"'
    return fresh_environment(
        folder,
        PLUGIN,
        write_package(folder / "interrupts", "interrupts", interrupts, "raise KeyboardInterrupt\n"),
        write_package(folder / "hangs", "hangs", hangs, "import time\nwhile True:\n    time.sleep(1)\n"),
    )


def result(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(run, folder) -> dict:
    return result(run("python", RUNS, "train", folder / "run"))


def test_list_shows_the_plugin_and_the_broken_ones(run: Run):
    done = run("segrl", "parts", "list", "--json")
    assert done.returncode == 0, done.stderr
    parts = {(part["kind"], part["name"]): part for part in json.loads(done.stdout)}
    for kind, name in (("adapter", "gated"), ("segmenter", "small_unet"), ("dense_loss", "rim")):
        assert parts[kind, name]["origin"] == "segrl-parts-plugin 0.1.0"
        assert parts[kind, name]["broken"] is None
    assert parts["adapter", "interrupts"]["origin"] == "interrupts 2.5"
    assert parts["adapter", "interrupts"]["broken"].endswith("'interrupts:Adapter': KeyboardInterrupt")
    assert parts["segmenter", "hangs"]["broken"].endswith("the import did not end within 10 s")
    assert parts["adapter", "linear"]["broken"] is None


@pytest.mark.long
def test_describe(run: Run):
    shown = run("segrl", "parts", "describe", "gated")
    assert shown.returncode == 0, shown.stderr
    for text in ("segrl-parts-plugin 0.1.0", "temperature", "weigh the states more evenly", "(N, P, C)"):
        assert text in " ".join(shown.stdout.split())
    broken = run("segrl", "parts", "describe", "interrupts")
    assert broken.returncode == 2
    assert "cannot be imported from 'interrupts:Adapter': KeyboardInterrupt" in broken.stderr


def test_it_trains(trained):
    assert trained["rim"][-1] < trained["rim"][0]
    assert trained["still"] == ["segmenter.box.weight", "segmenter.box.bias"]
    assert len(trained["predictions"]) == 3
    assert len({json.dumps(mask) for *_, mask, _ in trained["predictions"]}) == 3


def test_a_fresh_process_predicts_the_same_and_evaluates(run: Run, folder: Path, trained):
    found = result(run("python", RUNS, "predict", folder / "run"))
    assert found["parts"] == ["segrl_parts_plugin:GatedAdapter", "segrl_parts_plugin:SmallUNet"]
    assert found["config"]["adapter"] == {"type": "gated", "input_dim": 64, "prompt_dim": 32, "temperature": 2.0}
    assert found["config"]["segmenter"]["type"] == "small_unet"
    assert found["predictions"] == trained["predictions"]
    assert len(found["records"]) == 3


@pytest.mark.long
def test_it_resumes(run: Run, folder: Path, trained):
    assert result(run("python", RUNS, "resume", folder / "run")) == {"steps": 40, "different": []}
