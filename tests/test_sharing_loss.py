"""Log-probabilities, entropies, loss, gradients and metrics with shared prompts are those of TRL's pass."""

import warnings
from typing import Any

import pytest
import torch
from builders import FAMILIES, add_head
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from sharing_checks import (
    KINDS,
    Answer,
    Prompt,
    attention,
    batch_of,
    build,
    cases,
    checkpointed,
    close,
    computed,
    counted,
    dense,
    headed_trainer,
    loss_and_gradients,
    make_trainer,
    same_step,
    scores,
    three_prompts,
)

from segrl.heads import DenseLoss

few = settings(max_examples=15)
ROWS = [Answer(0, 5, 1), Answer(1, 3, 2), Answer(0, 9, 8), Answer(1, 0), Answer(0, 1), Answer(2, 4)]


@pytest.mark.parametrize("kind", KINDS)
class TestEqualsTrl:
    @pytest.mark.slow
    def test_any_rows(self, kind, tmp_path):
        """With a mask head where there are pictures, and the reference's term."""
        text = kind == "text"
        trainer = make_trainer(*build(kind), tmp_path) if text else headed_trainer(kind, tmp_path)
        trainer.beta = 0.1
        seen = []

        @few
        @given(cases(kind))
        def check(case):
            prompts, answers, seed = case
            batch = batch_of(trainer.processing_class, prompts, answers, seed=seed, head=trainer.mask_head)
            found = same_step(trainer, batch)
            seen.append(any(g.any() for name, g in found.items() if name.startswith("mask_head.adapter.")))

        check()
        assert any(seen) or text
        assert trainer._prompt_keys is None  # what is scored next has keys of its own, or none

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
    def test_scores_in_parts(self, kind, size, tmp_path):
        """As in the old-log-prob pass: parts that hold a whole group, some of it, or rows of several."""
        model, processor = build(kind)
        trainer = make_trainer(model, processor, tmp_path)
        rows = [Answer(n // 3, length) for n, length in enumerate([3, 5, 1, 2, 2, 0, 6, 3, 4])]
        batch = batch_of(processor, three_prompts(kind), rows)
        expected = scores(trainer, batch, shared=False)
        with counted(trainer) as tokens:
            found = scores(trainer, batch, shared=True, batch_size=size)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        keys, widths = batch["prompt_keys"], batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
        parts = [range(start, min(start + size, 9)) for start in range(0, 9, size)]
        lengths = batch["completion_mask"].sum(1)
        assert tokens == [
            len(part) * widths
            if len({keys[row] for row in part}) == len(part)
            else sum(len(key.tokens) for key in {keys[row] for row in part}) + int(lengths[list(part)].sum())
            for part in parts
        ]

    def test_no_entropies_when_none_are_asked_for(self, kind, tmp_path):
        model, processor = build(kind)
        trainer = make_trainer(model, processor, tmp_path)
        batch = batch_of(processor, three_prompts(kind), ROWS)
        logps, entropies = scores(trainer, batch, shared=True, compute_entropy=False)
        assert entropies is None
        torch.testing.assert_close(logps, scores(trainer, batch, shared=False)[0], rtol=1e-5, atol=1e-5)

    def test_groups_of_one_are_trls_bit_for_bit(self, kind, tmp_path):
        model, processor = build(kind)
        trainer = make_trainer(model, processor, tmp_path)
        batch = batch_of(processor, three_prompts(kind), [Answer(2, 3), Answer(0, 5), Answer(1, 2)])
        loss, found, logged = loss_and_gradients(trainer, batch)
        expected, wanted, also = loss_and_gradients(trainer, dense(batch))
        assert torch.equal(loss, expected)
        assert logged == also
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())

    def test_share_prompt_off_is_trl_bit_for_bit(self, kind, tmp_path):
        results = []
        for share in (False, True):
            model, processor = build(kind)
            trainer = make_trainer(model, processor, tmp_path, settings={"share_prompt": share})
            batch = batch_of(processor, three_prompts(kind), ROWS)
            results.append(loss_and_gradients(trainer, dense(batch)))
            assert trainer._shares is share
            if not share:  # keys change nothing
                again = loss_and_gradients(trainer, batch)
                assert torch.equal(results[0][0], again[0])
        (loss, found, logged), (expected, wanted, also) = results
        assert torch.equal(loss, expected)
        assert logged == also
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())

    def test_eager_attention(self, kind, tmp_path):
        model, processor = build(kind)
        trainer = make_trainer(attention(model, "eager"), processor, tmp_path)
        same_step(trainer, batch_of(processor, three_prompts(kind), ROWS))

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(self, kind, reentrant, tmp_path):
        model, processor = build(kind)
        trainer = make_trainer(model, processor, tmp_path)
        batch = batch_of(processor, three_prompts(kind), ROWS)
        _, wanted, _ = loss_and_gradients(trainer, batch)
        checkpointed(model, reentrant)
        assert model.is_gradient_checkpointing
        with counted(trainer) as tokens:
            _, found, _ = loss_and_gradients(trainer, batch)
        assert tokens == [computed(batch)]
        for name, gradient in wanted.items():
            close(found[name], gradient, scale=1e-3)
        same_step(trainer, batch)

    def test_bfloat16(self, kind, tmp_path):
        """Half precision is as far from single precision with shared prompts as without."""
        model, processor = build(kind)
        batch = batch_of(processor, three_prompts(kind), ROWS)
        exact = scores(make_trainer(model, processor, tmp_path), batch, shared=False)
        trainer = make_trainer(model.to(torch.bfloat16), processor, tmp_path)
        assert trainer._shares
        apart, together = (scores(trainer, batch, shared=shared) for shared in (False, True))
        for true, one, other in zip(exact, apart, together, strict=True):
            assert (other - true).norm() <= 1.5 * (one - true).norm() + 1e-3
        loss, found, _ = loss_and_gradients(trainer, batch)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found.values())

    def test_autocast(self, kind, tmp_path):
        model, processor = build(kind)
        trainer = make_trainer(model, processor, tmp_path, settings={"bf16": True})
        batch = batch_of(processor, three_prompts(kind), ROWS)
        exact = scores(trainer, batch, shared=False)
        found = scores(trainer, batch, shared=True)
        plain, processor = build(kind)
        single = scores(make_trainer(plain, processor, tmp_path), batch, shared=True)
        for one, other, full in zip(found, exact, single, strict=True):
            torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
            assert not torch.allclose(one, full, rtol=1e-5, atol=1e-5)  # it was in half precision


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
@pytest.mark.parametrize("kind", ["llava", "text"])
def test_flex_attention(kind, tmp_path):
    """Where transformers allows it; the CPU has no gradients for it."""
    model, processor = build(kind)
    trainer = make_trainer(attention(model, "flex_attention"), processor, tmp_path)
    assert trainer._shares
    batch = batch_of(processor, three_prompts(kind), ROWS)
    expected = scores(trainer, batch, shared=False)
    with counted(trainer) as tokens:
        found = scores(trainer, batch, shared=True)
    assert tokens == [computed(batch)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("text", False), ("llava", False), *((kind, True) for kind in FAMILIES)])
