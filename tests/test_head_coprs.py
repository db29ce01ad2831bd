"""A heatmap as prior of the mask, supervised on its own: the idea of CoPRS (arXiv:2510.11173), from public names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import grpo_args, seg_bias, sft_args, tiny_model, tiny_rows, tiny_segmenter
from torch import nn
from trainer_checks import logged

from segrl.heads import DenseLoss, MaskHead, attach_mask_head
from segrl.losses import dice_ce
from segrl.models import seg_token_id
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer


class HeatmapAdapter(nn.Module):
    """The state of `<seg>` is a query that looks for its place in the image's features."""

    def __init__(self, input_dim, prompt_dim, *, feature_dim=32):
        super().__init__()
        self.settings = {"input_dim": input_dim, "prompt_dim": prompt_dim, "feature_dim": feature_dim}
        self.query = nn.Linear(input_dim, feature_dim)
        self.keys = nn.Conv2d(feature_dim, feature_dim, 1)
        self.prompt = nn.Linear(feature_dim, prompt_dim)

    def forward(self, states, state_mask, *, features, index):
        query = self.query(states[:, 0])
        fine = features.tensors[-1]  # stride 4, as the masks
        heat = torch.einsum("nc,nchw->nhw", F.normalize(query, dim=1) * 4, self.keys(fine)[index])
        return self.prompt(query)[:, None], {"heatmap": heat, "mask_prompt": heat[:, None]}

    def to_config(self):
        return dict(self.settings)


TERMS = [DenseLoss("dice_ce"), DenseLoss("heatmap", weight=0.5, fn=dice_ce, on="heatmap")]


def headed_model() -> Any:
    torch.manual_seed(0)
    model, processor = tiny_model()
    head = MaskHead.build(model, tiny_segmenter(), token_id=seg_token_id(processor), adapter=HeatmapAdapter)
    return attach_mask_head(model, head), processor, head


@pytest.mark.slow
def test_sft_trains_heatmap_and_mask(tmp_path):
    model, processor, head = headed_model()
    args = sft_args(tmp_path, max_steps=30, learning_rate=3e-3, max_length=None)
    rows = tiny_rows(8, processor)
    trainer = SegSFTTrainer(model, args, train_dataset=rows, processing_class=processor, dense_losses=TERMS)
    trainer.train()
    for name in ("dense/heatmap", "dense/dice_ce"):
        values = logged(trainer, name)
        assert sum(values[-5:]) < 0.9 * sum(values[:5])
    head.save_pretrained(tmp_path / "head")
    again = MaskHead.from_pretrained(tmp_path / "head").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in head.state_dict().items())


def test_grpo_trains_it_with_shared_prompts(tmp_path):
    values = {}
    for share in (True, False):
        model, processor, head = headed_model()
        keys = head.adapter.keys.weight.detach().clone()
        args = grpo_args(tmp_path, share_prompt=share, generation_kwargs=seg_bias(processor))
        rows = tiny_rows(4, processor, completions=False)
        trainer = SegGRPOTrainer(
            model, ["format", "mask_dice"], args, train_dataset=rows, processing_class=processor, dense_losses=TERMS
        )
        trainer.train()
        assert not torch.equal(head.adapter.keys.weight, keys)
        values[share] = logged(trainer, "dense/heatmap", "dense/dice_ce")
    assert all(value > 0 for value in values[True])
    assert values[True] == pytest.approx(values[False], rel=1e-3)
