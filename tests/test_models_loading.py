"""Checkpoints load whole or not at all; the segmentation token is one normal token with an embedding row."""

import json
import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from segrl.errors import CheckpointError, SegRLError
from segrl.models import (
    ensure_seg_token,
    language_model_lora,
    load_vlm,
    seg_token_id,
    tiny_causal_lm,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen3_vl,
    tiny_tokenizer,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def hub_key(name):
    """The name that a weight of Qwen2.5-VL has in the checkpoints on the hub."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_hub_folder(folder, model, processor, *, state=None):
    """Write model and processor in the file layout of Qwen/Qwen2.5-VL-*-Instruct: two shards, flat config."""
    folder.mkdir()
    if state is None:
        state = {hub_key(name): value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state = {name: value for name, value in state.items() if name != "lm_head.weight"}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: state[key].clone() for key in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    size = sum(value.numel() * value.element_size() for value in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})

    text, vision, config = model.config.text_config, model.config.vision_config, model.config
    write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "vision_start_token_id": config.vision_start_token_id,
            "vision_end_token_id": config.vision_end_token_id,
            "vision_token_id": config.vision_end_token_id + 1,
            "image_token_id": config.image_token_id,
            "video_token_id": config.video_token_id,
            "hidden_act": text.hidden_act,
            "hidden_size": text.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "max_window_layers": text.num_hidden_layers,
            "model_type": "qwen2_5_vl",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_parameters["rope_theta"],
            "sliding_window": 32768,
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": "float32",
            "transformers_version": "4.41.2",
            "use_cache": True,
            "use_sliding_window": False,
            "vision_config": {
                "depth": vision.depth,
                "hidden_act": "silu",
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "in_chans": 3,
                "out_hidden_size": vision.out_hidden_size,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "spatial_patch_size": vision.patch_size,
                "window_size": vision.window_size,
                "fullatt_block_indexes": list(vision.fullatt_block_indexes),
                "tokens_per_second": 2,
                "temporal_patch_size": vision.temporal_patch_size,
            },
            "rope_scaling": {"type": "mrope", "mrope_section": list(text.rope_parameters["mrope_section"])},
            "vocab_size": text.vocab_size,
        },
    )
    images, tokenizer = processor.image_processor, processor.tokenizer
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": images.size["shortest_edge"],
            "max_pixels": images.size["longest_edge"],
            "patch_size": images.patch_size,
            "temporal_patch_size": images.temporal_patch_size,
            "merge_size": images.merge_size,
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    write_json(folder / "generation_config.json", {"eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]})

    write_json(folder / "chat_template.json", {"chat_template": processor.chat_template})

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    write_json(folder / "tokenizer.json", backend)
    write_json(folder / "vocab.json", backend["model"]["vocab"])
    merges = "\n".join(" ".join(merge) for merge in backend["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {str(token.pop("id")): token for token in backend["added_tokens"]}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": [token["content"] for token in added.values() if token["special"]][1:],
            "bos_token": None,
            "chat_template": processor.chat_template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


@pytest.fixture
def pair():
    """A tiny Qwen2.5-VL whose tokenizer lacks the segmentation token, with spare embedding rows."""
    return tiny_qwen2_5_vl(tag_tokens=TAGS)


class TestHubFolder:
    @pytest.mark.parametrize("tied", [False, True])
    def test_loads_with_identical_weights(self, tied, tmp_path):
        model, processor = tiny_qwen2_5_vl(tag_tokens=TAGS, tie_word_embeddings=tied)
        write_hub_folder(tmp_path / "hub", model, processor)
        index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
        prefixes = {"model.embed_tokens", "model.layers", "model.norm", "visual.blocks", "visual.merger"}
        prefixes |= {"visual.patch_embed"} | (set() if tied else {"lm_head.weight"})
        assert {".".join(key.split(".")[:2]) for key in index["weight_map"]} == prefixes

        loaded, loaded_processor = load_vlm(str(tmp_path / "hub"))
        assert type(loaded) is Qwen2_5_VLForConditionalGeneration
        assert type(loaded_processor) is Qwen2_5_VLProcessor
        expected = model.state_dict()
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not loaded.training
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
        ids = torch.tensor([processor.tokenizer("Where is the dark cyst?")["input_ids"]])
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert loaded_processor.image_processor.size == processor.image_processor.size

    def test_spare_row_serves_the_token_and_the_text_keeps_it(self, pair, tmp_path):
        write_hub_folder(tmp_path / "hub", *pair)
        model, processor = load_vlm(str(tmp_path / "hub"))
        token_id = seg_token_id(processor)
        assert token_id == len(pair[1].tokenizer)
        assert model.config.text_config.vocab_size == pair[0].config.text_config.vocab_size
        ids = processor.tokenizer("<answer>dark cyst.<seg></answer><|im_end|>")["input_ids"]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "<answer>dark cyst.<seg></answer>"

    @pytest.mark.parametrize(
        "key",
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.1.mlp.up_proj.weight",
            "visual.blocks.0.norm1.weight",
        ],
    )
    def test_a_missing_tensor_is_named(self, pair, tmp_path, key):
        state = {hub_key(name): value for name, value in pair[0].state_dict().items()}
        del state[key]
        write_hub_folder(tmp_path / "hub", *pair, state=state)
        own_name = next(name for name in pair[0].state_dict() if hub_key(name) == key)
        with pytest.raises(CheckpointError, match=f"hub' does not hold all weights .*: 1 missing: {own_name}"):
            load_vlm(str(tmp_path / "hub"))

    def test_a_wrong_shape_is_named(self, pair, tmp_path):
        state = {hub_key(name): value for name, value in pair[0].state_dict().items()}
        state["visual.merger.ln_q.weight"] = torch.ones(5)
        write_hub_folder(tmp_path / "hub", *pair, state=state)
        message = r"1 of the wrong shape: model\.visual\.merger\.ln_q\.weight \(5,\) instead of \(128,\)"
        with pytest.raises(CheckpointError, match=message):
            load_vlm(str(tmp_path / "hub"))

    def test_a_language_model_under_a_foreign_name_is_refused_with_both_names(self, pair, tmp_path):
        state = {hub_key(name): value for name, value in pair[0].state_dict().items()}
        state = {name.replace("model.layers", "decoder.layers"): value for name, value in state.items()}
        write_hub_folder(tmp_path / "hub", *pair, state=state)
        with pytest.raises(
            CheckpointError, match=r"24 missing: .* and 4 more\. Not used by the model: decoder\.layers"
        ):
            load_vlm(str(tmp_path / "hub"))

    def test_extra_weights_such_as_a_mask_head_are_no_error(self, pair, tmp_path):
        state = {hub_key(name): value for name, value in pair[0].state_dict().items()}
        write_hub_folder(tmp_path / "hub", *pair, state={**state, "mask_head.adapter.weight": torch.ones(3)})
        loaded: Any = load_vlm(str(tmp_path / "hub"))[0]
        assert torch.equal(loaded.lm_head.weight, pair[0].lm_head.weight)

    def test_code_in_the_folder_is_not_run(self, pair, tmp_path):
        write_hub_folder(tmp_path / "hub", *pair)
        path = tmp_path / "hub" / "config.json"
        config = json.loads(path.read_text())
        entry = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
        write_json(path, {**config, "model_type": "own", "auto_map": entry})
        (tmp_path / "hub" / "own.py").write_text("raise SystemExit('code from the checkpoint was run')\n")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_vlm(str(tmp_path / "hub"))

    def test_an_adapter_folder_is_refused(self, tmp_path):
        write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "base", "peft_type": "LORA"})
        with pytest.raises(CheckpointError, match=r"holds a PEFT adapter .* load the base model with load_vlm"):
            load_vlm(str(tmp_path))

    def test_settings_reach_model_and_processor(self, pair, tmp_path):
        write_hub_folder(tmp_path / "hub", *pair)
        model, processor = load_vlm(
            str(tmp_path / "hub"),
            dtype="bfloat16",
            attn_implementation="eager",
            seg_token=None,
            processor_kwargs={"max_pixels": 28 * 28},
        )
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert processor.image_processor.size["longest_edge"] == 28 * 28
        assert "<seg>" not in processor.tokenizer.get_vocab()


@pytest.mark.parametrize("build", [tiny_qwen2_5_vl, tiny_qwen3_vl, tiny_llava])
@pytest.mark.parametrize("spare_rows", [0, 8])
def test_other_families_load_and_reload_with_the_new_token(build, spare_rows, tmp_path):
    model, processor = build(tag_tokens=TAGS, spare_rows=spare_rows)
    model.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    first, first_processor = load_vlm(str(tmp_path / "a"))
    first.save_pretrained(tmp_path / "b")
    first_processor.save_pretrained(tmp_path / "b")
    second, second_processor = load_vlm(str(tmp_path / "b"))
    assert seg_token_id(first_processor) == seg_token_id(second_processor) == len(processor.tokenizer)
    assert first.config.get_text_config().vocab_size == len(processor.tokenizer) + max(spare_rows, 1)
    expected = first.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in second.state_dict().items())


class TestEnsureSegToken:
    def test_a_spare_row_is_used_untouched(self, pair):
        model, processor = pair
        before = {name: value.clone() for name, value in model.state_dict().items()}
        token_id = ensure_seg_token(model, processor)
        assert token_id == processor.tokenizer.convert_tokens_to_ids("<seg>") < len(before["lm_head.weight"])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("tied", [False, True])
    def test_without_spare_rows_the_embeddings_grow_by_their_mean(self, tied):
        model, processor = tiny_qwen2_5_vl(tag_tokens=TAGS, spare_rows=0, tie_word_embeddings=tied)
        old = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
        torch.manual_seed(5)
        expected_draw = torch.rand(1)
        torch.manual_seed(5)
        token_id = ensure_seg_token(model, processor)
        assert torch.equal(torch.rand(1), expected_draw)
        new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for before, after in zip(old, new, strict=True):
            assert len(after) == token_id + 1 == len(before) + 1
            assert torch.equal(after[:-1], before)
            assert torch.allclose(after[-1], before.mean(0))
        assert (new[0] is new[1]) is tied
        assert model.config.text_config.vocab_size == token_id + 1
        assert model(input_ids=torch.tensor([[token_id]])).logits.shape == (1, 1, token_id + 1)

    def test_a_second_call_changes_nothing(self):
        model, processor = tiny_qwen2_5_vl(tag_tokens=TAGS, spare_rows=0)
        first = ensure_seg_token(model, processor)
        before, size = model.state_dict(), len(processor.tokenizer)
        assert ensure_seg_token(model, processor) == first
        assert len(processor.tokenizer) == size
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("listed", [False, True])
    def test_a_special_token_is_made_normal_under_its_id(self, pair, listed, tmp_path):
        model, processor = pair
        tokenizer = processor.tokenizer
        if listed:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<seg>"]}, replace_extra_special_tokens=False)
        else:
            tokenizer.add_tokens([AddedToken("<seg>", special=True, normalized=False)])
        old_id, text = tokenizer.convert_tokens_to_ids("<seg>"), "a dark cyst.<seg>"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a dark cyst."  # the trap
        assert ensure_seg_token(model, processor) == old_id
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert "<seg>" not in tokenizer.all_special_tokens
        tokenizer.save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path)
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text

    def test_a_token_of_another_spelling(self, pair):
        model, processor = pair
        assert ensure_seg_token(model, processor.tokenizer, "[SEG]") == seg_token_id(processor, "[SEG]")

    def test_an_id_that_stands_for_images_is_refused(self, pair):
        model, processor = pair
        model.config.image_token_id = len(processor.tokenizer)
        with pytest.raises(SegRLError, match=r"'<seg>' got id \d+, which is the model's image_token_id"):
            ensure_seg_token(model, processor)

    @pytest.mark.parametrize("text", ["", " <seg>", "<seg>\n"])
    def test_text_with_outer_spaces_is_refused(self, pair, text):
        with pytest.raises(SegRLError, match="expected a text without spaces around it"):
            ensure_seg_token(pair[0], pair[1], text)


class TestSegTokenId:
    def test_known_value(self):
        tokenizer = tiny_tokenizer()
        assert seg_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<seg>") == len(tokenizer) - 1

    def test_an_absent_token_is_an_error_that_tells_the_pieces_and_the_fix(self):
        message = r"'<seg>' is not in the vocabulary of .*reads it as \['<', 'seg', '>'\].*ensure_seg_token"
        with pytest.raises(SegRLError, match=message):
            seg_token_id(tiny_tokenizer(tag_tokens=()))

    def test_a_vocabulary_entry_that_text_never_reaches_is_an_error(self):
        # The entry exists, but the text is split at "<" and ">" before the merges are tried.
        tokenizer = tiny_tokenizer(tag_tokens=())
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        merges = state["model"]["merges"]
        state["model"]["vocab"] |= {"<seg>": len(tokenizer)}
        unreachable = type(tokenizer)(
            vocab=state["model"]["vocab"], merges=[tuple(merge) for merge in merges], unk_token=None
        )
        assert "<seg>" in unreachable.get_vocab()
        with pytest.raises(SegRLError, match="is in the vocabulary but never matched"):
            seg_token_id(unreachable)

    def test_an_object_without_tokenizer_is_an_error(self):
        with pytest.raises(SegRLError, match="processor is int, expected a transformers processor"):
            seg_token_id(3)


class TestLanguageModelLora:
    @pytest.mark.parametrize("build", [tiny_qwen2_5_vl, tiny_qwen3_vl, tiny_llava, tiny_causal_lm])
    def test_every_linear_layer_of_the_language_model_and_no_other(self, build):
        model, _ = build()
        model.extra_head = torch.nn.Linear(2, 2)  # as a mask head: an ordinary submodule
        layers = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        expected = {name for name in layers if not re.search("visual|vision|projector|lm_head|extra_head", name)}
        assert len(expected) % 7 == 0
        wrapped = get_peft_model(model, language_model_lora(model, r=2))
        adapted = {name for name, layer in wrapped.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
        assert adapted == expected

    def test_settings_and_tokens(self):
        model, processor = tiny_qwen2_5_vl()
        token = seg_token_id(processor)
        config = language_model_lora(model, tokens=[token], r=3, lora_alpha=5)
        assert (config.r, config.lora_alpha, config.task_type) == (3, 5, "CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        rows = [value.shape for name, value in wrapped.named_parameters() if "trainable_tokens" in name]
        assert (1, model.get_input_embeddings().weight.shape[1]) in rows
        assert language_model_lora(tiny_qwen2_5_vl()[0]).trainable_token_indices is None

    def test_nothing_to_adapt(self):
        model, _ = tiny_causal_lm()
        model.model.layers = torch.nn.ModuleList()
        with pytest.raises(SegRLError, match=r"has no torch\.nn\.Linear in \w+, expected layers to adapt; build the"):
            language_model_lora(model)
