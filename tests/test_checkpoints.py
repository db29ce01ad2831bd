"""Save, resume and load: full models and PEFT adapters with a mask head, in this process and in a fresh one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import as_data, questions, tiny_headed_model, tiny_model, tiny_rows, with_answers
from marks import slow_to_build
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from script_modules import read_json
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.errors import CheckpointError
from segrl.heads import find_mask_head
from segrl.inference import ReasoningSegmenter
from segrl.models import restore_weights, seg_token_id
from segrl.predictions import ImagePromptSettings, prompt_settings_from_dict
from segrl.trainers.checkpoints import write_manifest

SETTINGS = ImagePromptSettings(instruction="Answer.", max_new_tokens=60)
ANSWER = "<think>One dark cyst.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"
OTHER = "<think>One dark cyst.</think><answer>The dark cyst is located at [4, 5, 31, 42].<seg></answer>"
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}


def length_reward(completions, **_) -> list[float | None]:
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def sft(
    folder, model, processor, *, rows=None, eval_rows=None, peft_config=None, validate=None, callbacks=None, **settings
) -> Any:
    return SegSFTTrainer(
        model,
        SegSFTConfig(str(folder), **{"max_length": None, **COMMON, **settings}),
        train_dataset=tiny_rows(8, processor) if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
        dense_losses=[DenseLoss("dice_ce")],
        prompt_settings=SETTINGS,
        validate=validate,
        callbacks=callbacks,
    )


def grpo(folder, model, processor, *, peft_config=None, **settings) -> Any:
    often = {"sequence_bias": [[[seg_token_id(processor)], 6.0]]}
    sizes = {"num_generations": 4, "max_completion_length": 12, "generation_kwargs": often}
    return SegGRPOTrainer(
        model,
        ["format", length_reward],
        SegGRPOConfig(str(folder), **{**sizes, **COMMON, **settings}),
        train_dataset=tiny_rows(8, processor, completions=False),
        processing_class=processor,
        peft_config=peft_config,
        dense_losses=[DenseLoss("dice_ce")],
        prompt_settings=SETTINGS,
    )


def plain_sft(folder, model, processor, **settings):
    args = SFTConfig(str(folder), **{"max_length": None, **COMMON, **settings})
    return SFTTrainer(model, args, train_dataset=tiny_rows(8, processor), processing_class=processor)


def plain_grpo(folder, model, processor, **settings):
    sizes = {"num_generations": 4, "max_completion_length": 12}
    args = GRPOConfig(str(folder), **{**sizes, **COMMON, **settings})
    rows = tiny_rows(8, processor, completions=False)
    return GRPOTrainer(model, length_reward, args, train_dataset=rows, processing_class=processor)


def largest_difference(model, other):
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    return max((value - expected[key]).abs().max().item() for key, value in model.state_dict().items())


def lora(processor, **changes):
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        "trainable_token_indices": {"embed_tokens": [seg_token_id(processor)]},
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **changes})


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize("build", [plain_sft, plain_grpo])
    def test_what_plain_trl_gives(self, build, tmp_path):
        """The measure for the tests below: where TRL's resume finds the weights, 2 + 2 steps equal 4 exactly.

        Qwen3-VL is saved under its own names. Qwen2.5-VL is not: there TRL resumes with the weights it started from.
        """
        models = []
        for name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
            model, processor = tiny_model("qwen3_vl")
            trainer = build(tmp_path / name, model, processor, max_steps=4, save_steps=2)
            trainer.train(resume_from_checkpoint=checkpoint)
            models.append(model)
        assert largest_difference(*models) == 0.0

    @pytest.mark.slow
    @pytest.mark.parametrize("build", [sft, grpo])
    @pytest.mark.parametrize(("family", "freeze_encoder"), [("qwen2_5_vl", True), ("llava", False)])
    def test_resumed_steps_equal_uninterrupted_ones(self, build, family, freeze_encoder, tmp_path):
        models, logs = [], []
        for name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
            model, processor = tiny_headed_model(family, freeze_encoder=freeze_encoder)
            trainer = build(
                tmp_path / name, model, processor, max_steps=4, save_steps=2, head_learning_rate=1e-2, seed=5
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            groups = [(group["initial_lr"], len(group["params"])) for group in trainer.optimizer.param_groups]
            assert {rate for rate, _ in groups} == {3e-3, 1e-2}
            head: Any = find_mask_head(model)
            trains = sum(p.requires_grad for p in head.parameters())
            assert sum(count for rate, count in groups if rate == 1e-2) == trains
            models.append(model)
            logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert largest_difference(*models) == 0.0
        assert logs[0] == logs[1]
        start, _ = tiny_headed_model(family, freeze_encoder=freeze_encoder)
        moved = {n for n, p in start.named_parameters() if not torch.equal(p, models[0].get_parameter(n))}
        assert any("mask_head.adapter" in name for name in moved)
        assert any("image_encoder" in name for name in moved) is not freeze_encoder

    @pytest.mark.slow
    def test_a_peft_run_resumes(self, tmp_path):
        models = []
        for name, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
            model, processor = tiny_headed_model()
            trainer = sft(
                tmp_path / name,
                model,
                processor,
                max_steps=4,
                save_steps=2,
                peft_config=lora(processor, lora_dropout=0.0),
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            models.append(trainer.model)
        assert largest_difference(*models) == 0.0

    @pytest.mark.parametrize("build", [sft, grpo])
    def test_files(self, build, tmp_path):
        model, processor = tiny_headed_model()
        trainer = build(tmp_path, model, processor, max_steps=2, save_steps=1)
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
            names = {path.name for path in folder.iterdir()}
            assert {"model.safetensors", "mask_head.safetensors", "mask_head.json", "tokenizer.json"} <= names
            assert prompt_settings_from_dict(read_json(folder / "segrl.json")) == SETTINGS
            keys = set(load_file(folder / "model.safetensors"))
            assert not any("mask_head" in key for key in keys)
            head: Any = find_mask_head(model)
            assert load_file(folder / "mask_head.safetensors").keys() == head.state_dict().keys()
        assert find_mask_head(model) is trainer.mask_head  # back on the model after saving
        first, last = (load_file(tmp_path / f"checkpoint-{n}" / "mask_head.safetensors") for n in (1, 2))
        assert any(not torch.equal(first[key], last[key]) for key in first)
        assert all(torch.equal(value.cpu(), last[key]) for key, value in trainer.mask_head.state_dict().items())

    def test_a_checkpoint_that_lost_a_weight_stops(self, tmp_path):
        model, processor = tiny_headed_model()
        sft(tmp_path, model, processor, max_steps=1, save_steps=1).train()
        path = tmp_path / "checkpoint-1" / "model.safetensors"
        state = load_file(path)
        del state["model.norm.weight"]
        save_file(state, path, metadata={"format": "pt"})
        write_manifest(path.parent)
        trainer = sft(tmp_path, *tiny_headed_model(), max_steps=2)
        with pytest.raises(CheckpointError, match=r"checkpoint-1' does not hold all .* 1 missing: .*norm\.weight"):
            trainer.train(resume_from_checkpoint=str(path.parent))

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_weights_in_shards_are_restored(self, family, tied, tmp_path):
        source, _ = tiny_model(family, seed=1, tie_word_embeddings=tied)
        source.save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        model, _ = tiny_model(family, seed=2, tie_word_embeddings=tied)
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        restore_weights(model, tmp_path)
        assert torch.equal(torch.rand(1), expected)
        assert largest_difference(model, source) == 0.0

    def test_weights_of_another_size_are_an_error(self, tmp_path):
        tiny_model(hidden_size=96)[0].save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match="is of another Qwen2_5_VLForConditionalGeneration than the one in mem"
        ):
            restore_weights(tiny_model()[0], tmp_path)

    def test_a_checkpoint_without_head_files_stops(self, tmp_path):
        model, processor = tiny_headed_model()
        sft(tmp_path, model, processor, max_steps=1, save_steps=1).train()
        (tmp_path / "checkpoint-1" / "mask_head.safetensors").unlink()
        trainer = sft(tmp_path, *tiny_headed_model(), max_steps=2)
        with pytest.raises(CheckpointError, match=r"checkpoint-1' cannot be resumed: no mask_head\.safetensors"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    @pytest.mark.parametrize("build", [sft, grpo])
    def test_a_checkpoint_of_the_last_step_is_not_trained_further(self, build, tmp_path):
        model, processor = tiny_headed_model()
        build(tmp_path, model, processor, max_steps=3, save_steps=1).train()
        other, processor = tiny_headed_model()
        trainer = build(tmp_path, other, processor, max_steps=3, save_steps=1)
        assert trainer.train(resume_from_checkpoint=True).global_step == 3
        assert trainer.state.global_step == 3
        assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
        assert largest_difference(other, model) == 0.0
        assert build(tmp_path, other, processor, max_steps=4).train(resume_from_checkpoint=True).global_step == 4

    @pytest.mark.parametrize("lost", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
    def test_a_checkpoint_without_a_state_stops(self, lost, tmp_path):
        """transformers goes on without a word."""
        model, processor = tiny_headed_model()
        sft(tmp_path, model, processor, max_steps=2, save_steps=1).train()
        (tmp_path / "checkpoint-2" / lost).unlink()
        trainer = sft(tmp_path, *tiny_headed_model(), max_steps=3)
        with pytest.raises(CheckpointError, match=rf"checkpoint-2' cannot be resumed: no {lost}; pass another one"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.train(resume_from_checkpoint=True).global_step == 3  # from checkpoint-1
        for checkpoint in tmp_path.glob("checkpoint-*"):
            (checkpoint / lost).unlink()
        with pytest.raises(CheckpointError, match=r"no complete checkpoint in '.*'.*; checkpoint-1: no"):
            sft(tmp_path, *tiny_headed_model(), max_steps=3).train(resume_from_checkpoint=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("peft", [False, True])
    def test_load_best_model_at_end_brings_back_model_and_head(self, peft, tmp_path):
        model, processor = tiny_headed_model()
        trainer = sft(
            tmp_path,
            model,
            processor,
            peft_config=lora(processor) if peft else None,
            eval_rows=tiny_rows(4, processor, seed=1),
            max_steps=4,
            save_steps=1,
            eval_steps=1,
            eval_strategy="steps",
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            learning_rate=3.0,  # diverges: the first checkpoints are the best
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
        )
        trainer.train()
        best = Path(str(trainer.state.best_model_checkpoint))
        assert best.name != "checkpoint-4"
        saved, current = load_file(best / "mask_head.safetensors"), trainer.mask_head.state_dict()
        assert all(torch.equal(saved[key], current[key]) for key in saved)
        last = load_file(tmp_path / "checkpoint-4" / "mask_head.safetensors")
        assert any(not torch.equal(last[key], current[key]) for key in saved)
        again = ReasoningSegmenter.from_pretrained(best, device="cpu") if not peft else None
        if again is not None:
            assert largest_difference(again.model, model) == 0.0
        else:
            adapter = load_file(best / "adapter_model.safetensors")
            name = next(key for key in adapter if "lora_B" in key)
            own = trainer.model.get_parameter(name.replace("lora_B.weight", "lora_B.default.weight"))
            assert torch.equal(own, adapter[name])


def answering(folder, tied):
    """A model that gives `ANSWER` to everything, trained and saved as a user does it."""
    model, processor = tiny_headed_model(max_pixels=56 * 56, tie_word_embeddings=tied)
    rows = with_answers(tiny_rows(4, processor), [ANSWER])
    trainer = sft(folder, model, processor, rows=rows, max_steps=60, lr_scheduler_type="constant", save_strategy="no")
    trainer.train()
    trainer.save_model()
    return ReasoningSegmenter(model.eval(), processor, SETTINGS)


@pytest.fixture(scope="module")
@slow_to_build
def run(tmp_path_factory):
    """A run's folder and the predictions of the model in memory."""
    folder = tmp_path_factory.mktemp("run")
    predictions = answering(folder, tied=False).predict_batch(*questions())
    assert [p.text for p in predictions] == [ANSWER] * 3
    return folder, as_data(predictions)


