"""Inputs of every form, several answers from one prefill, and what a result can be turned into."""

import json
import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from builders import seg_bias, tiny_headed_model, tiny_model, tiny_segmenter
from PIL import Image

from segrl.data import Case, Volume, read_label
from segrl.errors import CheckpointError, DataError, UnknownNameError
from segrl.geometry import read_mask_file, rle_to_mask
from segrl.heads import MaskHead, QueryProbe, attach_mask_head
from segrl.inference import Confidence, InferenceResult, ReasoningSegmenter, VolumeSegmenter, combine_answers, load
from segrl.inference.asking import Asked
from segrl.inference.batches import in_batches, row_bytes, rows_that_fit
from segrl.metrics import dice
from segrl.models import backbone_of, ensure_seg_token, seg_token_id
from segrl.predictions import Frame, ImagePromptSettings, VolumePromptSettings, parse_completion
from segrl.sharing import enable_sharing

SETTINGS = ImagePromptSettings(instruction="Answer.", max_new_tokens=12)
FRAME = Frame("original_px", (6, 4))
VALID = "<think>a</think><answer>The cyst is located at [0, 0, 2, 1].<seg></answer>"


def picture(size=(64, 64), seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def segmenter():
    """Random weights: every text is invalid, and every answer that writes `<seg>` has a mask."""
    model, processor = tiny_headed_model("qwen2_5_vl")
    return ReasoningSegmenter(model.eval(), processor, SETTINGS)


@pytest.fixture(scope="module")
def volumes():
    model, processor = tiny_model("qwen3_vl")
    settings = VolumePromptSettings(slices=3, size=32, instruction="Answer.", max_new_tokens=4)
    return VolumeSegmenter(model.eval(), processor, settings, tiny_segmenter())


def answers(*masks, text=VALID):
    parsed = parse_completion(text, FRAME)
    return [parsed if mask is None else parsed.with_mask(np.asarray(mask, dtype=bool)) for mask in masks]


def combined_of(given) -> tuple[Any, Confidence]:
    return combine_answers(given)


class TestCombine:
    def test_majority_and_mean_pairwise_dice(self):
        rng = np.random.default_rng(0)
        masks = rng.random((5, 4, 6)) < 0.5
        combined, confidence = combined_of(answers(*masks))
        assert np.array_equal(combined.mask, masks.mean(0) > 0.5)
        assert np.allclose(combined.probability, masks.mean(0))
        assert confidence.agreement == pytest.approx(np.mean([dice(a, b) for a, b in combinations(masks, 2)]))
        assert confidence.probability == pytest.approx(masks.mean(0)[masks.mean(0) > 0.5].mean())
        assert (confidence.samples, confidence.valid, confidence.value) == (5, 1.0, confidence.probability)

    def test_probabilities_are_averaged_before_the_threshold(self):
        first, second = answers(np.eye(4, 6) > 0, np.zeros((4, 6)))
        first = replace(first, probability=np.full((4, 6), 0.9, dtype=np.float32))
        second = replace(second, probability=np.full((4, 6), 0.2, dtype=np.float32))
        combined, confidence = combined_of([first, second])
        assert combined.mask.all()  # 0.55 everywhere, although one of the two masks is empty
        assert confidence.probability == pytest.approx(0.55)

    def test_the_text_is_that_of_the_mask_nearest_to_the_combined_one(self):
        wide, narrow = np.ones((4, 6), dtype=bool), np.eye(4, 6) > 0
        other = VALID.replace("0, 0, 2, 1", "1, 1, 3, 3")
        given = [*answers(narrow, text=other), *answers(wide, wide)]
        assert combined_of(given)[0].text == VALID
        bad = [*answers(narrow), *answers(wide, wide, text="nothing")]
        assert combined_of(bad)[0].text == VALID  # a valid answer before those that agree

    def test_an_invalid_answer_agrees_with_none(self):
        full = np.ones((4, 6), dtype=bool)
        _, confidence = combined_of([*answers(full, full), *answers(full, text="nothing")])
        assert confidence.agreement == pytest.approx(1 / 3)
        assert confidence.valid == pytest.approx(2 / 3)

    def test_empty_masks(self):
        combined, confidence = combined_of(answers(np.zeros((4, 6)), np.zeros((4, 6))))
        assert not combined.mask.any()
        assert (confidence.agreement, confidence.probability) == (1.0, 1.0)

    def test_without_any_mask(self):
        combined, confidence = combined_of([*answers(None, text="nothing"), *answers(None)])
        assert (combined.text, combined.mask) == (VALID, None)
        assert confidence == Confidence(2, None, 0.0, 0.5)

    def test_one_answer_keeps_its_mask(self):
        answer: Any = answers(np.eye(4, 6))[0]
        for shown in (None, np.full((4, 6), 0.75, dtype=np.float32)):
            combined, confidence = combined_of([replace(answer, probability=shown)])
            assert np.array_equal(combined.mask, answer.mask)
            value = None if shown is None else 0.75
            expected = {"value": value, "samples": 1, "probability": value, "agreement": None, "valid": 1.0}
            assert confidence.to_dict() == expected

    def test_without_a_valid_answer_the_value_is_zero(self):
        _, confidence = combined_of(answers(np.eye(4, 6), np.eye(4, 6), text="nothing"))
        assert (confidence.probability, confidence.value) == (1.0, 0.0)

    def test_errors(self):
        with pytest.raises(DataError, match="answers: expected one or more"):
            combined_of([])
        with pytest.raises(DataError, match=r"masks of the shapes \[\(2, 2\), \(4, 6\)\]"):
            combined_of(answers(np.zeros((4, 6)), np.zeros((2, 2))))


class TestSamples:
    def test_one_prefill_for_all_samples(self, segmenter):
        rows = []
        layer = segmenter.model.get_decoder().layers[0]
        segmenter.predict(picture(), "Find it.", samples=2, max_new_tokens=2)  # the model is tried before
        handle = layer.register_forward_hook(lambda module, args, output: rows.append(tuple(args[0].shape[:2])))
        segmenter.predict([picture(), picture((90, 40))], "Find it.", samples=4, seed=0, min_new_tokens=12)
        handle.remove()
        assert [batch for batch, _ in rows] == [2, *[8] * 11]
        assert rows[0][1] > 1
        assert {length for _, length in rows[1:]} == {1}

    def test_samples_are_those_of_prompts_of_their_own(self, segmenter):
        """One prefill changes nothing: greedy samples equal the greedy answer, with its mask."""
        settings = {**seg_bias(segmenter.processor), "repetition_penalty": 3.0}
        alone = segmenter.predict(picture(), "Find it.", probabilities=True, **settings)
        several = segmenter.predict(picture(), "Find it.", samples=3, top_k=1, **settings)
        assert [one.text for one in several.samples] == [alone.text] * 3
        assert alone.mask is not None
        assert all((one.mask != alone.mask).mean() < 0.002 for one in several.samples)
        assert np.allclose(several.probability, alone.probability, atol=1e-3)

    def test_a_seed_repeats_and_leaves_the_state_alone(self, segmenter):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        texts = [
            [one.text for one in segmenter.predict(picture(), "Find it.", samples=3, seed=seed).samples]
            for seed in (0, 0, 1)
        ]
        assert texts[0] == texts[1] != texts[2]
        assert len(set(texts[0])) == 3
        assert torch.equal(torch.get_rng_state(), state)

    def test_abstention(self, segmenter):
        settings = seg_bias(segmenter.processor)
        assert segmenter.predict(picture(), "Find it.", samples=2, seed=0, abstain_below=0.5, **settings).abstained
        assert not segmenter.predict(picture(), "Find it.", samples=2, seed=0, abstain_below=0.0, **settings).abstained
        alone = segmenter.predict(picture(), "Find it.", abstain_below=0.1, **settings)
        assert alone.confidence.samples == 1
        assert alone.abstained == (alone.confidence.value is None or alone.confidence.value < 0.1)

    def test_query_tokens_of_a_probe(self):
        """Nobody writes them, so that each sample gets a forward of its own, with its prompt."""
        model, processor = tiny_model()
        query = ensure_seg_token(model, processor, "<query>")
        probe = QueryProbe(seg_token_id(processor), query, 4, model.config.get_text_config().hidden_size)
        attach_mask_head(model, MaskHead.build(model, tiny_segmenter(), token_id=probe.token_id, probe=probe))
        own = ReasoningSegmenter(model.eval(), processor, SETTINGS)
        settings = seg_bias(processor)
        alone = own.predict(picture(), "Find it.", **settings)
        several = own.predict(picture(), "Find it.", samples=2, top_k=1, **settings)
        assert alone.mask is not None
        assert all((one.mask != alone.mask).mean() < 0.002 for one in several.samples)

    def test_a_model_that_cannot_share_prompts_still_answers(self):
        model, processor = tiny_headed_model("qwen2_5_vl")
        own, other = (ReasoningSegmenter(model.eval(), processor, SETTINGS) for _ in range(2))
        shared = own.predict(picture(), "Find it.", samples=2, seed=0)
        text = model.config.get_text_config()
        text._attn_implementation, before = "paged|sdpa", text._attn_implementation
        try:
            assert enable_sharing(model) is not None
            other._one_prefill([], 2)
        finally:
            text._attn_implementation = before
        assert (own._shares, other._shares) == (True, False)
        alone = other.predict(picture(), "Find it.", samples=2, seed=0)
        assert [one.text for one in alone.samples] == [one.text for one in shared.samples]

    def test_of_volumes(self, volumes):
        case = np.random.default_rng(0).integers(0, 255, (5, 24, 40), dtype=np.uint8)
        result = volumes.predict(case, "Find it.", samples=2, seed=0)
        assert result.mask.shape == (5, 24, 40)
        assert result.confidence.samples == 2
        assert result.to_dict()["slice"] is None


class TestInputs:
    def test_every_form_is_one_image(self, segmenter, tmp_path):
        image = picture((40, 30))
        image.save(tmp_path / "a.png")
        expected = segmenter.predict(image, "Find it.")
        for given in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), picture((40, 30), mode="RGBA")):
            assert segmenter.predict(given, "Find it.").text == expected.text
        assert segmenter.predict(tmp_path / "a.png", "Find it.").name == str(tmp_path / "a.png")

    def test_a_list_of_forms_with_a_question_each(self, segmenter, tmp_path):
        picture((40, 30)).save(tmp_path / "a.png")
        found = segmenter.predict([tmp_path / "a.png", np.zeros((9, 7), dtype=np.uint8)], ["Where?", "What?"])
        assert [one.query for one in found] == ["Where?", "What?"]
        assert [one.to_dict()["size"] for one in found] == [[40, 30], [7, 9]]
        assert segmenter.predict([], "Where?") == []

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_sixteen_bits_are_scaled_and_the_scaling_is_said(self, segmenter, tmp_path, suffix):
        values = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) * 30
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
        chosen = segmenter.predict(tmp_path / f"a{suffix}", "Find it.")
        assert chosen.intensity == "percentile:0.5:99.5"
        assert segmenter.predict(values, "Find it.").text == chosen.text
        given = segmenter.predict(values, "Find it.", intensity="window:0:30000")
        grey = np.asarray(given.source)[..., 0]
        assert given.intensity == "window:0:30000"
        assert grey[0, 0] == 0
        assert grey[-1, -1] == 255

    def test_the_modality_chooses_the_scaling_as_of_a_volume(self, segmenter, volumes):
        deep = (np.arange(48 * 40, dtype=np.int16) - 1000).reshape(48, 40)
        assert segmenter.predict(deep, "Find it.", modality="CT").intensity == "window:-160:240"
        found = segmenter.predict([deep, deep, picture()], "Find it.", modality=["CT", "MRI", ""])
        assert [one.intensity for one in found] == ["window:-160:240", "percentile:0.5:99.5", ""]
        for one, given in ((segmenter, [deep] * 2), (volumes, [np.zeros((2, 8, 8), dtype=np.uint8)] * 2)):
            with pytest.raises(DataError, match="1 modalities for 2 inputs; expected one text for all"):
                one.predict(given, "Find it.", modality=["CT"])
            with pytest.raises(DataError, match="modality=3: expected a text such as 'CT'"):
                one.predict(given, "Find it.", modality=3)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("nowhere.png", "nowhere.png: no such file"),
            (3, "image: int; expected a path, a PIL image or an array"),
            (np.zeros((3, 4, 5), dtype=np.uint8), r"uint8 array of shape \(3, 4, 5\); expected \(H, W\)"),
            (np.zeros((0, 4), dtype=np.uint8), "expected .* with pixels"),
            (np.zeros((4, 4, 3), dtype=np.uint16), r"uint16 array of shape \(4, 4, 3\)"),
            (np.zeros((4, 4), dtype=bool), "image: bool pixels; expected real numbers"),
            (np.full((4, 4), np.nan), "image: .*NaN"),
        ],
    )
    def test_bad_inputs(self, segmenter, given, message):
        with pytest.raises(DataError, match=message):
            segmenter.predict(given, "Find it.")

    def test_a_declared_20000_by_20000_is_refused_before_it_is_decoded(self, segmenter, tmp_path):
        Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: declares .*set PIL.Image.MAX_IMAGE_PIXELS"):
            segmenter.predict(tmp_path / "a.png", "Find it.")

    def test_one_pixel(self, segmenter):
        result = segmenter.predict(Image.new("L", (1, 1)), "Find it.", **seg_bias(segmenter.processor))
        assert result.plot().size == (256, 256)

    def test_an_intensity_for_eight_bits_is_an_error(self, segmenter):
        with pytest.raises(DataError, match="the image has 8 bits; leave the intensity out"):
            segmenter.predict(picture(), "Find it.", intensity="window:0:9")

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"max_new_token": 3}, UnknownNameError, "did you mean 'max_new_tokens'"),
            ({"sample": 3}, UnknownNameError, "did you mean 'samples'"),
            ({"samples": 0}, DataError, "samples=0: expected a whole number from 1"),
            ({"samples": 2, "do_sample": False}, DataError, "leave do_sample out"),
            ({"abstain_below": 2}, DataError, "abstain_below=2: expected a confidence from 0 to 1"),
            ({"seed": "a"}, DataError, "seed='a'"),
            ({"batch_size": 0}, DataError, "batch_size=0: expected 1 or more"),
        ],
    )
    def test_bad_settings(self, segmenter, volumes, settings, error, message):
        with pytest.raises(error, match=message):
            segmenter.predict(picture(), "Find it.", **settings)
        with pytest.raises(error, match=message):
            volumes.predict(np.zeros((2, 8, 8), dtype=np.uint8), "Find it.", **settings)

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            (["a"], "1 queries for 2 inputs"),
            (None, "query=None: expected a text, or a list of one text per input"),
            ([1, 2], r"query=\[1, 2\]"),
        ],
    )
    def test_bad_questions(self, segmenter, query, message):
        with pytest.raises(DataError, match=message):
            segmenter.predict([picture(), picture()], query)


