"""What TRL's GRPO trainer can do, through `SegGRPOTrainer`: unchanged without a mask head, and with one."""

import asyncio
import copy
from typing import Any

import pytest
import torch
from builders import FAMILIES, add_head, grpo_args, seg_bias, tiny_headed_model, tiny_model, tiny_rows
from marks import sampled
from peft import LoraConfig, get_peft_model
from trainer_checks import Collect, history, letters, overfit, same, same_masks, text_rows, weights, written_rollout
from transformers.models.qwen2 import Qwen2Config, Qwen2ForSequenceClassification
from trl.chat_template_utils import qwen3_chat_template, qwen3_vl_chat_template
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.heads import DenseLoss, attach_mask_head, detach_mask_head
from segrl.models import seg_token_id, tiny_causal_lm
from segrl.trainers import SegGRPOConfig, SegGRPOTrainer

pytestmark = [
    # TRL's word on experimental parts, and its use of names that transformers has renamed.
    pytest.mark.filterwarnings("ignore:You are using '(rollout_func|environment_factory)'"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]

TOOL_CALL = '<tool_call>\n{"name": "measure", "arguments": {"lesion": "cyst"}}\n</tool_call>'
FINAL = "<think>The cyst is large.</think><answer>The cyst is located at [3, 4, 30, 31].<seg></answer>"


def measure(lesion: str) -> str:
    """Measure a lesion.

    Args:
        lesion: its name.

    Returns:
        What was measured.
    """
    return f"a {lesion} of 12 px <seg>"


class Clinic:
    """An environment with one tool and a reward of its own."""

    def reset(self, **row) -> str:
        self.asked = 0
        return " Measure it."

    def measure(self, lesion: str) -> str:
        """Measure a lesion.

        Args:
            lesion: its name.

        Returns:
            What was measured.
        """
        self.asked += 1
        return f"a {lesion} of 12 px <seg>"

    def get_reward(self) -> float:
        return float(self.asked)


async def slow_letters(completions, **_):
    await asyncio.sleep(0)
    return letters(completions)


def reward_model(tokenizer):
    torch.manual_seed(5)
    settings: dict[str, Any] = {"num_labels": 1}
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        **settings,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForSequenceClassification(config)
    model.config._name_or_path = "tiny-judge"
    return model.eval()


def saved(model, folder):
    """`model`, able to be loaded again as TRL's reference model."""
    head = detach_mask_head(model)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    if head is not None:
        attach_mask_head(model, head)
    return model


def feature(name: str, rows: Any, processor: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arguments of the trainer that switch a feature on."""
    tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
    tokenizer.chat_template = processor.chat_template
    few = rows.select(range(4))
    return {
        "stream": ({}, {"train_dataset": rows.to_iterable_dataset()}),
        "async-reward": ({}, {"reward_funcs": [slow_letters, letters]}),
        "reward-model": (
            {"reward_weights": [0.5, 2.0]},
            {"reward_funcs": [reward_model(tokenizer), letters], "reward_processing_classes": [tokenizer, None]},
        ),
        "evaluation": (
            {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 2},
            {"eval_dataset": {"near": few, "far": few}},
        ),
        "iterations": ({"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}, {}),
        "reference": ({"beta": 0.1}, {}),
        "truncated": ({"mask_truncated_completions": True, "num_iterations": 2}, {}),
        "checkpointing": ({"activation_checkpointing": True}, {}),
        "lora": ({}, {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}),
        "lora-reference": ({"beta": 0.1}, {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}),
        "rollout": ({"max_completion_length": 64}, {"rollout_func": written_rollout(["first", FINAL, "third"])}),
        "completions-logged": ({"log_completions": True}, {}),
        "unused-columns": ({"remove_unused_columns": True}, {}),
        "tools": ({}, {"tools": [measure]}),
        "environment": ({}, {"environment_factory": Clinic}),
    }[name]


NAMES = [
    *("stream", "async-reward", "reward-model", "evaluation", "iterations", "reference", "truncated", "checkpointing"),
    *("lora", "lora-reference", "rollout", "completions-logged", "unused-columns", "tools", "environment"),
]


@pytest.mark.parametrize("name", sampled(NAMES, keep=2))
def test_without_a_head_as_in_trl(name, tmp_path):
    def run(trainer_class, config_class, folder):
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        if name in ("tools", "environment"):
            tokenizer.chat_template = qwen3_chat_template
        rows = text_rows()
        settings, arguments = feature(name, rows, tokenizer)
        args = grpo_args(folder, config_class, generation_kwargs=seg_bias(tokenizer), **settings)
        trainer = trainer_class(
            model=saved(model, tmp_path / "policy"),
            args=args,
            processing_class=tokenizer,
            **{"reward_funcs": letters, "train_dataset": rows, **arguments},
        )
        before = weights(trainer.model)
        trainer.train()
        return history(trainer), before, weights(trainer.model)

    plain_logs, before, plain = run(GRPOTrainer, GRPOConfig, tmp_path / "plain")
    logs, _, ours = run(SegGRPOTrainer, SegGRPOConfig, tmp_path / "seg")
    assert logs == plain_logs
    assert same(plain, ours)
    assert not same(before, ours)


@pytest.mark.parametrize("name", sampled(NAMES, keep=2))
def test_with_a_head(name, tmp_path):
    model, processor = tiny_headed_model("qwen3_vl")
    if name in ("tools", "environment"):
        processor.chat_template = qwen3_vl_chat_template
    rows = tiny_rows(8, processor, completions=False)
    settings, arguments = feature(name, rows, processor)
    collect = Collect()
    arguments.setdefault("reward_funcs", [letters])
    arguments["reward_funcs"] = [*arguments["reward_funcs"], collect, "dual_granularity_mask"]
    if "reward_processing_classes" in arguments:
        arguments["reward_processing_classes"] += [None, None]
        settings["reward_weights"] += [1.0, 1.0]
    args = grpo_args(tmp_path, generation_kwargs=seg_bias(processor), **settings)
    trainer = SegGRPOTrainer(
        model=saved(model, tmp_path / "policy"),
        args=args,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        **{"train_dataset": rows, **arguments},
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("mask_head.adapter." in key for key in changed)
    assert any("mask_head.segmenter.sam.sam_mask_decoder." in key for key in changed)
    assert any("language_model.layers" in key for key in changed)
    if "lora" in name:
        assert all("lora_" in key or "mask_head." in key for key in changed)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = {"policy", "policy_weighted", "dense/dice_ce", "dense/dice_ce_weighted", "rollout/dice"}
    expected |= {"rollout/valid", "rollout/fail", "rewards/dual_granularity_mask/mean"}
    assert expected <= logs[0].keys()
    assert any(prediction.mask is not None for prediction in collect.joined("prediction"))
    if name == "evaluation":
        evaluations = [entry for entry in trainer.state.log_history if "eval_near_loss" in entry]
        assert len(evaluations) == 2
        assert {"eval_policy", "eval_dense/dice_ce", "eval_rollout/dice"} <= evaluations[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps_per_generation"), [("tools", 1), ("environment", 2)])
def test_masks_after_tool_calls(kind, steps_per_generation, tmp_path):
    """Two turns: the last `<seg>` of the model counts, the tool's does not, and the states are those of the whole."""
    model, processor = tiny_model("qwen3_vl")
    processor.chat_template = qwen3_vl_chat_template
    rows = tiny_rows(1, processor, completions=False)
    rows = rows.select([0] * 4)
    asked = rows[0]["prompt"][0]["content"] + (" Measure it." if kind == "environment" else "")
    call = {"type": "function", "function": {"name": "measure", "arguments": {"lesion": "cyst"}}}

    def text(content):
        return [{"type": "text", "text": content}]

    conversation = [
        {"role": "user", "content": [{"type": "image", "image": rows[0]["image"]}, *text(asked)]},
        {"role": "assistant", "content": text(""), "tool_calls": [call]},
        {"role": "tool", "name": "measure", "content": text(measure("cyst"))},
        {"role": "assistant", "content": text(FINAL)},
    ]
    tool = measure if kind == "tools" else Clinic().measure
    given: dict[str, Any] = {"tools": [measure]} if kind == "tools" else {"environment_factory": Clinic}
    assert overfit(model, processor, conversation, [tool]) < 0.05
    add_head(model, processor)
    collect = Collect()
    trainer = SegGRPOTrainer(
        model,
        ["format", collect],
        grpo_args(
            tmp_path,
            max_steps=1,
            learning_rate=0.0,
            temperature=0.05,
            max_completion_length=160,
            steps_per_generation=steps_per_generation,
        ),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        **given,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] == 1.0
    assert log["tools/failure_frequency"] == 0.0
    assert log["dense/dice_ce"] > 0.0
    seg = seg_token_id(processor)
    for ids, prediction in zip(collect.joined("completion_ids"), collect.joined("prediction"), strict=True):
        assert ids.count(seg) == 2  # the tool's and the model's
        assert prediction.mask is not None
        assert prediction.valid, prediction.text
    if kind == "environment":
        assert log["rewards/Clinic/mean"] == 1.0
    else:
        assert same_masks(trainer.model, processor, rows, collect, tools=[measure]) == 4 * steps_per_generation


def test_a_tools_seg_is_not_the_models(tmp_path):
    """The model calls the tool, whose text holds a `<seg>`, and then writes none of its own."""
    model, processor = tiny_model("qwen3_vl")
    rows = tiny_rows(4, processor, completions=False)

    def rollout(prompts, trainer):
        tokenizer = trainer._tokenizer
        own, tool, end = (tokenizer(text)["input_ids"] for text in ("Call.", "of 12 px <seg>", "Done."))
        return {
            "prompt_ids": trainer._tokenize_prompts(prompts)[0],
            "completion_ids": [own + tool + end + [tokenizer.eos_token_id]] * len(prompts),
            "logprobs": None,
            "env_mask": [[1] * len(own) + [0] * len(tool) + [1] * (len(end) + 1)] * len(prompts),
        }

    collect = Collect()
    trainer = SegGRPOTrainer(
        add_head(model, processor),
        collect,
        grpo_args(tmp_path, max_steps=1, max_completion_length=64),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        rollout_func=rollout,
    )
    trainer.train()
    assert all(prediction.mask is None for prediction in collect.joined("prediction"))
    assert trainer.state.log_history[0]["dense/dice_ce"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("change", ["none", "more", "other-prompt"])
def test_states_of_a_rollout_function_that_generates(change, tmp_path):
    """A rollout function may use the trainer's own generation; its states count only if nothing was changed since."""
    model, processor = tiny_headed_model()
    rows = tiny_rows(2, processor, completions=False)

    def rollout(prompts, trainer):
        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        if change == "other-prompt":
            prompt_ids = [[*ids, trainer._tokenizer.convert_tokens_to_ids("<answer>")] for ids in prompt_ids]
            fields["mm_token_type_ids"] = [[*row, 0] for row in fields["mm_token_type_ids"]]
        ids, _ = trainer._generate_single_turn(prompt_ids, images, fields, trainer.num_generations)
        if change == "more":
            ids = [[*row, *trainer._tokenizer("More.")["input_ids"], trainer._tokenizer.eos_token_id] for row in ids]
        if change == "other-prompt":
            prompt_ids = trainer._tokenize_prompts(prompts)[0]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    collect = Collect()
    trainer = SegGRPOTrainer(
        model,
        collect,
        grpo_args(
            tmp_path,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=8,
            generation_kwargs=seg_bias(processor),
        ),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        rollout_func=rollout,
    )
    trainer.train()
    assert same_masks(model, processor, rows, collect) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    model, processor = tiny_headed_model(family)
    before = weights(model)
    trainer = SegGRPOTrainer(
        model,
        ["format", "box_f1", "dual_granularity_mask", letters],
        grpo_args(tmp_path, generation_kwargs=seg_bias(processor)),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce", 0.5)],
    )
    trainer.train()
    after = weights(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("mask_head.adapter.") for name in changed)
    assert any("language_model.layers.0." in name for name in changed)
    assert not any(name.startswith("mask_head.segmenter.sam.image_encoder.") for name in changed)
    logs = trainer.state.log_history[:2]
    for log in logs:
        assert {f"rewards/{name}/mean" for name in ("format", "box_f1", "dual_granularity_mask")} <= log.keys()
        assert log["policy"] == log["policy_weighted"]
        assert log["dense/dice_ce"] > 0
        assert log["dense/dice_ce_weighted"] == pytest.approx(0.5 * log["dense/dice_ce"])
        assert log["loss"] == pytest.approx(log["policy"] + 0.5 * log["dense/dice_ce"], abs=1e-4)


def test_images_column(tmp_path):
    model, processor = tiny_headed_model()
    rows = tiny_rows(4, processor, completions=False)
    rows = rows.map(lambda row: {"images": [row["image"], row["image"]]}, remove_columns="image")
    collect = Collect()
    trainer = SegGRPOTrainer(
        model,
        collect,
        grpo_args(tmp_path, max_steps=1, generation_kwargs=seg_bias(processor)),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
    )
    trainer.train()
    assert any(prediction.mask is not None for prediction in collect.joined("prediction"))
    assert model.mask_head.encoded_images == 1


def test_text_model_with_segrl_rewards(tmp_path):
    """A model without images may still be paid by segrl's rewards for text and boxes, in the frame of the mask."""
    from datasets import Dataset

    model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
    mask = [[1] * 8 + [0] * 8] * 16
    rows = Dataset.from_dict({"prompt": ["Where is it?", "And here?"], "mask": [mask, mask]})
    collect = Collect()
    trainer = SegGRPOTrainer(
        model,
        ["format", "box_f1", collect],
        grpo_args(tmp_path, max_steps=1, per_device_train_batch_size=8, max_completion_length=64),
        train_dataset=rows,
        processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": [
                tokenizer(f"<think>a</think><answer>at [0, 0, {right}, 1000].<seg></answer>")["input_ids"]
                for right in [500, 250] * (len(prompts) // 2)
            ],
            "logprobs": None,
        },
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/format/mean"] == 1.0
    assert log["rewards/box_f1/mean"] == pytest.approx(0.5)
    assert collect.joined("prediction")[0].boxes.tolist() == [[0, 0, 8, 16]]


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_masks_are_never_those_of_the_lora_reference(wrapped, tmp_path):
    """The reference pass runs the same model with adapters off, or with a copy: its states are not the policy's."""
    model, processor = tiny_model()
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = add_head(get_peft_model(model, config) if wrapped else model, processor)
    rows = tiny_rows(4, processor, completions=False)
    collect = Collect()
    trainer = SegGRPOTrainer(
        model,
        collect,
        grpo_args(tmp_path, max_steps=1, beta=0.1, learning_rate=0.0, max_completion_length=64),
        train_dataset=rows,
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce")],
        rollout_func=written_rollout([FINAL]),
        peft_config=None if wrapped else config,
    )
    trainer.train()
    trained: Any = trainer.model
    divergence = trainer.state.log_history[0]["kl"]
    assert divergence == pytest.approx(0.0, abs=1e-5) if wrapped else divergence > 1e-3
    assert same_masks(trained.get_base_model(), processor, rows, collect) == 4
