"""Runs repeat to the byte: in two fresh processes, and killed again and again and resumed with `last`."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from script_modules import ROOT, read_json

SCRIPT = ROOT / "examples" / "core_seg" / "train_grpo.py"
FLAGS = (
    *("--use_cpu", "true", "--train_limit", 8, "--eval_limit", 2, "--save_strategy", "steps", "--save_steps", 1),
    *("--save_total_limit", 2, "--per_device_train_batch_size", 4, "--max_completion_length", 24, "--seed", 3),
)
WEIGHTS = ("model.safetensors", "mask_head.safetensors", "mask_head.json", "segrl.json")


def launch(folder: Path, last: int, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("killed_run.py"), last, SCRIPT]
    return subprocess.run(
        [str(part) for part in (*command, *FLAGS, "--output_dir", folder, *flags)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(last)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def saved(folder: Path) -> dict[str, bytes]:
    return {f"{part}/{name}": (folder / part / name).read_bytes() for part in (".", "stage1") for name in WEIGHTS}


def killed_and_resumed(home: Path, kills: int, steps: int, most: int) -> list[int]:
    """Kill `kills` processes at seeded events, and compare every run that comes to its end with one left alone."""
    flags = ("--sft_max_steps", steps, "--max_steps", steps)
    alone = launch(home / "alone", 0, *flags)
    assert alone.returncode == 0, alone.stderr[-3000:]
    draw, done, runs = random.Random(0), [], 0
    folder, resume = home / "run0", ()
    while True:
        point = draw.randint(1, most) if len(done) < kills else 0
        process = launch(folder, point, *flags, *resume)
        print(f"{folder.name}: kill at {point}: exit {process.returncode}; {process.stderr.splitlines()[-1:]}")
        if process.returncode == -signal.SIGKILL:
            done.append(point)
            resume = ("--resume_from_checkpoint", "last") if (folder / "segrl_run.json").is_file() else ("--overwrite",)
            continue
        assert process.returncode == 0, process.stderr[-3000:]
        assert saved(folder) == saved(home / "alone")
        for part in (".", "stage1"):
            assert read_json(folder / part / "log_history.json")[-1]["step"] == steps
        assert read_json(folder / "results.json")["stage2"] == read_json(home / "alone" / "results.json")["stage2"]
        runs += 1
        if len(done) >= kills:
            print(f"{len(done)} kills, {runs} runs to the end")
            return done
        folder, resume = home / f"run{runs}", ()


def everything(folder: Path) -> dict[str, Any]:
    """Every file of a run; without the times that steps took, and of evaluations only that they were timed."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = path.read_bytes()
        if path.name in ("log_history.json", "trainer_state.json"):
            content = json.loads(found[name])
            for entry in content["log_history"] if isinstance(content, dict) else content:
                for key in [key for key in entry if "time" in key or "per_second" in key]:
                    del entry[key]
            found[name] = content
        if path.name == "evaluation_time.json":
            found[name] = len(json.loads(found[name])["seconds_per_answer"])
    return found


TWENTY_STEPS = {
    "core_seg": (*FLAGS[:-4], "--max_completion_length", 24, "--sft_max_steps", 10, "--max_steps", 10),
    "medvol_r1": (
        *("--use_cpu", "true", "--train_limit", 4, "--eval_limit", 2, "--save_strategy", "steps", "--save_steps", 5),
        *("--max_completion_length", 24, "--sft_max_steps", 10, "--max_steps", 10, "--pretrain_steps", 5),
    ),
}


@pytest.mark.parametrize(
    "example", [pytest.param("core_seg", marks=pytest.mark.slow), pytest.param("medvol_r1", marks=pytest.mark.long)]
)
def test_two_fresh_processes_write_equal_bytes(example, tmp_path):
    """20 steps with masks: everything random is seeded before it is drawn, and no order depends on a hash."""
    runs = []
    for seed in ("1", "77"):
        home = tmp_path / seed
        home.mkdir()
        command = [sys.executable, "-W", "ignore", ROOT / "examples" / example / "train_grpo.py"]
        process = subprocess.run(
            [str(part) for part in (*command, *TWENTY_STEPS[example], "--output_dir", "run")],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        runs.append(everything(home / "run"))
    assert runs[0].keys() == runs[1].keys()
    assert {"model.safetensors", "stage1/model.safetensors", "checkpoint-10/optimizer.pt"} <= runs[0].keys()
    assert [name for name, content in runs[0].items() if content != runs[1][name]] == []


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    killed_and_resumed(tmp_path, 3, steps=2, most=20)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_twenty_times(tmp_path):
    killed_and_resumed(tmp_path, 20, steps=5, most=24)