def asked_about_five(segmenter, pixels=0, most=3, fitting=5, fit=True) -> tuple[list[int], list[list[int]]]:
    """Answer five inputs in batches, of which those with more than `fitting` run out of memory."""
    read, batches = [], []

    def reading(value):
        read.append(value)
        return value

    def answering(batch, texts):
        assert texts == [str(value) for value in batch]
        batches.append(list(batch))
        if len(batch) > fitting:
            raise torch.cuda.OutOfMemoryError
        return [10 * value for value in batch]

    found = in_batches(
        segmenter, range(5), list("01234"), reading, answering, lambda value: pixels, lambda value, text: 50, Asked(),
        most=most, fit=fit, progress=False,
    )  # fmt: skip
    assert found == [0, 10, 20, 30, 40]
    return read, batches


class TestBatches:
    def test_chunks_give_the_answers_of_one_batch(self, segmenter):
        images, rows = [picture((40 + 9 * n, 50), n) for n in range(5)], []
        backbone = backbone_of(segmenter.model)
        handle = backbone.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
        whole = segmenter.predict(images, "Find it.", max_new_tokens=3)
        assert set(rows) == {5}
        rows.clear()
        parts = segmenter.predict(images, "Find it.", max_new_tokens=3, batch_size=2)
        handle.remove()
        assert set(rows) == {1, 2}
        assert [one.text for one in parts] == [one.text for one in whole]

    def test_bars_of_volumes_and_of_their_slices(self, volumes):
        assert len(volumes.predict([np.zeros((2, 8, 8), dtype=np.uint8)] * 2, "Find it.", progress=True)) == 2

    def test_what_fits(self, segmenter):
        row = row_bytes(segmenter.model, 50, 12, 1)
        assert rows_that_fit(segmenter, 50, [0] * 10, Asked(), free=2 * row * 4) == 4
        assert rows_that_fit(segmenter, 50, [0] * 10, Asked(), free=0) == 1
        assert rows_that_fit(segmenter, 50, [10**6] * 10, Asked(), free=2 * (3 * row + 3 * 10**6)) == 3
        assert rows_that_fit(segmenter, 50, [0] * 10, Asked(samples=8), free=2 * row * 4) < 4
        assert rows_that_fit(segmenter, 50, [0] * 3, Asked(), free=10**12) == 3

    def test_each_input_is_read_once_however_few_fit(self, segmenter):
        read, batches = asked_about_five(segmenter, pixels=10**15)
        assert (read, batches) == ([0, 1, 2, 3, 4], [[0], [1], [2], [3], [4]])

    def test_a_batch_that_does_not_fit_is_halved(self, segmenter, caplog):
        read, batches = asked_about_five(segmenter, most=5, fitting=2)
        assert (read, batches) == ([0, 1, 2, 3, 4], [[0, 1, 2, 3, 4], [0, 1], [2, 3], [4]])
        assert "going on with 2 at a time" in caplog.text
        with pytest.raises(torch.cuda.OutOfMemoryError):
            asked_about_five(segmenter, most=5, fitting=2, fit=False)


