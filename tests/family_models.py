"""Eleven families of vision-language models from tiny configurations, each with its own classes and processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from builders import tiny_model
from transformers import GenerationConfig
from transformers.models.smolvlm import processing_smolvlm

SIDE = 56  # of an image or a tile, in px
SQUARE = {"height": SIDE, "width": SIDE}
TILES = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER: dict[str, Any] = {**SIZE, "image_size": SIDE, "patch_size": 28}  # 2 x 2 patches
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ body(message['content']) }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ body(message['content']) }}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def family_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model of a family with random weights, float32 in eval mode, and its processor."""
    if name in ("qwen2_5_vl", "qwen3_vl", "llava"):
        return tiny_model(name, seed=seed)
    kind, config, processor = BUILDERS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    return model, processor


def _tokenizer(*special: str) -> Any:
    """The tokenizer of the tiny models, with more special tokens."""
    tokenizer = tiny_model("llava")[1].tokenizer
    if special:
        tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def _class(family: str, kind: str) -> Any:
    return getattr(transformers, family + kind)


def _text(tokenizer: Any, **own: Any) -> dict[str, Any]:
    return {
        **SIZE,
        "vocab_size": len(tokenizer) + 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
    }


def _template(image: str) -> str:
    return TEMPLATE.replace("IMAGE", image)


def _qwen3(name: str, text: dict[str, Any], **vision: Any) -> tuple[Any, Any]:
    """The configuration of a relative of Qwen3-VL, from that of the tiny one, and its processor."""
    model, processor = tiny_model("qwen3_vl")
    known = model.config.to_dict()
    for part in ("text_config", "vision_config"):
        known[part].pop("model_type")
    known.pop("model_type")
    known.pop("architectures", None)
    known["text_config"] |= text
    known["vision_config"] |= vision
    return _class(name, "Config")(**known), processor


def _qwen3_vl_moe() -> tuple[Any, Any, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return (transformers.Qwen3VLMoeForConditionalGeneration, *_qwen3("Qwen3VLMoe", experts))


def _qwen3_5() -> tuple[Any, Any, Any]:
    linear = {f"linear_{part}": 16 for part in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    layers = ["linear_attention", "full_attention"]
    return (transformers.Qwen3_5ForConditionalGeneration, *_qwen3("Qwen3_5", {**linear, "layer_types": layers}))


def _gemma3() -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    for key, token in names.items():
        setattr(tokenizer, f"{key}_token", token)
        setattr(tokenizer, f"{key}_token_id", ids[key])
    config = transformers.Gemma3Config(
        text_config=_text(
            tokenizer, sliding_window=64, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
        ),
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        mm_tokens_per_image=4,
        **{f"{key}_token_index": value for key, value in ids.items()},
        tie_word_embeddings=False,
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SQUARE),
        tokenizer,
        chat_template=_template("<start_of_image>"),
        image_seq_length=4,
    )
    return transformers.Gemma3ForConditionalGeneration, config, processor


def _idefics(name: str, **processors: Any) -> tuple[Any, Any, Any]:
    """Idefics 3, or SmolVLM, whose classes were made from it; `processors` are for the processor beside the images'."""
    tokenizer = _tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"
    )
    config = _class(name, "Config")(
        text_config=transformers.LlamaConfig(**_text(tokenizer)),
        vision_config={**TOWER},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = _class(name, "ImageProcessor")(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    processor = _class(name, "Processor")(
        images, tokenizer, **processors, image_seq_len=1, chat_template=_template("<image>")
    )
    return _class(name, "ForConditionalGeneration"), config, processor


def _smolvlm() -> tuple[Any, Any, Any]:
    module: Any = processing_smolvlm
    module.num2words = module.num2words or str  # the package, or None; it writes the number of frames of a video out
    return _idefics("SmolVLM", video_processor=transformers.SmolVLMVideoProcessor())


def _internvl() -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**_text(tokenizer)),
        vision_config={**TOWER},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=1,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return transformers.InternVLForConditionalGeneration, config, processor


def _llava_tiles(name: str, vision: Any, text: Any, images: dict[str, Any], **own: Any) -> tuple[Any, Any, Any]:
    """LLaVA's descendants that cut images into tiles; `own` is for the processor."""
    tokenizer = _tokenizer()
    config = _class(name, "Config")(
        vision_config=vision(**TOWER),
        text_config=text(**_text(tokenizer)),
        vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        image_grid_pinpoints=TILES,
        tie_word_embeddings=False,
    )
    processor = _class(name, "Processor")(
        _class(name, "ImageProcessor")(**images, image_grid_pinpoints=TILES),
        tokenizer,
        image_token="<|image_pad|>",
        chat_template=_template("<|image_pad|>"),
        **own,
    )
    return _class(name, "ForConditionalGeneration"), config, processor


def _llava_next() -> tuple[Any, Any, Any]:
    return _llava_tiles(
        "LlavaNext",
        transformers.CLIPVisionConfig,
        transformers.LlamaConfig,
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision() -> tuple[Any, Any, Any]:
    return _llava_tiles(
        "LlavaOnevision",
        transformers.SiglipVisionConfig,
        transformers.Qwen2Config,
        {"size": SQUARE},
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


BUILDERS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
ALL = ("qwen2_5_vl", "qwen3_vl", "llava", *BUILDERS)
