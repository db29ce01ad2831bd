"""Sweeps: rows of published tables as runs, resumable, done once, with the paper's numbers beside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from script_modules import ROOT, read_json

from segrl.cli.main import main
from segrl.data import make_synthetic, write_folder
from segrl.errors import DataError, SegRLError, UnknownNameError
from segrl.geometry import mask_to_rle
from segrl.metrics import bootstrap_ci, nested_bootstrap_ci
from segrl.sweeps import Job, plan_sweep, run_sweep, summarise_sweep, sweep_table
from segrl.sweeps.jobs import distinct_jobs
from segrl.sweeps.running import check_jobs, claim_sweep
from segrl.sweeps.samples import CELL, LABEL, MARGIN, samples_sheet

PUBLISHED = ROOT / "examples" / "core_seg" / "published.yaml"
TABLE = """
paper: An example
unit: percent
rows:
  - {table: "1", data: A, method: theirs, scores: {mdice: 10.0}}
  - {table: "1", data: A, method: first stage, scores: {mdice: 20.0}, command: train_sft}
  - {table: "1", data: A, method: both, scores: {mdice: 30.0, fail: 5.0}, command: train_grpo, stage1: train_sft}
  - {table: "2", data: A, method: no reward, command: train_grpo --bias 1, stage1: train_sft, note: diverged}
"""
# A script with the interface of an example's: it counts how often it was started, and its scores are known.
SCRIPT = """
import argparse, json, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("output_dir", "model", "resume_from_checkpoint"):
    parser.add_argument("--" + name)
for name in ("seed", "bias", "wait"):
    parser.add_argument("--" + name, type=int, default=0)
parser.add_argument("--check_only", action="store_true")
asked = parser.parse_args()
if asked.check_only:
    sys.exit(0)
folder = Path(asked.output_dir)
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts.txt", "a") as file:
    file.write((asked.resume_from_checkpoint or "new") + "\\n")
(folder / "segrl_run.json").write_text("{}")
if asked.model:
    assert (Path(asked.model) / "results.json").is_file()
time.sleep(asked.wait)
if asked.bias == 1 and asked.seed == 2:
    sys.exit("error: it diverged")
dice = [0.5 + 0.1 * asked.seed, 0.3 + 0.2 * bool(asked.model)]
records = [{"dice": d, "iou": d / 2, "fail": d < 0.5, "modality": m} for d, m in zip(dice, ("CT", "MR"))]
if asked.model:
    records[0]["text"] = "<think>It may be dark. It is round.</think><answer>It may be a cyst.</answer>"
    history = [{"reward_std": asked.seed}, {"parameters": 2000, "trainable_parameters": 1000}]
    (folder / "log_history.json").write_text(json.dumps(history))
(folder / "predictions.json").write_text(json.dumps(records))
found = {"zero_spread": 0.25} if asked.model else {}
if asked.model:
    (folder / "evaluation_time.json").write_text(json.dumps({"seconds_per_answer": [9.0, 0.25]}))
