"""Whole runs of `SegGRPOTrainer` with shared prompts: the same texts, masks, losses and weights, with less work."""

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from builders import FAMILIES, add_head, grpo_args, seg_bias, tiny_model, tiny_rows
from datasets import Dataset
from marks import sampled
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sharing_checks import build, seen_by, tower_of
from sharing_runs import run, same_runs
from trainer_checks import history, letters, overfit, text_rows, weights, written_rollout
from trl.chat_template_utils import qwen3_chat_template, qwen3_vl_chat_template

from segrl.heads import DenseLoss, detach_mask_head
from segrl.models import backbone_of
from segrl.trainers import SegGRPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning"),
]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 8, "num_generations": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "old": {"per_device_train_batch_size": 2, "steps_per_generation": 2, "max_steps": 4},
    "iterations": {"num_iterations": 2, "max_steps": 2},
    "truncated": {"mask_truncated_completions": True, "num_iterations": 2, "per_device_train_batch_size": 8},
    "reference": {"beta": 0.1, "per_device_train_batch_size": 8},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "padded": {"pad_to_multiple_of": 8, "per_device_train_batch_size": 8},
    "grpo": {"loss_type": "grpo", "scale_rewards": "none", "per_device_train_batch_size": 8, "temperature": 1.3},
}


@pytest.mark.parametrize("name", sampled(SETTINGS))
@pytest.mark.parametrize("head", [False, True])
def test_runs_equal_trls(name, head, tmp_path):
    with_head = {"plain": FAMILIES, "reference": ["qwen3_vl"], "old": ["llava", "qwen3_vl"]}.get(name, ["qwen2_5_vl"])
    for kind in with_head if head else ["text"]:
        settings = {"num_generations": 4, "max_steps": 1, **SETTINGS[name]}
        runs = [run(tmp_path, kind, share=share, head=head, **settings) for share in (True, False)]
        same_runs(*runs)
        for what in ("score", "loss"):
            mine, yours = (trainer.tokens(what) for trainer in runs)
            assert len(mine) == len(yours)
            assert sum(mine) < 0.75 * sum(yours) or not yours
        assert len(runs[0].tokens("generate")) == len(runs[1].tokens("generate"))
        assert sum(runs[0].tokens("generate")) < sum(runs[1].tokens("generate"))


@pytest.mark.long
@pytest.mark.parametrize("new", [False, True])
def test_lora_with_its_reference(new, tmp_path):
    """A new adapter, whose reference is the model without it; and one that is trained on, whose reference is a copy."""
    runs = []
    for share in (True, False):
        model, processor = build("qwen2_5_vl")
        torch.manual_seed(2)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        arguments: dict[str, Any] = {"peft_config": config}
        if not new:
            model, arguments = get_peft_model(model, config), {"peft_config": None}
        settings: dict[str, Any] = {"model": (model, processor), "beta": 0.1, "arguments": arguments}
        runs.append(run(tmp_path, share=share, per_device_train_batch_size=2, steps_per_generation=2, **settings))
    same_runs(*runs)
    assert runs[0].state.log_history[0]["kl"] == pytest.approx(runs[1].state.log_history[0]["kl"], rel=1e-3, abs=1e-5)
    assert all("lora_" in name or "mask_head" in name for name in runs[0].kept.steps[0])


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answers", "rows", "steps"), sampled([(4, 2, 4), (3, 4, 3), (6, 4, 3), (2, 4, 2), (5, 1, 5)]))
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_answers_to_a_prompt_stay_side_by_side(kind, answers, rows, steps, tmp_path):
    """Through shuffling and accumulation, also where a micro-batch holds part of a group; the gradient is TRL's."""
    settings = {"num_generations": answers, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    shared, dense = (run(tmp_path, kind, share=share, head=False, max_steps=1, **settings) for share in (True, False))
    same_runs(shared, dense)
    keys = [key for batch in shared.batches for key in batch["prompt_keys"]]
    assert [len(batch["prompt_keys"]) for batch in shared.batches] == [rows] * steps
    groups = rows * steps // answers
    assert len(set(keys)) == groups
    changes = sum(one != other for one, other in pairwise(keys))
    assert changes == groups - 1
    for batch, tokens in zip(shared.batches, shared.tokens("loss"), strict=True):
        own = batch["prompt_keys"]
        expected = sum(len(key.tokens) for key in set(own)) + int(batch["completion_mask"].sum())
        if len(set(own)) == rows:
            expected = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        assert tokens == expected
        for key, ids, mask in zip(own, batch["prompt_ids"], batch["prompt_mask"], strict=True):
            assert ids[mask.bool()].tolist() == list(key.tokens)
    texts = [
        sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in trainer.batches
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        )
        for trainer in (shared, dense)
    ]
    assert texts[0] == texts[1]


