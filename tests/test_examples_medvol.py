"""What only the MedVol-R1 example has: a segmenter that is trained or given, key slices, one scan.

Most tests start from a stage 1 run that has learned two volumes by heart, so that its answers are valid and name slices
and boxes: what comes after them is then really computed. The rest of the example is in `test_examples.py`.
"""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from marks import learned_by_heart, slow_to_build
from medvol_data import HOSTILE, volumes
from PIL import Image
from safetensors.torch import load_file
from script_modules import ROOT, Example, read_json

from segrl import dump_reward, make_reward, weighted_sum
from segrl.cli.main import main
from segrl.data import (
    load_volumes,
    make_synthetic_volumes,
    read_case,
    read_grey,
    read_label,
    read_volume,
    uniform_slices,
    write_manifest,
)
from segrl.errors import DataError
from segrl.evaluation import evaluate_volumes
from segrl.geometry import rle_to_mask
from segrl.inference import InferenceResult, VolumeSegmenter
from segrl.predictions import Frame, Status

pytestmark = learned_by_heart

VOLUMES3D = ROOT.parent / "shared" / "data" / "volumes3d"
MEDVOL = Example("medvol_r1")
REWARDS = ["slice_format", "slice_visibility", "slice_boxes", "propagated_dice"]
QUICK = ("--max_steps", "1", "--dataloader_pin_memory", "false", "--logging_steps", "1", "--eval_limit", "2")
GRPO = (*QUICK, "--per_device_train_batch_size", "8", "--max_completion_length", "48")
SFT = (*QUICK, "--per_device_train_batch_size", "2", "--segmenter_steps", "1", "--train_limit", "33")


