"""The baselines LISA and Seg-Zero as a user runs them: what their stages write, and their published settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import learned_by_heart, slow_to_build
from peft import get_peft_model
from safetensors.torch import load_file
from script_modules import Example, phases_of, read_json

from segrl.data import make_scene, make_synthetic, prepare, write_folder
from segrl.errors import SegRLError, UnknownNameError
from segrl.heads import find_mask_head
from segrl.inference import load
from segrl.models import language_model_lora, list_findings, tiny_qwen2_5_vl
from segrl.scripts import TwoStageRun
from segrl.segmenters import BoxSegmenter, Sam2Segmenter, sam2_config

pytestmark = learned_by_heart

LISA, SEG_ZERO = Example("lisa"), Example("seg_zero")
SHORT = ("--max_steps", 2, "--train_limit", 24, "--eval_limit", 4, "--dataloader_pin_memory", "false")


def runs(example: Example, name: str) -> type[TwoStageRun]:
    return getattr(example.modules["recipe"], name)


@pytest.fixture(scope="module")
@slow_to_build
def lisa(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lisa") / "run"
    LISA.done("train_sft", *SHORT, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
@slow_to_build
def seg_zero(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seg_zero") / "run"
    flags = (*SHORT, "--max_completion_length", 24, "--logging_steps", 1, "--output_dir", folder)
    (folder.parent / "printed.txt").write_text(SEG_ZERO.done("train_grpo", *flags), encoding="utf-8")
    return folder


# ---- LISA ------------------------------------------------------------------------------------------------------------


def test_lisa_answers_with_the_token_alone():
    recipe: Any = runs(LISA, "LisaRun").recipes["tiny"]
    _, processor = tiny_qwen2_5_vl()
    rows = prepare(make_synthetic(6, size=56), processor, recipe.prompt, completions=True)
    said = {row["completion"][0]["content"] for row in map(dict, rows)}
    assert "It is <seg>." in said
    assert all(text == "It is <seg>." or text.startswith("No ") for text in said)
    assert all(row["prompt"][0]["content"] == row["query"] for row in map(dict, rows))
    made = recipe.prompt.completion_format
    assert (made.require_reasoning, made.require_tags, made.require_seg) == (False, False, True)


def test_lisa_trains_its_head_with_its_own_losses(lisa):
    results, history = read_json(lisa / "results.json"), read_json(lisa / "log_history.json")
    assert set(results) >= {"baseline", "stage1", "gain_over_baseline"}
    assert "gain" not in results
    head = read_json(lisa / "mask_head.json")
    assert (head["adapter"]["type"], head["probe"]["type"]) == ("mlp", "seg_token")
    logged = [name for entry in history for name in entry]
    for name, weight in (("cross_entropy", 2.0), ("dice", 0.5)):
        plain = next(entry[f"dense/{name}"] for entry in history if f"dense/{name}" in entry)
        weighted = next(entry[f"dense/{name}_weighted"] for entry in history if f"dense/{name}_weighted" in entry)
        assert weighted == pytest.approx(weight * plain, rel=1e-3)
    assert "dense/dice_ce" not in logged
    loaded: Any = load(lisa, device="cpu")
    assert find_mask_head(loaded.model) is not None
    assert loaded.settings.answer_form == "mask"


def test_lisa_at_full_size_has_its_published_settings():
    recipe: Any = runs(LISA, "LisaRun").recipes["core_seg_3b"]
    sft = recipe.sft
    assert (sft["learning_rate"], sft["adam_beta2"], sft["weight_decay"], sft["max_grad_norm"]) == (3e-4, 0.95, 0, 1)
    assert (sft["per_device_train_batch_size"], sft["gradient_accumulation_steps"], sft["max_steps"]) == (2, 10, 5000)
    assert (sft["lr_scheduler_type"], sft["warmup_steps"]) == ("linear", 100)
    assert recipe.grpo is None
    model, _ = tiny_qwen2_5_vl(layers=1, vision_layers=1)
    lora = language_model_lora(model, **recipe.lora)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.05)
    adapted = get_peft_model(model, lora)
    trained = {name.split(".lora")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    with pytest.raises(UnknownNameError, match="linear layer 'q'"):
        language_model_lora(tiny_qwen2_5_vl()[0], layers=["q"])
    with pytest.raises(SegRLError, match="are those of the language model"):
        language_model_lora(tiny_qwen2_5_vl()[0], layers=["q_proj"], scope="all")


def test_lisa_has_no_stage_2():
    assert not (LISA.folder / "train_grpo.py").exists()
    assert "--rewards is for train_grpo.py" in LISA.refused("train_sft", *SHORT, "--rewards", "format")


# ---- Seg-Zero --------------------------------------------------------------------------------------------------------


def test_seg_zero_trains_on_boxes_and_points_with_a_frozen_segmenter(seg_zero):
    results = read_json(seg_zero / "results.json")
    assert set(results) >= {"baseline", "oracle", "stage1", "stage2", "gain", "zero_spread"}
    printed = (seg_zero.parent / "printed.txt").read_text(encoding="utf-8")
    assert phases_of(printed) == ["segmenter", "vision", "captions", "stage 1", "stage 2", "evaluation"]
    truth = read_json(seg_zero / "predictions_oracle.json")
    assert all(record["status"] == "valid" for record in truth)
    assert any(record["boxes"] for record in truth)
    assert not (seg_zero / "mask_head.json").exists()
    assert results["config"]["grpo"]["num_generations"] == 8
    (steps,) = [[e for e in read_json(seg_zero / "log_history.json") if "reward" in e]]
    parts = {"json_format", "box_iou", "box_l1", "point_distance", "think_answer_format"}
    assert {f"seg_zero/{part}" for part in parts} <= set(steps[0])
    loaded: Any = load(seg_zero, device="cpu")
    assert (loaded.settings.answer_form, loaded.settings.seg_token) == ("json", "")
    assert isinstance(loaded.task.box_segmenter, BoxSegmenter)
    assert loaded.task.box_segmenter.points
    first = load(seg_zero / "stage1", device="cpu")  # finds the segmenter of the run around it
    state = load_file(seg_zero / "segmenter.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in first.segmenter.sam.state_dict().items())


def test_seg_zero_answers_with_json():
    recipe: Any = runs(SEG_ZERO, "SegZeroRun").recipes["tiny"]
    _, processor = tiny_qwen2_5_vl()
    rows = prepare(make_synthetic(3, size=56), processor, recipe.prompt, completions=True)
    for row in map(dict, rows):
        _, _, answer = row["completion"][0]["content"].removesuffix("</answer>").partition("<answer>")
        for item in json.loads(answer):
            assert set(item) == {"bbox_2d", "point_2d"}
            (x1, y1, x2, y2), (x, y) = item["bbox_2d"], item["point_2d"]
            assert x1 <= x <= x2
            assert y1 <= y <= y2


def test_seg_zero_at_full_size_begins_with_grpo():
    recipe: Any = runs(SEG_ZERO, "SegZeroRun").recipes["core_seg_3b"]
    assert recipe.sft is None
    grpo = recipe.grpo
    assert (grpo["learning_rate"], grpo["beta"], grpo["num_generations"]) == (1e-6, 5e-3, 8)
    assert recipe.lora is None
    assert recipe.rewards == ("seg_zero",)
    assert recipe.prompt.max_edge == 840
    assert "point_2d" in recipe.prompt.full_instruction


def test_a_preset_without_stage_1(tmp_path, monkeypatch):
    kind = runs(SEG_ZERO, "SegZeroRun")
    monkeypatch.setattr(kind, "recipes", {"tiny": replace(kind.recipes["tiny"], sft=None)})
    with pytest.raises(SegRLError, match="preset 'tiny' has no stage 1"):
        kind.check_sft([*map(str, SHORT), "--use_cpu", "--output_dir", str(tmp_path / "x")])
    with pytest.raises(SegRLError, match="--control continues stage 1"):
        kind.check_grpo([*map(str, SHORT), "--use_cpu", "--control", "--output_dir", str(tmp_path / "x")])
    short = ("--max_steps", "1", "--max_completion_length", "8", "--output_dir", str(tmp_path / "run"), "--use_cpu")
    kind.check_grpo([*map(str, SHORT), *short])()
    assert not (tmp_path / "run" / "stage1").exists()
    assert set(read_json(tmp_path / "run" / "results.json")) >= {"baseline", "oracle", "stage2"}


@pytest.mark.slow
def test_seg_zero_on_other_data_with_another_segmenter(seg_zero, lisa, tmp_path):
    data = write_folder(make_synthetic(4, size=64, seed=9), tmp_path / "data", split="test")
    SEG_ZERO.done("evaluate", "--model", seg_zero, "--data", data, "--output_dir", tmp_path / "own")
    assert read_json(tmp_path / "own" / "results.json")["model"]["n"] == 4
    flags = ("--model", seg_zero, "--data", data, "--output_dir", tmp_path / "other", "--segmenter", tmp_path / "sam")
    Sam2Segmenter(sam2_config("tiny", image_size=64)).save_pretrained(tmp_path / "sam")
    SEG_ZERO.done("evaluate", *flags)
    assert "has a mask head, and seg_zero is for models without one" in SEG_ZERO.refused(
        "evaluate", "--model", lisa, "--data", data, "--output_dir", tmp_path / "y"
    )
    LISA.done("evaluate", "--model", lisa, "--data", data, "--output_dir", tmp_path / "lisa")


@pytest.mark.slow
def test_seg_zero_goes_on_where_it_was(seg_zero, tmp_path):
    saved = ("--save_strategy", "steps", "--save_steps", 1, "--max_completion_length", 24, "--logging_steps", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    SEG_ZERO.done("train_grpo", *SHORT, *saved, "--output_dir", whole)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoint-2")
    for name in ("log_history.json", "model.safetensors", "results.json"):
        (stopped / name).unlink()
    SEG_ZERO.done("train_grpo", *SHORT, *saved, "--output_dir", stopped, "--resume_from_checkpoint", "last")
    one, other = load_file(whole / "model.safetensors"), load_file(stopped / "model.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---- synthetic rows --------------------------------------------------------------------------------------------------


def test_repeated_scenes_keep_their_own_reasoning(tmp_path):
    """A short training split is repeated, whole pass after whole pass, and each row says what its own scene shows."""
    kind = runs(Example("core_seg"), "CoreSegRun")
    run: Any = kind(kind.training_flags(train_limit=5, eval_limit=1), 3, tmp_path / "run")
    run.rows["train"] = run.load("train")
    _, processor = tiny_qwen2_5_vl()
    rows = run.prepare(None, processor, completions=True)
    assert rows["name"][:10] == run.train_rows["name"][:] * 2
    assert len(rows) == run.views()
    assert len(set(rows["name"])) == 5
    for row in map(dict, rows):
        number = int(row["name"].rsplit("_", 1)[1])
        picture = make_scene(number, **run.scenes("train")).picture()
        assert row["reasoning"] == list_findings(picture)
        assert f"<think>{list_findings(picture)}</think>" in row["completion"][0]["content"]


def test_stage_1_sees_the_rows_with_written_answers(tmp_path):
    kind = runs(Example("core_seg"), "CoreSegRun")
    run: Any = kind(kind.training_flags(), 3, tmp_path / "run")
    run.rows["train"] = make_synthetic(3, size=96).select([0] * 550)
    _, processor = tiny_qwen2_5_vl()
    written = run.recipe.synthetic["sft"]
    assert written == 400
    run.recipe = replace(run.recipe, fill_to=0, pretraining=None)
    assert len(run.prepare(None, processor, completions=True)) == written
    assert len(run.prepare(None, processor, completions=False)) == 550


def test_answers_on_own_images_name_no_lesion(tmp_path):
    """With the weights of a few hundred rows, names of those were written for another, in pieces."""
    kind = runs(Example("core_seg"), "CoreSegRun")
    folder = write_folder(make_synthetic(8, size=64), tmp_path / "data", split="train")
    run: Any = kind(kind.training_flags(data=str(folder)), 3, tmp_path / "run")
    run.recipe = replace(run.recipe, fill_to=0)
    run.rows["train"] = rows = run.load("train")
    _, processor = tiny_qwen2_5_vl()
    for row, given in zip(run.prepare(None, processor, completions=True), rows, strict=True):
        text = row["completion"][0]["content"]
        assert given["lesion"] not in text
        assert "lesion" in text
        assert given["lesion"] in row["prompt"][0]["content"]
    assert {picture.findings[0].kind for picture in run.pictures(rows) if picture.findings} == {"lesion"}
    asked = run.prepare(None, processor, completions=False)
    assert asked["lesion"][:] == rows["lesion"][:]  # rewards and scores have the names
