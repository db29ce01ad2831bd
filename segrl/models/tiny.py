"""Tiny vision-language models of the real transformers classes, with full processors, built in memory.

The models have random weights and one to two million parameters. They are meant for tests and for small experiments on
synthetic images, so the tokenizer is trained on the texts of such experiments: most words are one token, and every
digit is one token, as in the Qwen tokenizers.

Equal arguments give equal models. Nothing needs the network, and everything can be saved with ``save_pretrained`` and
loaded with ``AutoModelForImageTextToText`` and ``AutoProcessor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip import CLIPImageProcessor, CLIPVisionConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llava import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from segrl.models.tiny_tokenizer import (
    LLAVA_CHAT_TEMPLATE,
    QWEN2_5_CHAT_TEMPLATE,
    QWEN3_CHAT_TEMPLATE,
    TAG_TOKENS,
    tiny_tokenizer,
)

__all__ = ["tiny_causal_lm", "tiny_llava", "tiny_qwen2_5_vl", "tiny_qwen3_vl"]


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
        "initializer_range": hidden_size**-0.5,  # with 0.02, made for wide models, attention would hardly differ
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _mrope_section(head_dim: int) -> list[int]:
    """Divide the rotary frequencies into time, height and width as Qwen does: 1/4, 3/8, 3/8 of half the head."""
    time = head_dim // 8
    height = (head_dim // 2 - time) // 2
    return [time, height, head_dim // 2 - time - height]


def _vision_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


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
) -> tuple[Any, Any]:
    """Build a small Qwen2.5-VL with random weights and its processor (patch 14, merge 2).

    With the defaults an image of 112 x 112 pixels becomes 16 vision tokens (4 x 4); larger images are shrunk to this
    number. Raise `max_pixels` (and `min_pixels`, to enlarge small images) for a finer grid. Every second vision layer
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
        seed: Seed of the weights; the global random state does not change.

    Returns:
        A ``Qwen2_5_VLForConditionalGeneration`` in eval mode, float32, on the CPU, and its ``Qwen2_5_VLProcessor``.
        (Annotated as Any: transformers' annotations do not describe configs and outputs well enough to be checked.)

    Raises:
        ValueError: If `vocab_size` or `hidden_size` does not fit.

    Example:
        >>> from PIL import Image
        >>> model, processor = tiny_qwen2_5_vl(layers=1, vision_layers=1)
        >>> inputs = processor(images=[Image.new("RGB", (112, 112))], text="<|image_pad|> Where?", return_tensors="pt")
        >>> int((inputs["input_ids"] == model.config.image_token_id).sum())
        16
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
    patch_size: int = 16,
    merge_size: int = 2,
    rope_theta: float = 5e6,
    position_std: float | None = None,
    tie_word_embeddings: bool = False,
    spare_rows: int = 32,
    tag_tokens: Iterable[str] = TAG_TOKENS,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Build a small Qwen3-VL with random weights and its processor (one DeepStack level).

    With the defaults a 112 x 112 or 128 x 128 image becomes 16 vision tokens (4 x 4). Arguments, result and errors
    are those of `tiny_qwen2_5_vl`; there are no attention windows. An image is cut into patches of `patch_size` pixels,
    and `merge_size` x `merge_size` patches become one token. With the published `rope_theta`, only one or two of the 16
    or 32 dimensions of a head turn fast enough to separate neighbouring tokens: use 1e4 for a model that is trained,
    which then learns to read its prompt much sooner. `position_std` is the deviation of the vision tower's position
    embeddings; transformers' 0.02 is lost beside the patches of a model that is trained for minutes: with 0.5 it learns
    where in the image something is, with 0.02 it does not (docs/log.md).

    Example:
        >>> model, _ = tiny_qwen3_vl(layers=1, vision_layers=1)
        >>> type(model).__name__, model.config.vision_config.deepstack_visual_indexes
        ('Qwen3VLForConditionalGeneration', [0])
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
                "rope_theta": rope_theta,
                "mrope_section": _mrope_section(head_dim),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_heads": vision_heads,
            "patch_size": patch_size,
            "spatial_merge_size": merge_size,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [vision_layers // 2],
        },
        tie_word_embeddings=tie_word_embeddings,
        **_vision_token_ids(tokenizer),
    )
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    images: dict[str, Any] = {
        "size": size,
        "patch_size": patch_size,
        "merge_size": merge_size,
        "temporal_patch_size": 2,
    }
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**images),
        chat_template=QWEN3_CHAT_TEMPLATE,
    )
    model = _build(Qwen3VLForConditionalGeneration, config, tokenizer, seed)
    if position_std is not None:
        embeddings = model.model.visual.pos_embed.weight
        with torch.no_grad():
            embeddings.mul_(position_std / embeddings.std())
    return model, processor


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
) -> tuple[Any, Any]:
    """Build a small LLaVA (CLIP vision tower, Llama language model), a family unlike Qwen, and its processor.

    Images are resized to `image_size` squares and cut into ``(image_size / patch_size) ** 2`` vision tokens, 16 with
    the defaults. The other arguments, the result and the errors are those of `tiny_qwen2_5_vl`.

    Example:
        >>> model, processor = tiny_llava(layers=1, vision_layers=1)
        >>> type(model).__name__, model.config.image_seq_length
        ('LlavaForConditionalGeneration', 16)
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
        image_token_index=_vision_token_ids(tokenizer)["image_token_id"],
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
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Build a small text-only Qwen2 with random weights and its tokenizer (with a chat template).

    Arguments, result and errors are those of `tiny_qwen2_5_vl`, with a tokenizer instead of the processor.

    Example:
        >>> model, tokenizer = tiny_causal_lm(layers=1, spare_rows=7)
        >>> type(model).__name__, model.config.vocab_size - len(tokenizer)
        ('Qwen2ForCausalLM', 7)
    """
    tokenizer = tiny_tokenizer(corpus, vocab_size, tag_tokens=tag_tokens)
    tokenizer.chat_template = QWEN2_5_CHAT_TEMPLATE
    text = _text_settings(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, spare_rows=spare_rows)
    config = Qwen2Config(**text, tie_word_embeddings=tie_word_embeddings)
    return _build(Qwen2ForCausalLM, config, tokenizer, seed), tokenizer
