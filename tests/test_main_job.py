"""The benchmark that runs the main job many times, on real runs of two steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from script_modules import ROOT, read_json

from segrl.data import make_synthetic, write_folder

SHORT = ["--max_steps", "2", "--eval_limit", "3", "--train_limit", "8", "--logging_steps", "1", "--save_strategy", "no"]


def main_job(*flags: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "main_job.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = make_synthetic(12, size=48, seed=5).add_column("source", ["north", "south", "east"] * 4)
    return write_folder(rows, tmp_path / "data", split=["train"] * 10 + ["test"] * 2)


@pytest.mark.slow
def test_folds_are_run_and_pooled(data, tmp_path):
    out = tmp_path / "folds"
    done = main_job("--folds", 2, "--data", data, "--output_dir", out, *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_json(out / "summary.json")
    assert found["runs"] == ["fold1", "fold2"]
    names = [{record["name"] for record in read_json(out / run / "predictions.json")} for run in found["runs"]]
    assert all(len(each) == 3 for each in names)
    assert not names[0] & names[1]
    for stage in ("stage1", "stage2"):
        groups = found[f"{stage}_over_constant"]
        assert groups["all"]["rows"] == 6 == sum(group["rows"] for name, group in groups.items() if name != "all")
        dice = {}
        for name in (stage, "baseline"):
            file = "predictions.json" if name == "stage2" else f"predictions_{name}.json"
            records = [record for run in found["runs"] for record in read_json(out / run / file)]
            dice[name] = 100 * np.mean([record["dice"] for record in records])
        assert groups["all"]["difference"][0] == pytest.approx(dice[stage] - dice["baseline"])
    assert "stage2 - constant mask, all (6): " in done.stdout
    # what is finished is not run again
    times = [(out / run / "results.json").stat().st_mtime_ns for run in found["runs"]]
    again = main_job("--folds", 2, "--data", data, "--output_dir", out, *SHORT)
    assert again.stdout.splitlines() == done.stdout.splitlines()
    assert [(out / run / "results.json").stat().st_mtime_ns for run in found["runs"]] == times


@pytest.mark.slow
def test_a_source_that_is_not_there_stops_with_its_log(data, tmp_path):
    done = main_job("--sources", "west", "--data", data, "--output_dir", tmp_path / "out", *SHORT)
    assert done.returncode == 1
    assert "without_west failed: see" in done.stderr
    log = (tmp_path / "out" / "without_west.log").read_text()
    assert "unknown source 'west'" in log
    assert "Traceback" not in log