@pytest.mark.long
def test_pictures_move_with_their_rows(tmp_path):
    """Prompts with one, two and three pictures, in micro-batches that cut groups."""
    _, processor = tiny_model()
    rows = tiny_rows(6, processor, completions=False)
    pictures = [row["image"] for row in rows]
    rows = rows.map(lambda row, n: {"images": pictures[n : n + 1 + n % 3]}, with_indices=True, remove_columns="image")
    for kind in ("qwen3_vl", "llava"):
        settings: dict[str, Any] = {
            "num_generations": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 6,
        }
        same_runs(*(run(tmp_path, kind, share=share, rows=rows, max_steps=1, **settings) for share in (True, False)))


@pytest.mark.parametrize("kind", sampled(FAMILIES))
def test_the_same_words_about_other_pictures(kind, tmp_path):
    _, processor = tiny_model()
    rows = tiny_rows(4, processor, completions=False)
    rows = rows.remove_columns("prompt").add_column("prompt", [rows[0]["prompt"]] * 4)
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1, "rows": rows}
    runs = [run(tmp_path, kind, share=share, **settings) for share in (True, False)]
    same_runs(*runs)
    (batch,) = runs[0].batches
    assert len({key.tokens for key in batch["prompt_keys"]}) == 1
    assert len(set(batch["prompt_keys"])) == 2


@pytest.mark.slow
def test_evaluation(tmp_path):
    results = []
    for share in (True, False):
        model, processor = tiny_model()
        rows = tiny_rows(4, processor, completions=False)
        evaluated = []
        for answers in (1, 2):
            args = grpo_args(
                tmp_path,
                share_prompt=share,
                num_generations_eval=answers,
                per_device_eval_batch_size=4,
                generation_kwargs=seg_bias(processor),
            )
            trainer = SegGRPOTrainer(
                add_head(model, processor),
                [letters, "format"],
                args,
                train_dataset=rows,
                eval_dataset=rows,
                processing_class=processor,
                dense_losses=[DenseLoss("dice_ce")],
            )
            torch.manual_seed(4)
            found = trainer.evaluate()
            evaluated.append({k: v for k, v in found.items() if "time" not in k and "per_second" not in k})
            detach_mask_head(model)
        results.append(evaluated)
    for mine, yours in zip(*results, strict=True):
        assert mine == pytest.approx(yours, rel=1e-4, abs=1e-5)


# ---- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sampled(FAMILIES))
@pytest.mark.parametrize("frozen", [True, False])
def test_each_picture_is_prepared_and_encoded_once(family, frozen, tmp_path):
    """Two groups about three pictures, one of them in both: old scores, two micro-batches of loss, and generation."""
    model, processor = build(family)
    rows = tiny_rows(3, processor, completions=False)
    one, two, three = [row["image"] for row in rows]
    rows = Dataset.from_list([{**rows[0], "images": [one, two]}, {**rows[1], "images": [two, three, three]}])
    rows = rows.cast_column("images", tiny_rows(1, processor).map(lambda r: {"images": [one]}).features["images"])
    prepared: list[int] = []
    inner = processor.image_processor

    class Counting(type(inner)):
        def __call__(self, images: Any = None, *args, **kwargs):
            flat = [image for group in images for image in (group if isinstance(group, list) else [group])]
            prepared.append(len(flat))
            return super().__call__(images, *args, **kwargs)

    inner.__class__ = Counting
    if frozen:
        for parameter in [
            *tower_of(model).parameters(),
            *getattr(model.model, "multi_modal_projector", model.lm_head).parameters(),
        ]:
            parameter.requires_grad_(False)
    with seen_by(tower_of(model)) as pictures:
        trainer = run(
            tmp_path,
            model=(model, processor),
            head=False,
            rows=rows.remove_columns("image"),
            num_generations=4,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            max_steps=2,
        )
    assert sum(prepared) == 3
    if frozen:
        assert sum(pictures) == 3
    else:
        assert sorted(pictures) == sorted([3, 2, 2, 2, 2])  # generation, twice old scores, twice a loss
    assert len(trainer.tokens("score")) == len(trainer.tokens("loss")) == 2


