"""The names inside TRL, transformers and PEFT that segrl's trainers stand on, checked against what is installed.

A failure here says which assumption an upgrade has broken, before a wrong number does.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from builders import FAMILIES, grpo_args, seg_bias, sft_args, tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from trainer_checks import Calls, letters, text_rows
from transformers import Trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import (
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from segrl.models import tiny_causal_lm
from segrl.trainers import SegGRPOTrainer, SegSFTTrainer, SharedPromptGRPOTrainer
from segrl.trainers.mask_head_mixin import MaskHeadMixin
from segrl.trainers.token_budget import NORMALIZERS, TokenBudgetMixin


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


class TestSignatures:
    """Methods that segrl overrides or calls, with the parameters that it passes on or names."""

    @pytest.mark.parametrize(
        ("owner", "method", "expected"),
        [
            (GRPOTrainer, "_generate_and_score_completions", ["inputs"]),
            (GRPOTrainer, "_generate", ["prompts"]),
            (
                GRPOTrainer,
                "_generate_single_turn",
                ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
            ),
            (GRPOTrainer, "_calculate_rewards", ["inputs", "prompts", "completions", "completion_ids_list"]),
            (GRPOTrainer, "_compute_loss", ["model", "inputs"]),
            (GRPOTrainer, "_tokenize_prompts", ["prompts"]),
            (GRPOTrainer, "_log_metric", ["name", "value"]),
            (GRPOTrainer, "_set_signature_columns_if_needed", []),
            (GRPOTrainer, "_prepare_inputs", ["generation_batch"]),
            (GRPOTrainer, "compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
            (Trainer, "get_train_dataloader", []),
            (GradientState, "_set_sync_gradients", ["sync_gradients"]),
            (Accelerator, "no_sync", ["model"]),
            (SFTTrainer, "_set_signature_columns_if_needed", []),
            (SFTTrainer, "compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
            (Trainer, "_save", ["output_dir", "state_dict"]),
            (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
            (Trainer, "_load_best_model", []),
        ],
    )
    def test_parameters(self, owner, method, expected):
        assert parameters(getattr(owner, method)) == expected

    def test_scoring(self):
        names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
        assert names[:5] == ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
        passed = {"pixel_values", "image_grid_thw", "num_images", "image_sizes", "pixel_attention_mask"}
        assert passed | {"token_type_ids", "mm_token_type_ids"} <= set(names)

    @pytest.mark.parametrize(
        ("owner", "first"), [(GRPOTrainer, ["model", "reward_funcs", "args"]), (SFTTrainer, ["model", "args"])]
    )
    def test_constructor_order(self, owner, first):
        assert parameters(owner.__init__)[: len(first)] == first

    def test_who_scales_for_accumulation(self):
        """GRPO's loss is scaled already, so the dense terms are divided; SFT's is scaled if its tokens were counted."""
        assert GRPOTrainer.loss_is_scaled_for_ga is True
        assert SFTTrainer.loss_is_scaled_for_ga is None
        source = inspect.getsource(Trainer.training_step)
        # transformers 5.19 turned the condition around; both divide unless the tokens were counted
        assert (
            "self.model_accepts_loss_kwargs and num_items_in_batch is not None" in source
            or "not self.model_accepts_loss_kwargs or num_items_in_batch is None" in source
        )

    def test_what_a_loss_is_divided_by(self):
        """`tokens_per_micro_batch` weights the losses of micro-batches; a new loss type needs its place there."""
        source = inspect.getsource(GRPOTrainer._compute_loss)
        listed = re.findall(r"self\.loss_type (?:==|in) (\[[^]]+\]|\"\w+\")", source)
        assert set(re.findall(r"\w+", " ".join(listed))) == set(NORMALIZERS)
        assert "/ mask.sum(-1).clamp(min=1.0)).mean()" in source  # rows
        assert "/ (per_token_loss.size(0) * self.max_completion_length)" in source
        assert "(per_token_loss * mask).sum(-1).mean()" in source
        assert "(per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)" in source  # tokens
        scaled = "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation"
        assert scaled in source  # of the rollout, for one accumulation: folding both leaves their ratio
        assert "_entropy_bonus_enabled" in source
        assert "top_entropy_quantile" in source

    def test_tags_of_the_model_card(self):
        assert GRPOTrainer._tag_names == ["trl", "grpo"]
        assert SFTTrainer._tag_names == ["trl", "sft"]

    def test_peft_tells_whether_adapters_are_on(self):
        model, _ = tiny_causal_lm(hidden_size=64, vocab_size=640)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
        assert (layer.disable_adapters, layer.active_adapters) == (False, ["default"])
        with model.disable_adapter():
            assert layer.disable_adapters


class TestBuffer:
    """Lists beside tensors are shuffled, split and kept as TRL does with `num_images`."""

    def test_shuffle(self):
        things = [object() for _ in range(6)]
        shuffled = shuffle_sequence_dict({"x": torch.arange(6), "things": things, "n": torch.tensor(3.0)})  # type: ignore[dict-item]
        assert isinstance(shuffled["things"], list)
        assert [things[n] for n in shuffled["x"].tolist()] == shuffled["things"]  # type: ignore[union-attr]

    def test_split(self):
        things: Any = [object() for _ in range(6)]
        parts = split_tensor_dict({"x": torch.arange(6), "things": things, "n": torch.tensor(3.0)}, 3)
        assert [part["things"] for part in parts] == [things[:2], things[2:4], things[4:]]

    def test_pixels_by_row(self):
        things: Any = [object(), object()]
        batch = {
            "x": torch.arange(2),
            "pixel_values": torch.zeros(8, 3),
            "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
            "num_images": [1, 1],
            "seg_inputs": things,
        }
        joined = unsplit_pixel_values_by_grid(split_pixel_values_by_grid(batch))
        assert joined["seg_inputs"] is things
        assert joined["pixel_values"].shape == (8, 3)


class Watched(GRPOTrainer):
    """TRL's trainer, whose calls are kept as they come."""

    def __init__(self, *args, **kwargs):
        self.seen: dict[str, list[Any]] = {}
        super().__init__(*args, **kwargs)

    def _keep(self, name, value):
        self.seen.setdefault(name, []).append(value)
        return value

    def _generate(self, prompts):
        return self._keep("_generate", super()._generate(prompts))

    def _generate_single_turn(self, *args, **kwargs):
        self._keep("turn_arguments", (args, kwargs))
        return self._keep("_generate_single_turn", super()._generate_single_turn(*args, **kwargs))

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self._keep("scoring_arguments", (args, kwargs))
        return self._keep("scores", super()._get_per_token_logps_and_entropies(*args, **kwargs))

    def _tokenize_prompts(self, prompts):
        return self._keep("_tokenize_prompts", super()._tokenize_prompts(prompts))

    def _generate_and_score_completions(self, inputs):
        self._keep("rows", inputs)
        return self._keep("output", super()._generate_and_score_completions(inputs))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._keep("scored", (inputs, prompts, completions, completion_ids_list))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        self._keep("loss_inputs", inputs)
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_flows_through_a_step(family, tmp_path):
    model, processor = tiny_model(family)
    rows = tiny_rows(4, processor, completions=False)
    trainer = Watched(
        model,
        letters,
        grpo_args(tmp_path, GRPOConfig, max_steps=2, steps_per_generation=2, generation_kwargs=seg_bias(processor)),
        train_dataset=rows,
        processing_class=processor,
    )
    backbone = Calls(model.model)
    trainer.train()
    seen = trainer.seen

    (generated,) = seen["_generate"]
    assert len(generated) == 8
    images = generated[6]
    assert [len(group) for group in images] == [1] * 8
    assert all(isinstance(image, Image.Image) for (image,) in images)
    prompt_ids, completion_ids, tool_mask, completions, logprobs = generated[:5]
    assert all(isinstance(ids, list) and isinstance(ids[0], int) for ids in [*prompt_ids, *completion_ids])
    assert (tool_mask, logprobs) == (None, None)
    assert all(message["role"] == "assistant" and isinstance(message["content"], str) for (message,) in completions)

    ((args, kwargs),) = seen["turn_arguments"]
    assert args[0] == prompt_ids
    assert args[1] == images
    assert not set(kwargs) - {"has_tool_images", "num_generations"}
    assert seen["_generate_single_turn"] == [(completion_ids, None)]

    assert len(seen["_tokenize_prompts"][0]) == 3
    assert "pixel_values" in seen["_tokenize_prompts"][0][2]

    (old, _, _), *losses = seen["scores"]  # the old-log-prob pass comes first: two steps use one generation
    assert len(losses) == 2
    assert all(len(scores) == 3 for scores in seen["scores"])
    (args, kwargs), *_ = seen["scoring_arguments"]
    assert args[0] is trainer.model
    assert args[3] == max(map(len, completion_ids)) == old.size(1)
    assert kwargs["batch_size"] == 4
    assert not old.requires_grad

    ((inputs, prompts, scored, ids),) = seen["scored"]
    assert [row["name"] for row in inputs] == [row["name"] for row in seen["rows"][0]]
    assert {"image", "mask", "query"} <= inputs[0].keys()
    assert len(prompts) == len(scored) == 8
    assert ids == completion_ids

    (output,) = seen["output"]
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= output.keys()
    assert len(seen["loss_inputs"]) == 2
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= seen["loss_inputs"][0].keys()

    # tokens one by one, the old pass in chunks of a micro-batch, and one forward for each loss
    assert backbone.rows == [8] * max(map(len, completion_ids)) + [4, 4] + [4, 4]
    assert set(trainer._metrics) >= {"train"}
    assert trainer._tokenizer is processor.tokenizer
    assert (trainer.use_vllm, trainer.use_transformers_continuous_batching) == (False, False)
    assert trainer._signature_columns is None or "image" in trainer._signature_columns


