"""`VolumeSegmenter`: one question about a volume, whatever form the volume comes in; saved, loaded, asked again."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import NewObjects, sft_args, tiny_model, tiny_segmenter
from datasets import Dataset
from marks import slow_to_build
from peft import LoraConfig, PeftModel
from volume_builders import blocks, row_of

from segrl.data import Intensity, Volume, prepare_volumes, read_case, read_grey, read_volume
from segrl.errors import CheckpointError, DataError
from segrl.inference import VolumeSegmenter
from segrl.predictions import VolumePromptSettings
from segrl.segmenters import ImageFeatures, PropagationRequest, VolumePropagator
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, SEGMENTER_WEIGHTS
from segrl.trainers import SegSFTTrainer

SETTINGS = VolumePromptSettings(slices=4, size=32, instruction="Answer.", frame_kind="original_px", max_new_tokens=90)
QUESTION = "Where is it?"
MASK = blocks([0, 9, 9, 9, 9, 9, 9, 0])  # 0, 2, 5, 7 are shown
BOX = [4, 1, 34, 20]


def text(number, *boxes):
    return f'<think>a</think><answer>{{"slice": {number}, "bbox_2d_list": {[list(box) for box in boxes]}}}</answer>'


ANSWERS = {
    QUESTION: text(3, BOX),
    "not shown": text(9, BOX),
    "no slice": '<think>a</think><answer>{"bbox_2d_list": [[4, 1, 34, 20]]}</answer>',
    "outside": text(2, [900, 900, 999, 999]),
    "cut off": "<think>a</think><answer>nothing",
    "first": text(1, BOX),
}


def taught(folder, answers, steps=75) -> tuple[Any, Any]:
    """A model that knows the answers to some questions, about any volume."""
    model, processor = tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32, rope_theta=1e4)
    folder.mkdir(parents=True, exist_ok=True)
    scans = [row_of(folder, blocks([5] * depth, 24, 40), f"{depth}") for depth in (1, 3, 8)]
    rows = [{**scan, "query": question} for scan in scans for question in answers]
    data = prepare_volumes(Dataset.from_list(rows), None, SETTINGS, completions=False)
    completions = [[{"role": "assistant", "content": answers[row["query"]]}] for row in rows]
    data = data.add_column("completion", completions)
    args = sft_args(
        folder / "sft",
        max_steps=steps,
        max_length=None,
        learning_rate=5e-3,
        per_device_train_batch_size=9,
        lr_scheduler_type="cosine",
        logging_steps=25,
    )
    trainer = SegSFTTrainer(model, args, train_dataset=data, processing_class=processor)
    trainer.train()
    return model.eval(), processor


@pytest.fixture(scope="module")
@slow_to_build
def model(tmp_path_factory):
    return taught(tmp_path_factory.mktemp("taught"), ANSWERS)


@pytest.fixture(scope="module")
def segmenter(model):
    return VolumeSegmenter(model[0], model[1], SETTINGS, tiny_segmenter())


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    return row_of(tmp_path_factory.mktemp("scan"), MASK)


def same(one, other):
    assert (one.text, one.status, one.slice_index) == (other.text, other.status, other.slice_index)
    assert np.array_equal(one.boxes, other.boxes)
    assert np.array_equal(one.mask, other.mask)


class TestPredict:
    def test_slice_boxes_and_mask_of_the_volume(self, segmenter, row):
        _, grey = read_grey(row["scan"], modality="MRI")
        answer = segmenter.predict(row["scan"], QUESTION, modality="MRI")
        assert answer.text == text(3, BOX)
        assert answer.valid
        assert (answer.slice_index, answer.boxes.tolist()) == (5, [BOX])
        request = PropagationRequest(grey, "", 5, np.array([BOX], dtype=float))
        assert np.array_equal(answer.mask, VolumePropagator(tiny_segmenter(), reach=None)([request])[0])
        assert answer.mask.shape == (8, 24, 40)
        assert answer.mask.any()

    def test_path_volume_and_grey_values_are_one(self, segmenter, row, tmp_path):
        volume, grey = read_grey(row["scan"], modality="MRI")
        first = segmenter.predict(row["scan"], QUESTION, modality="MRI")
        for given in (tmp_path.parent / row["scan"], volume, grey):
            same(segmenter.predict(given, QUESTION, modality="MRI"), first)

    def test_the_intensity_that_is_asked_for(self, segmenter, row):
        volume, grey = read_grey(row["scan"], intensity="window:0:90")
        expected = segmenter.predict(grey, QUESTION)
        for given in (row["scan"], volume):
            for intensity in ("window:0:90", Intensity("window", 0, 90)):
                same(segmenter.predict(given, QUESTION, intensity=intensity), expected)

    def test_the_prompt_is_that_of_training(self, segmenter, row):
        """Token by token and pixel by pixel what TRL makes of a prepared row."""
        data: Any = prepare_volumes(Dataset.from_list([row]), None, SETTINGS, completions=False)
        conversation, asked = segmenter._ask(read_case(row, label=False), row["query"])
        mine = segmenter._inputs([conversation])
        images = iter(data[0]["images"])
        content = [
            {"type": "image", "image": next(images)} if block["type"] == "image" else block
            for block in data[0]["prompt"][0]["content"]
        ]
        theirs = segmenter._inputs([[{"role": "user", "content": content}]])
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
        assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
        assert list(asked.frame.slices) == data[0]["slices"]

    def test_a_batch_of_volumes_of_different_depth_equals_one_by_one(self, segmenter):
        rng = np.random.default_rng(0)
        volumes = [rng.integers(0, 255, (depth, 24, 40), dtype=np.uint8) for depth in (8, 1, 3, 30)]
        queries = [QUESTION, QUESTION, QUESTION, "outside"]
        together = segmenter.predict_batch(volumes, queries)
        assert [answer.mask.shape[0] for answer in together] == [8, 1, 3, 30]
        assert [answer.slice_index for answer in together] == [5, -1, 2, 10]
        for answer, volume, query in zip(together, volumes, queries, strict=True):
            same(answer, segmenter.predict(volume, query))

    def test_the_same_volume_is_read_and_encoded_once(self, segmenter, row):
        before = segmenter.propagator.encoded_slices
        first, second = segmenter.predict_batch([row["scan"]] * 2, [QUESTION] * 2, modality="MRI")
        same(first, second)
        assert segmenter.propagator.encoded_slices == before + 8

    def test_a_lazy_sequence_of_volumes(self, segmenter, row, tmp_path):
        """Every access makes a new object, whose id the next one may have."""
        other = row_of(tmp_path, blocks([0, 3, 3]), "other")

        class Lazy:
            def __len__(self):
                return 2

            def __getitem__(self, n):
                return read_volume([row, other][n]["scan"])

        answers = segmenter.predict_batch(Lazy(), [QUESTION] * 2)
        assert [answer.mask.shape[0] for answer in answers] == [8, 3]

    def test_without_segmenter_there_is_no_mask(self, model, row):
        answer = VolumeSegmenter(model[0], model[1], SETTINGS).predict(row["scan"], QUESTION)
        assert (answer.mask, answer.slice_index) == (None, 5)

    def test_none(self, segmenter):
        assert segmenter.predict_batch([], []) == []

    def test_progress(self, segmenter, row, capsys):
        segmenter.predict(row["scan"], QUESTION)
        assert capsys.readouterr().out == ""
        segmenter.predict(row["scan"], QUESTION, progress=True)
        assert re.search("propagate.*100%", capsys.readouterr().out)

    @pytest.mark.long
    def test_features_of_a_deep_volume_are_let_go(self, segmenter):
        volume = np.random.default_rng(0).integers(0, 255, (60, 24, 40), dtype=np.uint8)
        alive = []
        new = NewObjects(ImageFeatures)
        encode = segmenter.segmenter.sam.image_encoder.register_forward_hook(lambda *_: alive.append(len(new())))
        try:
            answer = segmenter.predict(volume, QUESTION)
        finally:
            encode.remove()
        assert answer.slice_index == 39
        assert len(alive) >= 39
        assert max(alive) <= 4


class TestAnswers:
    """What a model may write instead: never an exception."""

    @pytest.mark.parametrize(
        ("question", "index", "boxes"),
        [
            ("not shown", -1, [BOX]),
            ("no slice", None, [BOX]),
            ("outside", 2, [[40, 24, 40, 24]]),
            ("cut off", None, []),
        ],
    )
    def test_an_empty_mask(self, question, index, boxes, segmenter, row):
        found = segmenter.predict(row["scan"], question)
        assert found.text == ANSWERS[question]
        assert (found.slice_index, found.boxes.tolist()) == (index, boxes)
        assert found.mask.shape == (8, 24, 40)
        assert not found.mask.any()

    def test_a_volume_of_one_slice(self, segmenter):
        volume = np.random.default_rng(0).integers(0, 255, (1, 24, 40), dtype=np.uint8)
        found = segmenter.predict(volume, "first")
        assert (found.slice_index, found.mask.shape) == (0, (1, 24, 40))
        assert found.mask.any()


class TestSaved:
    def test_the_same_prediction(self, segmenter, row, tmp_path):
        before = segmenter.predict(row["scan"], QUESTION, modality="MRI")
        segmenter.save_pretrained(tmp_path / "run")
        assert {SEGMENTER_CONFIG, SEGMENTER_WEIGHTS, "segrl.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
        loaded = VolumeSegmenter.from_pretrained(tmp_path / "run", device="cpu")
        assert loaded.settings == segmenter.settings
        same(loaded.predict(row["scan"], QUESTION, modality="MRI"), before)

    def test_a_checkpoint_has_the_segmenter_of_its_run(self, segmenter, row, tmp_path):
        segmenter.save_pretrained(tmp_path / "checkpoint-2")
        for name in (SEGMENTER_CONFIG, SEGMENTER_WEIGHTS, "segrl.json"):
            (tmp_path / "checkpoint-2" / name).rename(tmp_path / name)
        loaded = VolumeSegmenter.from_pretrained(tmp_path / "checkpoint-2", device="cpu")
        same(loaded.predict(row["scan"], QUESTION), segmenter.predict(row["scan"], QUESTION))

    def test_another_segmenter(self, segmenter, model, row, tmp_path):
        other = tiny_segmenter(seed=5)
        expected = VolumeSegmenter(model[0], model[1], SETTINGS, other).predict(row["scan"], QUESTION)
        assert not np.array_equal(np.asarray(expected.mask), segmenter.predict(row["scan"], QUESTION).mask)
        segmenter.save_pretrained(tmp_path / "run")
        other.save_pretrained(tmp_path / "sam")
        for given in (other, tmp_path / "sam", str(tmp_path / "sam")):
            loaded = VolumeSegmenter.from_pretrained(tmp_path / "run", device="cpu", segmenter=given)
            same(loaded.predict(row["scan"], QUESTION), expected)

    def test_no_segmenter(self, model, row, tmp_path):
        VolumeSegmenter(model[0], model[1], SETTINGS).save_pretrained(tmp_path)
        loaded = VolumeSegmenter.from_pretrained(tmp_path, device="cpu")
        assert loaded.segmenter is None
        assert loaded.predict(row["scan"], QUESTION).mask is None

    def test_settings_of_the_propagator_come_back(self, model, tmp_path):
        made = VolumeSegmenter(model[0], model[1], replace(SETTINGS, postprocessing=False), tiny_segmenter())
        made.save_pretrained(tmp_path)
        loaded = VolumeSegmenter.from_pretrained(tmp_path, device="cpu")
        for one in (made, loaded):
            assert one.propagator is not None
            assert (one.propagator.postprocessing, one.propagator.reach) == (False, None)
        assert VolumeSegmenter(model[0], model[1]).settings.max_new_tokens == 256

    @pytest.mark.slow
    @pytest.mark.parametrize("merge", [False, True])
    def test_an_adapter(self, merge, row, tmp_path):
        base, processor = tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32)
        base.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
        adapted = PeftModel(base, config)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        made = VolumeSegmenter(adapted.eval(), processor, SETTINGS, tiny_segmenter())
        before = made.predict(row["scan"], QUESTION)
        made.save_pretrained(tmp_path / "run")
        assert (tmp_path / "run" / "adapter_config.json").is_file()
        loaded = VolumeSegmenter.from_pretrained(tmp_path / "run", device="cpu", merge=merge)
        same(loaded.predict(row["scan"], QUESTION), before)
        with adapted.disable_adapter():
            assert made.predict(row["scan"], QUESTION).text != before.text

    def test_no_model(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere' does not exist; pass an output directory"):
            VolumeSegmenter.from_pretrained(tmp_path / "nowhere")

    def test_a_damaged_segmenter_is_named(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path)
        (tmp_path / SEGMENTER_WEIGHTS).write_bytes(b"cut")
        with pytest.raises(CheckpointError, match=r"segmenter\.safetensors: cannot be read: "):
            VolumeSegmenter.from_pretrained(tmp_path, device="cpu")


class TestErrors:
    @pytest.mark.parametrize(
        ("volume", "message"),
        [
            (
                np.zeros((3, 24, 40)),
                r"volume: float64 array of shape \(3, 24, 40\); expected grey values \(D, H, W\) uint8",
            ),
            (np.zeros((24, 40), np.uint8), r"volume: uint8 array of shape \(24, 40\)"),
            (np.zeros((0, 24, 40), np.uint8), r"volume: uint8 array of shape \(0, 24, 40\)"),
            ("nowhere.nii.gz", r"nowhere\.nii\.gz: no such file"),
            (None, r"volume: NoneType; expected a path, a Volume, a Case or grey values"),
            ([[[1]]], r"volume: list; expected a path"),
            (torch.zeros(3, 24, 40), r"volume: Tensor; expected a path"),
        ],
    )
    def test_what_is_no_volume(self, volume, message, segmenter):
        with pytest.raises(DataError, match=message):
            segmenter.predict(volume, QUESTION)

    def test_voxels_that_are_no_numbers(self, segmenter):
        voxels = np.full((3, 24, 40), np.nan, np.float32)
        with pytest.raises(DataError, match=r"the scan: voxels: 2880 of 2880 are NaN or infinite"):
            segmenter.predict(Volume(voxels, name="the scan"), QUESTION)

    def test_lengths(self, segmenter):
        volume = np.zeros((3, 24, 40), np.uint8)
        with pytest.raises(DataError, match="1 volumes for 2 queries; expected one query per volume"):
            segmenter.predict_batch([volume], ["A", "B"])
        with pytest.raises(DataError, match="2 modalities for 1 inputs; expected one text for all, or one per input"):
            segmenter.predict_batch([volume], ["A"], modality=["CT", "MRI"])

    def test_an_intensity_that_is_none(self, segmenter, row):
        for given in (row["scan"], read_volume(row["scan"])):
            with pytest.raises(DataError, match=r"one\.nii\.gz: intensity 'bright': expected 'window"):
                segmenter.predict(given, QUESTION, intensity="bright")

    def test_beams(self, segmenter, row):
        with pytest.raises(DataError, match="num_beams and num_return_sequences must be 1"):
            segmenter.predict(row["scan"], QUESTION, num_beams=2)