@pytest.mark.slow
def test_a_rollout_function_shares_as_well(tmp_path):
    """Texts from outside, as vLLM's: their states come from the old-log-prob pass or one forward, which are shared."""
    texts = ["<answer><seg> two of them <seg></answer>", "<think>no mask</think>", "The lesion <seg>", "a <seg> b"]
    for steps in (1, 2):
        settings: dict[str, Any] = {"max_completion_length": 64, "steps_per_generation": steps, "max_steps": steps}
        settings |= {"per_device_train_batch_size": 4 // steps, "arguments": {"rollout_func": written_rollout(texts)}}
        shared, dense = (run(tmp_path, share=share, **settings) for share in (True, False))
        same_runs(shared, dense)
        assert 0 < shared.all_tokens() < 0.75 * dense.all_tokens()


def places(completions: Any, **_: Any) -> list[float]:
    """A reward that tells equal texts apart as well."""
    return [float(n) for n in range(len(completions))]


def measure(lesion: str) -> str:
    """Measure a lesion.

    Args:
        lesion: its name.

    Returns:
        What was measured.
    """
    return f"a {lesion} of 12 px"


@pytest.mark.slow
def test_tools(tmp_path):
    """A real call of a tool, whose answer is in the completion but not the policy's, for all answers to one prompt."""
    call = {"type": "function", "function": {"name": "measure", "arguments": {"lesion": "cyst"}}}
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Measure it."}]] * 4})
    model, tokenizer = build("text")
    tokenizer.chat_template = qwen3_chat_template
    talk = [
        {"role": "user", "content": "Measure it."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "measure", "content": measure("cyst")},
        {"role": "assistant", "content": "It is small."},
    ]
    overfit(model, tokenizer, talk, [measure], steps=120)
    runs = []
    for share in (True, False):
        settings: dict[str, Any] = {"temperature": 0.8, "max_completion_length": 120, "generation_kwargs": {}}
        settings |= {"arguments": {"tools": [measure]}, "rows": rows, "max_steps": 1, "score": places}
        runs.append(run(tmp_path, "text", share=share, model=(copy.deepcopy(model), tokenizer), **settings))
    same_runs(*runs)
    assert runs[0].state.log_history[0]["tools/call_frequency"] > 0
    (batch,) = runs[0].batches
    assert 0 < (batch["tool_mask"] * batch["completion_mask"]).sum() < batch["completion_mask"].sum()
    assert sum(runs[0].tokens("loss")) < 0.75 * sum(runs[1].tokens("loss"))


@pytest.mark.long
def test_tools_that_answer_with_pictures(tmp_path):
    """Their place is in the completion, where a packed row has only text: these rows are computed as in TRL."""
    model, processor = build("qwen3_vl")
    processor.chat_template = qwen3_vl_chat_template
    rows = tiny_rows(1, processor, completions=False).select([0] * 4)
    shown = [{"type": "image", "image": rows[0]["image"].transpose(0)}, {"type": "text", "text": "Enlarged."}]

    def measure(lesion: str) -> list:
        """Enlarge a lesion.

        Args:
            lesion: its name.

        Returns:
            The picture.
        """
        return shown

    call = {"type": "function", "function": {"name": "measure", "arguments": {"lesion": "cyst"}}}
    asked = [
        {"type": "image", "image": rows[0]["image"]},
        {"type": "text", "text": rows[0]["prompt"][0]["content"]},
    ]
    talk = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [call]},
        {"role": "tool", "name": "measure", "content": shown},
        {"role": "assistant", "content": [{"type": "text", "text": "<answer>It is small.<seg></answer>"}]},
    ]
    overfit(model, processor, talk, [measure])
    runs = []
    for share in (True, False):
        settings: dict[str, Any] = {"temperature": 0.8, "max_completion_length": 160, "generation_kwargs": {}}
        settings |= {"arguments": {"tools": [measure]}, "rows": rows, "max_steps": 1, "head": False, "score": places}
        runs.append(run(tmp_path, share=share, model=(copy.deepcopy(model), processor), **settings))
    same_runs(*runs)
    assert runs[0].state.log_history[0]["tools/call_frequency"] > 0
    assert runs[0].tokens("loss") == runs[1].tokens("loss")
    assert sum(runs[0].tokens("generate")) < sum(runs[1].tokens("generate"))


