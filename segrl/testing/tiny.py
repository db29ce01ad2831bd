"""Tiny vision-language models of the real transformers classes, with full processors, built in memory.

The models have random weights and one to two million parameters. They are meant for tests and for small experiments on
synthetic images, so the tokenizer is trained on the texts that such experiments use: most words are one token, every
digit is one token, as in the Qwen tokenizers.

Everything here is deterministic in its arguments, needs no network and survives ``save_pretrained`` followed by
``AutoModelForImageTextToText.from_pretrained`` and ``AutoProcessor.from_pretrained``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessor, CLIPVisionConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Normal tokens: decoding with skip_special_tokens=True, as TRL does, has to keep them.
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>", "<seg>")

_LESIONS = ("bright nodule", "dark cyst", "ring abscess", "tumor", "polyp", "skin lesion", "melanoma", "breast cancer")
_DEFAULT_CORPUS = (
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Please segment the lesion in this image. Find, locate, outline and mark every lesion. Where is it? Show me.",
    "Think in <think></think>, then answer in <answer></answer> with the boxes [x1, y1, x2, y2] and <seg>.",
    "Answer in <answer></answer>: name the lesion, give its bounding boxes and end with the mask token, in pixels.",
    "The skin, breast, head, abdomen, colon, liver, brain or tissue looks normal away from the findings.",
    "Most of it has the usual structure. No lesion is visible. Many shapes, the largest in the center or centre.",
    "It differs in brightness, texture and outline from normal tissue and from other findings in the same place.",
    "Normal structures and other findings do not share this brightness and outline.",
    "Dermoscopy, Ultrasound, Endoscopy, MRI, CT; of the Skin, Breast, Head, Abdomen, Colon. Think, Show, Answer.",
    "This is a dermoscopy, ultrasound, MRI, CT, X-ray or endoscopy image and shows normal tissue around the lesion.",
    "There is one lesion, there are two lesions, three lesions, four or several small, medium and large lesions.",
    "It lies in the upper left, the upper central, the upper right, the central left, the center, the central right, "
    "the lower left, the lower central and the lower right third of the image.",
    "It is bright and filled, dark and filled, or has a bright rim with a dark center, unlike the other structures.",
    *(f"The {lesion} is located at [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11].<seg>" for lesion in _LESIONS),
    *(f"Segment every {lesion}. Where is the {lesion}? One {lesion}, no {lesion}s, two {lesion}s." for lesion in _LESIONS),
)

# ChatML with the vision markers of the Qwen families. The generation block lets SFT mask everything but the answers.
_MESSAGE_LOOP = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ body(message['content']) }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ body(message['content']) }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BODY = (
    "{% macro body(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}"
)
_DEFAULT_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
)


def _chat_template(*, image: str, video: str = "", default_system: bool) -> str:
    body = _BODY.replace("IMAGE", image).replace("VIDEO", video)
    return body + "{% for message in messages %}" + (_DEFAULT_SYSTEM if default_system else "") + _MESSAGE_LOOP


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN2_5_CHAT_TEMPLATE = _chat_template(image=_QWEN_IMAGE, video=_QWEN_VIDEO, default_system=True)
QWEN3_CHAT_TEMPLATE = _chat_template(image=_QWEN_IMAGE, video=_QWEN_VIDEO, default_system=False)
LLAVA_CHAT_TEMPLATE = _chat_template(image="<|image_pad|>", default_system=False)


def tiny_tokenizer(
    corpus: Iterable[str] | None = None, vocab_size: int = 1024, *, tag_tokens: Iterable[str] = TAG_TOKENS
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in memory, with Qwen's text splitting and special tokens.

    Every digit is a token of its own. The tags are added as normal tokens, so decoding with
    ``skip_special_tokens=True`` keeps them. Padding is on the left, ``<|im_end|>`` ends a turn.

    Args:
        corpus: Texts to learn the merges from, in addition to the built-in sentences about lesions.
        vocab_size: Upper limit of ``len(tokenizer)``; at least 256 bytes plus the special and tag tokens are needed.
            A small corpus may not fill it.
        tag_tokens: Texts that become one normal token each.

    Returns:
        The tokenizer. Equal arguments give equal tokenizers.

    Raises:
        ValueError: If `vocab_size` is too small to hold all bytes and added tokens.
    """
    tags = list(tag_tokens)
    n_merged = vocab_size - len(SPECIAL_TOKENS) - len(tags)
    if n_merged < 256:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {256 + len(SPECIAL_TOKENS) + len(tags)} "
            f"(256 bytes, {len(SPECIAL_TOKENS)} special tokens, {len(tags)} tags); pass a larger vocab_size"
        )
    reference = Qwen2Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer = reference.normalizer
    trained.pre_tokenizer = reference.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=n_merged,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    trained.train_from_iterator([*_DEFAULT_CORPUS, *(corpus or ())], trainer)
    bpe = json.loads(trained.to_str())["model"]

    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def _finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Point the configs at the tokenizer's pad and end tokens and decode greedily by default."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    model.eval()


