"""Prompts and answers about volumes: the number that is written comes back as the slice it stands for."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
from builders import tiny_model
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_builders import blocks, row_of

from segrl.data import (
    Volume,
    build_volume_prompt,
    format_slice_answer,
    load_volumes,
    prepare_volumes,
    read_case,
    read_grey,
    read_volume,
    render_slices,
    shown_frame,
    uniform_slices,
    write_volume,
)
from segrl.errors import DataError, FrameError
from segrl.predictions import Frame, VolumePromptSettings, format_completion, parse_completion
from segrl.tasks import VolumeTask

VOLUMES3D = Path(__file__).parents[2] / "shared" / "data" / "volumes3d"
PROCESSORS = {family: tiny_model(family)[1] for family in ("qwen2_5_vl", "qwen3_vl")}
KINDS = {  # the processor and the kind asked for, by the kind that follows
    "resized_px": (PROCESSORS["qwen2_5_vl"], None),
    "relative_1000": (PROCESSORS["qwen3_vl"], None),
    "original_px": (None, "original_px"),
}


def said(place, boxes, frame):
    text = format_completion("Seen.", format_slice_answer(place, np.array(boxes, dtype=float), frame))
    return parse_completion(text, frame, require_seg=False, answer_format="json")


def prepared(rows, processor=None, **options) -> Any:
    chosen: dict[str, Any] = {"slices": 64, "size": 32, "frame_kind": None if processor else "original_px"}
    asked = {name: options.pop(name) for name in list(options) if hasattr(VolumePromptSettings, name)}
    settings = VolumePromptSettings(**{**chosen, **asked})
    return prepare_volumes(Dataset.from_list(rows), processor, settings, **{"completions": True, **options})


def answer_of(row) -> Any:
    return json.loads(re.search("<answer>(.*)</answer>", row["completion"][0]["content"])[1])  # type: ignore[index]


class TestNumbers:
    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=40)
    @given(
        depth=st.integers(1, 200),
        count=st.integers(1, 64),
        shape=st.tuples(st.integers(4, 60), st.integers(4, 60)),
        size=st.integers(16, 200),
        data=st.data(),
    )
    def test_the_written_number_is_the_original_slice_and_the_boxes_come_back(
        self, kind, depth, count, shape, size, data
    ):
        processor, asked = KINDS[kind]
        height, width = shape
        shown = uniform_slices(depth, count)
        (image,) = render_slices(np.zeros((depth, height, width), np.uint8), shown[:1], size)
        frame = shown_frame(processor, (depth, height, width), shown, image.size, asked)
        assert (frame.kind, frame.original_size) == (kind, (width, height))
        key = data.draw(st.sampled_from(shown.tolist()))
        x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
        place = shown.tolist().index(key)
        assert json.loads(format_slice_answer(place, np.array([[x1, y1, x2, y2]]), frame))["slice"] == place + 1
        found = said(place, [[x1, y1, x2, y2]], frame)
        assert found.valid
        assert found.slice_index == key
        unit = np.array([width, height] * 2) / np.array([*frame.size] * 2)  # original pixels a unit of the frame
        assert (np.abs(found.boxes[0] - [x1, y1, x2, y2]) <= unit + 1e-9).all()
        if kind == "original_px":
            assert found.boxes[0].tolist() == [x1, y1, x2, y2]

    def test_resized_px_are_those_of_the_picture_that_the_encoder_sees(self):
        """A slice of 40 x 20 is shown as 112 x 56, which the processor leaves as it is."""
        shown = uniform_slices(90, 4)
        (image,) = render_slices(np.zeros((90, 20, 40), np.uint8), [0], 112)
        assert image.size == (112, 56)
        frame = shown_frame(PROCESSORS["qwen2_5_vl"], (90, 20, 40), shown, image.size)
        assert (frame.kind, frame.resized_size) == ("resized_px", (112, 56))
        text = format_slice_answer(2, np.array([[10, 5, 20, 15]]), frame)
        assert json.loads(text) == {"slice": 3, "bbox_2d_list": [[28, 14, 56, 42]]}
        found = parse_completion(f"<think>a</think><answer>{text}</answer>", frame, answer_format="json")
        assert (found.slice_index, found.boxes.tolist()) == (59, [[10.0, 5.0, 20.0, 15.0]])

    @pytest.mark.parametrize("number", [0, 5, 99, -1])
    def test_a_number_that_was_not_shown(self, number):
        frame = shown_frame(None, (90, 20, 40), uniform_slices(90, 4), (32, 16), "original_px")
        text = f'<think>a</think><answer>{{"slice": {number}, "bbox_2d_list": []}}</answer>'
        found = parse_completion(text, frame, require_seg=False, answer_format="json")
        assert found.slice_index == (None if number < 1 else -1)

    def test_no_box(self):
        assert json.loads(format_slice_answer(0, np.zeros((0, 4)), Frame("original_px", (8, 8)))) == {
            "slice": 1,
            "bbox_2d_list": [],
        }

    def test_without_processor_the_kind_is_needed(self):
        with pytest.raises(FrameError, match=r"processor=None: pass the model's processor, or kind='original_px'"):
            shown_frame(None, (3, 8, 8), [0, 1, 2], (8, 8))
        with pytest.raises(FrameError, match="resized_size"):
            shown_frame(None, (3, 8, 8), [0, 1, 2], (8, 8), "resized_px")


class TestPrompt:
    def test_every_picture_stands_after_its_number(self):
        ((user,),) = (build_volume_prompt("Where?", 3, VolumePromptSettings().full_instruction),)
        assert user["role"] == "user"
        kinds = [block["type"] for block in user["content"]]
        assert kinds == ["text", "image"] * 3 + ["text"]
        assert [block["text"] for block in user["content"][:-1:2]] == ["<slice 1>", "<slice 2>", "<slice 3>"]
        assert user["content"][-1]["text"] == f"Where? {VolumePromptSettings().full_instruction}"

    def test_the_instruction_is_an_example_of_the_answer(self):
        keys = re.findall(r'"(\w+)"', VolumePromptSettings().full_instruction)
        assert keys == list(json.loads(format_slice_answer(0, np.zeros((0, 4)), Frame("original_px", (8, 8)))))


class TestPictures:
    @pytest.mark.parametrize(
        ("shape", "size", "expected"),
        [((20, 40), 32, (32, 16)), ((40, 20), 32, (16, 32)), ((7, 300), 30, (30, 1)), ((8, 8), 64, (64, 64))],
    )
    def test_sizes(self, shape, size, expected):
        (image,) = render_slices(np.zeros((1, *shape), np.uint8), [0], size)
        assert (image.size, image.mode) == (expected, "RGB")

    def test_slices_in_order_and_pixels_where_they_were(self):
        grey = np.arange(6, dtype=np.uint8)[:, None, None] * 40 + np.zeros((6, 8, 8), np.uint8)
        images = render_slices(grey, [0, 2, 5], 8)
        assert [np.unique(np.array(image)).tolist() for image in images] == [[0], [80], [200]]
        grey = np.random.default_rng(0).integers(0, 255, (1, 12, 9), np.uint8)
        (same,) = render_slices(grey, [0], 12)
        assert np.array_equal(np.array(same), np.repeat(grey[0, :, :, None], 3, axis=2))

    def test_grey_values(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4, 0]))
        volume, window = read_grey(row["scan"], intensity="window:0:255")
        assert np.array_equal(window, np.floor(np.clip(volume.voxels, 0, 255) + 0.5))
        _, percentile = read_grey(row["scan"], modality="MRI")
        assert (percentile.min(), percentile.max()) == (0, 255)
        assert not np.array_equal(window, percentile)
        with pytest.raises(DataError, match=r"one\.nii\.gz: intensity 'bright': expected 'window"):
            read_grey(row["scan"], intensity="bright")


class TestRows:
    def test_columns(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 3, 5, 0, 2]), extra="kept")
        (found,) = prepared([row], completions=False, slices=3, size=20)
        assert found["slices"] == [0, 2, 4]
        assert [image.size for image in found["images"]] == [(20, 12)] * 3
        _, grey = read_grey(row["scan"], modality="MRI")
        for image, expected in zip(found["images"], render_slices(grey, [0, 2, 4], 20), strict=True):
            assert np.array_equal(np.array(image), np.array(expected))
        assert found["prompt"] == build_volume_prompt("Where is it?", 3, VolumePromptSettings().full_instruction)
        assert "completion" not in found
        assert {key: found[key] for key in row} == row

    def test_without_completions_no_label_is_read(self, tmp_path):
        (found,) = prepared([row_of(tmp_path, blocks([3, 3]), label="")], completions=False)
        assert len(found["images"]) == 2

    def test_rows_of_different_depth_and_shape(self, tmp_path):
        rows = [row_of(tmp_path, blocks([2] * depth, 12, 16 + depth), f"{depth}") for depth in (1, 3, 7)]
        found = prepared(rows, slices=5)
        assert [len(row["images"]) for row in found] == [1, 3, 5]
        assert [row["slices"] for row in found] == [[0], [0, 1, 2], [0, 2, 3, 5, 6]]

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_answer_holds_the_boxes_of_its_slice(self, kind, tmp_path):
        processor, _ = KINDS[kind]
        mask = blocks([0, 9, 9, 9, 0, 0, 9, 9, 9, 0])
        (found,) = prepared([row_of(tmp_path, mask)], processor, slices=4, size=56, seed=3)
        assert found["slices"] == [0, 3, 6, 9]
        assert found["key_slice"] in (3, 6)
        frame = shown_frame(processor, mask.shape, found["slices"], found["images"][0].size, kind)
        text = found["completion"][0]["content"]
        prediction = parse_completion(text, frame, require_seg=False, answer_format="json")
        assert prediction.valid
        assert prediction.slice_index == found["key_slice"]
        expected = sorted(references.box_around(part) for part in references.components(mask[found["key_slice"]]))
        unit = max(np.array([40, 24]) / np.array(frame.size))
        assert np.abs(np.array(sorted(prediction.boxes.tolist())) - expected).max() <= unit

    def test_the_largest_boxes(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 9, 0]))
        (one,) = prepared([row], max_boxes=1)
        assert answer_of(one) == {"slice": 2, "bbox_2d_list": [[5, 2, 13, 3]]}
        (both,) = prepared([row], max_boxes=5)
        assert answer_of(both)["bbox_2d_list"] == [[5, 2, 13, 3], [7, 10, 8, 11]]

    def test_the_value_of_the_label_counts(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4, 0, 0]))
        values = blocks([0, 4, 0, 0]) + 2 * blocks([0, 0, 0, 2]).astype(np.uint8)
        volume = read_volume(row["scan"])
        write_volume(tmp_path / "both.nii.gz", Volume(values.astype(np.float32), volume.spacing_mm))
        found = [prepared([{**row, "label": str(tmp_path / "both.nii.gz"), "label_value": v}])[0] for v in (1, 2)]
        assert [row["key_slice"] for row in found] == [1, 3]
        case = read_case({**row, "label": str(tmp_path / "both.nii.gz"), "label_value": 2})
        assert case.mask is not None
        assert case.mask.sum() == 2


class TestKeySlice:
    AREAS = (0, 1, 9, 2, 8, 0, 7, 3, 7, 0)

    def keys(self, row, seeds=16, **options):
        return [prepared([row], seed=seed, size=8, **options)[0]["key_slice"] for seed in range(seeds)]

    def test_each_of_the_largest_and_no_other(self, tmp_path):
        row = row_of(tmp_path, blocks(self.AREAS))
        assert set(self.keys(row, top_k=3)) == {2, 4, 6}  # of 6 and 8, equally large, the first
        assert self.keys(row, 3, top_k=1) == [2, 2, 2]

    def test_a_slice_without_foreground_never(self, tmp_path):
        row = row_of(tmp_path, blocks((0, 0, 5, 0, 4, 0)))
        assert set(self.keys(row, 10, top_k=50)) == {2, 4}

    def test_only_what_is_shown(self, tmp_path):
        row = row_of(tmp_path, blocks(self.AREAS))
        assert uniform_slices(10, 4).tolist() == [0, 3, 6, 9]
        assert set(self.keys(row, 10, slices=4, top_k=9)) == {3, 6}

    def test_names_draw_for_themselves_and_again_the_same(self, tmp_path):
        rows = [row_of(tmp_path, blocks(self.AREAS), f"volume {n}") for n in range(12)]
        first = [row["key_slice"] for row in prepared(rows, size=8)]
        assert first == [row["key_slice"] for row in prepared(rows[::-1], size=8)][::-1]
        assert len(set(first)) > 1
        assert first != [row["key_slice"] for row in prepared(rows, size=8, seed=1)]


class TestReasoning:
    @pytest.mark.parametrize(
        ("depth", "slices", "words"), [(9, 64, "lmh"), (1, 64, "m"), (2, 64, "lh"), (90, 3, "lmh")]
    )
    def test_it_says_in_which_third_of_the_slices_and_no_number(self, depth, slices, words, tmp_path):
        thirds = {"l": "lowest", "m": "middle", "h": "highest"}
        for word, key in zip(words, np.linspace(0, depth - 1, len(words)).astype(int), strict=True):
            if depth == 90:
                key = uniform_slices(90, 3)["lmh".index(word)]
            areas = np.zeros(depth, int)
            areas[key if depth > 1 else 0] = 4
            (row,) = prepared([row_of(tmp_path, blocks(areas), f"{key}")], slices=slices, size=8)
            thought = re.search("<think>(.*)</think>", row["completion"][0]["content"])[1]  # type: ignore[index]
            assert f"in the {thirds[word]} third of the slices" in thought
            assert not re.search(r"\d", thought)

    def test_a_written_one_is_taken(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4]), reasoning="  A cyst at the top. ")
        assert prepared([row])[0]["completion"][0]["content"].startswith("<think>A cyst at the top.</think><answer>")
        blank = prepared([{**row, "reasoning": " "}])[0]["completion"][0]["content"]
        assert "third of the slices" in blank

    def test_none(self, tmp_path):
        (row,) = prepared([row_of(tmp_path, blocks([0, 4]))], reasoning=False)
        assert row["completion"][0]["content"].startswith('<answer>{"slice": 2')

    def test_a_tag_in_it_names_the_row(self, tmp_path):
        with pytest.raises(DataError, match=r"one: reasoning holds the tag '</think>'"):
            prepared([row_of(tmp_path, blocks([0, 4]), reasoning="a</think>")])

    def test_brief(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4]))
        short, long = (prepared([row], brief=brief)[0]["completion"][0]["content"] for brief in (True, False))
        assert len(short) < len(long)


class TestNothingToFind:
    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("seg_token", ["", "<seg>"])
    def test_the_answer_names_neither_slice_nor_boxes(self, order, seg_token, tmp_path):
        rows = [row_of(tmp_path, blocks([0, 0]), "none"), row_of(tmp_path, blocks([0, 4]), "some")][::order]
        found = {row["name"]: row for row in map(dict, prepared(rows, seg_token=seg_token))}
        assert found["none"]["key_slice"] is None
        assert found["some"]["key_slice"] == 1
        text = found["none"]["completion"][0]["content"]
        assert text.endswith(f"No dark cyst is visible.</think><answer>{{}}{seg_token}</answer>")
        settings = VolumePromptSettings(slices=64, size=32, frame_kind="original_px", seg_token=seg_token)
        (row,) = VolumeTask(None, settings).read([found["none"]])
        assert row.target is not None
        assert row.target.empty
        answer = settings.completion_format.parse(text, row.frame)
        assert (answer.valid, answer.slice_index, len(answer.boxes)) == (True, None, 0)

    def test_alone(self, tmp_path):
        rows = prepared([row_of(tmp_path, blocks([0, 0]))], reasoning=False)
        assert rows["key_slice"][:] == [None]
        assert rows.features["key_slice"].dtype == "int64"
        assert rows[0]["completion"][0]["content"] == "<answer>{}</answer>"


class TestErrors:
    def test_a_lesion_on_no_shown_slice(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4, 0, 0, 0]), label_value=1)
        with pytest.raises(
            DataError,
            match=r"one_label\.nii\.gz: none of the 2 slices shown holds foreground \(label_value=1\); show",
        ):
            prepared([row], slices=2)

    def test_no_label(self, tmp_path):
        with pytest.raises(DataError, match="one: no label; expected a path in the column 'label'"):
            prepared([row_of(tmp_path, blocks([4]), label="")])

    def test_a_broken_scan(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4]))
        content = (tmp_path / "one.nii.gz").read_bytes()
        (tmp_path / "one.nii.gz").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"one\.nii\.gz: .*cut off"):
            prepared([row], completions=False)

    def test_columns_and_rows(self, tmp_path):
        row = row_of(tmp_path, blocks([0, 4]))
        with pytest.raises(DataError, match=r"dataset lacks the columns \['label_value', 'name'\]: expected \['scan'"):
            prepared([{key: value for key, value in row.items() if key not in ("label_value", "name")}])
        with pytest.raises(DataError, match="dataset has no rows: expected at least one"):
            prepare_volumes(
                Dataset.from_list([row]).select([]),
                None,
                VolumePromptSettings(frame_kind="original_px"),
                completions=False,
            )

    @pytest.mark.parametrize("name", ["slices", "size", "top_k", "max_boxes"])
    def test_numbers_below_one(self, name, tmp_path):
        with pytest.raises(DataError, match=f"{name}=0: expected .*1 or more"):
            prepared([row_of(tmp_path, blocks([0, 4]))], **{name: 0})

    @pytest.mark.parametrize("kind", [None, "resized_px"])
    def test_no_processor(self, kind, tmp_path):
        with pytest.raises(DataError, match=f"processor=None with frame_kind={kind!r}: pass the model's processor"):
            prepare_volumes(
                Dataset.from_list([row_of(tmp_path, blocks([0, 4]))]),
                None,
                VolumePromptSettings(frame_kind=kind),
                completions=True,
            )


@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="no real volumes here")
def test_real_volumes_of_2_to_182_slices():
    rows = load_volumes(VOLUMES3D, validate=False)
    for row in list[Any](
        prepare_volumes(rows, PROCESSORS["qwen3_vl"], VolumePromptSettings(slices=64, size=32), completions=True)
    ):
        (read,) = VolumeTask(PROCESSORS["qwen3_vl"]).read([row])
        target: Any = read.target
        assert row["slices"] == uniform_slices(target.depth, 64).tolist()
        answer = parse_completion(row["completion"][0]["content"], read.frame, require_seg=False, answer_format="json")
        assert answer.valid
        assert answer.slice_index == row["key_slice"]
        true = target.at(row["key_slice"]).boxes
        assert len(answer.boxes) == len(true)
        assert np.abs(answer.boxes - true).max() <= max(target.width, target.height) / 1000
