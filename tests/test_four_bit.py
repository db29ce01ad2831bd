"""A base model in 4 bit (bitsandbytes, NF4) under LoRA, with a mask head in single precision."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import add_head, grpo_args, seg_bias, sft_args, tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from script_modules import Example
from sharing_runs import Watched
from trainer_checks import history, letters, logged, same, weights
from transformers import BitsAndBytesConfig

from segrl.errors import SegRLError
from segrl.heads import DenseLoss, find_mask_head
from segrl.inference import ReasoningSegmenter
from segrl.models import load_vlm
from segrl.predictions import ImagePromptSettings
from segrl.scripts.four_bit import check_four_bit
from segrl.scripts.memory import read_sizes
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 8}


def quantized() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def base(tmp_path):
    for part in tiny_model():
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def headed(base: Any) -> tuple[Any, Any]:
    """The model in 4 bit with new adapters and a new head, the same weights each time."""
    model, processor = load_vlm(str(base), quantization_config=quantized(), device_map={"": "cpu"})
    torch.manual_seed(0)
    return add_head(get_peft_model(model, LoraConfig(**LORA)), processor), processor


def four_bit_layers(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Linear4bit") and module.weight.dtype == torch.uint8
    }


def trainer_of(kind: str, base: Any, folder: Any, **settings: Any) -> Any:
    model, processor = headed(base)
    common: dict[str, Any] = {
        "processing_class": processor,
        "dense_losses": [DenseLoss("dice_ce")],
        "prompt_settings": ImagePromptSettings(instruction="Answer.", frame_kind="resized_px"),
        "train_dataset": tiny_rows(4, processor, completions=kind == "sft"),
    }
    if kind == "sft":
        return SegSFTTrainer(model, sft_args(folder, **settings), **common)
    settings = {"generation_kwargs": seg_bias(processor), **settings}
    return SegGRPOTrainer(model, [letters, "format"], grpo_args(folder, **settings), **common)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_layers_are_not_packed_for_inference(kind, base, tmp_path, monkeypatch):
    """As on processors with AVX512-BF16, where a pass without gradients packs the weights of the next with them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = trainer_of(kind, base, tmp_path).model
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(module.support_avx512bf16_for_cpu for module in layers)
    before = four_bit_layers(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
    assert same(four_bit_layers(model), before)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_train_save_resume_merge(kind, base, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(kind, base, tmp_path / "whole", **saving)
    frozen = four_bit_layers(whole.model)
    assert len(frozen) >= 10
    before = weights(whole.model)
    whole.train()
    head = find_mask_head(whole.model)
    assert head is not None
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert all(loss > 0 for loss in logged(whole, "dense/dice_ce"))
    assert same(frozen, four_bit_layers(whole.model))
    changed = {name for name, value in weights(whole.model).items() if not torch.equal(value, before[name])}
    assert any("lora_" in name for name in changed)
    assert any("mask_head.adapter" in name for name in changed)
    assert all("lora_" in name or "mask_head" in name for name in changed)

    half = trainer_of(kind, base, tmp_path / "whole", **saving)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(half)[-2]["loss"] == history(whole)[-2]["loss"]
    assert same(weights(half.model), weights(whole.model))

    whole.save_model(str(tmp_path / "saved"))
    whole.processing_class.save_pretrained(tmp_path / "saved")
    image, question = tiny_rows(1, whole.processing_class)[0]["image"], "Where is the cyst?"
    answers = []
    for merge in (False, True):  # onto the base in full precision, and folded into it
        loaded = ReasoningSegmenter.from_pretrained(tmp_path / "saved", device="cpu", merge=merge)
        assert not four_bit_layers(loaded.model)
        answers.append(loaded.predict(image, question, max_new_tokens=4).text)
    assert answers[0] == answers[1]
    again = ReasoningSegmenter.from_pretrained(
        tmp_path / "saved", device="cpu", quantization_config=quantized(), device_map={"": "cpu"}
    )
    assert same(four_bit_layers(again.model), frozen)


def test_shared_prompts(base, tmp_path):
    """As without sharing, with fewer tokens."""
    found = []
    for share in (True, False):
        model, processor = headed(base)
        trainer: Any = Watched(
            model,
            [letters, "format"],
            grpo_args(tmp_path, share_prompt=share, max_steps=1, generation_kwargs=seg_bias(processor)),
            train_dataset=tiny_rows(4, processor, completions=False),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        assert trainer._shares is share
        trainer.train()
        found.append(trainer)
    one, other = (history(trainer)[0] for trainer in found)
    for name in ("loss", "grad_norm", "dense/dice_ce", "policy"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)
    assert sum(found[0].tokens("loss")) < 0.75 * sum(found[1].tokens("loss"))


def test_estimated_memory_counts_packed_weights_and_their_scales(base):
    model, _ = load_vlm(str(base), quantization_config=quantized(), device_map={"": "cpu"})
    plain, _ = load_vlm(str(base))
    packed = four_bit_layers(model)
    layers: dict[str, Any] = {name: module for name, module in plain.named_modules() if name in packed}
    args = grpo_args("run", num_generations=4)
    sizes = [read_sizes(one, args, prompt=9, answer=9, shares_prompt=True).weights for one in (model, plain)]
    whole = sum(4 * layer.weight.numel() for layer in layers.values())
    four = sum(layer.weight.numel() / 2 + 4 * layer.weight.numel() / 64 for layer in layers.values())
    assert sizes[1] - sizes[0] == pytest.approx(whole - four, rel=0.01)


def test_what_cannot_be_loaded_in_4_bit(tmp_path):
    said = Example("core_seg").refused("train_sft", "--load_in_4bit", "--output_dir", tmp_path / "run")
    assert "--load_in_4bit: preset tiny trains all weights" in said
    with pytest.raises(SegRLError, match=r"`build` of preset own takes no \*\*loading"):
        check_four_bit(SimpleNamespace(lora={"r": 4}, build=lambda rows, model: None), "own")
