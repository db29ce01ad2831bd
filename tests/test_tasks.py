"""Images and volumes are two tasks of one mechanism: what they share is held together here."""

import inspect
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import grpo_args, seg_bias, sft_args, tiny_headed_model, tiny_model, tiny_segmenter
from datasets import Dataset
from PIL import Image

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOTrainer, SegSFTTrainer, inference, predictions
from segrl.data import make_synthetic, make_synthetic_volumes, prepare, prepare_volumes
from segrl.errors import CheckpointError, DataError, SegRLError
from segrl.evaluation import evaluate, overlap_record, volume_record
from segrl.heads import find_mask_head
from segrl.predictions import (
    ImagePromptSettings,
    Prediction,
    Status,
    Target,
    VolumePromptSettings,
    VolumeTarget,
    load_prompt_settings,
)
from segrl.rewards import make_reward
from segrl.tasks import ImageTask, VolumeTask, make_task, rollout_metrics

KINDS: Any = [ImagePromptSettings, VolumePromptSettings]


def answer(mask, status=Status.VALID):
    return Prediction("text", "r", "a", np.zeros((0, 4)), status, has_seg=True, mask=mask)


def pairs() -> list[tuple[Any, Any, Any]]:
    """Target, an equal mask and an empty one, of an image and of a volume."""
    plane = np.zeros((6, 8), dtype=bool)
    plane[2:4, 2:5] = True
    volume = np.stack([np.zeros_like(plane), plane])
    return [
        (Target.from_mask(plane, lesion="cyst"), plane, np.zeros_like(plane)),
        (VolumeTarget.from_mask(volume, lesion="cyst"), volume, np.zeros_like(volume)),
    ]


def test_record_keys():
    (image, *_), (volume, *_) = pairs()
    two, three = overlap_record(answer(image.mask), image), volume_record(answer(volume.mask), volume)
    assert list(two) == list(three)[: len(two)]
    own = {"hd95_mm", "nsd", "slice_visibility", "slice_boxes", "slice_index", "spacing_mm"}
    assert set(three) - set(two) == own


@pytest.mark.parametrize("which", [0, 1])
def test_one_definition_of_a_failure(which):
    target, right, nothing = pairs()[which]
    empty = type(target).from_mask(nothing)
    record = overlap_record if which == 0 else volume_record
    cases = [
        (answer(right), target, False),
        (answer(right, Status.NO_ANSWER), target, True),
        (answer(nothing), target, True),
        (answer(None), target, True),
        (answer(None), empty, False),
        (answer(right), empty, True),
    ]
    for prediction, truth, failed in cases:
        assert record(prediction, truth)["fail"] is failed
        assert rollout_metrics([prediction], [truth], masks=True)["fail"] == [float(failed)]
        assert rollout_metrics([prediction], [truth], masks=True)["dice"] == [record(prediction, truth)["dice"]]
    assert list(rollout_metrics([], [], masks=False)) == ["valid"]


@pytest.mark.parametrize("kind", KINDS)
def test_reasoning_changes_the_instruction_the_format_and_the_target(kind, tmp_path):
    rows = make_synthetic(1) if kind is ImagePromptSettings else make_synthetic_volumes(1, tmp_path, depth=4, size=32)
    make: Any = prepare if kind is ImagePromptSettings else prepare_volumes
    for reasoning in (True, False):
        settings = kind(reasoning=reasoning, frame_kind="original_px")
        assert ("<think>" in settings.full_instruction) is reasoning
        assert settings.completion_format.require_reasoning is reasoning
        (row,) = make(rows, None, settings, completions=True)
        assert ("<think>" in str(row["prompt"])) is reasoning
        assert ("<think>" in row["completion"][0]["content"]) is reasoning
    assert kind(instruction="Look.", reasoning=False).full_instruction == "Look."


@pytest.mark.parametrize("kind", KINDS)
def test_settings_come_back_from_their_file(kind, tmp_path):
    settings = kind(instruction="Look.", reasoning=False, frame_kind="relative_1000", max_new_tokens=7)
    settings.save(tmp_path)
    assert load_prompt_settings(tmp_path) == settings
    (tmp_path / "checkpoint-3").mkdir()
    assert load_prompt_settings(tmp_path / "checkpoint-3") == settings
    assert load_prompt_settings(tmp_path.parent) is None
    own = {"max_edge", "answer_form", "answer_tags"}  # of images
    assert {item.name for item in fields(ImagePromptSettings)} - {item.name for item in fields(kind)} <= own


