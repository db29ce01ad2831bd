"""The names inside TRL, transformers and PEFT that shared prompts stand on, checked against what is installed.

The signatures, and what flows through a step, are in `test_trl_contract.py`.
"""

import copy
from typing import Any

import pytest
import torch
from builders import FAMILIES, grpo_args, tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from sharing_checks import CACHE
from trainer_checks import letters, text_rows
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.models import base_instance, tiny_causal_lm
from segrl.sharing.support import no_mask


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
        arguments = {"config": config, "inputs_embeds": states, "attention_mask": mask, CACHE: None}
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
            cache = kwargs.get(CACHE)
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            seen.append((args, type(cache), cache.get_seq_length(), len(ids), set(kwargs)))

        model.model.register_forward_pre_hook(before, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        args, kind, length, rows, names = seen[0]
        assert (args, kind, length, rows) == ((), DynamicCache, 0, 2)
        assert {"attention_mask", CACHE} <= names
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
