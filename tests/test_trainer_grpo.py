"""`SegGRPOTrainer`: TRL bit for bit without masks, the joint gradient, and masks without forwards of their own."""

from typing import Any

import pytest
import references
import torch
import torch.nn.functional as F
from builders import add_head, grpo_args, seg_bias, tiny_headed_model, tiny_model, tiny_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl import losses
from segrl.config import SegGRPOConfig
from segrl.dense import DenseLoss
from segrl.errors import DataError, RewardError, SegRLError, UnknownNameError
from segrl.loading import seg_token_id
from segrl.rewards import make_reward, register_reward
from segrl.testing import tiny_causal_lm
from segrl.trainer import SegGRPOTrainer

TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
EVAL_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def letters(completions, **_):
    """A reward that tells any two texts apart."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(map(ord, text)) % 101 / 100 for text in texts]


def history(trainer) -> list[dict[str, Any]]:
    dropped = {*TIMES, *EVAL_TIMES}
    return [{k: v for k, v in entry.items() if k not in dropped} for entry in trainer.state.log_history]


def text_rows(n=8) -> Dataset:
    questions = [f"Find every lesion, number {number}." for number in range(n)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Collect:
    """A reward that keeps what it was given."""

    __name__ = "collect"

    def __init__(self, score=letters):
        self.score, self.calls = score, []

    def __call__(self, completions, **columns):
        self.calls.append({"completions": completions, **columns})
        return self.score(completions=completions, **columns)

    def joined(self, name: str) -> list[Any]:
        return [value for call in self.calls for value in call[name]]


class Gradients(TrainerCallback):
    """The accumulated gradients at every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class TestPlainTrl:
    """Without head and dense losses: the same logs and the same weights as TRL, exactly."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "beta": 0.0},
            {"loss_type": "grpo", "scale_rewards": "batch", "mask_truncated_completions": True, "top_p": 0.9},
            {"eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2, "per_device_eval_batch_size": 4},
        ],
        ids=["default", "several-iterations", "masked-grpo", "evaluation"],
    )
    @pytest.mark.parametrize("kind", ["text", "vision", "lora"])
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
            torch.testing.assert_close(scaled[name], weight * one[name], rtol=1e-4, atol=1e-8)
        assert any(gradient.abs().max() > 1e-4 for gradient in one.values())


# ---- the joint objective against a slow reference --------------------------------------------------------------------

ANSWERS = (
    "<think>The skin looks normal.</think><answer>The cyst is located at [1, 2, 30, 40].<seg></answer>",
    "<answer><seg> two of them <seg></answer>",
    "<think>no mask at all</think>",
    "The lesion <seg>",
)


def written_rollout(texts):
    """A rollout function that answers with fixed texts, in turn."""

    def rollout(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        tokenizer = trainer._tokenizer
        ids = [tokenizer(texts[n % len(texts)])["input_ids"] + [tokenizer.eos_token_id] for n in range(len(prompts))]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    return rollout


def row_inputs(processor, row, completion_ids):
    """Unpadded inputs of one row, made by the processor itself."""
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["prompt"][0]["content"]}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = batch["input_ids"].size(1)
    ids = torch.tensor([completion_ids])
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
    return dict(batch), length


def reference_mask_logits(head, image, state):
    """SAM 2's own single-image path, one mask: "h h" from one state "D"."""
    sam = head.segmenter.sam
    features = sam.forward_image(head.segmenter.preprocess(image)[None])["backbone_fpn"]
    prompt = head.adapter(state.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool))
    empty = torch.zeros(1, 0, head.segmenter.prompt_dim)
    _, dense = sam.sam_prompt_encoder(points=None, boxes=None, masks=None)
    masks, *_ = sam.sam_mask_decoder(
        image_embeddings=features[2] + sam.no_mem_embed.view(1, -1, 1, 1),
        image_pe=sam.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.cat([empty, prompt], dim=1),
        dense_prompt_embeddings=dense,
        multimask_output=False,
        repeat_image=False,
        high_res_features=features[:2],
    )
    return masks[0, 0]


