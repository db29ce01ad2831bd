"""Whole runs for the tests of shared prompts: what a run did, and one run compared with another."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from builders import add_head, grpo_args, seg_bias, tiny_rows
from sharing_checks import build
from trainer_checks import Collect, Gradients, history, letters, text_rows, weights

from segrl.heads import DenseLoss, attach_mask_head, detach_mask_head
from segrl.models import base_instance
from segrl.trainers import SegGRPOTrainer


class Watched(SegGRPOTrainer):
    """The trainer, which keeps what its micro-batches were and what its language model computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.collect: Any = None
        self.kept: Any = None
        self.batches: list[dict[str, Any]] = []
        self.passes: list[tuple[str, int]] = []  # what for, and tokens
        self.states: list[torch.Tensor] = []
        self._now = "generate"
        super().__init__(*args, **kwargs)
        decoder = base_instance(self.accelerator.unwrap_model(self.model)).get_decoder()
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        values = kwargs.get("inputs_embeds")
        self.passes.append((self._now, (kwargs["input_ids"] if values is None else values[..., 0]).numel()))

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self._now = "loss" if torch.is_grad_enabled() else "score"
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            self._now = "generate"

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)

    def _calculate_rewards(self, *args: Any) -> Any:
        rewards = super()._calculate_rewards(*args)
        completions = None if self._rollout is None else self._rollout.completions
        if completions is not None and completions.states is not None:
            self.states.append(completions.states)
        return rewards

    def tokens(self, what: str) -> list[int]:
        return [tokens for kind, tokens in self.passes if kind == what]

    def all_tokens(self) -> int:
        return sum(tokens for _, tokens in self.passes)


def saved(model: Any, folder: Any) -> Any:
    """`model`, able to be loaded again as TRL's reference model, which is another one than the policy."""
    head = detach_mask_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    other.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    if head is not None:
        attach_mask_head(model, head)
    return model


def run(folder: Any, kind: str = "qwen2_5_vl", *, share: bool = True, head: bool = True, **settings: Any) -> Any:
    """A trained trainer with `kept` gradients and `collect`ed rewards."""
    rows, arguments = settings.pop("rows", None), settings.pop("arguments", {})
    model, processor = settings.pop("model", None) or build(kind)
    head = head and kind != "text"
    if head:
        add_head(model, processor)
    if settings.get("beta") and "peft_config" not in arguments:
        saved(model, folder / "reference")
    collect, kept = Collect(settings.pop("score", letters)), Gradients()
    if rows is None:
        rows = text_rows(4) if kind == "text" else tiny_rows(4, processor, completions=False)
    defaults = {"share_prompt": share, "optim": "sgd", "max_grad_norm": 0.0, "generation_kwargs": seg_bias(processor)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="share_prompt")
        trainer = Watched(
            model,
            [collect, "format"] if head else [collect],
            grpo_args(folder, **{**defaults, **settings}),
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")] if head else None,
            callbacks=[kept],
            **arguments,
        )
    trainer.collect, trainer.kept = collect, kept
    assert trainer._shares is share
    trainer.train()
    return trainer


def norm(values: Any) -> float:
    return torch.stack([value.float().norm() for value in values]).norm().item()


def same_runs(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    """Assert that two runs wrote the same texts and masks, and had the same states, logs, gradients and weights."""
    assert one.collect.joined("completion_ids") == other.collect.joined("completion_ids")
    if "prediction" in one.collect.calls[0]:
        masks = [[p.mask for p in trainer.collect.joined("prediction")] for trainer in (one, other)]
        assert any(mask is not None for mask in masks[0])
        for mine, yours in zip(*masks, strict=True):
            assert (mine is None) is (yours is None)
            assert mine is None or np.mean(mine != yours) < 0.01
    for mine, yours, call in zip(one.states, other.states, one.collect.calls, strict=False):
        for row, ids in enumerate(call["completion_ids"]):  # what was fed back; a tool's or hidden text has no states
            torch.testing.assert_close(mine[row, : len(ids) - 1], yours[row, : len(ids) - 1], rtol=1e-3, atol=1e-3)
    assert len(one.states) == len(other.states)
    alone = one.args.steps_per_generation == 1  # else means over micro-batches depend on which rows they hold
    for mine, yours in zip(history(one), history(other), strict=True):
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            if alone or not name.startswith(("mask/", "entropy")):
                assert yours[name] == pytest.approx(value, rel=1e-3, abs=2e-4), name
    for mine, yours in zip(one.kept.steps, other.kept.steps, strict=True):
        assert mine.keys() == yours.keys()
        whole = norm(yours.values())
        assert whole > 1e-3
        for name, gradient in yours.items():
            difference = (mine[name] - gradient).norm().item()
            assert difference <= tolerance * max(gradient.norm().item(), 0.05 * whole), (name, difference)
    mine, yours = weights(one.model), weights(other.model)
    for name, value in yours.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
