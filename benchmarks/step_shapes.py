"""Sizes that `bench_step.py` measures, and the models, rows and answers that are made for them.

Everything is built from configs with random weights: nothing is downloaded, and a step costs what it costs with trained
weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from segrl.data import make_synthetic
from segrl.geometry import boxes_from_mask
from segrl.models import tiny_qwen2_5_vl
from segrl.predictions import ImagePromptSettings, format_answer, frame_for
from segrl.segmenters.sam2 import sam2_config

PATCH, MERGE = 14, 2
SAM_SIZES = {"tiny": sam2_config("tiny"), "hiera_tiny": sam2_config("sam2.1_hiera_tiny", image_size=512)}


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a Qwen2.5-VL, by the names of its config; the output layer is tied to the embedding, as in the 3B.

    Attributes:
        vocabulary: rows of the embedding and of the output layer.
        vision_full: vision layers that attend to the whole image; the others attend to windows of 112 px.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    vision_full: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """One workload.

    Attributes:
        prompt_tokens: language-model tokens of a prompt, images included; a little more where the images need it.
        completion_tokens: tokens of every completion.
        images, image_px: images of a prompt and their side; the first one is segmented.
        prompts: prompts of a micro-batch; each has as many completions as the group is large.
        sam: a name of `SAM_SIZES`.
        goals: largest ratio B / A at a group of 4, by quantity.
    """

    name: str
    prompt_tokens: int
    completion_tokens: int
    images: int
    image_px: int
    prompts: int
    model: ModelSize
    sam: str
    goals: Mapping[str, float]


# The parts have about the shares that they have in Qwen2.5-VL-3B, where the output layer holds 11 % and the vision
# tower 23 % of the parameters of the decoder's layers.
_100M = ModelSize(768, 10, 12, 2, 3072, 16_384, 384, 10, 6, 1024, (4, 9))
_27M = ModelSize(512, 6, 8, 2, 2048, 6_144, 192, 10, 6, 512, (4, 9))
_TINY = ModelSize(64, 2, 2, 1, 192, 1_024, 32, 2, 2, 64, (1,))
QWEN_3B = ModelSize(2048, 36, 16, 2, 11_008, 151_936, 1280, 32, 16, 3420, (7, 15, 23, 31))

_GOALS = {
    "core_seg": {"loss": 0.55, "step": 0.85, "memory": 1.0},
    "medvol": {"loss": 0.33, "step": 0.60, "memory": 0.6},
    "short": {"loss": 1.10, "step": 1.15, "memory": 1.2},
}
SHAPES = {
    "core_seg": Shape("core_seg", 430, 200, 1, 504, 2, _100M, "hiera_tiny", _GOALS["core_seg"]),
    "medvol": Shape("medvol", 5400, 256, 64, 256, 1, _27M, "hiera_tiny", _GOALS["medvol"]),
    "short": Shape("short", 60, 60, 1, 112, 2, _100M, "hiera_tiny", _GOALS["short"]),
}
QUICK = {
    "core_seg": Shape("core_seg", 140, 60, 1, 168, 2, _TINY, "tiny", {}),
    "medvol": Shape("medvol", 330, 60, 16, 84, 1, _TINY, "tiny", {}),
    "short": Shape("short", 60, 60, 1, 112, 2, _TINY, "tiny", {}),
}
FULL_SIZE = {name: replace(shape, model=QWEN_3B) for name, shape in SHAPES.items()}


# ---- model -----------------------------------------------------------------------------------------------------------


def build_model(shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Qwen2.5-VL of these sizes with random weights, and its processor: (model, processor)."""
    size = shape.model
    _, processor = tiny_qwen2_5_vl(min_pixels=56 * 56, max_pixels=1024 * 1024)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = 32_768
    if len(tokenizer) > size.vocabulary:
        raise SystemExit(f"vocabulary={size.vocabulary} is smaller than the tokenizer ({len(tokenizer)})")
    head = size.hidden // size.heads
    rotary = [head // 8, (head // 2 - head // 8) // 2]
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32_768, "tie_word_embeddings": True, **special,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [*rotary, head // 2 - sum(rotary)]},
        },
        vision_config={
            "depth": size.vision_layers, "hidden_size": size.vision_hidden, "num_heads": size.vision_heads,
            "intermediate_size": size.vision_intermediate, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(size.vision_full),
        },
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    built: Any = Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(seed)
    with torch.device(device):
        model = built._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def count_parameters(backbone: Any) -> dict[str, int]:
    """Parameters of the parts of a `Qwen2_5_VLModel`; the tied output layer is the language model's embedding."""
    parts = {"language": backbone.language_model, "vision": backbone.visual}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


# ---- rows ------------------------------------------------------------------------------------------------------------

_WORDS = (" normal", " tissue", " around", " the", " lesion", " in", " this", " image", " of", " and")


def build_rows(shape: Shape, processor: Any, count: int, seed: int) -> Dataset:
    """`count` rows; no image occurs twice, so that no step can use what an earlier one has computed.

    Columns are those that `segrl.data.prepare` gives, with `images` instead of `image` if a prompt has several. A
    prompt says which row it belongs to ("Case 3."), and holds filler words up to `shape.prompt_tokens`.
    """
    scenes = make_synthetic(count * shape.images, size=shape.image_px, seed=seed)
    rows = scenes.select(range(0, len(scenes), shape.images))
    if shape.images > 1:
        stored = scenes.with_format(None).cast_column("image", ImageFeature(decode=False))["image"]
        groups = [list(stored[n : n + shape.images]) for n in range(0, len(scenes), shape.images)]
        rows = rows.remove_columns("image").add_column("images", groups)  # type: ignore[call-arg]
        rows = rows.cast_column("images", [ImageFeature()])
    texts = [prompt_text(shape, processor, f"Case {number}. {query}") for number, query in enumerate(rows["query"])]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    return rows.add_column("prompt", prompts)  # type: ignore[call-arg]


def image_tokens(shape: Shape) -> int:
    """Language-model tokens of one image: Qwen's grid of 28 px."""
    return round(shape.image_px / (PATCH * MERGE)) ** 2


def prompt_text(shape: Shape, processor: Any, question: str) -> str:
    """The question, the instruction if there is room for it, and filler up to `shape.prompt_tokens`."""
    instruction = ImagePromptSettings().full_instruction
    left = shape.prompt_tokens - prompt_length(shape, processor, f"{question} {instruction}")
    text = f"{question} {instruction}" if left >= 0 else question
    instruction = ImagePromptSettings().full_instruction
    left = shape.prompt_tokens - prompt_length(shape, processor, text)
    return text + "".join(itertools.islice(itertools.cycle(_WORDS), max(0, left)))


def prompt_length(shape: Shape, processor: Any, text: str) -> int:
    """Tokens of a prompt with this text and the shape's images."""
    content = [*({"type": "image"} for _ in range(shape.images)), {"type": "text", "text": text}]
    written = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return len(processor.tokenizer(written)["input_ids"]) + shape.images * (image_tokens(shape) - 1)


# ---- answers ---------------------------------------------------------------------------------------------------------


class Answers:
    """Completions of exactly `shape.completion_tokens` tokens, a different one for each of a group.

    By turns the boxes are right, moved, only the first one, or in a text with words after its end (not valid). Every
    completion holds a `<seg>`, so that each has a mask.
    """

    def __init__(self, shape: Shape, processor: Any, rows: Dataset) -> None:
        self.shape, self.tokenizer = shape, processor.tokenizer
        self._known: dict[tuple[int, int], list[int]] = {}
        self._frame = frame_for(processor, (shape.image_px, shape.image_px))
        self._rows = rows.select_columns(["mask", "lesion"])

    def __call__(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The completion of each prompt; the n-th time that a prompt occurs it gets its n-th answer."""
        seen: dict[int, int] = {}
        result = []
        for ids in prompt_ids:
            found = re.search(r"Case (\d+)\.", self.tokenizer.decode(list(ids)))
            assert found is not None
            row = int(found[1])
            place = seen[row] = seen.get(row, -1) + 1
            if (row, place) not in self._known:
                self._known[row, place] = self.write(row, place)
            result.append(self._known[row, place])
        return result

    def write(self, row: int, place: int) -> list[int]:
        """Token ids of one completion."""
        shape, kind = self.shape, place % 4
        lesion = self._rows[row]["lesion"]
        boxes = boxes_from_mask(np.asarray(self._rows[row]["mask"]) > 0)
        if kind == 1:
            boxes = np.clip(boxes + shape.image_px // 8, 0, shape.image_px)
        end = " So it is." if kind == 3 else ""
        head = self._ids("<think>There are small lesions")
        for kept in range(1 if kind == 2 else len(boxes), -1, -1):
            tail = self._ids(f".</think><answer>{format_answer(lesion, boxes[:kept], self._frame)}</answer>{end}")
            room = shape.completion_tokens - len(head) - len(tail)
            if room >= 0:
                break
        else:
            raise SystemExit(f"{shape.name}: {shape.completion_tokens} tokens are too few for an answer")
        words = itertools.islice(itertools.cycle(_WORDS), place, place + room)
        return [*head, *itertools.chain.from_iterable(map(self._ids, words)), *tail]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]
