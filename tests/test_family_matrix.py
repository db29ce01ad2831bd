"""Eleven families of models with a mask head, SFT and GRPO: those that can share prompts do, with the values of
`share_prompt=False`; the others train as in TRL, with one warning that says why.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from builders import add_head, grpo_args, seg_bias, sft_args
from datasets import Dataset
from family_models import ALL, BUILDERS, family_model
from marks import sampled
from sharing_runs import Watched, same_runs
from trainer_checks import Collect, Gradients, history, letters, logged, weights
from transformers import LlavaForConditionalGeneration
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl.data import make_synthetic, prepare
from segrl.heads import DenseLoss, detach_mask_head
from segrl.models import backbone_of
from segrl.predictions import ImagePromptSettings
from segrl.sharing.support import COMPARED
from segrl.trainers import SegSFTTrainer

SETTINGS = ImagePromptSettings(instruction="Answer.", frame_kind="original_px")


@dataclass(frozen=True)
class Family:
    """Behaviour of a family with shared prompts: `reason` is in the warning, None where all is shared."""

    reason: str | None = None
    before_training: bool = False  # whether the warning comes when the trainer is made
    wide_reason: str | None = None  # the same, of images of 128 x 48 px, which become tiles
    settings: dict[str, Any] = field(default_factory=dict)  # without which it shares nothing


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(),
    "qwen3_vl": Family(),
    "qwen3_vl_moe": Family(settings={"router_aux_loss_coef": 0.0}),
    "qwen3_5": Family("layers of the types ['full_attention', 'linear_attention']", before_training=True),
    "gemma3": Family("layers of the types ['full_attention', 'sliding_attention']", before_training=True),
    "idefics3": Family("the model takes pixel_attention_mask"),
    "smolvlm": Family("the model takes pixel_attention_mask"),
    "internvl": Family(wide_reason="the model takes num_tiles"),
    "llava": Family(),
    "llava_onevision": Family("the model takes image_sizes"),
    "llava_next": Family("the model takes image_sizes"),
}


def rows_of(processor: Any, n: int = 2, size: tuple[int, int] = (64, 64), **arguments: Any) -> Any:
    """Synthetic rows, with images and masks of `size`."""
    rows: Any = make_synthetic(n, size=64)
    if size != (64, 64):
        changed = [{**row, "image": row["image"].resize(size), "mask": row["mask"].resize(size, 0)} for row in rows]
        rows = Dataset.from_list(changed, features=rows.features)
    return prepare(rows, processor, SETTINGS, brief=True, **arguments)


def grpo(
    name: str, folder: Any, share: bool | None, rows: Any = None, about: str = "share_prompt", **settings: Any
) -> tuple[Any, list[Any]]:
    """A trained trainer, and the warnings about a setting: how many had come before training, and all texts."""
    model, processor = family_model(name)
    add_head(model, processor)
    rows = rows_of(processor, completions=False) if rows is None else rows(processor)
    collect, kept = Collect(letters), Gradients()
    own = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    own |= FAMILIES[name].settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer: Any = Watched(
            model,
            [collect, "format"],
            grpo_args(folder, share_prompt=share, generation_kwargs=_bias(processor), **{**own, **settings}),
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
            prompt_settings=SETTINGS,
            callbacks=[kept],
        )
        early = sum(about in str(warning.message) for warning in caught)
        trainer.collect, trainer.kept = collect, kept
        trainer.train()
    return trainer, [early, *(str(warning.message) for warning in caught if about in str(warning.message))]


def _bias(processor: Any) -> dict[str, Any]:
    """As `seg_bias`, for placeholders of any family."""
    bias, special = seg_bias(processor), processor.tokenizer.added_tokens_decoder
    ends = {processor.tokenizer.eos_token_id, *(item[0][0] for item in bias["sequence_bias"])}
    bias["suppress_tokens"] = [n for n, token in special.items() if token.special and n not in ends]
    return bias


def test_every_family():
    assert set(FAMILIES) == set(ALL)
    shared = {type(family_model(name)[0]).__name__ for name, family in FAMILIES.items() if family.reason is None}
    assert shared == set(COMPARED)


@pytest.mark.parametrize("name", sampled(FAMILIES))
def test_grpo(name, tmp_path):
    family = FAMILIES[name]
    shared, told = grpo(name, tmp_path, None)
    dense, quiet = grpo(name, tmp_path, False)
    assert quiet == [0]
    assert any(loss > 0 for loss in logged(shared, "dense/dice_ce"))
    assert any("mask_head" in key and value.any() for key, value in shared.kept.steps[0].items())
    if family.reason is None:
        assert told == [0]
        same_runs(shared, dense)
        assert 0 < sum(shared.tokens("loss")) < 0.75 * sum(dense.tokens("loss"))
        assert sum(shared.tokens("generate")) < sum(dense.tokens("generate"))
        return
    assert told[0] == family.before_training
    (text,) = told[1:]
    assert family.reason in text
    assert history(shared) == history(dense)
    assert all(torch.equal(value, weights(dense.model)[key]) for key, value in weights(shared.model).items())


@pytest.mark.slow
@pytest.mark.long
def test_a_routers_loss_counts_tokens(tmp_path):
    """TRL trains it by default where a model has it; then nothing is shared."""
    shared, told = grpo("qwen3_vl_moe", tmp_path, None, router_aux_loss_coef=0.001)
    dense, _ = grpo("qwen3_vl_moe", tmp_path, False, router_aux_loss_coef=0.001)
    assert told[0] == 1
    assert "router_aux_loss_coef=0 leaves it out" in told[1]
    assert history(shared) == history(dense)


class Mixing(LlavaForConditionalGeneration):
    """A model that mixes its images with everything in a row, which a trial with texts cannot see."""

    shown = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.register_forward_pre_hook(self._look, with_kwargs=True)
        self.model.language_model.register_forward_pre_hook(self._mix, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.shown = kwargs.get("pixel_values") is not None

    def _mix(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.shown:
            states = kwargs["inputs_embeds"]
            kwargs["inputs_embeds"] = states + states.mean(1, keepdim=True)
        return args, kwargs


@pytest.mark.slow
def test_wrong_scores_are_noticed_on_the_first_real_batch(tmp_path, monkeypatch):
    model, _ = family_model("llava")
    monkeypatch.setitem(BUILDERS, "mixing", lambda: (Mixing, model.config, family_model("llava")[1]))
    monkeypatch.setitem(FAMILIES, "mixing", Family())
    shared, told = grpo("mixing", tmp_path, None)
    dense, _ = grpo("mixing", tmp_path, False)
    assert told[0] == 0
    (text,) = told[1:]
    assert "the first batch did not go through packed: RuntimeError: log-probabilities of Mixing differ by" in text
    assert shared.kept.steps[0].keys() == dense.kept.steps[0].keys()
    assert shared.tokens("loss")[-1] == dense.tokens("loss")[-1]


class Narrow(LlavaForConditionalGeneration):
    """A model that takes rows of up to `limit` tokens."""

    limit = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (tokens := kwargs["inputs_embeds"].size(1)) > self.limit:
            raise ValueError(f"{tokens} tokens, at most {self.limit}")


@pytest.mark.slow
@pytest.mark.long
def test_a_batch_that_outgrows_what_went_through(tmp_path, monkeypatch):
    """The first rollout is short enough for a packed row, the second is not: it is computed as in TRL."""
    config, processor = family_model("llava")[0].config, family_model("llava")[1]
    monkeypatch.setitem(BUILDERS, "narrow", lambda: (Narrow, config, processor))
    monkeypatch.setitem(FAMILIES, "narrow", Family())
    short = rows_of(processor, 1, completions=False)[0]
    question = short["prompt"][0]["content"]
    long = {**short, "prompt": [{"role": "user", "content": question + " and where is the lesion" * 12}]}

    def rows(processor: Any) -> Any:
        return Dataset.from_list([short, long], features=rows_of(processor, 1, completions=False).features)

    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "num_generations": 2, "shuffle_dataset": False}
    Narrow.limit = 10_000
    free, told = grpo("narrow", tmp_path, None, rows, **settings)
    assert told == [0]
    first, second = free.tokens("loss")[0], free.tokens("loss")[-1]
    alone = max(batch["prompt_ids"].size(1) + batch["completion_ids"].size(1) for batch in free.batches)
    assert max(first, alone) < second
    Narrow.limit = max(first, alone)
    bound, told = grpo("narrow", tmp_path, None, rows, **settings)
    (text,) = told[1:]
    assert "the larger batch did not go through packed: ValueError:" in text
    same_runs(bound, free)


@pytest.mark.parametrize("name", sampled(["gemma3", "qwen3_5"]))
def test_layers_that_cannot_be_compiled(name, tmp_path):
    """They run as they are, with one warning."""
    plain, _ = grpo(name, tmp_path, False)
    asked, told = grpo(name, tmp_path, False, about="compile_layers", compile_layers=True)
    (text,) = told[1:]
    assert "only full_attention can be compiled. The layers run uncompiled" in text
    assert history(asked) == history(plain)
    assert all(torch.equal(value, weights(plain.model)[key]) for key, value in weights(asked.model).items())


@pytest.mark.parametrize("name", sampled(FAMILIES))
def test_sft(name, tmp_path):
    """The text loss is that of TRL's trainer, and the head learns beside it."""
    model, processor = family_model(name)
    rows = rows_of(processor, 4, completions=True)
    plain = SFTTrainer(
        model, sft_args(tmp_path, SFTConfig, max_steps=1), train_dataset=rows, processing_class=processor
    )
    plain.train()
    model, _ = family_model(name)
    kept = Gradients()
    trainer = SegSFTTrainer(
        add_head(model, processor),
        sft_args(tmp_path, max_steps=1),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        prompt_settings=SETTINGS,
        callbacks=[kept],
    )
    trainer.train()
    (log, _), (expected, _) = history(trainer), history(plain)
    assert log["text"] == pytest.approx(expected["loss"], rel=1e-5)
    assert log["dense/dice_ce"] > 0
    assert any("mask_head" in key and value.any() for key, value in kept.steps[0].items())
    detach_mask_head(model)


