"""`<seg>` on a volume: its state prompts SAM 2 on the named slice, and the mask is propagated through the volume."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import add_head, grpo_args, sft_args, tiny_model, tiny_segmenter
from trainer_checks import Collect, logged, same, weights, written_rollout

from segrl.data import make_synthetic_volumes, prepare_volumes
from segrl.heads import DenseLoss
from segrl.inference import VolumeSegmenter
from segrl.predictions import VolumePromptSettings
from segrl.rewards import make_reward
from segrl.segmenters import VolumePropagator
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer

SETTINGS = VolumePromptSettings(
    slices=4, size=32, frame_kind="original_px", instruction="", seg_token="<seg>", max_new_tokens=90
)
TERMS = [DenseLoss("dice_ce")]
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return make_synthetic_volumes(4, tmp_path_factory.mktemp("volumes"), depth=8, size=32)


def headed_model() -> Any:
    torch.manual_seed(0)
    model, processor = tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32)
    return add_head(model, processor), processor


@pytest.mark.slow
def test_both_stages_train_the_head_on_the_named_slice(volumes, tmp_path):
    model, processor = headed_model()
    rows = prepare_volumes(volumes, processor, SETTINGS, completions=True, brief=True)
    assert rows[0]["completion"][0]["content"].endswith("<seg></answer>")
    args = sft_args(tmp_path / "sft", max_steps=40, max_length=None, learning_rate=3e-3)
    common: dict[str, Any] = {"processing_class": processor, "prompt_settings": SETTINGS, "dense_losses": TERMS}
    stage1 = SegSFTTrainer(model, args, train_dataset=rows, **common)
    stage1.train()
    dense = logged(stage1, "dense/dice_ce")
    assert sum(dense[-5:]) < 0.9 * sum(dense[:5])

    questions = prepare_volumes(volumes, processor, SETTINGS, completions=False)
    named = '<think>a</think><answer>{"slice": 2, "bbox_2d_list": [[4, 4, 20, 20]]}<seg></answer>'
    silent = "<think>a</think><answer>{}<seg></answer>"
    seen = Collect()
    stage2: Any = SegGRPOTrainer(
        stage1.model,
        ["slice_visibility", make_reward("propagated_dice", delta=2), seen],
        grpo_args(tmp_path / "grpo", max_steps=1),
        train_dataset=questions,
        propagator=VolumePropagator(tiny_segmenter(), reach=2),
        rollout_func=written_rollout([named, silent, named, "nothing"]),
        **common,
    )
    before = weights(stage2.model.mask_head.adapter)
    stage2.train()
    assert not same(weights(stage2.model.mask_head.adapter), before)
    first = stage2.state.log_history[0]
    assert {"rollout/dice", "rollout/valid", "rollout/fail", "rollout/encoded_slices"} <= set(first)
    assert first["dense/dice_ce"] > 0
    for prediction in seen.joined("prediction"):
        touched = np.flatnonzero(prediction.mask.any(axis=(1, 2))) if prediction.mask is not None else []
        if prediction.slice_index is None:
            assert len(touched) == 0
        else:
            assert prediction.slice_index == 2
            assert all(abs(index - 2) <= 2 for index in touched)
    stage2.save_model()
    again: Any = VolumeSegmenter.from_pretrained(tmp_path / "grpo", device="cpu", segmenter=tiny_segmenter())
    assert again.settings == SETTINGS.for_rows(questions)
    assert again.predict(volumes[0]["scan"], volumes[0]["query"]).mask.shape == (8, 32, 32)
