"""Chat models that were not trained by segrl: frames, answers without tags, and `segrl eval` of one."""

from typing import Any

import numpy as np
import pytest
from builders import tiny_segmenter
from PIL import Image
from transformers import (
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from segrl.cli.main import main
from segrl.data import make_synthetic, write_folder
from segrl.errors import DataError, FrameError
from segrl.inference import ReasoningSegmenter
from segrl.models import tiny_llava, tiny_qwen2_5_vl, tiny_qwen3_vl
from segrl.predictions import FAMILIES, CompletionFormat, Frame, ImagePromptSettings, frame_for, zero_shot_settings

SIZE = (640, 200)  # not square: a box in the wrong frame is elsewhere
BOX = [160.0, 50.0, 320.0, 150.0]


def qwen(kind: type, video: type) -> Any:
    return kind(Qwen2VLImageProcessor(), Qwen2Tokenizer(), video())


def internvl() -> Any:
    tokenizer: Any = Qwen2Tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    for name, token in names.items():
        tokenizer.add_tokens([token], special_tokens=True)
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return InternVLProcessor(GotOcr2ImageProcessor(), tokenizer, video_processor=InternVLVideoProcessor())


def glm4v() -> Any:
    return Glm4vProcessor(Glm4vImageProcessor(), Qwen2Tokenizer(), Glm4vVideoProcessor())


# the processor that each family's models come with, and its answer for BOX on an image of SIZE
CASES = {
    "qwen2_vl": (lambda: qwen(Qwen2VLProcessor, Qwen2VLVideoProcessor), '[{"bbox_2d": [250, 250, 500, 750]}]'),
    # 640 x 200 is fed as 644 x 196: multiples of 28
    "qwen2_5_vl": (lambda: qwen(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor), '[{"bbox_2d": [161, 49, 322, 147]}]'),
    "qwen3_vl": (lambda: qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor), '[{"bbox_2d": [250, 250, 500, 750]}]'),
    "internvl": (internvl, "<ref>cyst</ref><box>[[250, 250, 500, 750]]</box>"),
    "glm4v": (glm4v, "<think>Dark.</think>It is at <|begin_of_box|>[[250, 250, 500, 750]]<|end_of_box|>"),
}


def test_every_family_has_a_case():
    assert CASES.keys() == FAMILIES.keys()
    assert all(family.source and family.models for family in FAMILIES.values())


@pytest.mark.parametrize("model_type", CASES)
def test_the_frame_of_a_family(model_type):
    make, text = CASES[model_type]
    settings = zero_shot_settings(model_type)
    frame = frame_for(make(), SIZE, kind=settings.frame_kind)
    found = settings.completion_format.parse(text, frame)
    assert found.valid, found.status
    assert np.allclose(found.boxes, [BOX], atol=1)


FRAME = Frame("original_px", (64, 64))
LENIENT = CompletionFormat(require_seg=False, require_reasoning=False, require_tags=False)


@pytest.mark.parametrize(
    ("text", "status", "answer", "reasoning"),
    [
        ("At [1, 2, 9, 8].", "valid", "At [1, 2, 9, 8].", None),
        ("<think>Dark.</think>At [1, 2, 9, 8].", "valid", "At [1, 2, 9, 8].", "Dark."),
        ("Dark.</think> At [1, 2, 9, 8].", "valid", "At [1, 2, 9, 8].", "Dark."),
        ("<think>Dark.</think><answer>At [1, 2, 9, 8].</answer>", "valid", "At [1, 2, 9, 8].", "Dark."),
        ('```json\n[{"bbox_2d": [1, 2, 9, 8], "label": "cyst"}]\n```', "valid",
         '```json\n[{"bbox_2d": [1, 2, 9, 8], "label": "cyst"}]\n```', None),
        ("<think>Dark, and on and on", "no_answer", None, None),
        ("<think>Dark.</think>", "no_answer", None, "Dark."),
        ("", "no_answer", None, None),
        (" \n", "no_answer", None, None),
        ("So: <answer>At [1, 2, 9, 8].</answer>", "extra_text", "At [1, 2, 9, 8].", None),
        ("It is at (1, 2, 9, 8).", "malformed_boxes", "It is at (1, 2, 9, 8).", None),
    ],
)  # fmt: skip
def test_answers_without_tags(text, status, answer, reasoning):
    found = LENIENT.parse(text, FRAME)
    assert (found.status.value, found.reasoning) == (status, reasoning)
    assert (found.answer or None) == answer
    assert len(found.boxes) == (status in ("valid", "extra_text"))
    strict = CompletionFormat(require_seg=False, require_reasoning=False).parse(text, FRAME)
    assert strict.valid == (text.count("answer>") == 2 and status == "valid")


def test_settings_of_answers():
    refused: list[tuple[dict[str, Any], str]] = [
        ({"answer_tags": False}, "answer_tags=False with reasoning=True"),
        ({"answer_form": "mask", "seg_token": ""}, "the answer would say nothing"),
        ({"answer_form": "boxes"}, "answer_form"),
    ]
    for settings, message in refused:
        with pytest.raises((DataError, Exception), match=message):
            ImagePromptSettings(**settings)
    json_form = ImagePromptSettings(answer_form="json", seg_token="")
    assert "point_2d" in json_form.full_instruction
    assert json_form.completion_format.answer_format == "json"
    assert "mask token" not in ImagePromptSettings(seg_token="").full_instruction


def test_an_unknown_family_needs_a_frame(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(FrameError, match="model_type 'llava': the frame of its boxes is not known; pass frame_kind"):
        ReasoningSegmenter.zero_shot(tmp_path)
    loaded = ReasoningSegmenter.zero_shot(tmp_path, frame_kind="original_px", device="cpu")
    assert loaded.settings.frame_kind == "original_px"
    assert loaded.predict(Image.new("RGB", (56, 56)), "Where is the cyst?", max_new_tokens=2).mask is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    return write_folder(make_synthetic(3, size=64), folder, split=["test"] * 3)


@pytest.mark.parametrize("make", [tiny_qwen2_5_vl, tiny_qwen3_vl])
def test_eval_of_a_chat_model(make, data, tmp_path, capsys):
    model, processor = make(layers=1, vision_layers=1)
    model.save_pretrained(tmp_path / "chat")
    processor.save_pretrained(tmp_path / "chat")
    tiny_segmenter().save_pretrained(tmp_path / "sam2")
    argv = ["eval", "--model", str(tmp_path / "chat"), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "makes no masks; pass --segmenter" in capsys.readouterr().err
    assert main([*argv, "--segmenter", str(tmp_path / "sam2"), "--batch_size", "2"]) == 0
    assert "mDice" in capsys.readouterr().out
    assert {"results.json", "predictions.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_eval_of_an_unknown_family(data, tmp_path, capsys):
    for part in tiny_llava():
        part.save_pretrained(tmp_path / "chat")
    tiny_segmenter().save_pretrained(tmp_path / "sam2")
    argv = ["eval", "--model", str(tmp_path / "chat"), "--data", str(data), "--output_dir", str(tmp_path / "out"),
            "--segmenter", str(tmp_path / "sam2")]  # fmt: skip
    assert main(argv) == 2
    assert "the frame of its boxes is not known" in capsys.readouterr().err
    assert main([*argv, "--frame_kind", "relative_1000"]) == 0
