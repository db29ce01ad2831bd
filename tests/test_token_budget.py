"""`tokens_per_micro_batch`: losses, gradients and logs are those of the undivided batch, by fewer and fuller passes."""

from typing import Any

import pytest
import torch
from builders import add_head, grpo_args, seg_bias, sft_args, tiny_headed_model, tiny_model, tiny_rows, with_answers
from peft import LoraConfig
from sharing_checks import Answer, Prompt, batch_of, build, close, computed, counted, gradients, make_trainer, scores
from sharing_runs import run
from trainer_checks import Gradients, history, text_rows
from trl.trainer.grpo_config import GRPOConfig

from segrl.errors import SegRLError
from segrl.heads import DenseLoss
from segrl.models import tiny_causal_lm
from segrl.trainers import SegGRPOConfig, SegSFTConfig, SegSFTTrainer
from segrl.trainers.token_budget import NORMALIZERS, join_rows

PROMPTS = [Prompt(3), Prompt(7), Prompt(1), Prompt(5)]
ROWS = [Answer(n % 4, length, seg) for n, (length, seg) in enumerate(
    [(5, 1), (3, None), (9, 8), (2, 0), (1, None), (4, 2), (6, None), (0, None), (3, 1), (7, 3), (2, None), (8, 5)]
)]  # fmt: skip


def pictured() -> list[Prompt]:
    return [Prompt(prompt.words, (number % 3,)) for number, prompt in enumerate(PROMPTS)]


