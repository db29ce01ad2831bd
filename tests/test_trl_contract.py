"""The names inside TRL, transformers and PEFT that segrl's trainers stand on, checked against what is installed.

A failure here says which assumption an upgrade has broken, before a wrong number does.
"""

import copy
import inspect
from typing import Any

import pytest
import torch
from builders import FAMILIES, grpo_args, seg_bias, sft_args, tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from trainer_checks import Calls, letters, text_rows
from transformers import DynamicCache, Trainer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
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

from segrl.heads.attach import base_instance
from segrl.shared_prompt import SharedPromptGRPOTrainer
from segrl.sharing.support import no_mask
from segrl.testing import tiny_causal_lm
from segrl.trainer import SegGRPOTrainer


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


# ---- what shared prompts stand on ------------------------------------------------------------------------------------


class TestScoringOfPackedRows:
    def test_labels_that_are_shifted(self, tmp_path):
        """A fused head scores the states as they come, one label each, and leaves out -100."""
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        args = grpo_args(tmp_path, GRPOConfig, temperature=0.7)
        GRPOTrainer(model, letters, args, train_dataset=text_rows(), processing_class=tokenizer)
        ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[6, -100, 8, -100]])
        with torch.no_grad():
            output = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
            expected = (model(input_ids=ids).logits / 0.7).log_softmax(-1)[0]
        assert output.log_probs.shape == output.entropy.shape == labels.shape
        torch.testing.assert_close(output.log_probs[0, [0, 2]], expected[[0, 2], [6, 8]])
        torch.testing.assert_close(output.entropy[0, [0, 2]], -(expected.exp() * expected).sum(-1)[[0, 2]])
        assert not output.log_probs[0, [1, 3]].any()
        assert not output.entropy[0, [1, 3]].any()

    def test_buffer_of_the_trainer(self, tmp_path):
        """Micro-batches in a list, of which `_step` chooses; lists by row are split and shuffled with the tensors."""
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        seen = []

        class Marks(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                output: Any = super()._generate_and_score_completions(inputs)
                rows = zip(output["completion_ids"].tolist(), output["completion_mask"].tolist(), strict=True)
                return {**output, "marks": [(ids, mask) for ids, mask in rows]}

            def _prepare_inputs(self, generation_batch):
                inputs: Any = super()._prepare_inputs(generation_batch)
                buffered: Any = self._buffered_inputs
                seen.append((self._step, [batch is inputs for batch in buffered].index(True), len(buffered)))
                for ids, mask, mark in zip(
                    inputs["completion_ids"].tolist(), inputs["completion_mask"].tolist(), inputs["marks"], strict=True
                ):
                    assert (ids, mask) == mark
                return inputs

        args = grpo_args(tmp_path, GRPOConfig, max_steps=2, gradient_accumulation_steps=2)
        trainer = Marks(model, letters, args, train_dataset=text_rows(), processing_class=tokenizer)
        assert trainer._buffered_inputs is None
        assert (trainer.aux_loss_enabled, trainer.ref_model) == (False, None)
        trainer.train()
        assert seen == [(0, 0, 2), (1, 1, 2), (2, 0, 2), (3, 1, 2)]


@pytest.mark.parametrize("family", FAMILIES)
class TestModelsOfPackedRows:
    def test_attention_of_a_layer(self, family):
        """A layer looks its attention up by the name in its own config, and gets the keywords of the model."""
        model, _ = tiny_model(family)
        seen = []

        def own(module, query, key, value, attention_mask, dropout=0.0, scaling=None, test_word=None, **extra):
            seen.append((test_word, attention_mask.shape, extra.get("sliding_window"), extra.get("softcap")))
            return torch.zeros_like(query).transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS.register("test_contract", own)
        layers = model.get_decoder().layers
        other = copy.copy(layers[0].self_attn.config)
        other._attn_implementation_internal = "test_contract"
        assert other._attn_implementation == "test_contract"
        assert layers[0].self_attn.config._attn_implementation == "sdpa"
        layers[0].self_attn.config = other
        mask, word = no_mask("cpu"), object()
        positions = torch.arange(3)[None]
        model.model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask, position_ids=positions, test_word=word)
        assert seen == [(word, mask.shape, None, None)]

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_mask_with_four_dimensions_is_passed_on(self, family, implementation):
        model, _ = tiny_model(family)
        config = model.config.get_text_config()
        config._attn_implementation = implementation
        mask, states = no_mask("cpu"), torch.zeros(1, 3, 64)
        arguments = {"config": config, "inputs_embeds": states, "attention_mask": mask, "past_key_values": None}
        assert create_causal_mask(**arguments, position_ids=torch.arange(3)[None]) is mask

    def test_features_of_images(self, family):
        """One tensor of tokens per image; Qwen3-VL's deeper layers for all images, or by image."""
        model, processor = tiny_model(family)
        images = [Image.new("RGB", (64, 64)), Image.new("RGB", (120, 60))]
        inputs = processor.image_processor(images=images, return_tensors="pt")
        output: Any = model.model.get_image_features(**inputs)
        width = model.config.get_text_config().hidden_size
        assert isinstance(output.pooler_output, (list, tuple))
        assert [tokens.ndim for tokens in output.pooler_output] == [2, 2]
        assert all(tokens.size(1) == width for tokens in output.pooler_output)
        sizes = [len(tokens) for tokens in output.pooler_output]
        levels = getattr(output, "deepstack_features", None) or []
        assert len(levels) == (1 if family == "qwen3_vl" else 0)
        for level in levels:
            assert sum(sizes) == len(level) if torch.is_tensor(level) else sizes == [len(part) for part in level]
        assert set(inputs) == {"pixel_values", *(("image_grid_thw",) if family != "llava" else ())}
        rebuilt = type(output)(pooler_output=output.pooler_output)
        assert rebuilt.pooler_output is output.pooler_output

    def test_positions(self, family):
        model, _ = tiny_model(family)
        backbone = model.model
        assert hasattr(backbone, "rope_deltas") is hasattr(backbone, "get_rope_index") is (family != "llava")
        if family == "llava":
            return
        token = model.config.image_token_id
        ids = torch.tensor([[0, 5, token, token, token, token, 6], [5, 6, token, token, token, token, 7]])
        arguments: Any = {
            "mm_token_type_ids": (ids == token).int(),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
            "attention_mask": torch.tensor([[0, *[1] * 6], [1] * 7]),
        }
        positions, deltas = backbone.get_rope_index(ids, **arguments)
        assert positions.shape == (3, 2, 7)
        assert deltas.shape == (2, 1)
        assert positions[:, 1, -1].tolist() == [4, 4, 4]

    def test_prefill_of_generate(self, family):
        """The first forward of the backbone has all prompts, an empty dynamic cache, and everything by keyword."""
        model, processor = tiny_model(family)
        message = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}
        inputs = processor.apply_chat_template(
            [[message]] * 2, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        seen: list[Any] = []

        def before(module, args, kwargs):
            cache = kwargs.get("past_key_values")
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            seen.append((args, type(cache), cache.get_seq_length(), len(ids), set(kwargs)))

        model.model.register_forward_pre_hook(before, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        args, kind, length, rows, names = seen[0]
        assert (args, kind, length, rows) == ((), DynamicCache, 0, 2)
        assert {"attention_mask", "past_key_values"} <= names
        assert {"pixel_values", "mm_encoder_outputs"} & names  # transformers 5.2x encodes before the first forward
        assert seen[1][2] == inputs["input_ids"].size(1)


def test_rows_of_a_cache():
    cache = DynamicCache()
    cache.update(torch.arange(2.0).view(2, 1, 1, 1), torch.arange(2.0).view(2, 1, 1, 1), 0)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    layer: Any = cache.layers[0]
    assert layer.keys.flatten().tolist() == layer.values.flatten().tolist() == [1.0, 0.0, 1.0]


def test_base_of_a_model():
    """PEFT's and transformers' names for the parts of a model."""
    model, _ = tiny_causal_lm(hidden_size=64, vocab_size=640)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert base_instance(wrapped) is model
    assert model.get_decoder() is model.model
    assert model.base_model_prefix == "model"
    assert wrapped.active_peft_config.is_prompt_learning is False
    layer = next(module for module in wrapped.modules() if isinstance(module, BaseTunerLayer))
    assert (layer.merged, layer.disable_adapters, list(layer.active_adapters)) == (False, False, ["default"])


def test_every_override_exists_in_trl():
    """What `SegGRPOTrainer` defines under a private name is either its own or a name that TRL still has."""
    own = {
        "_decode",
        "_keep_records",
        "_log_masks",
        "_reads_predictions",
        "_rollout",
        "_score_states",
        "_text_term",
        "_texts",
        "_with_predictions",
    }
    own |= {"_image_keys", "_image_tokens", "_keys", "_prompt_keys", "_shares", "_start_sharing"}
    own |= {"_share_by_default", "_wants_sharing"}
    ours = {**vars(SegGRPOTrainer), **vars(SharedPromptGRPOTrainer)}
    defined = {name for name in ours if name.startswith("_") and not name.startswith("__")} - own
    inherited = {name for base in GRPOTrainer.__mro__ for name in vars(base)}
    assert {"_compute_loss", "_prepare_inputs", "_generate_single_turn"} <= defined
    assert not {name for name in defined - inherited if not name.startswith("_abc")} - {"_buffered_inputs"}
