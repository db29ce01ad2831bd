"""Texts that hold a token of the model: refused before training and by inference, with row, column and token."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from segrl import ReasoningSegmenter
from segrl.data import make_synthetic, make_synthetic_volumes, prepare, prepare_volumes
from segrl.data.reserved import reserved_tokens
from segrl.errors import DataError
from segrl.inference import VolumeSegmenter
from segrl.models import tiny_causal_lm, tiny_qwen2_5_vl, tiny_qwen3_vl
from segrl.predictions import ImagePromptSettings, VolumePromptSettings

TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<seg>"]
IMAGES = ImagePromptSettings(max_new_tokens=2)
VOLUMES = VolumePromptSettings(slices=2, size=32, seg_token="<seg>", max_new_tokens=2)


def changed(rows: Any, column: str, token: str) -> Any:
    """The second row's text with a token inside."""
    texts = [f"the {token} cyst" if n == 1 else text for n, text in enumerate(rows[column])]
    return rows.remove_columns(column).add_column(column, texts)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("column", ["query", "lesion", "anatomy", "modality"])
@pytest.mark.parametrize("completions", [True, False])
def test_images(column, token, completions):
    _, processor = tiny_qwen2_5_vl()
    rows = changed(make_synthetic(2, size=64), column, token)
    with pytest.raises(DataError) as caught:
        prepare(rows, processor, IMAGES, completions=completions)
    assert str(caught.value) == f"row 1: {column} holds {token!r}, a token of the model; remove it from the text"


@pytest.mark.parametrize("token", TOKENS)
def test_volumes(token, tmp_path):
    _, processor = tiny_qwen3_vl()
    rows = changed(make_synthetic_volumes(2, tmp_path, depth=4, size=32), "query", token)
    with pytest.raises(DataError, match="row 1: query holds"):
        prepare_volumes(rows, processor, VOLUMES, completions=False)


@pytest.mark.parametrize("token", TOKENS)
def test_inference(token):
    segmenter = ReasoningSegmenter(*tiny_qwen2_5_vl(), IMAGES)
    with pytest.raises(DataError, match=r"query .* holds .*, a token of the model"):
        segmenter.predict(Image.new("RGB", (64, 64)), f"Where is {token}?")
    volumes = VolumeSegmenter(*tiny_qwen3_vl(), VOLUMES)
    with pytest.raises(DataError, match=r"query .* holds .*, a token of the model"):
        volumes.predict(np.zeros((3, 32, 32), np.uint8), f"Where is {token}?")


def test_plain_words_and_brackets_are_text():
    _, tokenizer = tiny_causal_lm()
    tokenizer.add_tokens(["cyst", "  "])
    assert not {"cyst", "  "} & set(reserved_tokens(tokenizer))
    _, processor = tiny_qwen2_5_vl()
    rows = changed(make_synthetic(2, size=64), "query", "<1 cm, [dark] | left")
    assert "[dark]" in str(prepare(rows, processor, IMAGES, completions=False)[1]["prompt"])