# ---- before and after ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_model_after_training(tmp_path):
    """It is saved and loaded as ever, and generates as a copy that never shared a prompt."""
    for kind in (*FAMILIES, "text"):
        trainer = run(tmp_path / kind, kind, head=False, max_steps=1)
        trainer.save_model(str(tmp_path / kind / "saved"))
        loaded = type(trainer.model).from_pretrained(tmp_path / kind / "saved").eval()
        assert weights(loaded).keys() == weights(trainer.model).keys()
        assert all(torch.equal(value, weights(trainer.model)[name]) for name, value in weights(loaded).items())
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = tokenizer(["Where is it?", "And the lesion?"], padding=True, return_tensors="pt", padding_side="left")
        trainer.model.eval()
        written = [model.generate(**ids, max_new_tokens=8, do_sample=False) for model in (trainer.model, loaded)]
        assert torch.equal(*written)


TEXT: dict[str, Any] = {
    **{"vocab_size": 672, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def unsupported(name: str) -> tuple[Any, str]:
    model, _ = build("text")
    if name == "window":
        config = transformers.MistralConfig(**TEXT, sliding_window=8)
        return transformers.MistralForCausalLM(config), "a sliding window of 8 tokens"
    if name == "router":
        config = transformers.MixtralConfig(**TEXT, num_local_experts=2)
        return transformers.MixtralForCausalLM(config), "the router's auxiliary loss counts every token"
    if name == "prompt-learning":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return get_peft_model(model, config), "PromptTuningConfig puts virtual tokens before the prompt"
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, 1))
    return model, "states of Qwen2ForCausalLM differ"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(expert|router|aux).*:UserWarning")
@pytest.mark.parametrize("name", ["window", "router", "prompt-learning", "wrong"])
def test_unsupported_model_trains_as_in_trl_with_one_warning(name, tmp_path):
    logs = []
    for share in (True, False):
        torch.manual_seed(0)
        model, reason = unsupported(name)
        _, tokenizer = build("text")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = grpo_args(tmp_path, share_prompt=share, max_steps=2)
            trainer = SegGRPOTrainer(model, letters, args, train_dataset=text_rows(), processing_class=tokenizer)
            assert trainer._shares is False
            trainer.train()
        told = [warning for warning in caught if "share_prompt" in str(warning.message)]
        assert len(told) == (1 if share else 0)
        for warning in told:
            assert reason in str(warning.message)
            assert "share_prompt=False" in str(warning.message)
            assert warning.filename == __file__
        logs.append((history(trainer), weights(trainer.model)))
    assert logs[0][0] == logs[1][0]
    assert all(torch.equal(value, logs[1][1][name]) for name, value in logs[0][1].items())


@pytest.mark.parametrize(
    ("share", "kind", "shares"),
    [
        *((None, kind, kind != "plain") for kind in ("plain", "reward", "head", "loss")),
        (True, "plain", True),
        (False, "loss", False),
    ],
)
def test_who_shares_when_nobody_says_so(share, kind, shares, tmp_path):
    """A run with anything of segrl in it; one with nothing of it stays TRL's, bit for bit."""
    model, processor = build("llava")
    if kind in ("head", "loss"):
        add_head(model, processor)
    trainer = SegGRPOTrainer(
        model,
        "format" if kind == "reward" else letters,
        grpo_args(tmp_path, **({} if share is None else {"share_prompt": share})),
        train_dataset=tiny_rows(2, processor, completions=False),
        processing_class=processor,
        dense_losses=[DenseLoss("dice")] if kind == "loss" else None,
    )
    assert trainer._shares is shares


def test_settings_of_trl_share_nothing(tmp_path):
    from trl.trainer.grpo_config import GRPOConfig

    model, tokenizer = build("text")
    args = grpo_args(tmp_path, GRPOConfig, max_steps=1)
    trainer = SegGRPOTrainer(model, letters, args, train_dataset=text_rows(), processing_class=tokenizer)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert trainer._shares is False
    assert hooks == 0
    assert "get_image_features" not in vars(backbone_of(model))