@pytest.fixture(scope="module", params=["untied", "tied"])
@slow_to_build
def adapter_run(request, tmp_path_factory):
    """A PEFT run on a base model in a folder: LoRA and the trained row of `<seg>`."""
    if request.param == "tied":
        base = tmp_path_factory.mktemp("base")
        answering(base, tied=True)
    else:
        base, _ = request.getfixturevalue("run")
    folder = tmp_path_factory.mktemp("adapter")
    segmenter = ReasoningSegmenter.from_pretrained(base, device="cpu")
    trainer = sft(
        folder,
        segmenter.model,
        segmenter.processor,
        rows=with_answers(tiny_rows(4, segmenter.processor), [OTHER]),
        peft_config=lora(segmenter.processor, r=8),
        max_steps=40,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    trainer.train()
    trainer.save_model()
    predictions = ReasoningSegmenter(trainer.model.eval(), segmenter.processor, SETTINGS).predict_batch(*questions())
    assert [p.text for p in predictions] == [OTHER] * 3
    return folder, as_data(predictions)


LOADER = """
import json, sys
from builders import as_data, questions
from segrl import ReasoningSegmenter
for merge in json.loads(sys.argv[2]):
    segmenter = ReasoningSegmenter.from_pretrained(sys.argv[1], device="cpu", merge=merge)
    print(json.dumps([type(segmenter.model).__name__, as_data(segmenter.predict_batch(*questions()))]))
"""


def in_fresh_process(folder, merge):
    """Class of the loaded model and its predictions, for each value of `merge`."""
    command = [sys.executable, "-W", "ignore", "-c", LOADER, str(folder), json.dumps(merge)]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()[-len(merge) :]]


