"""The tiny models are real: right classes, right token counts, saved and loaded, generating, trainable by plain TRL."""

import functools
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.llava import LlavaForConditionalGeneration
from transformers.models.qwen2 import Qwen2ForCausalLM
from transformers.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.models import tiny_causal_lm, tiny_llava, tiny_qwen2_5_vl, tiny_qwen3_vl, tiny_tokenizer
from segrl.models.tiny_tokenizer import SPECIAL_TOKENS, TAG_TOKENS

VLMS = [
    (tiny_qwen2_5_vl, Qwen2_5_VLForConditionalGeneration),
    (tiny_qwen3_vl, Qwen3VLForConditionalGeneration),
    (tiny_llava, LlavaForConditionalGeneration),
]
COMPLETION = (
    "<think>The skin looks normal around one small bright nodule in the upper left third.</think>"
    "<answer>The bright nodule is located at [12, 7, 35, 40].<seg></answer>"
)


def picture(size=(112, 112), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encode(processor, *texts, image=None):
    image = image or picture()
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for text in texts or ["Segment the lesion."]
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )


@functools.cache
def shared_tokenizer():
    return tiny_tokenizer()


class TestTokenizer:
    def test_tags_are_single_normal_tokens_that_decoding_keeps(self):
        tokenizer = tiny_tokenizer()
        ids = tokenizer(COMPLETION)["input_ids"]
        for tag in TAG_TOKENS:
            assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == 1, tag
        assert tokenizer.decode(ids, skip_special_tokens=True) == COMPLETION

    def test_special_tokens_are_skipped(self):
        tokenizer = tiny_tokenizer()
        ids = tokenizer("".join(SPECIAL_TOKENS) + "dark cyst")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids)[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
        assert tokenizer.decode(ids, skip_special_tokens=True) == "dark cyst"
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (
            "<|im_end|>",
            "<|endoftext|>",
            "left",
        )

    def test_digits_are_one_token_each_and_known_words_one_token(self):
        tokenizer = tiny_tokenizer()
        assert tokenizer.tokenize("1203") == ["1", "2", "0", "3"]
        assert tokenizer.tokenize("The bright nodule is located at") == [
            "The",
            "Ġbright",
            "Ġnodule",
            "Ġis",
            "Ġlocated",
            "Ġat",
        ]

    def test_a_corpus_teaches_new_words(self):
        words = " xylophonic zeppelin"
        assert len(tiny_tokenizer().tokenize(words)) > 2
        assert len(tiny_tokenizer([words] * 3).tokenize(words)) == 2

    def test_equal_arguments_give_equal_tokenizers(self):
        first, second = (tiny_tokenizer(["one more text"], 700) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()

    def test_vocab_size_is_an_upper_limit(self):
        assert len(tiny_tokenizer(vocab_size=400)) == 400

    def test_vocabulary_below_the_bytes_is_refused(self):
        with pytest.raises(ValueError, match="vocab_size is 267, expected at least 268"):
            tiny_tokenizer(vocab_size=267)

    @given(st.text(max_size=60).map(lambda text: unicodedata.normalize("NFC", text)))
    def test_any_text_survives_a_round_trip(self, text):
        tokenizer = shared_tokenizer()
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(("build", "model_class"), VLMS)
class TestVisionLanguageModels:
    def test_is_the_original_class_and_small(self, build, model_class):
        model, _ = build()
        assert type(model) is model_class
        assert 1_000_000 < model.num_parameters() < 2_000_000
        assert model.dtype == torch.float32
        assert not model.training

    def test_seed_decides_the_weights_and_the_global_state_is_kept(self, build, model_class):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        states = [build(seed=seed)[0].state_dict() for seed in (0, 0, 1)]
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])

    def test_a_square_of_112_pixels_is_16_vision_tokens(self, build, model_class):
        model, processor = build()
        inputs = encode(processor)
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16

    def test_left_padded_rows_generate_as_they_do_alone(self, build, model_class):
        model, processor = build()
        alone = encode(processor, "Segment the lesion.")
        batch = encode(processor, "Segment the lesion.", "Segment the lesion. Where is the dark cyst? Show every one.")
        assert (batch["attention_mask"][0] == 0).any()
        expected = model.generate(**alone, max_new_tokens=6)[:, alone["input_ids"].shape[1] :]
        found = model.generate(**batch, max_new_tokens=6)[:1, batch["input_ids"].shape[1] :]
        assert torch.equal(found, expected)

    def test_the_image_reaches_the_logits(self, build, model_class):
        model, processor = build()
        with torch.no_grad():
            first, second = (model(**encode(processor, image=picture(seed=seed))).logits[0, -1] for seed in (0, 1))
        assert not torch.allclose(first, second, atol=1e-6)

    def test_saved_and_loaded_is_the_same(self, build, model_class, tmp_path):
        model, processor = build()
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        pair: Any = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        loaded, info = pair
        loaded_processor = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is model_class
        assert type(loaded_processor) is type(processor)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
        tokenizer = loaded_processor.tokenizer
        assert (tokenizer.padding_side, tokenizer.eos_token) == ("left", "<|im_end|>")
        ids = tokenizer(COMPLETION)["input_ids"]
        assert ids == processor.tokenizer(COMPLETION)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == COMPLETION
        inputs, again = encode(processor), encode(loaded_processor)
        assert inputs.keys() == again.keys()
        assert all(torch.equal(inputs[key], again[key]) for key in inputs)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), loaded.generate(**again, max_new_tokens=4))