(folder / "results.json").write_text(json.dumps(found))
"""


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    folder = tmp_path / "example"
    folder.mkdir()
    for name in ("train_sft", "train_grpo"):
        (folder / f"{name}.py").write_text(SCRIPT)
    (folder / "published.yaml").write_text(TABLE)
    return folder / "published.yaml"


def starts(home: Path) -> dict[str, list[str]]:
    found = sorted(home.glob("*/*/starts.txt"))
    return {f"{path.parent.parent.name}/{path.parent.name}": path.read_text().split() for path in found}


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_rows_with_one_command_share_a_run_and_stage1_comes_first(paper):
    rows = plan_sweep(paper, [])
    assert [job and job.name for _, job in rows] == [
        None,
        "train_sft",
        "train_grpo--after-train_sft",
        "train_grpo--bias-1--after-train_sft",
    ]
    assert [job.name for job in distinct_jobs(rows)] == [
        "train_sft",
        "train_grpo--after-train_sft",
        "train_grpo--bias-1--after-train_sft",
    ]
    names = [job.name for job in distinct_jobs(plan_sweep(paper, ["2"]))]
    assert names == ["train_sft", "train_grpo--bias-1--after-train_sft"]  # a stage 1 that is no row
    with pytest.raises(UnknownNameError, match=r"table of .* '3'"):
        plan_sweep(paper, ["3"])


def test_rows_3_to_6_of_table_3_start_from_one_stage1():
    jobs = [job for row, job in plan_sweep(PUBLISHED, ["3"]) if row.command[0] == "train_grpo"]
    assert len(jobs) == 4
    assert {job.stage1 for job in jobs if job} == {Job(PUBLISHED.parent / "train_sft.py", ())}
    whole = plan_sweep(PUBLISHED, [])
    assert len({job for row, job in whole if row.method in ("CORE-Seg", "SG-A, S1 + S2", "<seg>, S1 + S2")}) == 1
    for example in ("core_seg", "medvol_r1"):
        for row, job in plan_sweep(ROOT / "examples" / example / "published.yaml", []):
            assert (job is None) == (not row.command)


def test_commands(paper, tmp_path):
    job = plan_sweep(paper, ["2"])[0][1]
    assert job is not None
    found = job.command(3, tmp_path, ["--data", "x"])
    assert found[0] == str(paper.parent / "train_grpo.py")
    home = tmp_path / "train_grpo--bias-1--after-train_sft" / "seed3"
    assert found[1:] == [
        *("--output_dir", str(home), "--seed", "3", "--bias", "1"),
        *("--model", str(tmp_path / "train_sft" / "seed3"), "--data", "x"),
    ]


def test_a_command_without_a_script_is_refused(paper):
    (paper.parent / "train_grpo.py").unlink()
    with pytest.raises(DataError, match=r"command 'train_grpo': no .*train_grpo\.py; expected a script beside"):
        plan_sweep(paper, [])


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_every_run_is_done_once_and_the_table_has_both_numbers(paper, tmp_path, capsys):
    home = tmp_path / "not" / "there" / "sweep"
    argv = ["sweep", str(paper), "--table", "1", "--seeds", "2", "--output_dir", str(home), "--jobs", "2"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    once = {f"{name}/seed{seed}": ["new"] for name in ("train_sft", "train_grpo--after-train_sft") for seed in (1, 2)}
    assert starts(home) == once
    assert "| theirs | A | 10.00 / - / - | - | - | - | 0 |" in out
    assert re_row(out, "first stage") == ["A", "20.00 / - / -", "47.5", "23.8", "50.0", "2"]
    assert re_row(out, "both") == ["A", "30.00 / - / 5.00", "57.5", "28.7", "0.0", "2"]
    rows = read_json(home / "tables.json")
    assert {name: group["mean"] for name, group in rows[2]["groups"].items()} == {
        "CT": pytest.approx(0.65),
        "MR": pytest.approx(0.5),
    }
    assert "| both | A | 1.500 | 25.0 % | 0.00 M of 0.00 M | 0.25 | 50.0 % |" in out  # means over the two seeds
    assert "| first stage | A | - | - | - | - | - |" in out
    with Image.open(home / "table1_modalities.png") as chart:
        assert chart.width > 300
    assert rows[2]["scores"]["mdice"]["each"] == pytest.approx([0.55, 0.6])
    assert (home / "tables.md").read_text() == sweep_table(rows, data="synthetic data") + "\n"
    assert main(argv) == 0
    assert starts(home) == once  # what is done is not run again
    assert main([*argv[:4], "--seeds", "3", *argv[6:]]) == 0
    assert starts(home) == once | {name.replace("seed1", "seed3"): ["new"] for name in once if "seed1" in name}


def re_row(text: str, method: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip().split(" [")[0] for cell in line.strip("|").split("|")[1:]]


def test_a_run_that_fails_does_not_stop_the_others(paper, tmp_path, capsys):
    home = tmp_path / "sweep"
    assert main(["sweep", str(paper), "--seeds", "2", "--output_dir", str(home)]) == 2
    error = capsys.readouterr().err
    assert "1 of 6 runs failed; the others are done" in error
    assert "train_grpo --bias 1, seed 2: exit status 1" in error
    assert "error: it diverged" in error
    rows = read_json(home / "tables.json")
    assert [row["seeds"] for row in rows] == [[], [1, 2], [1, 2], [1]]
    assert "no reward: diverged" in (home / "tables.md").read_text()


def test_what_follows_a_stage1_that_failed_is_not_tried(paper, tmp_path):
    (paper.parent / "train_sft.py").write_text("import sys; sys.exit('--check_only' not in sys.argv)")
    jobs = distinct_jobs(plan_sweep(paper, ["1"]))
    with pytest.raises(SegRLError, match=r"(?s)2 of 2 runs failed.*train_grpo, seed 1: seed1 before it failed"):
        run_sweep(jobs, [1], tmp_path / "sweep")
    assert starts(tmp_path / "sweep") == {}


def test_wrong_flags_are_found_before_anything_runs(paper, tmp_path, capsys):
    home = tmp_path / "sweep"
    assert main(["sweep", str(paper), "--output_dir", str(home), "--", "--stpes", "3"]) == 2
    error = capsys.readouterr().err
    assert "nothing was started:" in error
    assert error.count("unrecognized arguments: --stpes 3") == 3
    assert not home.exists()


def test_a_folder_of_another_sweep_is_refused(paper, tmp_path, capsys):
    home = tmp_path / "sweep"
    argv = ["sweep", str(paper), "--table", "1", "--seeds", "1", "--output_dir", str(home)]
    assert main(argv) == 0
    assert main([*argv, "--", "--wait", "0"]) == 2
    assert "holds another sweep (shared: [], now ['--wait', '0'])" in capsys.readouterr().err
    (home / "sweep.json").write_text("{")
    assert main(argv) == 2
    assert "sweep.json" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(SegRLError, match="other is not empty and holds no sweep; pass another --output_dir"):
        claim_sweep(tmp_path / "other", {})


def test_a_killed_sweep_goes_on_where_it_was(paper, tmp_path):
    home = tmp_path / "sweep"
    command = [sys.executable, "-m", "segrl", "sweep", str(paper), "--table", "1", "--seeds", "1"]
    command += ["--output_dir", str(home), "--", "--wait", "3"]
    process = subprocess.Popen(command, start_new_session=True)
    begun = home / "train_sft" / "seed1" / "segrl_run.json"
    until(begun.is_file)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True)
    assert starts(home) == {"train_sft/seed1": ["new", "last"], "train_grpo--after-train_sft/seed1": ["new"]}


def test_two_sweeps_at_once_share_the_work(paper, tmp_path):
    home = tmp_path / "sweep"
    command = [sys.executable, "-m", "segrl", "sweep", str(paper), "--table", "1", "--seeds", "3"]
    command += ["--output_dir", str(home), "--", "--wait", "1"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(map(tuple, starts(home).values())) == {("new",)}
    assert len(starts(home)) == 6
    assert all("| both | A |" in out for out in outs)  # each waits for the other's runs, and has the whole table


def test_a_run_of_another_process_is_waited_for(paper, tmp_path):
    jobs = distinct_jobs(plan_sweep(paper, ["1"]))[:1]
    folder = jobs[0].folder(1, tmp_path)
    folder.parent.mkdir()
    with FileLock(folder.with_suffix(".lock")):
        process = subprocess.Popen([sys.executable, "-c", RUN.format(paper=str(paper), home=str(tmp_path))])
        time.sleep(4)
        assert not folder.exists()
    assert process.wait(60) == 0
    assert starts(tmp_path) == {"train_sft/seed1": ["new"]}


RUN = """
from pathlib import Path
from segrl.sweeps import plan_sweep, run_sweep
from segrl.sweeps.jobs import distinct_jobs
run_sweep(distinct_jobs(plan_sweep({paper!r}, ["1"]))[:1], [1], Path({home!r}))
"""


def until(happened: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flags_of_the_example_are_checked(tmp_path):
    jobs = distinct_jobs(plan_sweep(PUBLISHED, ["4"]))[:1]
    shared = ["--use_cpu", "--train_limit", "64", "--eval_limit", "2"]
    check_jobs(jobs, 1, tmp_path / "x", shared)
    with pytest.raises(SegRLError, match=r"nothing was started:\ntrain_sft.*: error: unknown flag '--trian_limit'"):
        check_jobs(jobs, 1, tmp_path / "x", ["--trian_limit", "64"])
    assert not (tmp_path / "x").exists()


def test_data_elsewhere_is_named_as_in_the_tables(paper, tmp_path, capsys):
    argv = ["sweep", str(paper), "--output_dir", str(tmp_path / "sweep"), "--on"]
    for pair, message in [
        ("A", "--on A: expected NAME=PATH, such as A=path/to/folder"),
        (f"B={tmp_path}", "unknown data of the tables 'B'"),
        (f"A={tmp_path / 'none'}", "none: no such folder"),
    ]:
        assert main([*argv, pair]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_runs_are_evaluated_elsewhere_too(tmp_path, capsys):
    """A real run, on data of its own and on another folder: rows on either have their scores."""
    paper = tmp_path / "example" / "published.yaml"
    paper.parent.mkdir()
    for path in PUBLISHED.parent.glob("*.py"):
        (paper.parent / path.name).write_text(path.read_text())
    row = "{{table: '2', data: {data}, method: S1, scores: {{mdice: 30.0}}, command: train_sft}}"
    rows = "\n".join(f"  - {row.format(data=data)}" for data in ("A", "B", "C"))
    paper.write_text(f"unit: percent\nrows:\n{rows}\n")
    data = write_folder(make_synthetic(3, size=48, seed=5), tmp_path / "data", split="test")
    home = tmp_path / "sweep"
    short = ["--use_cpu", "--max_steps", "2", "--train_limit", "32", "--eval_limit", "2", "--logging_steps", "1"]
    argv = ["sweep", str(paper), "--seeds", "1", "--output_dir", str(home), "--on", f"B={data}", "--", *short]
    assert main(argv) == 0
    found = {row["data"]: row for row in read_json(home / "tables.json")}
    for name, folder, count in (("A", "seed1", 2), ("B", "seed1_on_B", 3)):
        records = read_json(home / "train_sft" / folder / "predictions.json")
        assert len(records) == count
        assert found[name]["scores"]["mdice"]["mean"] == pytest.approx(sum(r["dice"] for r in records) / count)
    assert (found["C"]["seeds"], "scores" in found["C"]) == ([], False)
    assert "seed 1, on B: done in" in capsys.readouterr().out
    assert main(argv) == 0
    assert "begins" not in capsys.readouterr().out


@pytest.mark.long
def test_two_rows_of_table_3_on_the_example(tmp_path, capsys):
    home = tmp_path / "sweep"
    text = PUBLISHED.read_text().replace("command: train_sft --no_reasoning", "note: left out")
    paper = tmp_path / "core_seg" / "published.yaml"
    paper.parent.mkdir()
    for path in PUBLISHED.parent.glob("*.py"):
        (paper.parent / path.name).write_text(path.read_text())
    lines = [line for line in text.splitlines() if "dense_weight" not in line]
    paper.write_text("\n".join(lines))
    short = ["--use_cpu", "--max_steps", "2", "--train_limit", "64", "--eval_limit", "4", "--logging_steps", "1"]
    assert main(["sweep", str(paper), "--table", "3", "--seeds", "1", "--output_dir", str(home), "--", *short]) == 0
    rows = {row["method"]: row for row in read_json(home / "tables.json")}
    full = rows["CoT, r_fmt + r_bbox + r_mask + DiceCE"]
    assert full["published"] == {"mdice": 0.3706, "miou": 0.2779, "fail": 0.1842}
    results = read_json(home / "train_grpo--after-train_sft" / "seed1" / "results.json")
    assert full["scores"]["mdice"]["mean"] == pytest.approx(results["stage2"]["mdice"])
    assert full["zero_spread"] == results["zero_spread"]
    assert rows["CoT, S1"]["scores"]["mdice"]["mean"] == pytest.approx(results["stage1"]["mdice"])


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_wider_than_that_over_samples():
    runs = [[0.2] * 20 + [0.4] * 20, [0.6] * 20 + [0.8] * 20, [0.4] * 20 + [0.6] * 20]
    low, high = nested_bootstrap_ci(runs)
    inner_low, inner_high = bootstrap_ci([value for run in runs for value in run])
    assert low < inner_low < 0.5 < inner_high < high
    assert nested_bootstrap_ci([[0.5] * 3] * 4) == (0.5, 0.5)
    assert nested_bootstrap_ci(runs[:1]) == pytest.approx(bootstrap_ci(runs[0]), abs=0.01)
    for wrong, message in [([], "at least one run"), ([[0.5], []], r"values\[1\]"), ([[float("nan")]], r"values\[0\]")]:
        with pytest.raises(DataError, match=message):
            nested_bootstrap_ci(wrong)


def test_a_table_keeps_its_columns_whatever_names_hold(paper, tmp_path):
    rows = summarise_sweep(plan_sweep(paper, ["1"]), [1], tmp_path)
    rows[0]["method"] = "a|b"
    (line,) = [line for line in sweep_table(rows).splitlines() if "a\\|b" in line]
    assert line.replace("\\|", "").count("|") == 8
    assert json.dumps(rows)


# ---- baselines and pictures ------------------------------------------------------------------------------------------


def test_rows_of_other_examples_have_runs_of_their_own(paper):
    jobs = {row.method: job for row, job in plan_sweep(PUBLISHED, ["1"]) if job is not None}
    assert {method: job.name for method, job in jobs.items()} == {
        "LISA-3B": "lisa-train_sft",
        "SegZero-3B": "seg_zero-train_grpo",
        "CORE-Seg": "train_grpo--after-train_sft",
    }
    for method, example in (("LISA-3B", "lisa"), ("SegZero-3B", "seg_zero")):
        assert jobs[method].script == ROOT / "examples" / example / f"{jobs[method].script.stem}.py"
        assert jobs[method].title.startswith(f"{example}/train_")
    paper.write_text(TABLE.replace("command: train_sft}", "command: ../lisa/train_grpo}"))
    with pytest.raises(DataError, match=r"or that of another example, such as \.\./lisa/train_sft"):
        plan_sweep(paper, [])


def test_a_sheet_of_samples_has_a_row_for_each_run(tmp_path):
    rng = np.random.default_rng(0)
    runs = {}
    for number, name in enumerate(("full", "boxes only", "other rows")):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        records = []
        for n in range(3):
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / "samples" / f"{n:03d}.png")
            mask = mask_to_rle(np.full((30, 40), n == number))
            asked = {"name": f"row {n}" if number < 2 else f"x {n}", "query": "Where?"}
            records.append(
                {
                    **asked,
                    "dice": 0.5,
                    "boxes": [[1, 1, 9, 9]],
                    "target_mask": mask,
                    "predicted_mask": mask if n else None,
                }
            )
        (folder / "predictions.json").write_text(json.dumps(records))
        runs[name] = folder
    assert samples_sheet(runs, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.height == 24 + 3 * (CELL + MARGIN)  # images, and the two runs on the same rows
        assert sheet.width == LABEL + 3 * (CELL + MARGIN)
        red = np.asarray(sheet)[24 + 2 * (CELL + MARGIN) :, LABEL + CELL + MARGIN : LABEL + 2 * CELL]
        assert (red[..., 0] > red[..., 2].astype(int) + 40).any()  # the mask of "boxes only" covers its second image
    assert not samples_sheet({}, tmp_path / "none.png")
    (tmp_path / "full" / "predictions.json").write_text(json.dumps([{"dice": 1.0}] * 3))
    assert not samples_sheet({"full": tmp_path / "full"}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
