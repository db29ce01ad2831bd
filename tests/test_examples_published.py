"""The presets of the papers: their settings, and MedVol-R1's on small files of the real layout.

CORE-Seg's on such files is in `test_examples.py`.

`medvol_r1_4b` trains stage 1 on answers alone and stage 2 with a think block, and has LoRA on all linear layers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import learned_by_heart
from medvol_data import volumes
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from script_modules import Example, read_json
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError, UnknownNameError
from segrl.inference import VolumeSegmenter
from segrl.models import language_model_lora, tiny_qwen3_vl
from segrl.predictions import ImagePromptSettings, VolumePromptSettings
from segrl.scripts import parse
from segrl.segmenters import Sam2Segmenter, sam2_config

pytestmark = learned_by_heart

MEDVOL, CORE_SEG = Example("medvol_r1"), Example("core_seg")
MEDVOL_RUN, CORE_SEG_RUN = MEDVOL.modules["recipe"].MedVolRun, CORE_SEG.modules["recipe"].CoreSegRun
CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def settings_of(config: Any, names: str) -> list[Any]:
    return [getattr(config, name) for name in names.split()]


def configs(recipe: Any) -> tuple[Any, Any]:
    """The settings of both stages as the trainers read them."""
    assert recipe.sft["bf16"] is recipe.grpo["bf16"] is True
    return SegSFTConfig("x", **{**recipe.sft, **CPU}), SegGRPOConfig("x", **{**recipe.grpo, **CPU})


def test_settings_of_medvol_r1_4b():
    recipe = MEDVOL_RUN.recipes["medvol_r1_4b"]
    sft, grpo = configs(recipe)
    shared = "lr_scheduler_type warmup_steps gradient_checkpointing"
    assert settings_of(sft, shared) == settings_of(grpo, shared) == ["cosine", 0.1, True]
    assert sft.optim.startswith("adamw")
    names = "num_train_epochs per_device_train_batch_size learning_rate"
    assert settings_of(sft, names) == [1, 2, 2e-5]
    assert settings_of(grpo, names) == [3, 1, 2e-6]
    names = "num_generations beta max_completion_length loss_type use_bias_correction_kl importance_sampling_level"
    assert settings_of(grpo, names) == [4, 0.01, 256, "grpo", False, "sequence"]
    assert recipe.rewards == ("slice_format", "slice_visibility", "slice_boxes", "propagated_dice")
    assert (recipe.lora["r"], recipe.lora_scope, recipe.sft_reasoning) == (128, "all", False)
    assert recipe.prompt == VolumePromptSettings(slices=64, size=256, max_new_tokens=256, reasoning=True)
    assert MEDVOL_RUN.training_flags().reach == 5


def test_settings_of_core_seg_3b():
    recipe = CORE_SEG_RUN.recipes["core_seg_3b"]
    sft, grpo = configs(recipe)
    assert settings_of(sft, "num_train_epochs global_batch_size learning_rate") == [1, 32, 1e-4]
    names = "num_train_epochs global_batch_size batch_unit learning_rate num_generations"
    assert settings_of(grpo, names) == [2, 16, "prompts", 5e-6, 4]
    names = "loss_type use_bias_correction_kl importance_sampling_level"
    assert settings_of(grpo, names) == ["grpo", False, "token"]
    assert recipe.lora == {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
    assert (recipe.lora_scope, recipe.sft_reasoning) == ("language", None)
    assert recipe.prompt == ImagePromptSettings(max_edge=512, max_new_tokens=512)


@pytest.mark.parametrize("runs", [MEDVOL_RUN, CORE_SEG_RUN], ids=["medvol_r1", "core_seg"])
def test_every_preset_has_the_published_loss(runs):
    for recipe in runs.recipes.values():
        assert (recipe.grpo["loss_type"], recipe.grpo["use_bias_correction_kl"]) == ("grpo", False)


# ---- reasoning of each stage -----------------------------------------------------------------------------------------


def reasoning(runs: Any, stage: str, *flags: str) -> tuple[bool, bool]:
    """Whether the stages ask for a think block: stage 1, stage 2 (or None) as `_enter` sets them."""
    config = {"sft": SegSFTConfig, "grpo": SegGRPOConfig}[stage]
    values = [*flags, *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "x")]
    arguments, _, given = parse(
        values, runs.training_flags, config, defaults=lambda known: runs._defaults(known, stage, {}, "x")
    )
    run = runs(arguments, 0, Path("x"), given)
    asked = []
    for name in ("sft", "grpo"):
        run._enter(name)
        asked.append(run.prompt.reasoning)
        instruction = run.prompt.full_instruction
        assert ("<think>" in instruction) is run.prompt.reasoning or not instruction
    return asked[0], asked[1]


@pytest.mark.parametrize(
    ("runs", "preset", "flags", "expected"),
    [
        (MEDVOL_RUN, "medvol_r1_4b", [], (False, True)),
        (MEDVOL_RUN, "medvol_r1_4b", ["--sft_reasoning", "true"], (True, True)),
        (MEDVOL_RUN, "medvol_r1_4b", ["--no_reasoning"], (False, False)),
        (MEDVOL_RUN, "tiny", [], (True, True)),
        (MEDVOL_RUN, "tiny", ["--sft_reasoning", "false"], (False, True)),
        (CORE_SEG_RUN, "core_seg_3b", [], (True, True)),
        (CORE_SEG_RUN, "core_seg_3b", ["--no_reasoning"], (False, False)),
        (CORE_SEG_RUN, "core_seg_3b", ["--no_reasoning", "--sft_reasoning", "true"], (True, False)),
    ],
)
def test_each_stage_reasons_or_not(runs, preset, flags, expected):
    assert reasoning(runs, "grpo", "--preset", preset, *flags) == expected


def test_stage1_alone_reasons_as_the_preset_says_or_the_flag():
    assert reasoning(MEDVOL_RUN, "sft", "--preset", "medvol_r1_4b")[0] is False
    assert reasoning(MEDVOL_RUN, "sft", "--preset", "medvol_r1_4b", "--reasoning", "true")[0] is True
    assert reasoning(CORE_SEG_RUN, "sft", "--preset", "tiny")[0] is True
    assert "--sft_reasoning is for train_grpo.py" in MEDVOL.refused("train_sft", "--sft_reasoning", "true")


# ---- scope of LoRA ---------------------------------------------------------------------------------------------------


def test_trainable_parameters_at_full_size():
    """Qwen3-VL-4B on the meta device: 264 M in the language model, 322 M in all linear layers."""
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    found = {}
    for scope in ("language", "all"):
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(config)
            settings = language_model_lora(model, scope=scope, **MEDVOL_RUN.recipes["medvol_r1_4b"].lora)
            adapted = get_peft_model(model, settings)
        found[scope] = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert found == {"language": 264_241_152, "all": 322_174_976}
    with pytest.raises(UnknownNameError, match="LoRA scope 'vision'"):
        language_model_lora(model, scope="vision")  # type: ignore[arg-type]


def test_a_preset_without_lora_has_no_scope():
    with pytest.raises(SegRLError, match="--lora_scope: preset 'tiny' trains the whole model; drop the flag"):
        MEDVOL_RUN(MEDVOL_RUN.training_flags(lora_scope="all"), 0, Path("x"))


# ---- MedVol-R1 on small files of the real layout ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """A hub-style Qwen3-VL (tied, in two shards, without `<think>` of its own) and MedSAM2's `.pt` at full size."""
    home = tmp_path_factory.mktemp("published")
    folder = home / "Qwen3-VL-4B-Instruct"
    model, processor = tiny_qwen3_vl(tag_tokens=TAGS, tie_word_embeddings=True, hidden_size=64, max_pixels=64 * 64)
    size = sum(weight.numel() for weight in model.parameters()) * 4
    model.save_pretrained(folder, max_shard_size=size * 2 // 3)
    processor.save_pretrained(folder)
    shards = sorted(folder.glob("model-*-of-00002.safetensors"))
    assert len(shards) == 2
    names = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert {name.split(".")[1] for name in names} == {"language_model", "visual"}  # as on the hub; no lm_head, tied
    torch.manual_seed(1)
    segmenter = Sam2Segmenter(sam2_config("sam2.1_hiera_tiny", image_size=512))
    torch.save({"model": segmenter.sam.state_dict()}, home / "MedSAM2_latest.pt")
    return folder, home / "MedSAM2_latest.pt"


def test_medvol_r1_4b_is_built_from_its_files(published):
    recipe = MEDVOL_RUN.recipes["medvol_r1_4b"]
    model, processor = recipe.build(None, str(published[0]))
    assert (type(model).__name__, model.dtype) == ("Qwen3VLForConditionalGeneration", torch.bfloat16)
    assert type(processor).__name__ == "Qwen3VLProcessor"
    files = read_json(published[0] / "model.safetensors.index.json")["weight_map"]
    name = next(key for key in files if "language_model.layers" in key)
    with safe_open(published[0] / files[name], "pt") as file:
        assert torch.equal(model.state_dict()[name], file.get_tensor(name).bfloat16())
    segmenter = recipe.segmenter(str(published[1]))
    assert segmenter.image_size == 512
    state = torch.load(published[1], weights_only=True)["model"]
    assert all(torch.equal(weight, state[name]) for name, weight in segmenter.sam.state_dict().items())


@pytest.mark.slow
def test_a_step_of_each_stage_of_medvol_r1_4b(published, tmp_path):
    data, sft, run = volumes(tmp_path / "data", ["train", "test"], 2), tmp_path / "sft", tmp_path / "run"
    flags = ("--preset", "medvol_r1_4b", "--data", data, "--segmenter", published[1])
    flags += ("--bf16", "false", "--report_to", "none", "--logging_steps", 1, "--save_strategy", "no")
    flags += ("--train_limit", 4, "--eval_limit", 1, "--dataloader_pin_memory", "false")
    # the first step of a warm-up has a learning rate of 0
    MEDVOL.done("train_sft", *flags, "--max_steps", 2, "--model", published[0], "--output_dir", sft)
    flags += ("--max_steps", 1)
    said = MEDVOL.refused("train_grpo", *flags, "--model", sft, "--lora_scope", "all", "--output_dir", run)
    assert "--lora_scope belongs to stage 1" in said
    MEDVOL.done("train_grpo", *flags, "--model", sft, "--max_completion_length", 8, "--output_dir", run)
    config = read_json(sft / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (128, 256, str(published[0]))
    adapter = load_file(sft / "adapter_model.safetensors")
    trained = {".visual." in name for name, weight in adapter.items() if "lora_B" in name and weight.any()}
    assert trained == {True, False}
    assert [read_json(folder / "segrl.json")["reasoning"] for folder in (sft, run)] == [False, True]
    (entry,) = [entry for entry in read_json(run / "log_history.json") if "reward" in entry]
    assert {"kl", "rewards/slice_format/mean", "rewards/propagated_dice/mean"} <= entry.keys()
    loaded = VolumeSegmenter.from_pretrained(run, device="cpu")
    assert (loaded.settings.reasoning, loaded.settings.slices, loaded.settings.size) == (True, 64, 256)
    results = json.loads((run / "results.json").read_text())
    assert results["config"]["grpo"]["importance_sampling_level"] == "sequence"