def _build(model_class: type, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    _finish(model, tokenizer)
    return model


def _text_settings(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, layers: int, heads: int, spare_rows: int
) -> dict[str, Any]:
    if hidden_size % heads or (hidden_size // heads) % 8:
        raise ValueError(
            f"hidden_size is {hidden_size} with heads={heads}, expected a multiple of 8 times heads; change one of them"
        )
    return {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _mrope_section(head_dim: int) -> list[int]:
    """Share the rotary frequencies among time, height and width as Qwen does: 1/4, 3/8, 3/8 of half the head."""
    time = head_dim // 8
    height = (head_dim // 2 - time) // 2
    return [time, height, head_dim // 2 - time - height]


def _vision_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: int(tokenizer.convert_tokens_to_ids(token)) for key, token in names.items()}


def tiny_qwen2_5_vl(
    *,
    corpus: Iterable[str] | None = None,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    vision_hidden_size: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    window_size: int = 56,
    min_pixels: int = 56 * 56,
    max_pixels: int = 112 * 112,
    tie_word_embeddings: bool = False,
    spare_rows: int = 32,
    tag_tokens: Iterable[str] = TAG_TOKENS,
    seed: int = 0,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """Build a small Qwen2.5-VL with random weights and its processor (patch 14, merge 2).

    With the defaults an image of 112 x 112 pixels becomes 16 vision tokens (4 x 4); larger images are shrunk to that
    many. Raise `max_pixels` (and `min_pixels`, to enlarge small images) for a finer grid. Every second vision layer
    attends to the whole image, the others to windows of `window_size` pixels.

    Args:
        corpus: More texts for the tokenizer, see `tiny_tokenizer`.
        vocab_size: Upper limit of the tokenizer's size.
        hidden_size: Width of the language model; a multiple of ``8 * heads``.
        layers: Number of language layers.
        heads: Attention heads of the language model; half as many key-value heads.
        vision_hidden_size: Width of the vision tower; a multiple of ``4 * vision_heads``.
        vision_layers: Number of vision layers.
        vision_heads: Attention heads of the vision tower.
        window_size: Side of an attention window, pixels.
        min_pixels: Smallest area, pixels, to which an image is enlarged.
        max_pixels: Largest area, pixels, to which an image is shrunk.
        tie_word_embeddings: Share the input embedding with the output layer (3B does, 7B does not).
        spare_rows: Embedding rows beyond the tokenizer's size, as in the hub's padded vocabularies.
        tag_tokens: Normal added tokens, see `tiny_tokenizer`.
        seed: Seed of the weights; the global random state is left as it was.

    Returns:
        Model in eval mode, float32, on the CPU, and processor.

    Raises:
        ValueError: If `vocab_size` or `hidden_size` does not fit.
    """
    tokenizer = tiny_tokenizer(corpus, vocab_size, tag_tokens=tag_tokens)
    text = _text_settings(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, spare_rows=spare_rows)
    section = _mrope_section(hidden_size // heads)
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}},
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": vision_heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": window_size,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": list(range(vision_layers))[1::2] or [0],
        },
        tie_word_embeddings=tie_word_embeddings,
        **_vision_token_ids(tokenizer),
    )
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2, temporal_patch_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=14, merge_size=2, temporal_patch_size=2),
        chat_template=QWEN2_5_CHAT_TEMPLATE,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed), processor