class TestResult:
    def test_to_dict_is_json_and_holds_the_mask(self, segmenter):
        result: Any = segmenter.predict(
            picture((50, 40)), "Find it.", samples=2, seed=0, **seg_bias(segmenter.processor)
        )
        assert type(result) is InferenceResult
        found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert (rle_to_mask(found["mask"]) == result.mask).all()
        assert (found["query"], found["size"], found["confidence"]["samples"]) == ("Find it.", [50, 40], 2)
        assert "mask" not in result.to_dict(mask=False)

    def test_saved_files_of_an_image(self, segmenter, tmp_path):
        picture((50, 40)).save(tmp_path / "a.b.png")
        result: Any = segmenter.predict(
            tmp_path / "a.b.png", "Find it.", samples=4, seed=0, **seg_bias(segmenter.processor)
        )
        files = result.save(tmp_path / "out")
        assert sorted(path.name for path in files.values()) == ["a.b.json", "a.b_mask.png", "a.b_overlay.png"]
        assert np.array_equal(read_mask_file(files["mask"]), result.mask)
        assert json.loads(files["record"].read_text())["name"] == str(tmp_path / "a.b.png")
        with Image.open(files["overlay"]) as overlay:
            assert overlay.size == (256, 205)

    def test_one_that_abstains_leaves_no_mask(self, segmenter, tmp_path):
        settings = {**seg_bias(segmenter.processor), "samples": 4, "seed": 0, "abstain_below": 1.0}
        result = segmenter.predict(picture((50, 40)), "Find it.", **settings)
        assert result.mask is not None
        assert sorted(path.name for path in result.save(tmp_path).values()) == ["answer.json", "answer_overlay.png"]

    def test_an_input_is_never_replaced(self, segmenter, tmp_path):
        picture((50, 40)).save(tmp_path / "a_mask.png")
        result = segmenter.predict(
            tmp_path / "a_mask.png", "Find it.", samples=4, seed=0, **seg_bias(segmenter.processor)
        )
        with pytest.raises(DataError, match=r"a_mask\.png is the input itself"):
            result.save(tmp_path, "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a_mask.png"]

    def test_saved_files_of_a_volume(self, volumes, tmp_path):
        grey = np.random.default_rng(0).integers(0, 255, (5, 24, 40), dtype=np.uint8)
        case = Case(Volume(grey, (5.0, 1.0, 1.0)), "key")
        result = volumes.predict(case, "Find it.")
        mask = grey > 128
        files = replace(result, mask=mask, slice_index=2).save(tmp_path, "scan")
        assert np.array_equal(read_label(files["mask"], case.scan), mask)
        found = json.loads(files["record"].read_text())
        assert found["size"] == [5, 24, 40]
        assert [found[key] for key in ("slice", "shown_slice", "file_slice", "file_axis", "z_mm")] == [2, 2, 2, 2, None]
        with Image.open(files["overlay"]) as page:
            assert min(page.size) > 200


class TestLoad:
    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no segrl\.json; expected the output directory of a run"):
            load(tmp_path)
        SETTINGS.save(tmp_path)
        with pytest.raises(CheckpointError, match=re.escape(f"{str(tmp_path)!r}: holds no model (config.json or")):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nobody/nothing", "no such folder, and offline mode is on (HF_HUB_OFFLINE) and this machine's cache does"),
            ("no body/nothing", "no such folder, and the name is none of the hub ("),
            ("nothing", "model folder 'nothing' does not exist"),
        ],
    )
    def test_a_name_that_is_not_there(self, name, message):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load(name)