@pytest.fixture(scope="module")
def recipe_module() -> Any:
    return MEDVOL.modules["recipe"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two volumes of 6 slices, to train and to test on: fewer slices than are shown."""
    return volumes(tmp_path_factory.mktemp("data") / "volumes", ["train", "test"], 2)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory, recipe_module) -> Path:
    """A segmenter with random weights that always sees something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        made = recipe_module.RECIPES["tiny"].segmenter(None)
        for name, weight in made.sam.named_parameters():
            if "pred_obj_score_head" in name and name.endswith("bias"):
                weight += 5
    folder = tmp_path_factory.mktemp("segmenter")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def sft_run(tmp_path_factory, data, segmenter) -> Path:
    """Stage 1 that knows the two volumes by heart."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    flags = ("--max_steps", 80, "--learning_rate", 0.005, "--key_slices", 1, "--segmenter", segmenter)
    sizes = ("--per_device_train_batch_size", 2, "--pretrain_steps", 1, "--dataloader_pin_memory", "false")
    MEDVOL.done("train_sft", "--data", data, *flags, *sizes, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def grpo_run(tmp_path_factory, data, sft_run) -> Path:
    """Two steps of stage 2 on it, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    MEDVOL.done("train_grpo", *two_steps(data, sft_run, folder))
    return folder


def two_steps(data: Path, model: Path, folder: Path) -> tuple[object, ...]:
    """So hot that the answers of a model that knows its data by heart differ: equal ones teach nothing."""
    flags = ("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--output_dir", folder)
    return ("--model", model, "--data", data, *GRPO, "--temperature", 1.5, *flags)


def load(path: Any) -> Any:
    return nib.load(path)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What each step of stage 2 logged."""
    return [entry for entry in read_json(run / "log_history.json") if "reward" in entry]


# ---- stage 2 of a model that answers ---------------------------------------------------------------------------------


def test_stage1_answers_with_slices_and_boxes(sft_run):
    results, records = read_json(sft_run / "results.json"), read_json(sft_run / "predictions.json")
    assert set(results) == {"oracle", "stage1", "config", "versions"}
    assert [record["status"] for record in records] == ["valid", "valid"]
    assert all(record["text"].startswith(f"<think>{HOSTILE}</think>") for record in records)
    assert all(results["stage1"][score] > 0 for score in ("slice_visibility", "slice_boxes", "mdice"))


def test_stage2_from_a_stage1_run(grpo_run, sft_run):
    assert not (grpo_run / "stage1").exists()
    results = read_json(grpo_run / "results.json")
    assert set(results) == {"oracle", "stage1", "stage2", "gain", "zero_spread", "encoded_slices", "config", "versions"}
    assert results["stage1"] == read_json(sft_run / "results.json")["stage1"]
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


def test_reasoning_of_the_tiny_preset_says_what_each_slice_holds(tmp_path):
    """A box of 8 x 12 pixels on slice 2 of 4 slices of 32 x 32 pixels, half of it on slice 3, a sixth on slice 4."""
    mask = np.zeros((4, 32, 32), np.uint8)
    mask[1, 8:16, 4:16] = 1
    mask[2, 8:16, 4:10] = 1
    mask[3, 8:12, 4:8] = 1
    for name in ("scan", "label"):
        nib.save(nib.Nifti1Image(mask.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")  # pyright: ignore[reportPrivateImportUsage]
    write_manifest(tmp_path, [{"image": "scan.nii.gz", "label": "label.nii.gz", "lesion": "spot", "modality": "MRI"}])
    (row,) = MEDVOL.modules["slice_texts"].add_reasoning(load_volumes(tmp_path), 4)
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
    assert sum(encoded) == read_json(grpo_run / "results.json")["encoded_slices"]


def test_the_run_loads_again_and_predicts_the_same(grpo_run, data):
    segmenter = VolumeSegmenter.from_pretrained(grpo_run, device="cpu")
    assert segmenter.settings.reasoning is True
    records = evaluate_volumes(segmenter, load_volumes(data, "test"), progress=False)
    assert json.loads(json.dumps(records)) == read_json(grpo_run / "predictions.json")
    assert any(record["dice"] > 0 for record in records)


# ---- ablations: one command each -------------------------------------------------------------------------------------


def made(recipe_module: Any, folder: Path, **flags: Any) -> Any:
    """A run of the tiny preset, as its script makes it."""
    arguments = recipe_module.TrainingFlags(**flags)
    return recipe_module.MedVolRun(arguments, 42, folder)


def test_each_reward_can_be_left_out(recipe_module, tmp_path):
    for name in REWARDS:
        rewards = made(recipe_module, tmp_path, drop_rewards=[name], reach=2).make_rewards()
        assert [reward.name for reward in rewards] == [other for other in REWARDS if other != name]
        assert [reward.settings["delta"] for reward in rewards if reward.needs_mask] == [2] * (name != REWARDS[3])


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        (["--drop_rewards", "slice_format", "slice_boxes", "--reach", "1", "--prompt_boxes", "all"], REWARDS[1::2]),
        pytest.param(["--drop_rewards", "propagated_dice", "slice_visibility"], REWARDS[::2], marks=pytest.mark.long),
    ],
    ids=lambda value: " ".join(value),
)
def test_without_rewards(sft_run, data, tmp_path, flags, used):
    run = tmp_path / "run"
    MEDVOL.done("train_grpo", "--model", sft_run, "--data", data, *GRPO, *flags, "--output_dir", run)
    (entry,) = steps_of(run)
    assert {key for key in entry if re.fullmatch("rewards/.*/mean", key)} == {f"rewards/{name}/mean" for name in used}
    results = read_json(run / "results.json")
    assert results["config"]["rewards"] == used
    assert results["config"]["grpo"]["prompt_boxes"] == ("all" if "all" in flags else "matched")
    propagated = "propagated_dice" in used
    assert ("rollout/encoded_slices" in entry) is propagated
    assert (results["encoded_slices"] > 0) is propagated
    if propagated:
        assert entry["rewards/propagated_dice/mean"] > 0


@pytest.mark.long
def test_stage2_alone_with_rewards_that_are_sums_or_files(sft_run, data, tmp_path):
    file = tmp_path / "rewards.yaml"
    dump_reward(weighted_sum([("slice_format", 0.5), (make_reward("propagated_dice", delta=3), 2.0)]), file)
    run = tmp_path / "run"
    flags = ("--segmenter", sft_run, "--data", data, *GRPO, "--reach", 3, "--output_dir", run)
    MEDVOL.done("train_grpo", "--skip_stage1", "--rewards", "medvol_r1", file, *flags)
    results = read_json(run / "results.json")
    assert set(results) == {"oracle", "stage2", "zero_spread", "encoded_slices", "config", "versions"}
    assert results["config"]["rewards"] == ["medvol_r1", str(file)]
    assert not (run / "stage1").exists()
    (entry,) = steps_of(run)
    assert "rewards/medvol_r1/mean" in entry
    assert "rollout/encoded_slices" in entry
    again = VolumeSegmenter.from_pretrained(run).model.config
    assert (again.text_config.hidden_size, again._name_or_path) == (128, str(run))


@pytest.mark.long
def test_one_slice_and_no_chain_of_thought(sft_run, tmp_path):
    """Both stages, on a volume of one slice."""
    folder, run = volumes(tmp_path / "data", ["train", "test"], 1), tmp_path / "run"
    row: Any = load_volumes(folder, "test")[0]
    key = int(areas_of(row).argmax())
    for path in (row["scan"], row["label"]):
        nib.save(load(path).slicer[:, :, key : key + 1], path)
    flags = ("--segmenter", sft_run, "--data", folder, *GRPO, "--output_dir", run)
    MEDVOL.done("train_grpo", "--no_reasoning", *flags)
    results = read_json(run / "results.json")
    assert results["stage2"]["n"] == 1
    assert results["oracle"]["slice_visibility"] == 1
    assert results["config"]["sft"]["max_steps"] == 1
    assert VolumeSegmenter.from_pretrained(run).settings.reasoning is False
    MEDVOL.done("evaluate", "--model", sft_run, "--data", folder, "--output_dir", tmp_path / "out")


def test_key_slices(recipe_module, data, tmp_path):
    """With one, every answer names the largest slice; with more, other copies of a row name others."""
    rows = load_volumes(data, "test")
    largest = {row["name"]: int(areas_of(row).argmax()) for row in rows}  # type: ignore[index]
    found = {}
    for count in (1, 3):
        run = made(recipe_module, tmp_path, key_slices=count)
        run.rows, run.recipe = {"train": rows}, replace(run.recipe, fill_to=8)
        targets = run.prepare(*run.build(), completions=True)
        assert len(targets) == 8
        found[count] = {(row["name"], row["key_slice"]) for row in targets}
    assert found[1] == set(largest.items())
    assert len(found[3]) > 2
    for row in map(dict, rows):  # type: ignore[call-overload]
        assert {key for name, key in found[3] if name == row["name"]} <= set(np.argsort(areas_of(row))[-3:].tolist())


def areas_of(row: Any) -> np.ndarray:
    return read_label(row["label"], None, row["label_value"]).sum(axis=(1, 2))


# ---- evaluation, one scan --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_evaluation_of_another_split(grpo_run, data, tmp_path):
    out = tmp_path / "out"
    flags = ("--model", grpo_run, "--data", data, "--split", "train", "--train_limit", 2, "--pictures", 1)
    MEDVOL.done("evaluate", *flags, "--output_dir", out)
    assert [record["name"] for record in read_json(out / "predictions.json")] == ["train 0", "train 1"]
    with Image.open(out / "pictures" / "000.png") as picture:
        picture.load()
        assert picture.width > 400
    assert not (out / "pictures" / "001.png").exists()


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


def predicted(capsys, *words) -> Any:
    """The record that `segrl predict` prints."""
    assert main(["predict", *map(str, words), "--device", "cpu", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_prediction_on_a_scan_in_another_orientation(grpo_run, data, scan, tmp_path, capsys):
    found = predicted(capsys, grpo_run, scan, query_of(data), "-o", tmp_path / "out")
    segmenter = VolumeSegmenter.from_pretrained(grpo_run, device="cpu")
    expected = segmenter.predict(read_grey(load_volumes(data, "test")[0]["scan"])[1], query_of(data))  # type: ignore[index]
    assert expected.mask is not None
    assert expected.mask.any()
    assert found["slice"] == expected.slice_index == found["shown_slice"] - 1  # all 6 slices are shown
    assert (found["file_axis"], found["file_slice"]) == (0, 5 - found["slice"])  # the file's first axis goes down
    centre = nib.affines.apply_affine(load(scan).affine, (found["file_slice"], 15.5, 15.5))  # type: ignore[attr-defined]
    assert found["z_mm"] == pytest.approx(centre[2], abs=1e-4)
    assert found["boxes"] == expected.boxes.tolist()
    assert found["foreground"] == expected.mask.sum()
    mask = tmp_path / "out" / "scan_mask.nii.gz"
    assert (found["status"], found["reasoning"], found["mask"]) == ("valid", HOSTILE, str(mask))
    image, written = load(scan), load(mask)
    assert written.shape == image.shape
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-5)
    assert np.array_equal(read_label(mask, read_volume(scan)), expected.mask)
    with Image.open(found["overlay"]) as drawn:
        drawn.load()
        assert drawn.format == "PNG"


def test_the_three_numbers_of_a_slice(tmp_path):
    """What the answer calls 4 is slice 8 of the volume, and 11 in a file whose slices go from the top down."""
    affine = np.diag([1.0, 1.0, -2.5, 1.0])
    affine[:3, 3] = 5, 6, 100
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(5, 6, 20)), affine), tmp_path / "scan.nii")
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).normal(size=(5, 6, 20)))
    frame = Frame("original_px", (5, 6), slices=tuple(map(int, uniform_slices(20, 8))))
    keys = ("slice", "shown_slice", "file_slice", "file_axis", "z_mm")

    def named(case, index):
        about: Any = {"slice_index": index, "source": case, "frame": frame}
        record = InferenceResult("", None, None, np.zeros((0, 4)), Status.NO_ANSWER, False, **about).to_dict()
        return {key: record[key] for key in keys}

    case = read_case({"scan": str(tmp_path / "scan.nii")}, label=False)
    found = {"slice": 8, "shown_slice": 4, "file_slice": 11, "file_axis": 2}
    assert named(case, 8) == {**found, "z_mm": 72.5}
    array = read_case({"scan": str(tmp_path / "scan.npy")}, label=False)
    assert named(array, 8) == {**found, "file_slice": 8, "z_mm": None}
    for index in (None, -1, 9):  # no slice, or one that was not shown
        assert named(case, index) == {**dict.fromkeys(keys), "slice": index}


def test_a_scan_without_spacing_may_be_given_one(grpo_run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("scan.npy", load(data / load_volumes(data, "test")[0]["scan"]).get_fdata())  # type: ignore[index]
    for spacing in ((), ("--spacing_mm", "[3, 1, 1]")):
        found = predicted(capsys, grpo_run, "scan.npy", query_of(data), *spacing)
        assert (found["z_mm"], found["file_slice"]) == (None, found["slice"])


def test_printed_predictions_escape_what_the_model_says(grpo_run, data, scan, tmp_path, capsys):
    assert main(["predict", str(grpo_run), str(scan), query_of(data), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[31m spot" in shown
    assert re.search(r"^slice +\d+ +\(index in the volume .*counted from 0\)$", shown, re.M)
    assert re.search(r"^shown_slice +\d+ +\(number in the answer, .*counted from 1\)$", shown, re.M)
    assert re.search(r"^file_slice +\d+ +\(index in the file, counted from 0\)$", shown, re.M)
    assert re.search(r"^z_mm +-?\d+\.\d+ +\(height", shown, re.M)
    assert "\x1b[31m" not in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--intensity", "bright"], "scan.nii.gz: intensity 'bright'"),
        (["--segmenter", "no_such.pt"], "no_such.pt"),
        (["--abstain_below", "0.5"], "one answer about a volume has no confidence; pass --samples of 2 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_of_a_prediction(grpo_run, scan, tmp_path, change, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(grpo_run), str(scan), "it", *change]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


# ---- data of one's own -----------------------------------------------------------------------------------------------


def test_rows_whose_lesion_is_not_shown_are_left_out_of_stage1(recipe_module, tmp_path, capsys):
    rows = make_synthetic_volumes(2, tmp_path / "data", depth=30, size=32)
    first: Any = rows[0]
    label = load(first["label"])
    values = np.zeros(label.shape, np.uint8)
    values[:, :, 1] = first["label_value"]
    nib.save(nib.Nifti1Image(values, label.affine), first["label"])
    run = made(recipe_module, tmp_path)
    run.rows, run.recipe = {"train": rows}, replace(run.recipe, fill_to=0)
    model, processor = run.build()
    found = run.prepare(model, processor, completions=True)
    assert "stage 1: 1 of 2 rows left out" in capsys.readouterr().out
    assert set(found["name"]) == {rows[1]["name"]}  # type: ignore[index]
    run.rows = {"train": rows.select([0])}
    with pytest.raises(DataError, match="no lesion of 1 rows is on one of the"):
        run.prepare(model, processor, completions=True)


@pytest.mark.long
def test_rows_without_a_target_train_and_are_scored(tmp_path):
    """Of two volumes one has nothing: both stages take it with `--allow_empty`, and N-acc is reported."""
    data = volumes(tmp_path / "volumes", ["train", "test"], 2)
    label = sorted((data / "labels").iterdir())[0]
    found = load(label)
    nib.save(nib.Nifti1Image(np.zeros(found.shape, np.uint8), found.affine), label)
    flags = ("--data", data, *GRPO, "--sft_max_steps", 1, "--pretrain_steps", 1, "--segmenter_steps", 1)
    message = MEDVOL.refused("train_grpo", *flags, "--output_dir", tmp_path / "refused")
    assert "(--allow_empty) if there is nothing to find" in message
    MEDVOL.done("train_grpo", *flags, "--allow_empty", "--output_dir", tmp_path / "run")
    results = read_json(tmp_path / "run" / "results.json")
    assert results["stage2"]["no_target"]["n"] == 1
    records = read_json(tmp_path / "run" / "predictions.json")
    assert sorted(not rle_to_mask(record["target_mask"]).any() for record in records) == [False, True]


@pytest.mark.long
@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
def test_every_real_volume(sft_run, tmp_path):
    run = tmp_path / "run"
    MEDVOL.done("train_grpo", "--data", VOLUMES3D, *GRPO, "--segmenter_steps", 20, "--output_dir", run)
    assert read_json(run / "results.json")["stage2"]["n"] == 2
    names = []
    for split, count in (("train", 4), ("test", 3)):
        out = tmp_path / split
        flags = ("--data", VOLUMES3D, "--split", split, "--output_dir", out, "--eval_batch_size", 2)
        MEDVOL.done("evaluate", "--model", run, *flags)
        assert read_json(out / "results.json")["model"]["n"] == count
        names += [record["name"] for record in read_json(out / "predictions.json")]
        assert len(list((out / "pictures").iterdir())) == count
    with (VOLUMES3D / "manifest.csv").open(newline="") as file:
        assert sorted(names) == sorted(row["image"] for row in csv.DictReader(file))


# ---- the command line ------------------------------------------------------------------------------------------------


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
def test_bad_data(tmp_path, data, case):
    spoil, message = BAD_DATA[case]
    folder = shutil.copytree(data, tmp_path / "data")
    for kind in ("images", "labels"):
        for number, path in enumerate(sorted((folder / kind).iterdir())):
            rewrite(folder, f"{kind}/{path.name}", f"{kind}/{number}.nii.gz")
            path.rename(folder / kind / f"{number}.nii.gz")
    spoil(folder)
    for script in ("train_grpo", "train_sft"):
        said = MEDVOL.refused(script, "--data", folder, *QUICK, "--output_dir", tmp_path / "run")
        assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_files_of_a_data_set_on_disk_are_checked(tmp_path, data):
    rows, empty = load_volumes(data, "train"), {"scan": ["x"], "label": [""], "query": ["where?"]}
    DatasetDict({"train": Dataset.from_dict(empty), "test": rows}).save_to_disk(str(tmp_path / "files"))
    flags = ("--data", tmp_path / "files", "--output_dir", tmp_path / "run")
    assert "row 0: x: no such file" in MEDVOL.refused("train_grpo", *flags)
    assert not (tmp_path / "run").exists()


# ---- runs that are there ---------------------------------------------------------------------------------------------


def test_a_run_without_a_segmenter_is_not_evaluated(tmp_path, data, sft_run):
    run = shutil.copytree(sft_run, tmp_path / "model")
    (run / "segmenter.json").unlink()
    flags = ("--model", run, "--data", data, "--output_dir", tmp_path / "out")
    assert "has no segmenter; pass --segmenter" in MEDVOL.refused("evaluate", *flags)
    assert not (tmp_path / "out").exists()
    MEDVOL.done("evaluate", *flags, "--segmenter", sft_run)
    assert read_json(tmp_path / "out" / "results.json")["model"] == read_json(sft_run / "results.json")["stage1"]


@pytest.mark.long
def test_overwrite_replaces_a_run_and_its_segmenter(tmp_path, data, sft_run):
    """With a data set on disk that has only the columns which it must have."""
    rows = load_volumes(data, "train").select_columns(["scan", "label", "query"])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "data"))
    run = shutil.copytree(sft_run, tmp_path / "run")
    flags = ("--data", tmp_path / "data", *SFT, "--output_dir", run)
    assert "is not empty" in MEDVOL.refused("train_sft", *flags)
    assert f"--overwrite would remove --segmenter {str(run)!r}" in MEDVOL.refused(
        "train_sft", *flags, "--overwrite", "--segmenter", run
    )
    (run / "checkpoint-9").mkdir()
    MEDVOL.done("train_sft", *flags, "--overwrite")
    assert not (run / "checkpoint-9").exists()
    old, new = (load_file(folder / "segmenter.safetensors") for folder in (sft_run, run))
    assert not all(torch.equal(old[name], new[name]) for name in old)
    assert [record["name"] for record in read_json(run / "predictions.json")] == ["row 0", "row 1"]