def tiny_qwen3_vl(
    *,
    corpus: Iterable[str] | None = None,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    vision_hidden_size: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    min_pixels: int = 64 * 64,
    max_pixels: int = 128 * 128,
    tie_word_embeddings: bool = False,
    spare_rows: int = 32,
    tag_tokens: Iterable[str] = TAG_TOKENS,
    seed: int = 0,
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Build a small Qwen3-VL with random weights and its processor (patch 16, merge 2, one DeepStack level).

    With the defaults a 112 x 112 or 128 x 128 image becomes 16 vision tokens (4 x 4). Arguments, result and errors
    are those of `tiny_qwen2_5_vl`; there are no attention windows.
    """
    tokenizer = tiny_tokenizer(corpus, vocab_size, tag_tokens=tag_tokens)
    text = _text_settings(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, spare_rows=spare_rows)
    head_dim = hidden_size // heads
    config = Qwen3VLConfig(
        text_config={
            **text,
            "head_dim": head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": _mrope_section(head_dim),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": vision_heads,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [vision_layers // 2],
        },
        tie_word_embeddings=tie_word_embeddings,
        **_vision_token_ids(tokenizer),
    )
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    mean_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    grid = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **grid, **mean_std),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, **grid, **mean_std),
        chat_template=QWEN3_CHAT_TEMPLATE,
    )
    return _build(Qwen3VLForConditionalGeneration, config, tokenizer, seed), processor


def tiny_llava(
    *,
    corpus: Iterable[str] | None = None,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    vision_hidden_size: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    image_size: int = 112,
    patch_size: int = 28,
    tie_word_embeddings: bool = False,
    spare_rows: int = 32,
    tag_tokens: Iterable[str] = TAG_TOKENS,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a small LLaVA (CLIP vision tower, Llama language model), a family unlike Qwen, and its processor.

    Images are resized to `image_size` squares and cut into ``(image_size / patch_size) ** 2`` vision tokens, 16 with
    the defaults. The other arguments, the result and the errors are those of `tiny_qwen2_5_vl`.
    """
    tokenizer = tiny_tokenizer(corpus, vocab_size, tag_tokens=tag_tokens)
    text = _text_settings(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, spare_rows=spare_rows)
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden_size,
            intermediate_size=2 * vision_hidden_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_hidden_size,
        ),
        image_token_index=int(tokenizer.convert_tokens_to_ids("<|image_pad|>")),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie_word_embeddings,
    )
    square = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=LLAVA_CHAT_TEMPLATE,
    )
    return _build(LlavaForConditionalGeneration, config, tokenizer, seed), processor


def tiny_causal_lm(
    *,
    corpus: Iterable[str] | None = None,
    vocab_size: int = 1024,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    tie_word_embeddings: bool = False,
    spare_rows: int = 32,
    tag_tokens: Iterable[str] = TAG_TOKENS,
    seed: int = 0,
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Build a small text-only Qwen2 with random weights and its tokenizer (with a chat template).

    Arguments, result and errors are those of `tiny_qwen2_5_vl`, with a tokenizer in place of the processor.
    """
    tokenizer = tiny_tokenizer(corpus, vocab_size, tag_tokens=tag_tokens)
    tokenizer.chat_template = QWEN2_5_CHAT_TEMPLATE
    text = _text_settings(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, spare_rows=spare_rows)
    config = Qwen2Config(**text, tie_word_embeddings=tie_word_embeddings)
    return _build(Qwen2ForCausalLM, config, tokenizer, seed), tokenizer