def test_lora(kind, head, tmp_path):
    """Gradients of adapters, and the reference pass with adapters off, also while the policy's features are kept."""
    model, processor = build(kind)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    wrapped = get_peft_model(add_head(model, processor) if head else model, config)
    losses = [DenseLoss("dice_ce")] if head else None
    trainer = make_trainer(wrapped, processor, tmp_path, dense_losses=losses)
    batch = batch_of(processor, three_prompts(kind), ROWS, head=trainer.mask_head)
    found = same_step(trainer, batch)
    assert any("lora_A" in name for name in found)
    with trainer.model.disable_adapter():
        off = [scores(trainer, batch, shared=shared)[0] for shared in (False, True)]
    torch.testing.assert_close(off[1], off[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(off[1], scores(trainer, batch, shared=True)[0], atol=1e-3)
    same_step(trainer, batch)


@pytest.mark.parametrize("family", FAMILIES)
class TestPictures:
    def trainer(self, family, tmp_path) -> Any:
        model, processor = build(family)
        return make_trainer(model, processor, tmp_path), processor

    def test_same_words_other_pictures(self, family, tmp_path):
        """Pictures 0 and 4 have one size, so that nothing but their content tells the prompts apart."""
        trainer, processor = self.trainer(family, tmp_path)
        rows = [Answer(0, 3), Answer(1, 4), Answer(0, 2), Answer(1, 3)]
        batch = batch_of(processor, [Prompt(3, (0,)), Prompt(3, (4,))], rows)
        assert batch["prompt_keys"][0].tokens == batch["prompt_keys"][1].tokens
        same_step(trainer, batch)
        swapped = batch_of(processor, [Prompt(3, (0,)), Prompt(3, (0,))], rows)
        one, other = (scores(trainer, each, shared=True)[0] for each in (batch, swapped))
        assert torch.allclose(one[0], other[0], atol=1e-5)
        assert not torch.allclose(one[1], other[1], atol=1e-3)

    def test_order_of_pictures(self, family, tmp_path):
        trainer, processor = self.trainer(family, tmp_path)
        rows = [Answer(0, 3), Answer(1, 4), Answer(0, 2), Answer(1, 3)]
        same_step(trainer, batch_of(processor, [Prompt(3, (0, 4)), Prompt(3, (4, 0))], rows))

    @pytest.mark.slow
    def test_64_slices(self, family, tmp_path):
        trainer, processor = self.trainer(family, tmp_path)
        same_step(trainer, batch_of(processor, [Prompt(3, tuple(range(64)))], [Answer(0, 3), Answer(0, 5)]))

    @pytest.mark.parametrize("size", [None, 2])
    def test_rows_without_pictures(self, family, size, tmp_path):
        trainer, processor = self.trainer(family, tmp_path)
        rows = [Answer(1, 3), Answer(1, 4), Answer(0, 2), Answer(0, 3), Answer(2, 1), Answer(1, 3)]
        batch = batch_of(processor, [Prompt(3, (0, 1)), Prompt(5), Prompt(2)], rows)
        same_step(trainer, batch)
        expected = scores(trainer, batch, shared=False)
        for one, other in zip(scores(trainer, batch, shared=True, batch_size=size), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_pad_to_a_multiple(self, family, tmp_path):
        trainer, processor = self.trainer(family, tmp_path)
        batch = batch_of(processor, three_prompts(family), ROWS)
        pad, sides = torch.nn.functional.pad, {"prompt": (5, 0), "completion": (0, 3)}
        for part, side in sides.items():
            batch[f"{part}_ids"] = pad(batch[f"{part}_ids"], side, value=processor.tokenizer.pad_token_id)
            batch[f"{part}_mask"] = pad(batch[f"{part}_mask"], side)
        if "mm_token_type_ids" in batch:
            batch["mm_token_type_ids"] = pad(batch["mm_token_type_ids"], (5, 3))
        same_step(trainer, batch)


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0.7},
        {"cast_lm_head_to_fp32": True},
        {"loss_type": "grpo", "top_entropy_quantile": 0.5},
        {"importance_sampling_level": "sequence", "entropy_coef": 0.1},
    ],
    ids="-".join,
)
def test_trls_settings(settings_, tmp_path):
    model, processor = build("qwen2_5_vl")
    trainer = make_trainer(model, processor, tmp_path, settings=settings_)
    same_step(trainer, batch_of(processor, three_prompts("qwen2_5_vl"), ROWS))


