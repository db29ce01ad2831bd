"""`SegGRPOTrainer`: TRL bit for bit without masks, the joint gradient, and masks without forwards of their own.

What shared prompts compute is compared in `test_trainer_sharing.py`.
"""

from typing import Any

import numpy as np
import pytest
import torch
from builders import grpo_args, seg_bias, tiny_headed_model, tiny_model, tiny_rows
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from trainer_checks import (
    Calls,
    Collect,
    Gradients,
    history,
    letters,
    reference_dice_ce,
    reference_forward,
    reference_target,
    row_inputs,
    same,
    same_masks,
    text_rows,
    weights,
    written_rollout,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.errors import DataError, RewardError, SegRLError, UnknownNameError
from segrl.heads import DenseLoss
from segrl.models import tiny_causal_lm
from segrl.predictions import ImagePromptSettings
from segrl.rewards import register_reward
from segrl.trainers import SegGRPOConfig, SegGRPOTrainer

pytestmark = [
    # TRL's word on rollout functions, and its use of names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]


class TestPlainTrl:
    """Without head and dense losses: the same logs and the same weights as TRL, exactly."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("text", {}),
            ("text", {"loss_type": "grpo", "scale_rewards": "batch", "mask_truncated_completions": True, "top_p": 0.9}),
            ("vision", {}),
            ("vision", {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2}),
            ("lora", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}),
        ],
        ids=["text", "text-masked-grpo", "vision", "vision-evaluation", "lora-iterations"],
    )
    def test_logs_and_weights(self, kind, settings, tmp_path):
        def run(trainer_class, config_class):
            model, processor = tiny_causal_lm(hidden_size=64, vocab_size=640) if kind == "text" else tiny_model()
            if kind == "lora":
                torch.manual_seed(3)
                model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
            rows = text_rows() if kind == "text" else tiny_rows(8, processor, completions=False)
            args = grpo_args(tmp_path, config_class, max_steps=4, generation_kwargs=seg_bias(processor), **settings)
            trainer = trainer_class(
                model, letters, args, train_dataset=rows, eval_dataset=rows, processing_class=processor
            )
            before = weights(trainer.model)
            trainer.train()
            return history(trainer), before, weights(trainer.model)

        plain_logs, before, plain = run(GRPOTrainer, GRPOConfig)
        logs, seg_before, ours = run(SegGRPOTrainer, SegGRPOConfig)
        assert logs == plain_logs
        assert same(before, seg_before)
        assert same(plain, ours)
        assert not same(before, ours)
        assert len([entry for entry in logs if "loss" in entry]) == 4

    def test_trl_config_is_enough(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(2, processor, completions=False)
        args = grpo_args(tmp_path, GRPOConfig, max_steps=1, generation_kwargs=seg_bias(processor))
        trainer = SegGRPOTrainer(
            model, "format", args, train_dataset=rows, processing_class=processor, dense_losses=[DenseLoss("dice")]
        )
        trainer.train()
        assert "dense/dice" in trainer.state.log_history[0]

    @pytest.mark.parametrize("weight", [0.25, 3.0])
    def test_policy_weight_scales_the_gradient(self, weight, tmp_path):
        def gradients(policy_weight):
            model, processor = tiny_causal_lm(hidden_size=64, vocab_size=640)
            kept = Gradients()
            args = grpo_args(tmp_path, max_steps=1, policy_weight=policy_weight, max_grad_norm=0.0)
            SegGRPOTrainer(
                model, letters, args, train_dataset=text_rows(), processing_class=processor, callbacks=[kept]
            ).train()
            return kept.steps[0]

        one, scaled = gradients(1.0), gradients(weight)
        assert one.keys() == scaled.keys()
        for name in one:
            torch.testing.assert_close(scaled[name], weight * one[name], rtol=1e-4, atol=1e-6)
        assert any(gradient.abs().max() > 1e-4 for gradient in one.values())


# ---- the joint objective against a slow reference --------------------------------------------------------------------

ANSWERS = (
    "<think>The skin looks normal.</think><answer>The cyst is located at [1, 2, 30, 40].<seg></answer>",
    "<answer><seg> two of them <seg></answer>",
    "<think>no mask at all</think>",
    "The lesion <seg>",
)


def reference_objective(model, processor, rows, ids, rewards, group, *, policy_weight, dense_weight):
    """`policy_weight * GRPO + dense_weight * DiceCE` of one optimiser step, row by row: (total, policy, dense)."""
    policy, dense = torch.zeros(()), torch.zeros(())
    tokens = sum(map(len, ids))
    for n, (row, completion) in enumerate(zip(rows, ids, strict=True)):
        others = torch.tensor(rewards[n // group * group : n // group * group + group])
        advantage = (rewards[n] - others.mean()) / (others.std() + 1e-4)
        log_probs, mask_logits = reference_forward(model, processor, row, completion)
        policy = policy - (torch.exp(log_probs - log_probs.detach()) * advantage).sum() / tokens
        if mask_logits is not None:
            target = reference_target(row, mask_logits.size(-1))
            dense = dense + reference_dice_ce(mask_logits, target) / len(rows)
    return policy_weight * policy + dense_weight * dense, policy, dense


class TestJointGradient:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("micro", "steps", "policy_weight", "dense_weight", "freeze"),
        [(8, 1, 1.0, 1.0, True), (4, 2, 1.0, 1.0, True), (2, 4, 0.5, 2.0, True), (4, 2, 1.0, 0.5, False)],
    )
    def test_equals_the_slow_reference(self, micro, steps, policy_weight, dense_weight, freeze, tmp_path):
        model, processor = tiny_headed_model(freeze_encoder=freeze)
        rows = tiny_rows(2, processor, completions=False)
        kept, collect = Gradients(), Collect()
        args = grpo_args(
            tmp_path,
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            policy_weight=policy_weight,
            max_completion_length=64,
            learning_rate=0.0,
        )
        trainer = SegGRPOTrainer(
            model,
            collect,
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce", weight=dense_weight)],
            rollout_func=written_rollout(ANSWERS),
            callbacks=[kept],
        )
        trainer.train()
        (call,) = collect.calls
        named = {row["name"]: row for row in rows}
        total, policy, dense = reference_objective(
            trainer.model,
            processor,
            [named[name] for name in call["name"]],
            call["completion_ids"],
            letters(call["completions"]),
            4,
            policy_weight=policy_weight,
            dense_weight=dense_weight,
        )
        model.zero_grad()
        total.backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}
        (gradients,) = kept.steps
        for name, gradient in gradients.items():
            reference = expected.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.keys() <= gradients.keys()
        assert any(n.startswith("mask_head.segmenter.sam.sam_mask_decoder.") for n in expected)
        assert any(n.startswith("mask_head.segmenter.sam.image_encoder.") for n in expected) is not freeze
        assert expected["mask_head.adapter.projection.weight"].abs().max() > 1e-4
        assert expected["lm_head.weight"].abs().max() > 1e-3

        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(total.item(), abs=1e-5)
        assert log["policy"] == pytest.approx(policy.item(), abs=1e-5)
        assert log["policy_weighted"] == pytest.approx(policy_weight * policy.item(), abs=1e-5)
        assert log["dense/dice_ce"] == pytest.approx(dense.item(), abs=1e-5)
        assert log["dense/dice_ce_weighted"] == pytest.approx(dense_weight * dense.item(), abs=1e-5)

    def test_without_any_seg_the_head_gets_zeros(self, tmp_path):
        model, processor = tiny_headed_model()
        kept = Gradients()
        args = grpo_args(tmp_path, max_steps=1, max_completion_length=64, weight_decay=0.0)
        before = weights(model.mask_head)
        trainer = SegGRPOTrainer(
            model,
            letters,
            args,
            train_dataset=tiny_rows(2, processor, completions=False),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
            rollout_func=written_rollout(["<think>nothing</think>", "<think>seen</think>"]),
            callbacks=[kept],
        )
        trainer.train()
        trained = [n for n, p in model.mask_head.named_parameters() if p.requires_grad]
        assert trained
        assert all(not kept.steps[0][f"mask_head.{name}"].any() for name in trained)
        assert same(before, weights(model.mask_head))
        log = trainer.state.log_history[0]
        assert log["dense/dice_ce"] == 0.0
        assert "mask/dice" not in log

    def test_seg_in_the_prompt_is_not_the_models(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(2, processor, completions=False)
        asked = [[{"role": "user", "content": "End with <seg>."}]] * len(rows)
        rows = rows.remove_columns("prompt").add_column("prompt", asked)
        collect = Collect()
        args = grpo_args(tmp_path, max_steps=1, max_completion_length=64)
        trainer = SegGRPOTrainer(
            model,
            [collect, "dual_granularity_mask"],
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
            rollout_func=written_rollout(["<think>a</think><answer>b</answer>", "<answer>c</answer>"]),
        )
        trainer.train()
        assert all(prediction.mask is None for prediction in collect.joined("prediction"))
        log = trainer.state.log_history[0]
        assert log["dense/dice_ce"] == 0.0
        assert log["rewards/dual_granularity_mask/mean"] == -1.0


# ---- masks without forwards of their own -----------------------------------------------------------------------------


class TestForwards:
    @pytest.mark.parametrize(
        ("settings", "losses_run", "old"),
        [
            ({"per_device_train_batch_size": 8}, 1, 0),
            ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 4, 0),
            (
                {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
                4,
                2,
            ),
            ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 2, 2),
        ],
        ids=["one-batch", "accumulated", "iterations", "several-steps"],
    )
    def test_backbone_vision_and_sam_calls(self, settings, losses_run, old, tmp_path):
        """One generation: the backbone runs for its tokens, TRL's own scoring and the losses, and for nothing else."""
        model, processor = tiny_headed_model()
        rows = tiny_rows(2, processor, completions=False)
        collect = Collect()
        iterations = settings.get("num_iterations", 1)
        updates = iterations * settings.get("steps_per_generation", 1)
        args = grpo_args(tmp_path, max_steps=updates, generation_kwargs=seg_bias(processor), **settings)
        trainer = SegGRPOTrainer(
            model,
            [collect, "dual_granularity_mask"],
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        backbone, vision = Calls(model.model), Calls(model.model.visual)
        encoder = Calls(model.mask_head.segmenter.sam.image_encoder)
        trainer.train()
        (call,) = collect.calls
        assert any(prediction.mask is not None for prediction in call["prediction"])
        decoded = max(map(len, call["completion_ids"]))
        assert len(backbone.rows) == decoded + old + losses_run
        assert len(vision.rows) == 1 + old + losses_run
        assert sum(encoder.rows) == len(set(call["name"])) == 2
        assert model.mask_head.encoded_images == 2

    def test_every_step_encodes_its_own_images_once(self, tmp_path):
        model, processor = tiny_headed_model()
        args = grpo_args(tmp_path, max_steps=3, generation_kwargs=seg_bias(processor, 8.0))
        trainer = SegGRPOTrainer(
            model,
            "dual_granularity_mask",
            args,
            train_dataset=tiny_rows(3, processor, completions=False),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        encoder = Calls(model.mask_head.segmenter.sam.image_encoder)
        trainer.train()
        assert encoder.rows == [1, 1, 1]

    def test_two_questions_about_one_image_encode_it_once(self, tmp_path):
        model, processor = tiny_headed_model()
        one, other = tiny_rows(2, processor, completions=False)
        rows = Dataset.from_list(
            [one, {**other, "image": one["image"]}], features=tiny_rows(2, processor, completions=False).features
        )
        collect = Collect()
        args = grpo_args(
            tmp_path, max_steps=1, per_device_train_batch_size=8, generation_kwargs=seg_bias(processor, 8.0)
        )
        trainer = SegGRPOTrainer(
            model,
            collect,
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        encoder = Calls(model.mask_head.segmenter.sam.image_encoder)
        trainer.train()
        assert encoder.rows == [1]
        targets = {id(target): target for target in collect.joined("target")}.values()
        assert len(targets) == 2

    def test_trained_encoder_runs_in_every_loss(self, tmp_path):
        model, processor = tiny_headed_model(freeze_encoder=False)
        args = grpo_args(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            generation_kwargs=seg_bias(processor, 8.0),
        )
        trainer = SegGRPOTrainer(
            model,
            "dual_granularity_mask",
            args,
            train_dataset=tiny_rows(2, processor, completions=False),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        encoder = Calls(model.mask_head.segmenter.sam.image_encoder)
        trainer.train()
        assert len(encoder.rows) == 3
        assert encoder.rows[0] == 2

    def test_masks_for_rewards_alone_cost_nothing_in_the_loss(self, tmp_path):
        model, processor = tiny_headed_model()
        collect = Collect()
        args = grpo_args(tmp_path, max_steps=1, generation_kwargs=seg_bias(processor))
        before = weights(model.mask_head)
        trainer = SegGRPOTrainer(
            model,
            collect,
            args,
            train_dataset=tiny_rows(2, processor, completions=False),
            processing_class=processor,
        )
        decoder = Calls(model.mask_head.segmenter.sam.sam_mask_decoder.transformer)
        trainer.train()
        assert len(decoder.rows) == 1
        assert same(before, weights(model.mask_head))
        assert not {"policy", "dense/dice_ce"} & trainer.state.log_history[0].keys()


class TestStates:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "settings"),
        [
            ("qwen2_5_vl", {}),
            ("qwen2_5_vl", {"steps_per_generation": 2}),
            ("qwen2_5_vl", {"num_iterations": 2}),
            ("qwen2_5_vl", {"beta": 0.1}),
            ("qwen2_5_vl", {"activation_checkpointing": True}),
            ("qwen2_5_vl", {"pad_to_multiple_of": 8, "steps_per_generation": 2}),
            ("qwen3_vl", {"pad_to_multiple_of": 8}),
            ("llava", {"activation_checkpointing": True, "beta": 0.1}),
        ],
        ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
    )
    def test_masks_of_the_rollout_are_those_of_a_forward(self, family, settings, tmp_path):
        model, processor = tiny_headed_model(family)
        if "beta" in settings:
            head = model.mask_head
            from segrl.heads import attach_mask_head, detach_mask_head

            detach_mask_head(model)
            model.save_pretrained(tmp_path / "policy")
            model.config._name_or_path = str(tmp_path / "policy")
            attach_mask_head(model, head)
        rows = tiny_rows(4, processor, completions=False)
        collect, states = Collect(), {}

        def keep(completions, **_):
            rollout: Any = trainer._rollout
            states["rollout"] = rollout.completions.states
            return [0.0] * len(completions)

        args = grpo_args(
            tmp_path,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=8,
            generation_kwargs=seg_bias(processor),
            **settings,
        )
        trainer = SegGRPOTrainer(
            model,
            [collect, keep],
            args,
            train_dataset=rows,
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train()
        assert same_masks(trainer.model, processor, rows, collect) >= 4
        named = {row["name"]: row for row in rows}
        call = collect.calls[0]
        for n, (name, ids) in enumerate(zip(call["name"], call["completion_ids"], strict=True)):
            inputs, length = row_inputs(processor, named[name], ids)
            with torch.no_grad():
                expected = model.model(**inputs).last_hidden_state[0, length:-1]
            torch.testing.assert_close(states["rollout"][n, : len(ids) - 1], expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.long
    @pytest.mark.parametrize("share_prompt", [True, False])
    @pytest.mark.parametrize("steps_per_generation", [1, 2])
    def test_masks_of_a_rollout_from_outside(self, steps_per_generation, share_prompt, tmp_path):
        """As with vLLM, generation leaves no states: they come from the old-log-prob pass, or from one forward."""
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False)
        collect = Collect()
        args = grpo_args(
            tmp_path,
            max_steps=2,
            learning_rate=0.0,
            per_device_train_batch_size=4,
            steps_per_generation=steps_per_generation,
            share_prompt=share_prompt,
            max_completion_length=64,
        )
        trainer = SegGRPOTrainer(
            model,
            collect,
            args,
            train_dataset=rows,
            processing_class=processor,
            rollout_func=written_rollout(ANSWERS),
            dense_losses=[DenseLoss("dice_ce")],
        )
        backbone = Calls(model.model)
        trainer.train()
        # each of the 8 completions once for its states and once for the loss; 4 that share a prompt are one row
        assert backbone.rows == [1 if share_prompt else 4] * 4
        assert same_masks(trainer.model, processor, rows, collect) == 6


# ---- bad input -------------------------------------------------------------------------------------------------------


@register_reward("test_trainer_raises")
def raises(prediction, target):
    if target.name == "bad":
        raise KeyError("no such organ")
    return 1.0


@register_reward("test_trainer_nan")
def not_a_number(prediction, target):
    return float("nan")


class TestBadInput:
    @staticmethod
    def trainer(
        tmp_path, rewards: Any = "format", *, model=None, processor=None, rows=None, settings=None, **arguments
    ) -> Any:
        if model is None:
            model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False) if rows is None else rows
        return SegGRPOTrainer(
            model,
            rewards,
            grpo_args(tmp_path, max_steps=1, **(settings or {})),
            train_dataset=rows,
            processing_class=processor,
            **arguments,
        )

    @pytest.mark.parametrize("rewards", ["box_f2", ["format", "box_f2"], [letters, "box_f2"]])
    def test_unknown_reward_suggests_the_closest(self, rewards, tmp_path):
        with pytest.raises(UnknownNameError, match="unknown reward 'box_f2'; did you mean 'box_f1'"):
            self.trainer(tmp_path, rewards)

    def test_path_is_a_reward_model_to_trl(self, tmp_path):
        with pytest.raises(OSError, match="no-such-folder"):
            self.trainer(tmp_path, str(tmp_path / "no-such-folder"))

    def test_list_of_the_caller_is_left_alone(self, tmp_path):
        rewards = ["format", letters]
        trainer = self.trainer(tmp_path, rewards)
        assert rewards == ["format", letters]
        assert trainer.reward_func_names == ["format", "letters"]

    def test_dense_losses_without_a_head(self, tmp_path):
        model, processor = tiny_model()
        with pytest.raises(
            SegRLError, match=r"DenseLoss\('dice_ce', weight=1.0\).*no mask head; call attach_mask_head"
        ):
            self.trainer(tmp_path, model=model, processor=processor, dense_losses=[DenseLoss("dice_ce")])

    @pytest.mark.parametrize(
        ("losses_given", "message"),
        [
            (["dice_ce"], r"expected DenseLoss objects such as DenseLoss\('dice_ce'\), got 'dice_ce'"),
            ([DenseLoss("dice"), DenseLoss("dice")], r"the names \['dice'\] occur twice"),
        ],
    )
    def test_wrong_dense_losses(self, losses_given, message, tmp_path):
        with pytest.raises(SegRLError, match=message):
            self.trainer(tmp_path, dense_losses=losses_given)

    @pytest.mark.parametrize("column", ["mask", "image"])
    def test_missing_column_is_seen_before_training(self, column, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False).remove_columns(column)
        with pytest.raises(DataError, match=rf"train_dataset: no column \['{column}'\]"):
            self.trainer(tmp_path, model=model, processor=processor, rows=rows)

    def test_missing_column_of_the_evaluation_data(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False)
        with pytest.raises(DataError, match=r"eval_dataset\['far'\]: no column \['mask'\]"):
            self.trainer(
                tmp_path,
                model=model,
                processor=processor,
                eval_dataset={"near": rows, "far": rows.remove_columns("mask")},
            )

    def test_missing_mask_in_a_stream_names_the_row(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False).remove_columns("mask")
        stream = IterableDataset.from_generator(lambda: iter(rows))  # knows no column names
        trainer = self.trainer(tmp_path, model=model, processor=processor, rows=stream)
        with pytest.raises(DataError, match=r"synthetic_0_\d+: no mask"):
            trainer.train()

    def test_seg_absent_from_the_tokenizer(self, tmp_path):
        model, processor = tiny_headed_model()
        _, other = tiny_model(tag_tokens=["<think>", "</think>", "<answer>", "</answer>"])
        with pytest.raises(SegRLError, match=r"SegTokenProbe.token_id=.*, expected '<seg>'; .*ensure_seg_token"):
            self.trainer(tmp_path, model=model, processor=other, rows=tiny_rows(4, processor, completions=False))

    def test_special_seg(self, tmp_path):
        model, processor = tiny_headed_model()
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<seg>"]})
        with pytest.raises(SegRLError, match="'<seg>' is a special token: TRL drops those"):
            self.trainer(tmp_path, model=model, processor=processor)

    def test_reward_that_raises_names_reward_and_row(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False)
        rows = rows.remove_columns("name").add_column("name", ["bad"] * 4)
        trainer = self.trainer(tmp_path, "test_trainer_raises", model=model, processor=processor, rows=rows)
        with pytest.raises(RewardError, match=r"'test_trainer_raises'.*row 0.*bad.*KeyError.*no such organ"):
            trainer.train()

    def test_reward_that_is_not_finite(self, tmp_path):
        trainer = self.trainer(tmp_path, "test_trainer_nan")
        with pytest.raises(RewardError, match=r"'test_trainer_nan'.*row 0.*nan; expected a finite number"):
            trainer.train()

    def test_reward_of_the_wrong_length(self, tmp_path):
        def short(completions, **_):
            return [1.0] * (len(completions) - 1)

        trainer = self.trainer(tmp_path, short)
        with pytest.raises(ValueError, match="The reward function 'short' returned 3 rewards, but 4 were expected"):
            trainer.train()

    def test_mask_that_is_not_binary(self, tmp_path):
        model, processor = tiny_headed_model()
        rows = tiny_rows(4, processor, completions=False)
        grey = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
        rows = rows.map(lambda row: {"mask": Image.fromarray(grey)})
        trainer = self.trainer(tmp_path, model=model, processor=processor, rows=rows)
        with pytest.raises(DataError, match=rows[0]["name"][:9]):
            trainer.train()

    def test_unknown_frame(self, tmp_path):
        with pytest.raises(UnknownNameError, match="'millimetres'"):
            self.trainer(tmp_path, prompt_settings=ImagePromptSettings(frame_kind="millimetres"))  # pyright: ignore

    def test_failed_construction_keeps_the_head(self, tmp_path):
        model, processor = tiny_headed_model()
        head = model.mask_head
        with pytest.raises(TypeError):
            self.trainer(tmp_path, model=model, processor=processor, no_such_argument=1)
        assert model.mask_head is head

    def test_frozen_head_without_dense_losses(self, tmp_path):
        trainer = self.trainer(tmp_path)
        assert not any(p.requires_grad for p in trainer.model.mask_head.parameters())
        trainer = self.trainer(tmp_path, dense_losses=[DenseLoss("dice", weight=0.0)])
        assert any(p.requires_grad for p in trainer.model.mask_head.parameters())

    @pytest.mark.slow
    def test_ablation_without_reasoning(self, tmp_path):
        model, processor = tiny_headed_model()
        kinds = {}
        for required in (True, False):
            trainer = self.trainer(
                tmp_path,
                model=model,
                processor=processor,
                settings={"max_completion_length": 64},
                prompt_settings=ImagePromptSettings(reasoning=required),
                rollout_func=written_rollout(["<answer>The cyst is located at [1, 2, 3, 4].<seg></answer>"]),
            )
            trainer.train()
            kinds[required] = trainer.state.log_history[0]["rollout/valid"]
        assert kinds == {True: 0.0, False: 1.0}