@pytest.mark.parametrize(
    ("size", "tokens"), [((112, 112), 16), ((56, 56), 4), ((20, 20), 4), ((448, 448), 16), ((224, 56), 4 * 4)]
)
def test_qwen2_5_vl_images_stay_within_the_pixel_limits(size, tokens):
    model, processor = tiny_qwen2_5_vl()
    inputs = encode(processor, image=picture(size))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens


def test_qwen2_5_vl_layout_is_that_of_the_family():
    config = tiny_qwen2_5_vl(hidden_size=64, heads=2)[0].config
    rope = config.text_config.rope_parameters
    assert rope["mrope_section"] == [4, 6, 6]  # 32 / 2 frequencies, 1:1.5:1.5 as in [16, 24, 24] of a 128-wide head
    assert (config.vision_config.patch_size, config.vision_config.spatial_merge_size) == (14, 2)
    assert list(config.vision_config.fullatt_block_indexes) == [1, 3]


def test_hidden_size_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_size is 100 with heads=4, expected a multiple of 8 times heads"):
        tiny_qwen2_5_vl(hidden_size=100)


def test_qwen_chat_text():
    _, processor = tiny_qwen2_5_vl()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "Sure?"},
    ]
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n"
    rest = (
        "<|im_start|>assistant\nHere.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"  # one turn
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == system + user + rest
    _, processor = tiny_qwen3_vl()
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == user + rest


def test_causal_lm_saved_and_loaded_is_the_same(tmp_path):
    model, tokenizer = tiny_causal_lm()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is Qwen2ForCausalLM
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    messages = [{"role": "user", "content": "Find the dark cyst."}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


# transformers.Trainer itself calls the names that transformers deprecates.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [tiny_qwen2_5_vl, tiny_qwen3_vl, tiny_llava, tiny_causal_lm])
def test_one_step_of_plain_grpo_changes_the_weights(build, tmp_path):
    model, processor = build()
    rows: dict[str, Any] = {"prompt": [[{"role": "user", "content": "Segment the lesion."}]] * 2}
    if build is not tiny_causal_lm:
        rows["image"] = [picture(seed=0), picture(seed=1)]
    texts = []

    def length(completions, **columns) -> list[float | None]:
        texts.extend(completion[0]["content"] for completion in completions)
        return [float(len(text)) for text in texts[-len(completions) :]]

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        beta=0.0,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[length],
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=processor,
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert len(texts) == 4
    # CLIP's last norm is there for pooled features only, which LLaVA does not use.
    assert set(before) - changed == {name for name in before if "post_layernorm" in name}
