"""The tokenizer and the chat templates of the tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2 import Qwen2Tokenizer

__all__ = [
    "LLAVA_CHAT_TEMPLATE",
    "QWEN2_5_CHAT_TEMPLATE",
    "QWEN3_CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "TAG_TOKENS",
    "tiny_tokenizer",
]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Normal tokens, because TRL decodes with skip_special_tokens=True and rewards read these.
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
    *(f"Segment every {lesion}. Where is the {lesion}? One {lesion}, two {lesion}s." for lesion in _LESIONS),
    # Words at the start of a text: without a space before them they are other tokens.
    *("Where", "Find", "Show", "Segment", "Locate", "Outline", "Mark", "Please", "Answer", "No", "There", "One", "It"),
    "ring abscesses, tumors, polyps, nodules, cysts",
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

    Every digit is one token. The tags are added as normal tokens, so decoding with ``skip_special_tokens=True`` keeps
    them. Padding is on the left, ``<|im_end|>`` ends a turn.

    Args:
        corpus: Texts to learn the merges from, in addition to the built-in sentences about lesions.
        vocab_size: Upper limit of ``len(tokenizer)``; at least 256 bytes plus the special and tag tokens are needed.
            A small corpus may not fill it.
        tag_tokens: Texts that become one normal token each.

    Returns:
        The tokenizer. Equal arguments give equal tokenizers.

    Raises:
        ValueError: If `vocab_size` is too small to hold all bytes and added tokens.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.tokenize("Segment 12.<seg>"), tokenizer.padding_side
        (['Segment', 'Ġ', '1', '2', '.', '<seg>'], 'left')
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

    settings: dict[str, Any] = {"merges": [tuple(merge) for merge in bpe["merges"]], "unk_token": None}
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        **settings,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        model_max_length=4096,
    )
    added: list[Any] = [AddedToken(tag, special=False, normalized=False) for tag in tags]
    tokenizer.add_tokens(added)
    return tokenizer
