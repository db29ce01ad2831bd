"""The CORE-Seg example as a user runs it: scripts, files, flags, and every bad input of the command line."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from marks import slow_to_build
from PIL import Image
from safetensors.torch import load_file, save_file
from script_modules import script_modules

from segrl import ReasoningSegmenter, SegGRPOConfig, SegSFTConfig
from segrl.data import make_synthetic, write_folder
from segrl.scripts import Parser, run_script

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "core_seg"
QUICK = ("--max_steps", "1", "--train_limit", "16", "--eval_limit", "4", "--dataloader_pin_memory", "false")
PLAIN = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
SCORES = {"mdice", "miou", "fail"}


def launch(script: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    """`accelerate launch --cpu examples/core_seg/<script> <flags>` from the root; several processes by torchrun."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "--num_processes", 1, *PLAIN]
    if processes > 1:  # accelerate would start one
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        flags = (*flags, "--use_cpu", "true")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(part) for part in (*command, EXAMPLE / script, *flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def modules():
    """The scripts' modules by name."""
    with script_modules(EXAMPLE) as modules:
        yield modules


@pytest.fixture(scope="module")
def example(modules):
    """`example(script, *flags)` runs a script inside this process, as its `__main__` does; returns the exit code."""

    def run(script: str, *flags: object) -> int:
        flags = (*flags, "--use_cpu", "true") if script.startswith("train") else flags
        try:
            run_script(modules[script].check, [str(flag) for flag in flags])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with 24 rows to train on and 8 to test on."""
    folder = tmp_path_factory.mktemp("data") / "lesions"
    return write_folder(make_synthetic(32, size=64), folder, split=["train"] * 24 + ["test"] * 8)


@pytest.fixture(scope="module")
@slow_to_build
def main_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The main job, shortened, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("main") / "run"
    flags = ("--max_steps", 2, "--eval_limit", 8, "--train_limit", 32, "--output_dir", folder)
    done = launch("train_grpo.py", *flags, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(scope="module")
@slow_to_build
def sft_run(tmp_path_factory, data) -> tuple[Path, subprocess.CompletedProcess]:
    """Stage 1 on a folder data set."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    done = launch("train_sft.py", "--data", data, "--max_steps", 1, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def check_summary(summary: dict[str, Any], n: int) -> None:
    """What `results.json` documents for one model."""

    def check_scores(scores: dict[str, Any]) -> None:
        for name in SCORES:
            low, high = scores["ci95"][name]
            assert 0 <= low <= scores[name] <= high <= 1

    assert set(summary) == {*SCORES, "n", "ci95", "groups"}
    assert summary["n"] == n
    check_scores(summary)
    assert set(summary["groups"]) == {"modality", "anatomy"}
    for groups in summary["groups"].values():
        assert sum(group["n"] for group in groups.values()) == n
        for group in groups.values():
            assert set(group) == {*SCORES, "n", "ci95"}
            check_scores(group)


# ---- the main job ----------------------------------------------------------------------------------------------------


def test_results_have_the_documented_layout(main_run):
    results = read(main_run[0] / "results.json")
    assert set(results) == {"baseline", "stage1", "stage2", "config", "versions"}
    for stage in ("baseline", "stage1", "stage2"):
        check_summary(results[stage], n=8)
    assert results["baseline"]["mdice"] > 0
    assert {"torch", "transformers", "trl", "segrl", "python"} <= set(results["versions"])
    config = results["config"]
    assert config["preset"] == "tiny"
    assert config["rewards"] == ["format", "box_f1", "dual_granularity_mask"]
    assert config["grpo"]["max_steps"] == config["sft"]["max_steps"] == 2
    assert config["sft"]["output_dir"] == str(main_run[0] / "stage1")
    assert config["sft"]["logging_steps"] == 1  # a flag of the machine holds for both stages
    assert config["sft"]["learning_rate"] > config["grpo"]["learning_rate"]  # one of the method does not


def test_pictures_and_records_are_written(main_run):
    with Image.open(main_run[0] / "predictions.png") as sheet:
        sheet.load()
        assert sheet.width > 4 * 192
    records = read(main_run[0] / "predictions.json")
    assert len(records) == 8
    assert {"dice", "iou", "fail", "text", "status", "boxes", "query", "modality", "name"} <= set(records[0])
    assert np.mean([record["dice"] for record in records]) == pytest.approx(
        read(main_run[0] / "results.json")["stage2"]["mdice"]
    )


def test_logs_hold_every_term_of_the_objectives(main_run):
    first, second = (read(main_run[0] / part / "log_history.json") for part in ("stage1", "."))
    terms = {"dense/dice_ce", "dense/dice_ce_weighted"}
    assert {"loss", "text", "text_weighted", "mask/dice", *terms} <= set().union(*first)
    steps = [entry for entry in second if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        rewards = [entry[f"rewards/{name}/mean"] for name in ("format", "box_f1", "dual_granularity_mask")]
        assert entry["reward"] == pytest.approx(sum(rewards), abs=1e-5)
        assert {"policy", "policy_weighted", "rollout/dice", "rollout/fail", *terms} <= set(entry)
        assert entry["loss"] == pytest.approx(entry["policy"] + entry["dense/dice_ce"], abs=1e-3)


def test_bars_and_table_are_shown(main_run):
    done = main_run[1]
    assert "2/2 [" in done.stderr
    assert done.stdout.count("evaluate ") == 2
    rows = re.findall(r"^│ (baseline|stage1|stage2) +│ +\d+\.\d\d \[.*│ +8 │$", done.stdout, re.MULTILINE)
    assert rows == ["baseline", "stage1", "stage2"]
    assert "modality: MRI" in done.stdout
    assert "anatomy: Head" in done.stdout
    assert f"Written to {main_run[0]}: results.json" in done.stdout


def test_the_checkpoint_gives_the_same_predictions_in_another_process(main_run):
    segmenter = ReasoningSegmenter.from_pretrained(main_run[0], device="cpu")
    assert segmenter.settings["reasoning"] is True
    test = make_synthetic(8, size=112, seed=43)
    predictions = segmenter.predict_batch(test["image"], test["query"])
    assert [prediction.text for prediction in predictions] == [
        record["text"] for record in read(main_run[0] / "predictions.json")
    ]


def test_an_interrupted_run_is_continued(main_run, tmp_path, example):
    run = shutil.copytree(main_run[0], tmp_path / "run")
    for path in run.iterdir():  # what a run holds that was killed after its first checkpoint
        if path.name not in ("checkpoint-1", "stage1", "segrl_run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage1 = (run / "stage1" / "model.safetensors").stat().st_mtime_ns
    flags = ("--max_steps", 2, "--eval_limit", 8, "--train_limit", 32, "--output_dir", run, "--logging_steps", 1)
    assert example("train_grpo", *flags, *QUICK[-2:], "--resume_from_checkpoint", "last") == 0
    assert (run / "stage1" / "model.safetensors").stat().st_mtime_ns == stage1
    whole, resumed = (read(folder / "log_history.json") for folder in (main_run[0], run))
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    assert resumed[0] == whole[0]
    assert resumed[1]["loss"] == pytest.approx(whole[1]["loss"], abs=1e-4)
    for name in ("model.safetensors", "mask_head.safetensors"):
        expected, found = load_file(main_run[0] / name), load_file(run / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    check_summary(read(run / "results.json")["stage2"], n=8)


@pytest.mark.long
def test_two_processes_finish(data, tmp_path):
    flags = ("--data", data, "--max_steps", 1, "--train_limit", 16, "--eval_limit", 4, "--output_dir", tmp_path / "run")
    done = launch("train_grpo.py", *flags, "--per_device_train_batch_size", 8, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    check_summary(read(tmp_path / "run" / "results.json")["stage2"], n=4)
    done = launch("train_grpo.py", "--data", data, "--output_dir", tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: output_dir") == 1


# ---- data and models of one's own ------------------------------------------------------------------------------------


def test_stage1_on_a_folder(sft_run, data):
    folder, done = sft_run
    results = read(folder / "results.json")
    assert set(results) == {"baseline", "stage1", "config", "versions"}
    check_summary(results["stage1"], n=8)
    assert results["config"]["data"] == str(data)
    assert re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE)[:2] == ["baseline", "stage1"]
    assert (folder / "predictions.png").is_file()


@pytest.mark.long
def test_stage2_from_a_stage1_run_on_a_data_set_on_disk(sft_run, data, tmp_path, example):
    rows = make_synthetic(24, size=64).remove_columns(["modality", "name"])
    DatasetDict({"train": rows.select(range(16)), "test": rows.select(range(16, 24))}).save_to_disk(
        str(tmp_path / "data")
    )
    out = tmp_path / "run"
    assert example("train_grpo", "--model", sft_run[0], "--data", tmp_path / "data", *QUICK, "--output_dir", out) == 0
    assert not (out / "stage1").exists()
    results = read(out / "results.json")
    assert set(results) == {"baseline", "stage1", "stage2", "config", "versions"}
    assert list(results["stage2"]["groups"]["modality"]) == ["unspecified"]
    assert [record["name"] for record in read(out / "predictions.json")] == [f"row {n}" for n in range(4)]


def test_evaluation_of_a_run(sft_run, data, tmp_path):
    out = tmp_path / "evaluation"
    done = subprocess.run(
        [sys.executable, EXAMPLE / "evaluate.py", "--model", sft_run[0], "--data", data, "--output_dir", out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE)[:2] == ["baseline", "model"]
    results, trained = read(out / "results.json"), read(sft_run[0] / "results.json")
    assert set(results) == {"baseline", "model", "config", "versions"}
    check_summary(results["model"], n=8)
    assert results["model"] == trained["stage1"]
    assert results["baseline"] == trained["baseline"]
    assert (out / "predictions.png").is_file()


def test_evaluation_on_a_test_split_alone(sft_run, tmp_path, example, capsys):
    folder = write_folder(make_synthetic(3, size=64, seed=5), tmp_path / "data", split="test")
    flags = ("--model", sft_run[0], "--data", folder, "--output_dir", tmp_path / "out")
    assert example("evaluate", *flags) == 0
    assert set(read(tmp_path / "out" / "results.json")) == {"model", "config", "versions"}
    assert example("evaluate", *flags) == 2
    assert "is not empty" in capsys.readouterr().err
    assert example("evaluate", *flags, "--overwrite", "--eval_limit", 2) == 0
    assert read(tmp_path / "out" / "results.json")["model"]["n"] == 2


# ---- ablations: one command each -------------------------------------------------------------------------------------


@pytest.mark.long
def test_without_chain_of_thought(data, tmp_path, example):
    assert example("train_grpo", "--no_reasoning", "--data", data, *QUICK, "--output_dir", tmp_path / "run") == 0
    assert ReasoningSegmenter.from_pretrained(tmp_path / "run").settings["reasoning"] is False
    assert read(tmp_path / "run" / "results.json")["config"]["grpo"]["require_reasoning"] is False


@pytest.mark.long
@pytest.mark.parametrize("rewards", [["format", "box_f1"], ["format", "dual_granularity_mask"]], ids=" + ".join)
def test_some_of_the_rewards(sft_run, data, tmp_path, example, rewards):
    flags = ("--model", sft_run[0], "--data", data, *QUICK, "--output_dir", tmp_path / "run")
    assert example("train_grpo", "--rewards", *rewards, *flags) == 0
    (entry,) = [entry for entry in read(tmp_path / "run" / "log_history.json") if "reward" in entry]
    assert {key for key in entry if re.fullmatch("rewards/.*/mean", key)} == {
        f"rewards/{name}/mean" for name in rewards
    }


@pytest.mark.long
def test_without_dense_losses(data, tmp_path, example):
    assert example("train_grpo", "--dense_weight", 0, "--data", data, *QUICK, "--output_dir", tmp_path / "run") == 0
    for part in ("stage1", "."):
        history = read(tmp_path / "run" / part / "log_history.json")
        assert not any(key.startswith("dense/") for entry in history for key in entry)
    heads = [load_file(tmp_path / "run" / part / "mask_head.safetensors") for part in ("stage1", ".")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.slow
def test_stage2_alone(data, tmp_path, example):
    flags = ("--adapter", "mlp", "--data", data, *QUICK, "--output_dir", tmp_path / "run")
    assert example("train_grpo", "--skip_stage1", *flags) == 0
    assert set(read(tmp_path / "run" / "results.json")) == {"baseline", "stage2", "config", "versions"}
    assert not (tmp_path / "run" / "stage1").exists()
    assert read(tmp_path / "run" / "mask_head.json")["adapter"]["type"] == "mlp"


@pytest.mark.long
def test_another_adapter_and_probe(data, tmp_path, example):
    flags = ("--data", data, "--max-steps", 1, *QUICK[2:], "--output_dir", tmp_path / "run")
    assert example("train_grpo", "--adapter", "linear", "--probe", "answer", *flags) == 0
    for part in ("stage1", "."):
        head = read(tmp_path / "run" / part / "mask_head.json")
        assert (head["adapter"]["type"], head["probe"]["type"]) == ("linear", "answer")
    assert read(tmp_path / "run" / "results.json")["config"]["sft"]["max_steps"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [["--adapter", "semantic_guided", "--probe", "answer"], ["--adapter", "mlp", "--probe", "seg_token"]],
    ids=" ".join,
)
def test_stage1_with_parts_of_the_head(data, tmp_path, example, flags):
    assert example("train_sft", *flags, "--data", data, *QUICK, "--output_dir", tmp_path / "run") == 0
    head = read(tmp_path / "run" / "mask_head.json")
    assert ["--adapter", head["adapter"]["type"], "--probe", head["probe"]["type"]] == flags


def test_the_documented_commands_are_understood(modules):
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:accelerate launch|python) examples/core_seg/(\w+)\.py ?(.*)$", text, re.MULTILINE)
    assert len(commands) >= 12
    for script, flags in commands:
        argv = flags.split("#")[0].split()
        if script == "evaluate":
            Parser(modules["arguments"].EvaluateArguments).read(argv)
        else:
            config, stage = {"train_sft": (SegSFTConfig, "sft"), "train_grpo": (SegGRPOConfig, "grpo")}[script]
            modules["arguments"].read(config, stage, "runs/out", [*argv, "--bf16", "false"])


# ---- bad input: one clear message, exit code 2, nothing written or lost ----------------------------------------------


def refused(example, capsys, script: str, *flags: object) -> str:
    """The message of a call that must be refused."""
    capsys.readouterr()
    assert example(script, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[start:])


@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "evaluate"])
def test_help_shows_the_flags_of_the_example_first(example, capsys, script):
    assert example(script, "--help") == 0
    flags = re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)
    assert flags[:2] == ["--preset", "--data"]
    assert flags.index("--model") < flags.index("--output_dir")
    assert ("--learning_rate" in flags) is script.startswith("train")


@pytest.mark.slow
def test_an_error_of_a_script_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE / "train_grpo.py", "--preset", "tyny", "--output_dir", tmp_path / "run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown preset 'tyny'; did you mean 'tiny'? Known: core_seg_3b, tiny\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tyny"], "unknown preset 'tyny'; did you mean 'tiny'?"),
        (["--rewards", "format", "box_f2"], "unknown reward 'box_f2'; did you mean 'box_f1'?"),
        (["--rewards", "format", "format"], "--rewards format format: a reward is named twice"),
        (["--max_stps", "3"], "unknown flag '--max_stps'; did you mean '--max_steps'?"),
        (["--max_step=3"], "unknown flag '--max_step'; did you mean '--max_steps'?"),
        (["somewhere"], "unexpected argument 'somewhere'"),
        (["--max_steps", "three"], "argument --max_steps/--max-steps: invalid int value: 'three'"),
        (["--num_generations", "5"], "must be divisible by num_generations"),
        (["--train_limit", "0"], "--train_limit 0: expected 1 or more"),
        (["--eval_limit", "-1"], "--eval_limit -1: expected 1 or more"),
        (["--eval_batch_size", "0"], "--eval_batch_size 0: expected 1 or more"),
        (["--dense_weight", "-1"], "--dense_weight -1.0: expected 0 or more"),
        (["--dense_weight", "nan"], "--dense_weight nan: expected 0 or more"),
        (["--data", "no_such_folder"], "--data 'no_such_folder': no such folder"),
        (["--data", "no_such_owner/name"], "--data 'no_such_owner/name' cannot be loaded"),
        (["--resume_from_checkpoint", "last"], "--resume_from_checkpoint last: no checkpoint in"),
        (["--resume_from_checkpoint", "no/checkpoint-1"], "--resume_from_checkpoint 'no/checkpoint-1': no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(example, capsys, tmp_path, flags, message):
    assert message in refused(example, capsys, "train_grpo", *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_sft", ["--adapter", "lineer"], "unknown adapter 'lineer'; did you mean 'linear'?"),
        ("train_sft", ["--probe", "answr"], "unknown probe 'answr'; did you mean 'answer'?"),
        ("train_sft", ["--rewards", "format"], "--rewards is for train_grpo.py"),
        ("train_sft", ["--model", "no_such_model"], "--model 'no_such_model': no such folder"),
        ("train_sft", ["--segmenter", "no_such.pt"], "SAM 2 checkpoint 'no_such.pt' does not exist"),
        ("train_grpo", ["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
        ("train_grpo", ["--model", "."], "--model '.' has no mask head"),
        ("train_grpo", ["--per_device_train_batch_size", "2000"], "training rows, expected at least 500"),
        ("evaluate", ["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
        ("evaluate", [], "--model is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_models_and_parts(example, capsys, tmp_path, data, script, flags, message):
    flags = (*flags, "--data", data, "--output_dir", tmp_path / "run")
    assert message in refused(example, capsys, script, *flags)
    assert not (tmp_path / "run").exists()


def spoil_missing_image(folder: Path) -> None:
    next((folder / "images").iterdir()).unlink()


def spoil_missing_mask(folder: Path) -> None:
    next((folder / "masks").iterdir()).unlink()


def spoil_size(folder: Path) -> None:
    Image.new("L", (8, 8)).save(next((folder / "masks").iterdir()))


def spoil_values(folder: Path) -> None:
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(next((folder / "masks").iterdir()))


def spoil_image(folder: Path) -> None:
    path = next((folder / "images").iterdir())
    path.write_bytes(path.read_bytes()[:200])


def spoil_manifest(folder: Path) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text(lines[0] + "\n")


def spoil_query(folder: Path) -> None:
    with (folder / "manifest.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    rows[3][header.index("query")] = " "
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def spoil_split(folder: Path) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(",test,", ",tset,"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_image, r"1 problems in \d+ rows.*\n.*images/.*no such file"),
        (spoil_missing_mask, r"1 problems in \d+ rows.*\n.*mask: no such file"),
        (spoil_size, r"\n.*the mask is 8 x 8 px, the image 64 x 64"),
        (spoil_values, r"\n.*mask: .*values"),
        (spoil_image, r"\n.*image: cannot be decoded"),
        (spoil_manifest, r"no rows under the header"),
        (spoil_query, r"\n.*column 'query' is empty"),
        (spoil_split, r"unknown split of .* 'test'; did you mean 'tset'\?"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_data(example, capsys, tmp_path, data, spoil, message):
    folder = shutil.copytree(data, tmp_path / "data")
    spoil(folder)
    said = refused(example, capsys, "train_grpo", "--data", folder, "--output_dir", tmp_path / "run")
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_bad_data_sets_on_disk(example, capsys, tmp_path):
    rows = make_synthetic(4, size=64)
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "tset": rows}).save_to_disk(str(tmp_path / "split"))
    DatasetDict({"train": rows.remove_columns("query"), "test": rows}).save_to_disk(str(tmp_path / "query"))
    for name, message in [
        ("one", "is one data set; expected the splits train and test"),
        ("split", "'test'; did you mean 'tset'?"),
        ("query", "lacks the columns ['query']"),
    ]:
        assert message in refused(
            example, capsys, "train_grpo", "--data", tmp_path / name, "--output_dir", tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_output_directory_with_another_run_is_kept(example, capsys, tmp_path, data, sft_run):
    run = shutil.copytree(sft_run[0], tmp_path / "run")
    before = contents(run)
    flags = ("--data", data, *QUICK, "--output_dir", run)
    assert "is not empty" in refused(example, capsys, "train_sft", *flags)
    for extra, message in [
        (["--adapter", "lineer"], "unknown adapter"),
        (["--data", "no_such_folder"], "no such folder"),
        (["--model", run], f"--overwrite would remove --model {str(run)!r}"),
    ]:  # refused for another reason, so that what stands there stays
        assert message in refused(example, capsys, "train_sft", *flags, "--overwrite", *extra)
    assert contents(run) == before


def test_overwrite_replaces_a_run(example, tmp_path, data, sft_run):
    run = shutil.copytree(sft_run[0], tmp_path / "run")
    (run / "checkpoint-9").mkdir()
    (run / "results.json").write_text("{}")
    assert example("train_sft", "--data", data, *QUICK, "--output_dir", run, "--overwrite") == 0
    assert not (run / "checkpoint-9").exists()
    check_summary(read(run / "results.json")["stage1"], n=4)


def test_overwrite_refuses_what_is_not_a_run(example, capsys, tmp_path, data):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("words")
    flags = ("--data", data, "--overwrite", "--output_dir")
    assert "was not written by a training script" in refused(example, capsys, "train_sft", *flags, precious)
    assert "is a file" in refused(example, capsys, "train_sft", *flags, precious / "chapter1.tex")
    assert (precious / "chapter1.tex").read_text() == "words"


def test_a_checkpoint_that_lacks_weights_is_refused(example, capsys, tmp_path, data, sft_run):
    for script, spoiled in [("train_grpo", "model.safetensors"), ("evaluate", "mask_head.safetensors")]:
        model = shutil.copytree(sft_run[0], tmp_path / script)
        weights = load_file(model / spoiled)
        name = next(key for key in weights if "layers.0" in key or "adapter" in key)
        del weights[name]
        save_file(weights, model / spoiled, metadata={"format": "pt"})
        said = refused(example, capsys, script, "--model", model, "--data", data, "--output_dir", tmp_path / "run")
        assert name.split(".")[-1] in said
    base = tmp_path / "train_grpo"
    (base / "mask_head.json").unlink()
    said = refused(example, capsys, "train_sft", "--model", base, "--data", data, "--output_dir", tmp_path / "run")
    assert "does not hold all weights" in said
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_trained_further_in_another_way(example, capsys, tmp_path, data, sft_run):
    flags = ("--model", sft_run[0], "--data", data, "--output_dir", tmp_path / "run")
    assert "was trained with --reasoning True" in refused(example, capsys, "train_grpo", "--no_reasoning", *flags)
    assert "--adapter belongs to stage 1" in refused(example, capsys, "train_grpo", "--adapter", "mlp", *flags)
    assert not (tmp_path / "run").exists()


def test_continuing_and_replacing_exclude_each_other(example, capsys, main_run, tmp_path, data):
    run, before = main_run[0], contents(main_run[0])
    flags = ("--output_dir", run, "--resume_from_checkpoint", "last")
    assert "pass one of them" in refused(example, capsys, "train_grpo", *flags, "--overwrite")
    assert contents(run) == before
    lonely = shutil.copytree(run / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    flags = ("--data", data, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", lonely)
    assert "holds no stage 1; pass --model" in refused(example, capsys, "train_grpo", *flags)
    assert not (tmp_path / "other").exists()