class TestFreshProcess:
    def test_a_run_predicts_the_same(self, run):
        folder, expected = run
        assert in_fresh_process(folder, [False]) == [["Qwen2_5_VLForConditionalGeneration", expected]]

    @pytest.mark.long
    def test_a_peft_run_predicts_the_same_merged_or_not(self, adapter_run):
        folder, expected = adapter_run
        assert not (folder / "model.safetensors").exists()
        assert (folder / "mask_head.safetensors").is_file()
        adapter = load_file(folder / "adapter_model.safetensors")
        assert not any("mask_head" in key for key in adapter)
        assert any("trainable_tokens_delta" in key for key in adapter)
        plain, merged = in_fresh_process(folder, [False, True])
        assert plain == ["PeftModelForCausalLM", expected]
        assert merged[0] == "Qwen2_5_VLForConditionalGeneration"
        assert [row[:3] for row in merged[1]] == [row[:3] for row in expected]
        for one, other in zip(merged[1], expected, strict=True):  # merging rounds weights: single pixels may flip
            bits = [np.unpackbits(np.array(row[3], dtype=np.uint8)) for row in (one, other)]
            assert (bits[0] != bits[1]).mean() < 0.01
        segmenter = ReasoningSegmenter.from_pretrained(folder, device="cpu", merge=True)
        assert as_data(segmenter.predict_batch(*questions())) == merged[1]