BAD_FILES = [
    ("[1]", "holds a list, expected an object"),
    ("{", "not JSON"),
    ('{"task": "images"}', "version=None"),
    ('{"task": "images", "version": 99}', "version=99 is of a newer segrl"),
    ('{"task": "video", "version": 1}', "unknown task 'video'"),
    ('{"task": "images", "version": 1, "max_edgee": 3}', "did you mean 'max_edge'"),
    ('{"task": "images", "version": 1, "max_edge": "512"}', "max_edge='512': expected a whole number"),
    ('{"task": "images", "version": 1, "reasoning": 1}', "reasoning=1: expected true or false"),
    ('{"task": "volumes", "version": 1, "slices": 0}', "slices=0: expected a whole number, 1 or more"),
    ('{"task": "volumes", "version": 1, "scaling": ["CT"]}', "expected pairs of texts"),
    ('{"task": "volumes", "version": 1, "frame_kind": "cm"}', "unknown frame_kind 'cm'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_damaged_file_of_settings_is_one_line_that_names_file_and_key(text, message, tmp_path):
    (tmp_path / "segrl.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_prompt_settings(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "segrl.json"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_must_agree_between_stages():
    VolumePromptSettings(reasoning=False, instruction="a").check_continues(VolumePromptSettings(), "run")
    changes: list[dict[str, Any]] = [{"slices": 8}, {"size": 32}, {"frame_kind": "original_px"}]
    for change in changes:
        with pytest.raises(SegRLError, match=f"run was trained with {next(iter(change))}="):
            VolumePromptSettings(**change).check_continues(VolumePromptSettings(), "run")
    with pytest.raises(SegRLError, match="run was trained on images, expected a run on volumes"):
        VolumePromptSettings().check_continues(ImagePromptSettings(), "run")
    window = VolumePromptSettings(scaling=(("CT", "window:0:1"),))
    with pytest.raises(SegRLError, match="scaling"):
        window.check_continues(VolumePromptSettings(scaling=(("CT", ""),)), "run")
    window.check_continues(VolumePromptSettings(scaling=(("MRI", ""),)), "run")


def test_a_scan_is_scaled_as_in_training():
    settings = VolumePromptSettings(scaling=(("CT", "window:-160:240"), ("CT", "window:0:80"), ("MRI", "")))
    assert settings.scaling_for("MRI") == ("MRI", "")
    assert settings.scaling_for("ct", "window:0:9") == ("ct", "window:0:9")
    assert settings.scaling_for("PET") == ("PET", "")
    for modality in ("CT", ""):
        with pytest.raises(SegRLError, match="several scalings"):
            settings.scaling_for(modality)
    assert VolumePromptSettings(scaling=(("CT", "window:0:80"),)).scaling_for() == ("CT", "window:0:80")


def test_training_rows_bring_their_scaling_and_a_stream_is_left_unread():
    pairs = [("CT", "window:0:80"), ("MRI", ""), ("CT", "window:0:80"), (None, None)]
    rows = Dataset.from_list([{"modality": modality, "intensity": intensity} for modality, intensity in pairs])
    settings = VolumePromptSettings(slices=8)
    found = settings.for_rows(rows)
    assert found == VolumePromptSettings(slices=8, scaling=(("", ""), ("CT", "window:0:80"), ("MRI", "")))
    drawn = []
    stream = rows.to_iterable_dataset().map(lambda row: drawn.append(row) or row, features=rows.features)
    assert stream.column_names == ["modality", "intensity"]
    for without in (stream, rows.remove_columns("intensity"), None):
        assert settings.for_rows(without) == settings
    assert drawn == []
    assert ImagePromptSettings().for_rows(rows) == ImagePromptSettings()


def test_which_task_fits():
    _, processor = tiny_model()
    assert isinstance(make_task(processor), ImageTask)
    assert isinstance(make_task(processor, rewards=[make_reward("slice_visibility")]), VolumeTask)
    assert isinstance(make_task(processor, columns=["scan", "slices", "images"]), VolumeTask)
    assert isinstance(make_task(processor, VolumePromptSettings()), VolumeTask)
    with pytest.raises(SegRLError, match="prompt_settings are those of images"):
        make_task(processor, ImagePromptSettings(), rewards=[make_reward("slice_visibility")])


@pytest.mark.slow
def test_load_returns_the_segmenter_of_the_run(tmp_path):
    model, processor = tiny_headed_model()
    inference.ReasoningSegmenter(model, processor).save_pretrained(tmp_path / "images")
    inference.VolumeSegmenter(*tiny_model("qwen3_vl")).save_pretrained(tmp_path / "volumes")
    for name, kind in (("images", inference.ReasoningSegmenter), ("volumes", inference.VolumeSegmenter)):
        assert type(inference.load(tmp_path / name, device="cpu")) is kind
    with pytest.raises(CheckpointError, match="is a run on volumes, expected one on images"):
        inference.ReasoningSegmenter.from_pretrained(tmp_path / "volumes")
    (tmp_path / "images" / "segrl.json").unlink()
    with pytest.raises(CheckpointError, match=r"no segrl\.json"):
        inference.load(tmp_path / "images")
    with pytest.raises(CheckpointError, match="does not exist"):
        inference.load(tmp_path / "nothing")


def test_both_trainers_and_prepare_have_the_same_arguments():
    shared = {"dataset", "processor", "settings", "completions", "brief", "max_boxes", "num_proc"}
    for make in (prepare, prepare_volumes):
        assert shared <= set(inspect.signature(make).parameters)
    public = {name for name, _ in inspect.getmembers(ImageTask) if not name.startswith("_")} | {"settings", "head"}
    assert {name for name in dir(VolumeTask) if not name.startswith("_")} | {"settings", "head"} >= public
    assert predictions.PromptSettings.__subclasses__() == KINDS


# ---- what the segmenter sees -----------------------------------------------------------------------------------------


def striped(width: int = 256, height: int = 128) -> Image.Image:
    """Columns that are black and white in turn: grey on any smaller copy."""
    columns = np.tile(np.arange(width) % 2 * 255, (height, 1)).astype(np.uint8)
    return Image.fromarray(np.stack([columns] * 3, 2))


def read(task: ImageTask, rows: Any) -> list[Any]:
    return list(task.read(rows))


class TestFullImage:
    """The model sees a copy with a longest edge of 64 px, the segmenter the original."""

    settings = ImagePromptSettings(max_edge=64, instruction="")

    def rows(self, processor, image=None) -> Any:
        mask = Image.fromarray(np.eye(128, 256, dtype=np.uint8) * 255)
        row = {"image": image or striped(), "mask": mask, "query": "Where?", "modality": "", "anatomy": ""}
        data = Dataset.from_list([{**row, "lesion": "cyst", "name": "a"}] * 2)
        return prepare(data, processor, self.settings, completions=True)

    def test_in_training(self, tmp_path):
        model, processor = tiny_headed_model()
        head: Any = find_mask_head(model)
        rows = self.rows(processor)
        assert rows[0]["image"].size == (64, 32)
        task = ImageTask(processor, self.settings, head)
        first, second = read(task, list(rows))
        assert first.seg_input is second.seg_input
        expected = head.segmenter.preprocess(striped())
        assert torch.equal(first.seg_input.pixels, expected)
        assert not torch.equal(expected, head.segmenter.preprocess(rows[0]["image"]))
        assert first.frame.original_size == (256, 128)
        striped().save(tmp_path / "a.png")  # a file on disk, of which the data set knows the path
        (row,) = read(task, [{**rows[0], "full_image": {"bytes": None, "path": str(tmp_path / "a.png")}}])
        assert torch.equal(row.seg_input.pixels, expected)

    def test_images_that_are_alike_only_when_small_are_two(self):
        model, processor = tiny_headed_model()
        task = ImageTask(processor, self.settings, find_mask_head(model))
        other = Image.fromarray(255 - np.asarray(striped()))
        rows: Any = [*self.rows(processor), *self.rows(processor, other)]
        small = np.asarray(rows[0]["image"], dtype=int)
        assert np.abs(small[:, 4:-4] - np.asarray(rows[2]["image"], dtype=int)[:, 4:-4]).max() <= 2
        assert len({row.seg_input.key for row in read(task, rows)}) == 2

    def test_both_trainers_and_inference_encode_it_once(self, tmp_path):
        model, processor = tiny_headed_model()
        head: Any = find_mask_head(model)
        seen: list[torch.Tensor] = []
        head.segmenter.sam.image_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        rows = self.rows(processor)
        common: dict[str, Any] = {"processing_class": processor, "dense_losses": [DenseLoss("dice")]}
        common["prompt_settings"] = self.settings
        SegSFTTrainer(model, sft_args(tmp_path / "sft", max_steps=1), train_dataset=rows, **common).train()
        args = grpo_args(tmp_path / "grpo", max_steps=1, generation_kwargs=seg_bias(processor))
        SegGRPOTrainer(model, ["format"], args, train_dataset=rows.remove_columns("completion"), **common).train()
        ReasoningSegmenter(model.eval(), processor, self.settings).predict(striped(), "Where?")
        expected = head.segmenter.preprocess(striped())[None]
        assert 1 <= len(seen) <= 3
        assert all(torch.equal(pixels, expected) for pixels in seen)

    def test_a_large_image_loses_nothing_before_the_segmenter(self):
        """1024 x 512 px for a model that sees 512 x 256 and a segmenter of 512 x 512: every row of it counts."""
        model, processor = tiny_headed_model()
        head: Any = find_mask_head(model)
        rows = np.tile(np.arange(512)[:, None] % 2 * 255, (1, 1024)).astype(np.uint8)  # grey in half the height
        image = Image.fromarray(np.stack([rows] * 3, 2))
        head.segmenter = tiny_segmenter(image_size=512)
        settings = ImagePromptSettings(max_edge=512, instruction="")
        mask = Image.fromarray(np.eye(512, 1024, dtype=np.uint8) * 255)
        row = {"image": image, "mask": mask, "query": "Where?", "modality": "", "anatomy": "", "lesion": "cyst"}
        made: Any = prepare(Dataset.from_list([{**row, "name": "a"}]), processor, settings, completions=True)[0]
        assert made["image"].size == (512, 256)
        (item,) = read(ImageTask(processor, settings, head), [made])
        contrast = item.seg_input.pixels[0].diff(dim=0).abs().mean()
        assert contrast == pytest.approx(1 / 0.229, rel=1e-3)  # from black to white between any two rows
        assert head.segmenter.preprocess(made["image"])[0].diff(dim=0).abs().mean() < contrast / 10
        assert item.seg_input.target.shape == (128, 128)

    def test_rows_that_are_prepared_again_begin_with_the_original(self):
        _, processor = tiny_headed_model()
        rows = self.rows(processor)
        again = prepare(rows, processor, ImagePromptSettings(max_edge=128, instruction=""), completions=True)
        assert again[0]["image"].size == (128, 64)
        assert again[0]["full_image"] == rows[0]["full_image"]
        whole = prepare(rows, processor, ImagePromptSettings(instruction=""), completions=True)
        assert whole[0]["image"].size == (256, 128)
        assert whole[0]["full_image"] is None
        prompts = prepare(rows, processor, ImagePromptSettings(instruction=""), completions=False)
        assert prompts[0]["image"].size == (256, 128)

    def test_evaluation_of_prepared_rows(self):
        model, processor = tiny_headed_model()
        segmenter = ReasoningSegmenter(model, processor, replace(self.settings, max_new_tokens=1))
        shown: list[Any] = []
        rows = self.rows(processor)
        evaluate(segmenter, rows, progress=False, on_answer=lambda _, image, *rest: shown.append(image.size))
        assert shown == [(256, 128)] * 2

    def test_an_original_that_is_decoded_or_gone(self, tmp_path):
        model, processor = tiny_headed_model()
        task = ImageTask(processor, self.settings, find_mask_head(model))
        row = self.rows(processor)[0]
        (decoded,) = read(task, [{**row, "full_image": striped()}])
        assert torch.equal(decoded.seg_input.pixels, read(task, [row])[0].seg_input.pixels)
        with pytest.raises(DataError, match=r"a: full_image: .*gone\.png"):
            read(task, [{**row, "full_image": {"bytes": None, "path": str(tmp_path / "gone.png")}}])
        (damaged,) = read(task, [{**row, "full_image": {"bytes": b"no image", "path": None}}])
        with pytest.raises(DataError, match=r"a: full_image: cannot be decoded .*replace the file"):
            _ = damaged.seg_input.pixels

    def test_without_a_limit_there_is_no_second_image(self):
        _, processor = tiny_model()
        data = prepare(make_synthetic(1, size=64), processor, ImagePromptSettings(), completions=False)
        assert "full_image" not in data.column_names
        fits = prepare(make_synthetic(1, size=64), processor, ImagePromptSettings(max_edge=64), completions=False)
        assert fits[0]["full_image"] is None
