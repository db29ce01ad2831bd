"""The MedVol-R1 example as a user runs it: scripts, files, flags, and every bad input of the command line.

Most tests start from a stage 1 run that has learned two volumes by heart, so that its answers are valid and name slices
and boxes: what comes after them is then really computed.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from marks import slow_to_build
from PIL import Image
from safetensors.torch import load_file
from script_modules import script_modules

from segrl import SegGRPOConfig, SegSFTConfig, dump_reward, make_reward, weighted_sum
from segrl.data import load_volumes, make_synthetic_volumes, read_grey, read_label, read_volume, write_manifest
from segrl.evaluation import evaluate_volumes
from segrl.inference import VolumeSegmenter
from segrl.scripts import Parser, run_script

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "medvol_r1"
VOLUMES3D = ROOT.parent / "shared" / "data" / "volumes3d"
REWARDS = ["slice_format", "slice_visibility", "slice_boxes", "propagated_dice"]
PLAIN = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
QUICK = ("--max_steps", "1", "--dataloader_pin_memory", "false", "--logging_steps", "1", "--eval_limit", "2")
GRPO = (*QUICK, "--per_device_train_batch_size", "8", "--max_completion_length", "48")
SFT = (*QUICK, "--per_device_train_batch_size", "2", "--segmenter_steps", "1", "--train_limit", "33")
SCORES = {"mdice", "miou", "fail", "nsd", "slice_visibility", "slice_boxes"}
MANY = 33  # the preset repeats smaller training sets
HOSTILE = "\x1b[31m spot"  # reasoning that a terminal must not obey


def launch(script: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    """`accelerate launch --cpu examples/medvol_r1/<script> <flags>` from the root; several processes by torchrun."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "--num_processes", 1, *PLAIN]
    if processes > 1:  # accelerate would start one
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        flags = (*flags, "--use_cpu", "true")
    return started([str(part) for part in (*command, EXAMPLE / script, *flags)])