def test_tool_mask(tmp_path):
    """What a tool said is read by what follows, but is not the policy's."""
    trainer = headed_trainer("qwen3_vl", tmp_path)
    rows = [Answer(0, 6, 2), Answer(0, 8, 5), Answer(1, 5, 1), Answer(1, 3)]
    batch = batch_of(trainer.processing_class, three_prompts("qwen3_vl"), rows, head=trainer.mask_head)
    before = loss_and_gradients(trainer, batch)[0]
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 1:3] = 0
    same_step(trainer, batch)
    assert not torch.allclose(before, loss_and_gradients(trainer, batch)[0])


def test_unknown_inputs_are_left_to_trl(tmp_path):
    """Some models take more than can be shared, as `token_type_ids`: their passes are TRL's, whole."""
    model, processor = build("text")
    trainer = make_trainer(model, processor, tmp_path)
    batch = batch_of(processor, three_prompts("text"), ROWS)
    expected = loss_and_gradients(trainer, dense(batch))[0]
    batch["token_type_ids"] = torch.zeros(len(ROWS), batch["prompt_ids"].size(1) + batch["completion_ids"].size(1))
    with counted(trainer) as tokens, pytest.warns(UserWarning, match="share_prompt: the model takes token_type_ids"):
        loss = loss_and_gradients(trainer, batch)[0]
    assert tokens == [batch["token_type_ids"].numel()]
    assert torch.equal(loss, expected)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", UserWarning)
        loss_and_gradients(trainer, batch)