@pytest.mark.parametrize("name", sampled(FAMILIES))
def test_wide_images(name, tmp_path):
    """Some families cut these into tiles, which cannot be told apart by row."""
    family = FAMILIES[name]
    reason = family.reason or family.wide_reason
    shared, told = grpo(name, tmp_path, None, wide_rows)
    dense, _ = grpo(name, tmp_path, False, wide_rows)
    same_runs(shared, dense)
    if reason is not None:
        (text,) = told[1:]
        assert reason in text
    else:
        assert told == [0]


def wide_rows(processor: Any) -> Any:
    return rows_of(processor, 2, (128, 48), completions=False)


@pytest.mark.slow
@pytest.mark.long
def test_images_that_become_tiles_later(tmp_path):
    """The first rollout shares, the second shows images of another shape: it is computed as in TRL, with a warning."""

    def rows(processor: Any) -> Any:
        small, wide = rows_of(processor, 1, completions=False), rows_of(processor, 1, (128, 48), completions=False)
        return Dataset.from_list([small[0], wide[0]], features=small.features)

    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "shuffle_dataset": False}
    shared, told = grpo("internvl", tmp_path, None, rows, **settings)
    dense, _ = grpo("internvl", tmp_path, False, rows, **settings)
    same_runs(shared, dense)
    (text,) = told[1:]
    assert "the model takes num_tiles" in text
    mine, yours = shared.tokens("loss"), dense.tokens("loss")
    assert mine[0] < yours[0]
    assert mine[1] == yours[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reason is None])
def test_a_frozen_tower_encodes_an_image_once(name, tmp_path):
    """In generation, scoring and loss, counted by the tower's own calls."""
    model, processor = family_model(name)
    add_head(model, processor)
    decoder = model.get_decoder()
    for key, parameter in model.named_parameters():
        own = any(parameter is other for other in [*decoder.parameters(), *model.lm_head.parameters()])
        parameter.requires_grad_(own or "mask_head" in key)
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "num_iterations": 2, **FAMILIES[name].settings}
    args = grpo_args(tmp_path, generation_kwargs=_bias(processor), **settings)
    trainer: Any = Watched(
        model,
        [letters, "format"],
        args,
        train_dataset=rows_of(processor, completions=False),
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        prompt_settings=SETTINGS,
    )
    trainer.train()
    once: Any = backbone_of(model).get_image_features
    assert once.frozen
    assert once.encoded_images == 2