def test_reward_arguments(tmp_path):
    """Every column that the rows have when rewards are computed reaches the reward functions."""
    model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
    seen = {}

    class Adds(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            inputs = [{**row, "prediction": n} for n, row in enumerate(inputs)]
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def reward(**columns) -> Any:
        seen.update(columns)
        columns["log_metric"]("own", 2.0)
        return [0.0] * len(columns["completions"])

    trainer = Adds(
        model,
        reward,
        grpo_args(tmp_path, GRPOConfig, max_steps=1),
        train_dataset=text_rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert seen["prediction"] == [0, 1, 2, 3]
    assert len(seen["completions"]) == len(seen["completion_ids"]) == len(seen["prompts"]) == 4
    assert trainer.state.log_history[0]["own"] == 2.0


def test_sft_batches_and_columns(tmp_path):
    model, processor = tiny_model()
    rows = tiny_rows(4, processor)
    seen = []

    class Watching(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append((set(inputs), num_items_in_batch))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Watching(
        model, sft_args(tmp_path, SFTConfig, max_steps=1), train_dataset=rows, processing_class=processor
    )
    prepared: Any = trainer.train_dataset
    assert set(prepared.column_names) == set(rows.column_names)  # images are read as they come
    trainer.train()
    ((keys, items),) = seen
    assert {"input_ids", "attention_mask", "labels", "pixel_values"} <= keys
    assert items is None  # Qwen-VL says accepts_loss_kwargs = False
    assert {"prompt", "completion", "image", "images"} <= set(trainer._signature_columns)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_of_a_family(family):
    model, _ = tiny_model(family)
    backbone = getattr(model, model.base_model_prefix)
    assert backbone is not model
    output = backbone(input_ids=torch.tensor([[1, 2, 3]]))
    assert output.last_hidden_state.shape == (1, 3, model.config.get_text_config().hidden_size)


def test_every_override_exists_in_trl():
    """What `SegGRPOTrainer` defines under a private name is either its own or a name that TRL still has."""
    own = {
        "_first_statuses",
        "_keep_records",
        "_log_predictions",
        "_needs_probability",
        "_queries",
        "_records",
        "_rollout",
        "_score_states",
        "_scored",
        "_text_term",
        "_with_predictions",
    }
    own |= {"_image_keys", "_image_token", "_keys", "_prompt_keys", "_shares", "_start_sharing"}
    own |= {"_share_by_default", "_warned", "_wants_sharing"}
    own |= {"_check_inputs", "_texts_checked"}
    own |= {
        "_compare",
        "_has_engine",
        "_head_state",
        "_packed_logps",
        "_save_head",
        "_tried",
        "_untried",
        "_without_head",
    }
    own |= {"_init_joint", "_joint_loss", "_keep_settings", "_load", "_mode", "_trained_already"}
    own |= {"_added_tokens", "_budget", "_check_budget", "_loss_in_parts", "_micro_batch_count", "_part", "_parts"}
    own |= {"_compared_sampling", "_groups", "_row_groups", "_training_budget"}
    classes = (SegGRPOTrainer, SharedPromptGRPOTrainer, MaskHeadMixin, TokenBudgetMixin)
    ours = {name: value for kind in classes for name, value in vars(kind).items()}
    defined = {name for name in ours if name.startswith("_") and not name.startswith("__")} - own
    inherited = {name for base in GRPOTrainer.__mro__ for name in vars(base)}
    assert {"_compute_loss", "_prepare_inputs", "_generate_single_turn"} <= defined
    assert {"_save", "_save_checkpoint", "_save_rng_state", "_load_from_checkpoint", "_load_best_model"} <= defined
    assert not {name for name in defined - inherited if not name.startswith("_abc")} - {"_buffered_inputs"}


@pytest.mark.parametrize("trainer", [SegGRPOTrainer, SegSFTTrainer, SharedPromptGRPOTrainer])
def test_what_our_construction_sets_has_a_default_on_the_class(trainer):
    """A trainer made without `__init__`, as TRL's own tests make one, can be asked for all of it."""
    ours = [kind for kind in trainer.__mro__ if kind.__module__.startswith("segrl")]
    functions = [function for kind in ours for function in vars(kind).values() if inspect.isfunction(function)]
    source = [ast.parse(textwrap.dedent(inspect.getsource(function))) for function in functions]
    written = {
        node.attr
        for tree in source
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    assert len(written) >= 3
    lacking = {name for name in written if not hasattr(trainer, name)}
    assert lacking <= {"data_collator", "_signature_columns", "_buffered_inputs"}  # TRL's own, read after its own