def started(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


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
    """Two volumes of 6 slices, to train and to test on: fewer slices than are shown."""
    return volumes(tmp_path_factory.mktemp("data") / "volumes", ["train", "test"], 2)


def volumes(folder: Path, splits: list[str], count: int) -> Path:
    """A folder of small synthetic volumes, all of them in each split; in "train" so often that none is repeated."""
    made = make_synthetic_volumes(count, folder, depth=6, size=32)
    rows: list[dict[str, Any]] = []
    for split in splits:
        for number in range(MANY if split == "train" else count):
            row: Any = made[number % count]
            files = {key: str(Path(row[name]).relative_to(folder)) for key, name in (("image", "scan"), ("label",) * 2)}
            texts = {name: row[name] for name in ("label_value", "modality", "anatomy", "lesion")}
            rows.append({**files, "split": split, **texts, "name": f"{split} {number}", "reasoning": HOSTILE})
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def main_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The main job, shortened."""
    folder = tmp_path_factory.mktemp("main") / "run"
    flags = ("--max_steps", 1, "--train_limit", 9, "--eval_limit", 2, "--logging_steps", 1, "--output_dir", folder)
    done = launch("train_grpo.py", *flags, "--per_device_train_batch_size", 8, "--max_completion_length", 40)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory, modules) -> Path:
    """A segmenter with random weights that always sees something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        made = modules["recipes"].find_recipe("tiny").segmenter(None)
        for name, weight in made.sam.named_parameters():
            if "pred_obj_score_head" in name and name.endswith("bias"):
                weight += 5
    folder = tmp_path_factory.mktemp("segmenter")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def sft_run(tmp_path_factory, data, segmenter, example) -> Path:
    """Stage 1 that knows the two volumes by heart."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    flags = ("--max_steps", 80, "--learning_rate", 0.005, "--key_slices", 1, "--segmenter", segmenter)
    sizes = ("--per_device_train_batch_size", 2, "--pretrain_steps", 1, "--dataloader_pin_memory", "false")
    assert example("train_sft", "--data", data, *flags, *sizes, "--output_dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def grpo_run(tmp_path_factory, data, sft_run, example) -> Path:
    """Two steps of stage 2 on it, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    assert example("train_grpo", *two_steps(data, sft_run, folder)) == 0
    return folder


def two_steps(data: Path, model: Path, folder: Path) -> tuple[object, ...]:
    flags = ("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--output_dir", folder)
    return ("--model", model, "--data", data, *GRPO, *flags)


def load(path: Any) -> Any:
    return nib.load(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What each step of stage 2 logged."""
    return [entry for entry in read(run / "log_history.json") if "reward" in entry]


def check_summary(summary: dict[str, Any], n: int) -> None:
    """What `results.json` documents for one model."""

    def check_scores(scores: dict[str, Any]) -> None:
        for name in SCORES:
            low, high = scores["ci95"][name]
            assert 0 <= low <= scores[name] <= high <= 1
        if scores["n_scored"]["hd95_mm"]:
            low, high = scores["ci95"]["hd95_mm"]
            assert 0 <= low <= scores["hd95_mm"] <= high
        else:
            assert scores["hd95_mm"] is None

    assert set(summary) == {*SCORES, "hd95_mm", "n", "n_scored", "ci95", "groups"}
    assert summary["n"] == n
    check_scores(summary)
    assert set(summary["groups"]) == {"lesion"}
    assert sum(group["n"] for group in summary["groups"]["lesion"].values()) == n
    for group in summary["groups"]["lesion"].values():
        check_scores(group)


# ---- the main job ----------------------------------------------------------------------------------------------------


def test_results_have_the_documented_layout(main_run):
    run = main_run[0]
    results = read(run / "results.json")
    assert set(results) == {"oracle", "stage1", "stage2", "gain", "encoded_slices", "config", "versions"}
    for stage in ("oracle", "stage1", "stage2"):
        check_summary(results[stage], n=2)
    assert results["oracle"]["slice_visibility"] == results["oracle"]["slice_boxes"] == 1
    assert {"torch", "transformers", "trl", "segrl", "python", "sam2"} <= set(results["versions"])
    config = results["config"]
    assert (config["preset"], config["rewards"], config["reach"]) == ("tiny", REWARDS, 5)
    assert config["grpo"]["max_steps"] == config["sft"]["max_steps"] == 1
    assert config["grpo"]["num_generations"] == 4
    assert config["grpo"]["beta"] == 0.01
    assert config["sft"]["output_dir"] == str(run / "stage1")
    assert config["sft"]["learning_rate"] > config["grpo"]["learning_rate"]
    assert {"model.safetensors", "segmenter.json", "segmenter.safetensors", "segrl.json", "predictions.json"} <= {
        path.name for path in run.iterdir()
    }
    records = read(run / "predictions.json")
    assert [record["name"] for record in records] == [f"synthetic_127_16x64_{n:05d}" for n in range(2)]
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["000.png", "001.png"]


def test_only_the_volumes_that_are_used_are_made(main_run):
    made = {path.name: len(list((path / "images").iterdir())) for path in (main_run[0] / "data").iterdir()}
    assert made == {"train": 9, "test": 2, "segmenter": 9}


def test_all_parts_report(main_run):
    done = main_run[1]
    assert re.search(r"^segmenter: \d+ steps, loss", done.stdout, re.MULTILINE)
    assert re.search(r"^vision tower: tells .* on \d+\.\d% of held-out slices$", done.stdout, re.MULTILINE)
    assert "1/1 [" in done.stderr
    assert re.findall(r"^(\w+) ━+ 100%", done.stdout, re.MULTILINE)[-3:] == ["oracle", "evaluate", "evaluate"]
    assert re.findall(r"^│ (oracle|stage1|stage2) .*│ 2 │$", done.stdout, re.MULTILINE) == [
        "oracle",
        "stage1",
        "stage2",
    ]
    assert re.findall(r"^stage 2 - stage 1, (\w+): ", done.stdout, re.MULTILINE) == [
        *("dice", "slice_visibility", "slice_boxes")
    ]
    assert f"Written to {main_run[0]}: results.json" in done.stdout


# ---- stage 2 of a model that answers ---------------------------------------------------------------------------------


def test_stage1_answers_with_slices_and_boxes(sft_run):
    results, records = read(sft_run / "results.json"), read(sft_run / "predictions.json")
    assert set(results) == {"oracle", "stage1", "config", "versions"}
    check_summary(results["stage1"], n=2)
    assert [record["status"] for record in records] == ["valid", "valid"]
    assert all(record["text"].startswith(f"<think>{HOSTILE}</think>") for record in records)
    assert all(results["stage1"][score] > 0 for score in ("slice_visibility", "slice_boxes", "mdice"))


def test_stage2_from_a_stage1_run(grpo_run, sft_run):
    assert not (grpo_run / "stage1").exists()
    results = read(grpo_run / "results.json")
    assert set(results) == {"oracle", "stage1", "stage2", "gain", "encoded_slices", "config", "versions"}
    assert results["stage1"] == read(sft_run / "results.json")["stage1"]
    assert "sft" not in results["config"]
    for name, (mean, low, high) in results["gain"].items():
        score = "mdice" if name == "dice" else name
        assert low <= mean <= high
        assert mean == pytest.approx(results["stage2"][score] - results["stage1"][score], abs=1e-9)
    ours, theirs = (load_file(run / "segmenter.safetensors") for run in (grpo_run, sft_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # frozen
    ours, theirs = (load_file(run / "model.safetensors") for run in (grpo_run, sft_run))
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert any("language_model" in name for name in changed)
    assert any(".visual." in name for name in theirs)
    assert not any(".visual." in name for name in changed)  # frozen after its warm-up


def test_reasoning_of_the_tiny_preset_says_what_each_slice_holds(modules, tmp_path):
    """A box of 8 x 12 pixels on slice 2 of 4 slices of 32 x 32 pixels, half of it on slice 3, a sixth on slice 4."""
    mask = np.zeros((4, 32, 32), np.uint8)
    mask[1, 8:16, 4:16] = 1
    mask[2, 8:16, 4:10] = 1
    mask[3, 8:12, 4:8] = 1
    for name in ("scan", "label"):
        nib.save(nib.Nifti1Image(mask.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")  # pyright: ignore[reportPrivateImportUsage]
    write_manifest(tmp_path, [{"image": "scan.nii.gz", "label": "label.nii.gz", "lesion": "spot", "modality": "MRI"}])
    (row,) = modules["warmup"].add_reasoning(load_volumes(tmp_path), 4)
    assert row["reasoning"] == "1 none, 2 large 1244, 3 medium 1224, 4 small 1223."


def test_logs_hold_every_reward_and_how_many_slices_were_encoded(grpo_run):
    steps = steps_of(grpo_run)
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        rewards = [entry[f"rewards/{name}/mean"] for name in REWARDS]
        assert entry["reward"] == pytest.approx(sum(rewards), abs=1e-5)
        assert "kl" in entry
    assert all(np.mean([entry[f"rewards/{name}/mean"] for entry in steps]) > 0 for name in REWARDS)
    encoded = [entry["rollout/encoded_slices"] for entry in steps]
    # 4 answers each about 2 volumes of 6 slices, one feature each, and none again in the second step
    assert 6 <= sum(encoded) <= 12
    assert sum(encoded) == read(grpo_run / "results.json")["encoded_slices"]


def test_the_run_loads_again_and_predicts_the_same(grpo_run, data):
    segmenter = VolumeSegmenter.from_pretrained(grpo_run, device="cpu")
    assert segmenter.settings["reasoning"] is True
    records = evaluate_volumes(segmenter, load_volumes(data, "test"), progress=False)
    assert json.loads(json.dumps(records)) == read(grpo_run / "predictions.json")
    assert any(record["dice"] > 0 for record in records)


def test_an_interrupted_run_is_continued(grpo_run, sft_run, data, tmp_path, example):
    run = shutil.copytree(grpo_run, tmp_path / "run")
    for path in run.iterdir():  # what a run holds that was killed after its first checkpoint
        if path.name not in ("checkpoint-1", "segrl_run.json", "segmenter.json", "segmenter.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert example("train_grpo", *two_steps(data, sft_run, run), "--resume_from_checkpoint", "last") == 0
    whole, resumed = read(grpo_run / "log_history.json"), read(run / "log_history.json")
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    assert resumed[0] == whole[0]
    assert resumed[1]["loss"] == pytest.approx(whole[1]["loss"], abs=1e-4)
    expected, found = (load_file(folder / "model.safetensors") for folder in (grpo_run, run))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    check_summary(read(run / "results.json")["stage2"], n=2)


@pytest.mark.long
def test_two_processes_finish(data, tmp_path):
    flags = ("--data", data, *GRPO, "--segmenter_steps", 4, "--output_dir", tmp_path / "run")
    done = launch("train_grpo.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == done.stdout.count("vision tower: ") == 1
    check_summary(read(tmp_path / "run" / "results.json")["stage2"], n=2)
    done = launch("train_grpo.py", "--data", data, "--output_dir", tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: output_dir") == 1


# ---- ablations: one command each -------------------------------------------------------------------------------------


def test_each_reward_can_be_left_out(modules):
    for name in REWARDS:
        example, _, _ = modules["arguments"].read(
            SegGRPOConfig, "grpo", "runs/out", ["--without", name, "--reach", "2"]
        )
        rewards = modules["stages"].rewards_of(example)
        assert [reward.name for reward in rewards] == example.rewards == [other for other in REWARDS if other != name]
        assert [reward.settings["delta"] for reward in rewards if reward.needs_mask] == [2] * (name != REWARDS[3])


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "used"),
    [
        (["--without", "slice_format", "slice_boxes", "--reach", "1", "--prompt_boxes", "all"], REWARDS[1::2]),
        (["--without", "propagated_dice", "slice_visibility"], REWARDS[::2]),
    ],
    ids=lambda value: " ".join(value),
)
def test_without_rewards(sft_run, data, tmp_path, example, flags, used):
    run = tmp_path / "run"
    assert example("train_grpo", "--model", sft_run, "--data", data, *GRPO, *flags, "--output_dir", run) == 0
    (entry,) = steps_of(run)
    assert {key for key in entry if re.fullmatch("rewards/.*/mean", key)} == {f"rewards/{name}/mean" for name in used}
    results = read(run / "results.json")
    assert results["config"]["rewards"] == used
    assert results["config"]["grpo"]["prompt_boxes"] == ("all" if "all" in flags else "matched")
    propagated = "propagated_dice" in used
    assert ("rollout/encoded_slices" in entry) is propagated
    assert (results["encoded_slices"] > 0) is propagated
    if propagated:
        assert entry["rewards/propagated_dice/mean"] > 0


@pytest.mark.long
def test_stage2_alone_with_rewards_that_are_sums_or_files(sft_run, data, tmp_path, example):
    file = tmp_path / "rewards.yaml"
    dump_reward(weighted_sum([("slice_format", 0.5), (make_reward("propagated_dice", delta=3), 2.0)]), file)
    run = tmp_path / "run"
    flags = ("--segmenter", sft_run, "--data", data, *GRPO, "--reach", 3, "--output_dir", run)
    assert example("train_grpo", "--skip_stage1", "--rewards", "medvol_r1", file, *flags) == 0
    results = read(run / "results.json")
    assert set(results) == {"oracle", "stage2", "encoded_slices", "config", "versions"}
    assert results["config"]["rewards"] == ["medvol_r1", str(file)]
    assert not (run / "stage1").exists()
    (entry,) = steps_of(run)
    assert "rewards/medvol_r1/mean" in entry
    assert "rollout/encoded_slices" in entry
    again = VolumeSegmenter.from_pretrained(run).model.config
    assert (again.text_config.hidden_size, again._name_or_path) == (128, str(run))


@pytest.mark.long
def test_one_slice_and_no_chain_of_thought(sft_run, tmp_path, example):
    """Both stages, on a volume of one slice."""
    folder, run = volumes(tmp_path / "data", ["train", "test"], 1), tmp_path / "run"
    row: Any = load_volumes(folder, "test")[0]
    key = int(areas_of(row).argmax())
    for path in (row["scan"], row["label"]):
        nib.save(load(path).slicer[:, :, key : key + 1], path)
    flags = ("--segmenter", sft_run, "--data", folder, *GRPO, "--output_dir", run)
    assert example("train_grpo", "--no_reasoning", *flags) == 0
    results = read(run / "results.json")
    check_summary(results["stage2"], n=1)
    assert results["oracle"]["slice_visibility"] == 1
    assert results["config"]["grpo"]["require_reasoning"] is False
    assert results["config"]["sft"]["max_steps"] == 1
    assert VolumeSegmenter.from_pretrained(run).settings["reasoning"] is False
    assert example("evaluate", "--model", sft_run, "--data", folder, "--output_dir", tmp_path / "out") == 0


def test_key_slices(modules, data):
    """With one, every answer names the largest slice; with more, other copies of a row name others."""
    recipes = modules["recipes"]
    recipe = recipes.find_recipe("tiny")
    rows = load_volumes(data, "test")
    _, processor = recipe.build(rows, None)
    largest = {row["name"]: int(areas_of(row).argmax()) for row in rows}  # type: ignore[index]
    found = {}
    for count in (1, 3):
        targets = recipes.rows_for(
            rows, processor, replace(recipe, targets={"top_k": count}, fill_to=8), completions=True
        )
        assert len(targets) == 8
        found[count] = {(row["name"], row["key_slice"]) for row in targets}
    assert found[1] == set(largest.items())
    assert len(found[3]) > 2
    for row in map(dict, rows):  # type: ignore[call-overload]
        assert {key for name, key in found[3] if name == row["name"]} <= set(np.argsort(areas_of(row))[-3:].tolist())


def areas_of(row: Any) -> np.ndarray:
    return read_label(row["label"], None, row["label_value"]).sum(axis=(1, 2))


# ---- evaluation, tables, one scan ------------------------------------------------------------------------------------


def test_evaluation_of_a_run(grpo_run, data, tmp_path, example, capsys):
    flags = ("--model", grpo_run, "--data", data, "--output_dir", tmp_path / "out")
    assert example("evaluate", *flags, "--pictures", 1) == 0
    results, trained = read(tmp_path / "out" / "results.json"), read(grpo_run / "results.json")
    assert set(results) == {"oracle", "model", "config", "versions"}
    assert (results["model"], results["oracle"]) == (trained["stage2"], trained["oracle"])
    with Image.open(tmp_path / "out" / "pictures" / "000.png") as picture:
        picture.load()
        assert picture.width > 400
    assert not (tmp_path / "out" / "pictures" / "001.png").exists()
    assert example("evaluate", *flags) == 2
    assert "is not empty" in capsys.readouterr().err
    assert example("evaluate", *flags, "--overwrite", "--split", "train", "--train_limit", 2) == 0
    assert [record["name"] for record in read(tmp_path / "out" / "predictions.json")] == ["train 0", "train 1"]


def test_the_published_tables_beside_a_run(grpo_run, sft_run, example, capsys):
    assert example("tables", grpo_run, sft_run) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^│ published, ", shown, re.MULTILINE)) == 3
    names = re.findall(r": (oracle boxes|SFT only|SFT \+ RL|RL only) +│", shown)
    assert names[-5:] == ["oracle boxes", "SFT only", "SFT + RL", "oracle boxes", "SFT only"]


@pytest.fixture
def scan(data, tmp_path) -> Path:
    """The first volume in another order of the axes, with two of them flipped, its affine kept true, and turned."""
    image = load(data / load_volumes(data, "test")[0]["scan"])  # type: ignore[index]
    order = nib.orientations.axcodes2ornt(("I", "L", "A"))
    have = nib.orientations.io_orientation(image.affine)
    turned = image.as_reoriented(nib.orientations.ornt_transform(have, order))
    angle = 0.1
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    file = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turn @ turned.affine), file)
    assert load(file).shape == (6, 32, 32)
    return file


def query_of(data: Path) -> str:
    return load_volumes(data, "test")[0]["query"]  # type: ignore[index]


def test_prediction_on_a_scan_in_another_orientation(grpo_run, data, scan, tmp_path, example, capsys):
    mask, picture = tmp_path / "mask.nii.gz", tmp_path / "picture.png"
    flags = (scan, query_of(data), "--model", grpo_run, "-o", mask, "--picture", picture)
    capsys.readouterr()
    assert example("predict", *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    segmenter = VolumeSegmenter.from_pretrained(grpo_run, device="cpu")
    expected = segmenter.predict(read_grey(load_volumes(data, "test")[0]["scan"])[1], query_of(data))  # type: ignore[index]
    assert expected.mask is not None
    assert expected.mask.any()
    assert found["slice"] == expected.slice_index == found["shown_slice"] - 1  # all 6 slices are shown
    assert found["boxes"] == expected.boxes.tolist()
    assert found["voxels"] == expected.mask.sum()
    assert (found["status"], found["reasoning"], found["mask"]) == ("valid", HOSTILE, str(mask))
    image, written = load(scan), load(mask)
    assert written.shape == image.shape
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
    assert np.array_equal(read_label(mask, read_volume(scan)), expected.mask)
    with Image.open(picture) as drawn:
        drawn.load()
        assert drawn.format == "PNG"


def test_printed_predictions_escape_what_the_model_says(grpo_run, data, scan, tmp_path, example, capsys):
    mask = tmp_path / "mask.nii"
    flags = (scan, query_of(data), "--model", grpo_run, "-o", mask)
    capsys.readouterr()
    assert example("predict", *flags) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[31m spot" in shown
    assert "\x1b[31m" not in shown
    before = mask.read_bytes()
    mask.write_bytes(b"precious")
    assert f"{mask} exists" in refused(example, capsys, "predict", *flags)
    assert mask.read_bytes() == b"precious"
    assert example("predict", *flags, "--overwrite") == 0
    assert mask.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-o", "mask.png"], "--output mask.png: expected a name that ends in .nii or .nii.gz"),
        (["-o", "nowhere/mask.nii"], "nowhere/mask.nii: there is no folder nowhere"),
        (["--picture", "answer.nii"], "--picture answer.nii: expected a name that ends in .png"),
        (["--intensity", "bright"], "scan.nii.gz: intensity 'bright'"),
        (["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
        (["--segmenter", "no_such.pt"], "no_such.pt"),
        (["--modell", "x"], "unrecognized arguments: --modell x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_of_a_prediction(grpo_run, scan, tmp_path, example, capsys, change, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(example, capsys, "predict", scan, "it", "--model", grpo_run, *change)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_a_prediction_never_replaces_its_scan(grpo_run, scan, example, capsys):
    before = scan.read_bytes()
    flags = (scan, "it", "--model", grpo_run, "--overwrite")
    for extra in (["-o", scan], ["-o", scan.parent / "." / scan.name], ["--picture", scan, "-o", "mask.nii"]):
        assert "expected different files" in refused(example, capsys, "predict", *flags, *extra)
    assert scan.read_bytes() == before


# ---- data of one's own -----------------------------------------------------------------------------------------------


def test_rows_whose_lesion_is_not_shown_are_left_out_of_stage1(modules, tmp_path, capsys):
    arguments, recipes, stages = (modules[name] for name in ("arguments", "recipes", "stages"))
    recipe = replace(recipes.find_recipe("tiny"), fill_to=0)
    folder = tmp_path / "data"
    made = make_synthetic_volumes(2, folder, depth=30, size=32)
    path = made[0]["label"]  # type: ignore[index]
    label = load(path)
    values = np.zeros(label.shape, np.uint8)
    values[:, :, 1] = made[0]["label_value"]  # type: ignore[index]
    nib.save(nib.Nifti1Image(values, label.affine), path)
    _, processor = recipe.build(made, None)
    capsys.readouterr()
    rows = stages.stage1_rows(arguments.ExampleArguments(), recipe, made, processor)
    assert "stage 1: 1 of 2 rows left out" in capsys.readouterr().out
    assert set(rows["name"]) == {made[1]["name"]}  # type: ignore[index]
    with pytest.raises(stages.DataError, match="no lesion of 1 rows is on one of the"):
        stages.stage1_rows(arguments.ExampleArguments(), recipe, made.select([0]), processor)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_start(modules, data):
    """The vision tower's warm-up included, whatever was drawn before."""
    arguments, recipes, stages = (modules[name] for name in ("arguments", "recipes", "stages"))
    settings = (arguments.ExampleArguments(pretrain_steps=2), recipes.find_recipe("tiny"), load_volumes(data, "test"))
    first, second, other = (stages.build_model(*settings, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.long
@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
def test_every_real_volume(sft_run, tmp_path, example):
    run = tmp_path / "run"
    assert example("train_grpo", "--data", VOLUMES3D, *GRPO, "--segmenter_steps", 20, "--output_dir", run) == 0
    check_summary(read(run / "results.json")["stage2"], n=2)
    names = []
    for split, count in (("train", 4), ("test", 3)):
        out = tmp_path / split
        flags = ("--data", VOLUMES3D, "--split", split, "--output_dir", out, "--eval_batch_size", 2)
        assert example("evaluate", "--model", run, *flags) == 0
        check_summary(read(out / "results.json")["model"], n=count)
        names += [record["name"] for record in read(out / "predictions.json")]
        assert len(list((out / "pictures").iterdir())) == count
    with (VOLUMES3D / "manifest.csv").open(newline="") as file:
        assert sorted(names) == sorted(row["image"] for row in csv.DictReader(file))


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_documented_commands_are_understood(modules):
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:accelerate launch|python) examples/medvol_r1/(\w+)\.py ?(.*)$", text, re.MULTILINE)
    assert {script for script, _ in commands} == {"train_grpo", "train_sft", "evaluate", "predict", "tables"}
    assert len(commands) >= 16
    for script, flags in commands:
        argv = shlex.split(flags, comments=True)
        if script == "evaluate":
            Parser(modules["arguments"].EvaluateArguments).read(argv)
        elif script == "predict":
            assert modules["predict"].parser().parse_args(argv).output == "mask.nii.gz"
        elif script == "tables":
            assert argv
            assert not any(flag.startswith("-") for flag in argv)
        else:
            if "--deepspeed" in argv:  # is not installed with segrl; its file is read below
                at = argv.index("--deepspeed")
                assert read(ROOT / argv[at + 1])["zero_optimization"]["stage"] == 2
                del argv[at : at + 2]
            config, stage = {"train_sft": (SegSFTConfig, "sft"), "train_grpo": (SegGRPOConfig, "grpo")}[script]
            modules["arguments"].read(config, stage, "runs/out", [*argv, "--bf16", "false"])


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
    assert "--m3d_seg" in flags
    assert ("--learning_rate" in flags) is script.startswith("train")


@pytest.mark.parametrize(("script", "flag"), [("predict", "--picture"), ("tables", "RUN")])
def test_help_of_the_other_commands(example, capsys, script, flag):
    assert example(script, "--help") == 0
    assert flag in capsys.readouterr().out


@pytest.mark.slow
def test_an_error_of_a_script_is_one_line_and_exit_code_2(tmp_path):
    done = started([sys.executable, str(EXAMPLE / "tables.py"), str(tmp_path)])
    assert done.returncode == 2
    said = f"{tmp_path}/results.json: cannot be read (No such file or directory)"
    assert done.stderr == f"error: {said}; pass the output_dir of a finished run\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tyny"], "unknown preset 'tyny'; did you mean 'tiny'?"),
        (["--rewards", "slice_format", "slice_bxes"], "unknown reward 'slice_bxes'; did you mean 'slice_boxes'?"),
        (["--without", "slice_bxes"], "unknown reward for --without 'slice_bxes'; did you mean 'slice_boxes'?"),
        (["--without", *REWARDS], f"--without {' '.join(REWARDS)}: no reward is left"),
        (["--without", "slice_boxes", "slice_boxes"], "unknown reward for --without 'slice_boxes'"),
        (["--reach", "-1"], "--reach -1: expected 0 or more"),
        (["--key_slices", "0"], "--key_slices 0: expected 1 or more"),
        (["--segmenter_steps", "0"], "--segmenter_steps 0: expected 1 or more"),
        (["--max_stps", "3"], "unknown flag '--max_stps'; did you mean '--max_steps'?"),
        (["--num_generations", "5"], "must be divisible by num_generations"),
        (["--prompt_boxes", "some"], "argument --prompt_boxes/--prompt-boxes: invalid choice: 'some'"),
        (["--m3d_seg", "KiTS23"], "--m3d_seg KiTS23: pass --data with the folder of M3D-Seg too"),
        (["--data", "no_such_folder"], "--data 'no_such_folder': no such folder"),
        (["--data", ".", "--m3d_seg", "KiTS24"], "unknown data set of M3D-Seg 'KiTS24'; did you mean 'KiTS23'?"),
        (["--data", ".", "--m3d_seg", "KiTS23"], ".: no data set 0004 of M3D-Seg; expected 0004/0004.json"),
        (["--train_limit", "3", "--per_device_train_batch_size", "2000"], "training rows, expected at least 500"),
        (["--resume_from_checkpoint", "last"], "--resume_from_checkpoint last: no checkpoint in"),
        (["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
        (["--model", "."], "--model '.' holds no model"),
        (["--segmenter", "no_such.pt"], "'no_such.pt' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(example, capsys, tmp_path, flags, message):
    assert message in refused(example, capsys, "train_grpo", *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        *[("train_sft", flag, f"{flag[0]} is for train_grpo.py") for flag in (["--reach", "2"], ["--skip_stage1"])],
        ("train_sft", ["--without", "slice_boxes"], "--without is for train_grpo.py"),
        ("train_sft", ["--data", "no_such_folder"], "--data 'no_such_folder': no such folder"),
        ("evaluate", [], "--model is missing"),
        ("evaluate", ["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
        ("evaluate", ["--pictures", "-1"], "--pictures -1: expected 0 or more"),
        (
            "evaluate",
            ["--split", "tset", "--model", "x"],
            "split of the synthetic volumes 'tset'; did you mean 'test'?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_of_the_other_scripts(example, capsys, tmp_path, script, flags, message):
    assert message in refused(example, capsys, script, *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- bad data: the file is named, nothing is written -----------------------------------------------------------------


def resave(path: Path, change: Any) -> None:
    """The file again with voxels and affine that `change` makes of the old ones."""
    image: Any = load(path)
    voxels, affine = change(np.asarray(image.dataobj).astype(np.float32), image.affine.copy())
    nib.save(nib.Nifti1Image(voxels, affine), path)


def moved(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    affine[0, 3] += 5
    return voxels, affine


def with_nan(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    voxels[0, 0, 0] = np.nan
    return voxels, affine


def cut(folder: Path) -> None:
    path = folder / "images" / "0.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(folder: Path, old: str, new: str) -> None:
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(old, new))


BAD_DATA = {
    "no foreground": (
        lambda f: resave(f / "labels" / "0.nii.gz", lambda voxels, affine: (0 * voxels, affine)),
        r"labels/0\.nii\.gz: the label has no voxel with the value \d, only no foreground",
    ),
    "another shape": (
        lambda f: resave(f / "labels" / "0.nii.gz", lambda voxels, affine: (voxels[:, :, :-1], affine)),
        r"labels/0\.nii\.gz: the label has the shape \(5, 32, 32\) .*images/0\.nii\.gz has \(6, 32, 32\)",
    ),
    "another affine": (
        lambda f: resave(f / "labels" / "0.nii.gz", moved),
        r"labels/0\.nii\.gz: the label lies up to 5 voxels away from .*images/0\.nii\.gz: their affines differ",
    ),
    "4D": (
        lambda f: resave(f / "images" / "0.nii.gz", lambda voxels, affine: (np.stack([voxels, voxels], -1), affine)),
        r"images/0\.nii\.gz: has the shape \(32, 32, 6, 2\), expected 3D",
    ),
    "NaN": (lambda f: resave(f / "images" / "0.nii.gz", with_nan), r"images/0\.nii\.gz: 1 of 6144 voxels are NaN"),
    "truncated": (cut, r"images/0\.nii\.gz: the voxels cannot be read \(.*\); the file is damaged or cut off"),
    "missing file": (lambda f: (f / "labels" / "0.nii.gz").unlink(), r"labels/0\.nii\.gz: no such file"),
    "missing split": (lambda f: rewrite(f, ",test,", ",tset,"), r"manifest\.csv 'test'; did you mean 'tset'\?"),
    "no split column": (lambda f: rewrite(f, ",split,", ",part,"), r"manifest\.csv: .*no split column"),
    "missing manifest": (lambda f: (f / "manifest.csv").unlink(), r"manifest\.csv: no such file; expected a CSV file"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(example, capsys, tmp_path, data, case):
    spoil, message = BAD_DATA[case]
    folder = shutil.copytree(data, tmp_path / "data")
    for kind in ("images", "labels"):
        for number, path in enumerate(sorted((folder / kind).iterdir())):
            rewrite(folder, f"{kind}/{path.name}", f"{kind}/{number}.nii.gz")
            path.rename(folder / kind / f"{number}.nii.gz")
    spoil(folder)
    for script in ("train_grpo", "train_sft"):
        said = refused(example, capsys, script, "--data", folder, *QUICK, "--output_dir", tmp_path / "run")
        assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_bad_data_sets_on_disk(example, capsys, tmp_path, data):
    rows = load_volumes(data, "train")
    empty = Dataset.from_dict({"scan": ["x"], "label": [""], "query": ["where?"]})
    bad: list[tuple[str, Any, str]] = [
        ("split", {"train": rows, "tset": rows}, "'test'; did you mean 'tset'?"),
        ("column", {"train": rows.remove_columns("label"), "test": rows}, "lacks the columns ['label']"),
        ("files", {"train": empty, "test": rows}, "row 0: x: no such file"),
    ]
    for name, parts, message in bad:
        DatasetDict(parts).save_to_disk(str(tmp_path / name))
        flags = ("--data", tmp_path / name, "--output_dir", tmp_path / "run")
        assert message in refused(example, capsys, "train_grpo", *flags)
    assert not (tmp_path / "run").exists()


# ---- runs that are there ---------------------------------------------------------------------------------------------


def test_a_run_is_not_trained_further_in_another_way(example, capsys, tmp_path, data, sft_run):
    flags = ("--model", sft_run, "--data", data, "--output_dir", tmp_path / "run")
    assert "was trained with reasoning True, here it is False; pass the --reasoning" in refused(
        example, capsys, "train_grpo", "--no_reasoning", *flags
    )
    assert "was trained with frame_kind 'original_px', here it is 'relative_1000'; pass the --frame_kind" in refused(
        example, capsys, "train_grpo", "--frame_kind", "relative_1000", *flags
    )
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_segmenter_is_not_evaluated(example, capsys, tmp_path, data, sft_run):
    run = shutil.copytree(sft_run, tmp_path / "model")
    (run / "segmenter.json").unlink()
    flags = ("--model", run, "--data", data, "--output_dir", tmp_path / "out")
    assert "has no segmenter; pass --segmenter" in refused(example, capsys, "evaluate", *flags)
    assert not (tmp_path / "out").exists()
    assert example("evaluate", *flags, "--segmenter", sft_run) == 0
    assert read(tmp_path / "out" / "results.json")["model"] == read(sft_run / "results.json")["stage1"]


def test_overwrite_replaces_a_run_and_its_segmenter(example, capsys, tmp_path, data, sft_run):
    """With a data set on disk that has only the columns which it must have."""
    rows = load_volumes(data, "train").select_columns(["scan", "label", "query"])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "data"))
    run = shutil.copytree(sft_run, tmp_path / "run")
    flags = ("--data", tmp_path / "data", *SFT, "--output_dir", run)
    assert "is not empty" in refused(example, capsys, "train_sft", *flags)
    assert f"--overwrite would remove --segmenter {str(run)!r}" in refused(
        example, capsys, "train_sft", *flags, "--overwrite", "--segmenter", run
    )
    (run / "checkpoint-9").mkdir()
    assert example("train_sft", *flags, "--overwrite") == 0
    assert not (run / "checkpoint-9").exists()
    old, new = (load_file(folder / "segmenter.safetensors") for folder in (sft_run, run))
    assert not all(torch.equal(old[name], new[name]) for name in old)
    check_summary(read(run / "results.json")["stage1"], n=2)
    assert [record["name"] for record in read(run / "predictions.json")] == ["row 0", "row 1"]
