"""Settings that exist twice: in model and processor, in processor and call, in trainer and inference."""

from typing import Any

import numpy as np
import pytest
from builders import grpo_args, sft_args, tiny_headed_model, tiny_model, tiny_rows, tiny_segmenter
from datasets import Dataset
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOTrainer, SegSFTTrainer
from segrl.data import make_synthetic, prepare
from segrl.errors import DataError, SegRLError
from segrl.models import check_processor, load_vlm
from segrl.predictions import Frame, ImagePromptSettings, frame_for


def other(name: str, value: int) -> tuple[Any, Any]:
    """A model, and a processor with one other value."""
    model, processor = tiny_headed_model()
    owner = processor if name.endswith("_id") else processor.image_processor
    setattr(owner, name, value)
    return model, processor


OTHERS = {"image_token_id": 7, "video_token_id": 7, "patch_size": 16, "temporal_patch_size": 1, "merge_size": 4}


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_processor_of_another_model_is_found_at_once(name, value, tmp_path):
    model, processor = other(name, value)
    rows = tiny_rows(2, tiny_model()[1])
    message = rf"Qwen2_5_VLProcessor does not fit Qwen2_5_VLForConditionalGeneration: {name}={value}, the model's is "
    doors = {
        "check": lambda: check_processor(model, processor),
        "inference": lambda: ReasoningSegmenter(model, processor),
        "sft": lambda: SegSFTTrainer(model, sft_args(tmp_path), train_dataset=rows, processing_class=processor),
        "grpo": lambda: SegGRPOTrainer(
            model, ["format"], grpo_args(tmp_path), train_dataset=rows, processing_class=processor
        ),
    }
    for door in doors.values():
        with pytest.raises(SegRLError, match=message):
            door()


def test_a_saved_processor_of_another_model(tmp_path):
    model, processor = tiny_model()
    processor.image_processor.merge_size = 4
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(SegRLError, match="merge_size=4, the model's is 2"):
        load_vlm(str(tmp_path))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_own_processors_fit(family):
    model, processor = tiny_model(family)
    check_processor(model, processor)
    check_processor(model, processor.tokenizer)


@pytest.mark.parametrize("key", ["max_pixels", "size", "images_kwargs", "processor_kwargs"])
def test_settings_of_images_for_single_calls_are_refused(key, tmp_path):
    """The model would see smaller images than the boxes were written for."""
    model, processor = tiny_model()
    args = grpo_args(tmp_path, chat_template_kwargs={key: {}})
    with pytest.raises(SegRLError, match=rf"chat_template_kwargs: \['{key}'\] change how single calls read images"):
        SegGRPOTrainer(model, ["box_f1"], args, train_dataset=tiny_rows(2, processor), processing_class=processor)


@pytest.mark.parametrize("kind", [Qwen2VLImageProcessor, Qwen2VLImageProcessorPil])
@pytest.mark.parametrize("merge", [2, 4])
@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")
def test_both_backends_of_the_image_processor(kind, merge):
    images = kind(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, merge_size=merge)
    for max_pixels in (None, 200_000):
        if max_pixels is not None:
            images.max_pixels = max_pixels
        grid = images(Image.new("RGB", (800, 600)), return_tensors="pt")["image_grid_thw"][0].tolist()
        expected = Frame("resized_px", (800, 600), (grid[2] * 14, grid[1] * 14))
        assert frame_for(images, (800, 600), kind="resized_px") == expected
    assert merge == 4 or expected.resized_size == (504, 364)


@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")
def test_prepare_and_predict_write_the_frame_that_the_model_sees():
    """800 x 600 with `max_pixels` set afterwards: 504 x 364 is seen, [126, 91, 252, 182] is the box."""
    model, processor = tiny_model(max_pixels=28 * 28 * 1280)
    processor.image_processor.max_pixels = 200_000
    mask = np.zeros((600, 800), np.uint8)
    mask[150:300, 200:400] = 255
    row: Any = make_synthetic(1, size=56)[0]
    row = {**row, "image": Image.new("RGB", (800, 600)), "mask": Image.fromarray(mask)}
    settings = ImagePromptSettings(reasoning=False, instruction="", max_new_tokens=1)
    made: Any = prepare(Dataset.from_list([row]), processor, settings, completions=True)[0]
    assert "[126, 91, 252, 182]" in made["completion"][0]["content"]
    answer = ReasoningSegmenter(model, processor, settings)
    seen: list[Any] = []
    model.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("grid_thw", args[-1])), with_kwargs=True
    )
    _, asked = answer._ask(row["image"], "Where?", (800, 600))
    answer.predict(row["image"], "Where?")
    assert seen[0].tolist() == [[1, 364 // 14, 504 // 14]]
    assert asked.frame.resized_size == (504, 364)


def test_inference_decodes_as_training_does():
    """The hub's `generation_config.json` of Qwen2.5-VL holds repetition_penalty 1.05, TRL generates with 1.0."""
    model, processor = tiny_model()
    settings = ImagePromptSettings(instruction="", max_new_tokens=12)
    image = make_synthetic(1, size=56)[0]["image"]
    plain = ReasoningSegmenter(model, processor, settings).predict(image, "Where?").text
    model.generation_config.repetition_penalty = 5.0
    assert ReasoningSegmenter(model, processor, settings).predict(image, "Where?").text == plain
    given = ReasoningSegmenter(model, processor, settings).predict(image, "Where?", repetition_penalty=5.0).text
    assert given != plain


def test_generation_stops_at_the_end_token_of_the_tokenizer():
    model, processor = tiny_model()
    model.generation_config.eos_token_id = processor.tokenizer.pad_token_id
    segmenter = ReasoningSegmenter(model, processor, ImagePromptSettings(instruction="", max_new_tokens=9))
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    bias = [[[processor.tokenizer.eos_token_id], 1e4]]
    segmenter.predict(make_synthetic(1, size=56)[0]["image"], "Where?", sequence_bias=bias)
    assert len(steps) == 1


def test_sizes_of_the_segmenter_are_those_of_its_config():
    segmenter: Any = tiny_segmenter()
    with pytest.raises(AttributeError):
        segmenter.image_size = 128
    assert (segmenter.image_size, segmenter.mask_size, segmenter.prompt_dim) == (64, 16, 32)


def test_a_segmentation_token_that_max_length_cuts_off(tmp_path):
    """The dense loss was 0.0, without a word."""
    model, processor = tiny_headed_model()
    rows = tiny_rows(2, processor)
    long = len(processor.tokenizer(rows[0]["completion"][0]["content"])["input_ids"])
    args = sft_args(tmp_path, max_steps=1, per_device_train_batch_size=2, max_length=long + 10)
    trainer = SegSFTTrainer(
        model, args, train_dataset=rows, processing_class=processor, dense_losses=[DenseLoss("dice")]
    )
    with pytest.raises(DataError, match=rf"max_length={long + 10} cuts '<seg>' off the row"):
        trainer.train()
