"""A run that is killed again and again, and resumed with `last`, ends in the weights of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    killed_and_resumed(tmp_path, 3, steps=2, most=20)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_twenty_times(tmp_path):
    killed_and_resumed(tmp_path, 20, steps=5, most=24)