class TestPeft:
    @pytest.mark.slow
    @pytest.mark.parametrize(("build", "beta"), [(sft, None), (grpo, 0.0), (grpo, 0.1)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_row_of_the_token_trains_and_counts(self, build, tied, beta, tmp_path):
        model, processor = tiny_headed_model(tie_word_embeddings=tied)
        token_id = seg_token_id(processor)
        settings = {} if beta is None else {"beta": beta}
        trainer = build(
            tmp_path, model, processor, max_steps=2, save_strategy="no", peft_config=lora(processor), **settings
        )
        base = trainer.model.get_base_model()
        before = base.get_input_embeddings().weight.detach().clone()
        trainer.train()
        after, output = base.get_input_embeddings().weight.detach(), base.get_output_embeddings()
        assert not torch.equal(after[token_id], before[token_id])
        others = torch.arange(len(after)) != token_id
        assert torch.equal(after[others], before[others])
        assert torch.equal(output.weight[token_id].detach(), after[token_id]) is tied
        # TRL's fused head, which reads the weight, and the layer's own forward agree
        ids = torch.tensor([[5, 6, token_id, 7, token_id]])
        trainer.model.eval()
        with torch.no_grad():
            fused = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
            temperature = trainer.temperature if build is grpo else 1.0
            logits = trainer.model(input_ids=ids).logits[0, :-1] / temperature
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(fused, expected, atol=1e-5)
        if tied:  # a larger row gives a larger logit, in both paths
            hidden = torch.ones(1, len(after[0]))
            with torch.no_grad():
                assert torch.allclose(output(hidden)[0, token_id], after[token_id].sum(), atol=1e-5)

    @pytest.mark.long
    def test_stage_two_goes_on_training_the_adapter(self, adapter_run, tmp_path):
        folder, _ = adapter_run
        segmenter = ReasoningSegmenter.from_pretrained(folder, device="cpu", trainable=True)
        trainer = grpo(
            tmp_path,
            segmenter.model,
            segmenter.processor,
            beta=0.1,
            temperature=3.0,  # the trained model is too sure of itself for samples that differ
            max_steps=2,
            save_steps=1,
            learning_rate=1e-2,
        )
        trainer.train()
        assert find_mask_head(trainer.model) is trainer.mask_head
        before = load_file(folder / "adapter_model.safetensors")
        after = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert (
            json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["base_model_name_or_path"]
            == json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        )
        again = ReasoningSegmenter.from_pretrained(tmp_path / "checkpoint-2", device="cpu")
        trainer.model.eval()
        ours = ReasoningSegmenter(trainer.model, segmenter.processor, again.settings)
        images, queries = questions(2)
        expected, found = ours.predict_batch(images, queries), again.predict_batch(images, queries)
        assert [p.text for p in expected] == [p.text for p in found]

    def test_an_adapter_that_names_no_base_is_an_error(self, tmp_path):
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": 2}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: names no base model; set base_model_name"):
            ReasoningSegmenter.from_pretrained(tmp_path)
