"""Learned query tokens behind the answer and a connector to the segmenter: the idea of LENS, from public names."""

from typing import Any

import pytest
import torch
from builders import grpo_args, seg_bias, sft_args, tiny_model, tiny_rows, tiny_segmenter
from torch import nn
from trainer_checks import logged

from segrl.heads import DenseLoss, MaskHead, QueryProbe, attach_mask_head
from segrl.inference import ReasoningSegmenter
from segrl.models import ensure_seg_token, seg_token_id
from segrl.predictions import ImagePromptSettings
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer


class Connector(nn.Module):
    """The states of the queries, each a prompt of the segmenter, after one layer of self-attention."""

    def __init__(self, input_dim, prompt_dim):
        super().__init__()
        self.settings = {"input_dim": input_dim, "prompt_dim": prompt_dim}
        self.mix = nn.TransformerEncoderLayer(input_dim, 2, 2 * input_dim, dropout=0.0, batch_first=True)
        self.out = nn.Linear(input_dim, prompt_dim)

    def forward(self, states, state_mask):
        return self.out(self.mix(states, src_key_padding_mask=~state_mask))

    def to_config(self):
        return dict(self.settings)


TERMS = [DenseLoss("dice_ce")]


def headed_model() -> Any:
    torch.manual_seed(0)
    model, processor = tiny_model()
    query = ensure_seg_token(model, processor, "<query>")
    probe = QueryProbe(seg_token_id(processor), query, 4, model.config.get_text_config().hidden_size)
    head = MaskHead.build(model, tiny_segmenter(), token_id=probe.token_id, probe=probe, adapter=Connector)
    return attach_mask_head(model, head), processor, head


@pytest.mark.slow
def test_sft_trains_the_queries_and_inference_uses_them(tmp_path):
    model, processor, head = headed_model()
    before = head.probe.queries.detach().clone()
    settings = ImagePromptSettings(instruction="Answer.", max_new_tokens=120)
    args = sft_args(tmp_path, max_steps=80, learning_rate=5e-3, max_length=None, per_device_train_batch_size=8)
    rows = tiny_rows(8, processor)
    common = {"processing_class": processor, "dense_losses": TERMS, "prompt_settings": settings}
    trainer = SegSFTTrainer(model, args, train_dataset=rows, **common)
    trainer.train()
    values = logged(trainer, "dense/dice_ce")
    assert sum(values[-5:]) < 0.9 * sum(values[:5])
    assert not torch.equal(head.probe.queries, before)
    trainer.save_model()
    asked = ReasoningSegmenter(model.eval(), processor, settings).predict_batch(rows["image"][:2], rows["query"][:2])
    again = ReasoningSegmenter.from_pretrained(tmp_path, device="cpu")
    for one, other in zip(asked, again.predict_batch(rows["image"][:2], rows["query"][:2]), strict=True):
        assert one.text == other.text
        assert one.mask is not None, one.text
        assert (one.mask == other.mask).all()


def test_grpo_trains_them_with_shared_prompts(tmp_path):
    values = {}
    for share in (True, False):
        model, processor, head = headed_model()
        queries = head.probe.queries.detach().clone()
        args = grpo_args(tmp_path, share_prompt=share, generation_kwargs=seg_bias(processor))
        rows = tiny_rows(4, processor, completions=False)
        common = {"processing_class": processor, "dense_losses": TERMS}
        trainer = SegGRPOTrainer(model, ["format", "mask_dice"], args, train_dataset=rows, **common)
        trainer.train()
        assert not torch.equal(head.probe.queries, queries)
        values[share] = logged(trainer, "dense/dice_ce", "loss", "rollout/dice")
    assert all(value > 0 for value in values[True][:2])
    assert values[True] == pytest.approx(values[False], rel=1e-3, abs=1e-5)