def stepped(trainer: Any, batch: dict[str, Any], budget: int | None) -> tuple[torch.Tensor, dict, dict, list[int]]:
    """Loss, gradients, logs and tokens of the passes of one optimizer step on a batch."""
    trainer.args.tokens_per_micro_batch = budget
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    with counted(trainer) as tokens:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        trainer.accelerator.backward(loss)
    logs = {name: values for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients(trainer.model), logs, tokens


def with_scores(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    known = scores(trainer, batch, shared=False)[0]
    noise = torch.Generator().manual_seed(3)
    moved = [known + 0.1 * torch.randn(known.shape, generator=noise) for _ in range(2)]
    return {**batch, "old_per_token_logps": moved[0], "ref_per_token_logps": moved[1]}


def same_step(found: Any, expected: Any) -> None:
    loss, gradient, *_ = found
    wanted_loss, wanted, *_ = expected
    close(loss, wanted_loss, scale=1.0, tolerance=2e-6)
    assert gradient.keys() == wanted.keys()
    norm = torch.stack([value.norm() for value in wanted.values()]).norm().item()
    assert norm > 1e-4
    for name, value in wanted.items():
        close(gradient[name], value, scale=1e-2 * norm)


class TestLosses:
    @pytest.mark.parametrize("loss_type", NORMALIZERS)
    def test_every_loss_type(self, loss_type, tmp_path):
        model, processor = build("text")
        trainer = make_trainer(
            model, processor, tmp_path, settings={"loss_type": loss_type, "max_completion_length": 9}
        )
        trainer.beta = 0.1
        batch = with_scores(trainer, batch_of(processor, PROMPTS, ROWS))
        whole = stepped(trainer, batch, None)
        assert len(whole[3]) == 1
        for budget, count in ((50, 3), (60, 2), (10_000, 1)):
            found = stepped(trainer, batch, budget)
            same_step(found, whole)
            assert len(found[3]) == count, found[3]
            assert max(found[3]) <= budget
            assert sum(found[3]) == computed(batch)  # every prompt once
            assert found[2]["micro_batches"] == [len(found[3])]
            assert found[2]["micro_batch_tokens"] == [pytest.approx(sum(found[3]) / len(found[3]))]
            assert all(len(values) == 1 for values in found[2].values())

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
    def test_equal_to_micro_batches_of_trl(self, loss_type, tmp_path):
        """Three accumulated micro-batches of four rows, which tear the groups apart."""
        model, processor = build("text")
        settings = {"loss_type": loss_type, "steps_per_generation": 3, "gradient_accumulation_steps": 3}
        trainer = make_trainer(model, processor, tmp_path, settings=settings)
        batch = with_scores(trainer, batch_of(processor, PROMPTS, ROWS))
        trainer.current_gradient_accumulation_steps, trainer.beta = 3, 0.1
        trainer.model.zero_grad()
        total = torch.zeros(())
        for start in range(0, 12, 4):
            rows = slice(start, start + 4)
            part = {k: v if torch.is_tensor(v) and v.ndim == 0 else v[rows] for k, v in batch.items()}
            loss = trainer.compute_loss(trainer.model, part)
            loss.backward()
            total += loss.detach()
        expected = total, gradients(trainer.model)
        folded = make_trainer(model, processor, tmp_path, settings={**settings, "tokens_per_micro_batch": 75})
        assert (folded.args.gradient_accumulation_steps, folded.args.steps_per_generation) == (1, 1)
        assert folded.args.per_device_train_batch_size == 12
        folded.beta = 0.1
        same_step(stepped(folded, batch, 75), expected)

    @pytest.mark.parametrize("lora", [False, True])
    def test_images_masks_and_dense_losses(self, lora, tmp_path):
        model, processor = build("qwen2_5_vl")
        arguments: dict[str, Any] = {"dense_losses": [DenseLoss("dice_ce", weight=0.7)]}
        if lora:
            arguments["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = make_trainer(
            add_head(model, processor), processor, tmp_path, settings={"policy_weight": 0.5}, **arguments
        )
        batch = with_scores(trainer, batch_of(processor, pictured(), ROWS, head=trainer.mask_head))
        whole = stepped(trainer, batch, None)
        found = stepped(trainer, batch, 120)
        assert len(found[3]) > 1
        assert max(found[3]) <= 120
        same_step(found, whole)
        assert any(value.any() for name, value in found[1].items() if "mask_head." in name)
        for name in ("dense/dice_ce", "dense/dice_ce_weighted", "policy", "policy_weighted"):
            assert found[2][name] == pytest.approx(whole[2][name], abs=1e-5), name

    def test_without_sharing_rows_count_with_their_padding(self, tmp_path):
        model, processor = build("text")
        trainer = make_trainer(model, processor, tmp_path, settings={"share_prompt": False})
        batch = with_scores(trainer, batch_of(processor, PROMPTS, ROWS))
        width = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
        found = stepped(trainer, batch, 5 * width)
        same_step(found, stepped(trainer, batch, None))
        assert sorted(found[3]) == [2 * width, 5 * width, 5 * width]

    def test_scoring_passes(self, tmp_path):
        """Old and reference scores run on consecutive groups within the budget, whatever the batch size."""
        model, processor = build("text")
        trainer = make_trainer(model, processor, tmp_path, settings={"tokens_per_micro_batch": 60})
        rows = [Answer(n // 3, length) for n, length in enumerate([3, 5, 1, 2, 2, 0, 6, 3, 4])]
        batch = batch_of(processor, PROMPTS, rows)
        with counted(trainer) as tokens:
            found = scores(trainer, batch, shared=True, batch_size=9)
        assert len(tokens) > 1
        assert max(tokens) <= 60
        assert sum(tokens) == computed(batch)
        for one, other in zip(found, scores(trainer, batch, shared=False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class TestSupervised:
    @pytest.mark.parametrize("kind", ["text", "vision"])
    def test_equal_to_one_batch(self, kind, tmp_path):
        """Rows of different lengths and images, some without a mask; text counts tokens of the step, vision a mean."""
        results = []
        for settings in (
            {"per_device_train_batch_size": 6},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "tokens_per_micro_batch": 260},
        ):
            if kind == "text":
                model, processor = tiny_causal_lm(hidden_size=64, vocab_size=640)
                rows = text_rows(6).add_column(
                    "completion", [[{"role": "assistant", "content": "It is small. " * n}] for n in range(1, 7)]
                )
                losses = None
            else:
                model, processor = tiny_headed_model()
                rows = with_answers(tiny_rows(6, processor), ["a <seg>", "no mask at all", "<seg> of it <seg>"])
                losses = [DenseLoss("dice_ce")]
            kept = Gradients()
            trainer = SegSFTTrainer(
                model,
                sft_args(tmp_path, max_steps=2, optim="sgd", max_grad_norm=0.0, **settings),
                train_dataset=rows,
                processing_class=processor,
                dense_losses=losses,
                callbacks=[kept],
            )
            with counted(trainer) as tokens:
                trainer.train()
            results.append((trainer, kept.steps, tokens))
        (whole, expected, _), (divided, found, tokens) = results
        assert len(tokens) > 2
        assert max(tokens) <= 260
        for mine, yours in zip(found, expected, strict=True):
            norm = torch.stack([value.norm() for value in yours.values()]).norm().item()
            for name, value in yours.items():
                close(mine[name], value, scale=1e-2 * norm, tolerance=2e-5)
        for mine, yours in zip(history(divided), history(whole), strict=True):
            for name in ("loss", "dense/dice_ce", "text", "num_tokens"):
                assert name not in yours or mine[name] == pytest.approx(yours[name], abs=1e-4), name

    def test_evaluation_has_batches(self, tmp_path):
        model, processor = tiny_model()
        rows = tiny_rows(4, processor)
        args = sft_args(tmp_path, max_steps=1, tokens_per_micro_batch=300, per_device_eval_batch_size=4)
        trainer = SegSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
        with counted(trainer) as tokens:
            trainer.evaluate()
        assert len(tokens) == 1

    def test_rows_that_do_not_fit(self):
        rows = [{"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(1, size)} for size in (3, 4)]
        with pytest.raises(SegRLError, match=r"rows have pixel_values of the shapes \[\(3,\), \(4,\)\]"):
            join_rows(rows, 0)

    def test_rows_may_lack_images(self):
        ids = [torch.ones(1, n, dtype=torch.long) for n in (2, 3)]
        rows = [
            {"input_ids": ids[0], "labels": ids[0]},
            {"input_ids": ids[1], "labels": ids[1], "mm_token_type_ids": ids[1], "pixel_values": torch.ones(4, 5)},
        ]
        joined = join_rows(rows, 9)
        assert joined["input_ids"].tolist() == [[1, 1, 9], [1, 1, 1]]
        assert joined["labels"].tolist() == [[1, 1, -100], [1, 1, 1]]
        assert joined["mm_token_type_ids"].tolist() == [[0, 0, 0], [1, 1, 1]]
        assert joined["pixel_values"].shape == (4, 5)


class TestErrors:
    def test_a_budget_below_the_completions_of_a_group(self, tmp_path):
        model, processor = build("text")
        with pytest.raises(SegRLError, match="4 completions of up to max_completion_length=12 tokens take 48 tokens"):
            make_trainer(model, processor, tmp_path, settings={"tokens_per_micro_batch": 48})

    def test_a_budget_below_a_group(self, tmp_path):
        model, processor = build("text")
        trainer = make_trainer(model, processor, tmp_path)
        batch = batch_of(processor, PROMPTS, ROWS)
        smallest = max(len(key.tokens) for key in batch["prompt_keys"]) + 3 * 12
        with pytest.raises(SegRLError, match=f"the smallest number that works is {smallest}"):
            stepped(trainer, batch, smallest - 1)
        stepped(trainer, batch, smallest)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 takes a quantile"),
            ({"entropy_coef": 0.1}, "the entropy bonus is a mean"),
        ],
    )
    def test_what_depends_on_the_division(self, settings, said, tmp_path):
        model, processor = build("text")
        with pytest.raises(SegRLError, match=said):
            make_trainer(model, processor, tmp_path, settings={"tokens_per_micro_batch": 999, **settings})

    def test_settings(self, tmp_path):
        with pytest.raises(SegRLError, match="tokens_per_micro_batch=0: expected a number of tokens"):
            grpo_args(tmp_path, tokens_per_micro_batch=0)
        with pytest.raises(
            SegRLError, match="steps_per_generation=3 is not a multiple of gradient_accumulation_steps=2"
        ):
            grpo_args(
                tmp_path, tokens_per_micro_batch=99, steps_per_generation=3, gradient_accumulation_steps=2,
                per_device_train_batch_size=4,
            )  # fmt: skip
        args = grpo_args(tmp_path, SegGRPOConfig, tokens_per_micro_batch=99, global_batch_size=4)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (16, 1)
        plain = grpo_args(tmp_path, GRPOConfig, per_device_train_batch_size=16)
        assert args.generation_batch_size == plain.generation_batch_size
        assert sft_args(tmp_path, SegSFTConfig, tokens_per_micro_batch=99, gradient_accumulation_steps=2) is not None

    def test_a_row_above_the_budget(self, tmp_path):
        model, processor = tiny_model()
        rows = tiny_rows(4, processor)
        args = sft_args(tmp_path, max_steps=1, tokens_per_micro_batch=10)
        trainer = SegSFTTrainer(model, args, train_dataset=rows, processing_class=processor)
        with pytest.raises(SegRLError, match=r"tokens_per_micro_batch=10: a row has \d+ tokens"):
            trainer.train()

    def test_packing(self, tmp_path):
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        args = sft_args(tmp_path, tokens_per_micro_batch=99, packing=True, max_length=32)
        rows = text_rows(4).add_column("completion", [[{"role": "assistant", "content": "yes"}]] * 4)
        with pytest.raises(SegRLError, match="packing and padding_free fill rows themselves"):
            SegSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.slow
def test_a_run_is_the_run_of_trls_micro_batches(tmp_path):
    """Two steps of two prompts each, with masks, LoRA left out: the same texts, logs, gradients and weights."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 2, "loss_type": "dapo"}
    _, processor = tiny_model()
    settings["generation_kwargs"] = seg_bias(processor)
    plain = run(tmp_path, **settings)
    full = run(tmp_path, tokens_per_micro_batch=10_000, **settings)
    small = run(tmp_path, tokens_per_micro_batch=max(plain.tokens("loss")) + 60, **settings)
    assert [len(trainer.tokens("loss")) for trainer in (plain, full, small)] == [4, 2, 4]
    for other in (full, small):
        assert other.collect.joined("completion_ids") == plain.collect.joined("completion_ids")
        for mine, yours in zip(other.kept.steps, plain.kept.steps, strict=True):
            norm = torch.stack([value.norm() for value in yours.values()]).norm().item()
            for name, value in yours.items():
                close(mine[name], value, scale=5e-2 * norm, tolerance=2e-5)
        for mine, yours in zip(history(other), history(plain), strict=True):
            for name in ("loss", "policy", "dense/dice_ce", "reward"):
                assert name not in yours or mine[name] == pytest.approx(yours[name], abs=2e-4), name
