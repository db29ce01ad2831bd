"""A model that something casts as a whole, such as an engine for bfloat16: masks, training steps and files."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import grpo_args, seg_bias, sft_args, tiny_headed_model, tiny_rows, tiny_segmenter
from PIL import Image

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOTrainer, SegSFTTrainer
from segrl.heads.requests import SegInput
from segrl.segmenters import PropagationRequest, VolumePropagator

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapter", ["semantic_guided", "linear", "mlp"])
def test_masks_are_close_to_those_of_float32(adapter, dtype):
    model, _ = tiny_headed_model(adapter=adapter)
    head: Any = model.mask_head
    torch.manual_seed(0)
    states, valid, pixels = torch.randn(3, 1, 64), torch.ones(3, 1, dtype=torch.bool), torch.rand(3, 64, 64)
    expected = head(states, valid, [SegInput(pixels)] * 3).detach()
    model.to(dtype)
    logits = head(states.to(dtype), valid, [SegInput(pixels)] * 3)
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7]])
    features, index = head.features([SegInput(pixels)])
    assert head.segmenter.decode_boxes(features, boxes, index).dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_the_position_encoding_keeps_its_values(dtype):
    segmenter = tiny_segmenter()
    before = segmenter.sam.sam_prompt_encoder.get_dense_pe()
    torch.nn.Sequential(segmenter).to(dtype)
    assert torch.equal(segmenter.sam.sam_prompt_encoder.get_dense_pe(), before)


@pytest.mark.parametrize("prompt", ["boxes", "mask"])
def test_boxes_and_masks_through_a_volume(prompt):
    volume, mask = np.full((4, 64, 64), 90, np.uint8), np.zeros((64, 64), dtype=bool)
    volume[:, 12:44, 10:40], mask[12:44, 10:40] = 200, True
    given: dict[str, Any] = {"mask": mask} if prompt == "mask" else {"boxes": np.array([[10.0, 12, 40, 44]])}
    masks = []
    for dtype in (torch.float32, *HALF):
        propagator = VolumePropagator(tiny_segmenter().to(dtype).eval(), reach=1)
        masks += propagator([PropagationRequest(volume, "", 1, **given)])
    assert 0.1 < masks[0].mean() < 0.9
    assert max((other != masks[0]).mean() for other in masks[1:]) < 0.02


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_step_trains_the_head_and_is_saved(kind, tmp_path):
    model, processor = tiny_headed_model()
    model.bfloat16()
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = tiny_rows(4, processor, completions=kind == "sft")
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": processor, "dense_losses": [DenseLoss("dice")]}
    if kind == "sft":
        trainer: Any = SegSFTTrainer(model, sft_args(tmp_path, max_steps=2, learning_rate=1e-2), **common)
    else:
        args = grpo_args(tmp_path, max_steps=2, learning_rate=1e-2, generation_kwargs=seg_bias(processor))
        trainer = SegGRPOTrainer(model, ["format", "dual_granularity_mask"], args, **common)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["dense/dice"] <= 1
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any(name.startswith("mask_head.adapter.") for name in moved)
    trainer.save_model()
    again = ReasoningSegmenter.from_pretrained(tmp_path, device="cpu")
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in model.state_dict().items())
    again.predict(Image.new("RGB", (64, 64)), "Where is the cyst?", max_new_tokens=4)