def reference_forward(model, processor, row, completion_ids):
    """Log-probabilities "T" of one row's completion, and its mask logits "h h" or None, with gradients."""
    inputs, length = row_inputs(processor, row, completion_ids)
    states = model.model(**inputs).last_hidden_state[0]
    logits = model.lm_head(states)[length - 1 : -1]
    chosen = torch.tensor(completion_ids)
    log_probs = logits.log_softmax(-1)[torch.arange(len(chosen)), chosen]
    seg = [t for t, token in enumerate(completion_ids) if token == seg_token_id(processor)]
    if not seg:
        return log_probs, None
    return log_probs, reference_mask_logits(model.mask_head, row["image"], states[length + seg[-1]])


def reference_target(row, side):
    import numpy as np

    cover = references.area_average(np.asarray(row["mask"]) > 0, (side, side))
    return torch.tensor(np.round(cover * 255) / 255, dtype=torch.float32)


def reference_dice_ce(logits, target):
    p = 1 / (1 + torch.exp(-logits))
    dice = 1 - (2 * (p * target).sum() + losses.DICE_SMOOTHING) / ((p + target).sum() + losses.DICE_SMOOTHING)
    cross_entropy = -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()
    flat, true = logits.detach().flatten().tolist(), target.flatten().tolist()
    expected = references.dice_loss(flat, true, losses.DICE_SMOOTHING) + references.cross_entropy(flat, true)
    assert (dice + cross_entropy).item() == pytest.approx(expected, abs=1e-5)
    return dice + cross_entropy


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
        assert expected["mask_head.adapter.query"].abs().max() > 1e-4
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


class Calls:
    """How often a module ran, and on how many rows, by a forward hook."""

    def __init__(self, module):
        self.rows: list[int] = []
        module.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs, output):
        first = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
        self.rows.append(len(first))


def same_masks(model, processor, rows, collect, tolerance=1e-3):
    """Assert that the masks that rewards saw are those of a plain forward per row. Returns how many there were."""
    named = {row["name"]: row for row in rows}
    found = 0
    for call in collect.calls:
        for name, ids, prediction in zip(call["name"], call["completion_ids"], call["prediction"], strict=True):
            row = named[name]
            with torch.no_grad():
                _, logits = reference_forward(model, processor, row, ids)
            if prediction.mask is None:
                last = seg_token_id(processor) == ids[-1] and ids.count(ids[-1]) == 1
                assert logits is None or last, "a completion with <seg> has no mask"
                continue
            assert logits is not None
            full = F.interpolate(logits[None, None], row["mask"].size[::-1], mode="bilinear")[0, 0]
            clear = full.abs() > tolerance
            assert torch.equal(torch.from_numpy(prediction.mask)[clear], (full > 0)[clear])
            assert clear.float().mean() > 0.9
            found += 1
    return found


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
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"steps_per_generation": 2},
            {"num_iterations": 2},
            {"beta": 0.1},
            {"activation_checkpointing": True},
            {"pad_to_multiple_of": 8},
        ],
        ids=["generation", "several-steps", "iterations", "reference", "checkpointing", "padded"],
    )
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
    def test_masks_of_the_rollout_are_those_of_a_forward(self, family, settings, tmp_path):
        model, processor = tiny_headed_model(family)
        if "beta" in settings:
            head = model.mask_head
            from segrl.heads.attach import attach_mask_head, detach_mask_head

            detach_mask_head(model)
            model.save_pretrained(tmp_path / "policy")
            model.config._name_or_path = str(tmp_path / "policy")
            attach_mask_head(model, head)
        rows = tiny_rows(2, processor, completions=False)
        collect, states = Collect(), {}

        def keep(completions, **_):
            assert trainer._rollout is not None
            states["rollout"] = trainer._rollout.states
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

    @pytest.mark.parametrize("steps_per_generation", [1, 2])
    def test_masks_of_a_rollout_from_outside(self, steps_per_generation, tmp_path):
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
        assert backbone.rows == [4, 4, 4, 4]  # each of the 8 completions once for its states and once for the loss
        assert same_masks(trainer.model, processor, rows, collect) == 6
