"""`VolumeTask.read`: rows to truths, frames and grey values, read once while there is room."""

from typing import Any

import numpy as np
import pytest
from builders import tiny_model
from datasets import Dataset
from volume_builders import blocks, row_of

from segrl.data import prepare_volumes, read_grey
from segrl.errors import DataError
from segrl.predictions import VolumePromptSettings
from segrl.tasks import VolumeTask


def rows_of(folder, *masks, slices=3, **fields) -> list[Any]:
    rows = [row_of(folder, mask, f"volume {n}", **fields) for n, mask in enumerate(masks)]
    return list(
        prepare_volumes(
            Dataset.from_list(rows),
            None,
            VolumePromptSettings(slices=slices, size=32, frame_kind="original_px"),
            completions=False,
        )
    )


def reader(processor=None, frame_kind: Any = "original_px", **settings) -> Any:
    return VolumeTask(processor, VolumePromptSettings(frame_kind=frame_kind), **settings).read


class TestReading:
    def test_what_is_read(self, tmp_path):
        mask = blocks([0, 5, 0, 2, 0])
        (row,) = rows_of(tmp_path, mask)
        (found,) = reader()([row])
        assert np.array_equal(found.target.mask, mask)
        assert found.target.spacing_mm == (3.0, 1.0, 1.0)
        for name in ("query", "modality", "anatomy", "lesion", "name"):
            assert getattr(found.target, name) == row[name]
        assert np.array_equal(found.case.grey, read_grey(row["scan"], modality="MRI")[1])
        assert (found.frame.kind, found.frame.original_size) == ("original_px", (40, 24))
        assert found.frame.slices == (0, 2, 4)

    def test_the_frame_is_that_of_the_picture(self, tmp_path):
        _, processor = tiny_model("qwen2_5_vl")
        rows = [row_of(tmp_path, blocks([4, 4]))]
        (row,) = list[Any](
            prepare_volumes(Dataset.from_list(rows), processor, VolumePromptSettings(size=112), completions=False)
        )
        (found,) = reader(processor, None)([row])
        assert row["images"][0].size == (112, 67)
        assert found.frame.kind == "resized_px"
        assert found.frame.resized_size == (112, 56)  # multiples of 28
        assert found.frame.original_size == (40, 24)
        assert reader(processor, "relative_1000")([row])[0].frame.kind == "relative_1000"

    def test_intensity_and_value_of_the_row_count(self, tmp_path):
        (row,) = rows_of(tmp_path, blocks([4, 4]), intensity="window:0:100")
        (found,) = reader()([row])
        assert np.array_equal(found.case.grey, read_grey(row["scan"], intensity="window:0:100")[1])
        (none,) = reader()([{**row, "label_value": 7}])
        assert none.target.empty  # there is nothing to find, and the rewards know it

    def test_equal_volumes_have_equal_keys_and_others_do_not(self, tmp_path):
        first, other, taller = rows_of(tmp_path, blocks([4, 4]), blocks([4, 5]), blocks([4, 4], 48, 20))
        asked = {**first, "query": "What else?", "name": "again"}
        keys = [row.case.key for row in reader()([first, other, taller, asked])]
        assert keys[0] == keys[3]
        assert len(set(keys)) == 3


class TestKeeping:
    def test_equal_rows_share_what_was_read(self, tmp_path):
        first, other = rows_of(tmp_path, blocks([4, 4]), blocks([4, 5]))
        read = reader()
        found = read([first, dict(first), other, first])
        assert found[0] is found[1] is found[3]
        assert found[2] is not found[0]
        assert read([other])[0] is found[2]
        changed = read(
            [{**first, "query": "Another?"}, {**first, "label_value": 1}, {**first, "intensity": "window:0:90"}]
        )
        assert all(row is not found[0] for row in changed)

    def test_the_oldest_make_room(self, tmp_path):
        rows = rows_of(tmp_path, *[blocks([4, 4 + n]) for n in range(3)])
        read = reader(memory_bytes=2 * 2 * 2 * 24 * 40)
        a, b = read(rows[:2])
        assert read(rows[:1])[0] is a  # used last now
        c = read(rows[2:])[0]
        assert read([rows[0], rows[2]]) == [a, c]
        assert read([rows[1]])[0] is not b

    def test_the_last_is_kept_in_any_case(self, tmp_path):
        rows = rows_of(tmp_path, blocks([4, 4]), blocks([4, 5]))
        read = reader(memory_bytes=0)
        one, again = read([rows[0], rows[0]])
        assert one is again
        assert read(rows)[0] is one
        assert read([rows[0]])[0] is not one


class TestErrors:
    @pytest.mark.parametrize("column", VolumeTask.needed)
    def test_a_value_is_missing(self, column, tmp_path):
        (row,) = rows_of(tmp_path, blocks([4, 4]))
        with pytest.raises(
            DataError, match=rf"volume 0: no value for \['{column}'\]; expected rows of prepare_volumes"
        ):
            reader()([{**row, column: None}])
        del row[column], row["name"]
        with pytest.raises(DataError, match=rf"row 1 of the batch: no value for \['{column}'\]"):
            reader()([*rows_of(tmp_path, blocks([4])), row])

    @pytest.mark.parametrize(("column", "empty"), [("label", ""), ("scan", ""), ("images", []), ("slices", [])])
    def test_an_empty_value_is_named(self, column, empty, tmp_path):
        (row,) = rows_of(tmp_path, blocks([4, 4]))
        with pytest.raises(DataError, match=rf"no value for \['{column}'\]"):
            reader()([{**row, column: empty}])

    def test_pictures_of_another_scan(self, tmp_path):
        long, short = rows_of(tmp_path, blocks([4] * 9), blocks([4, 4]))
        with pytest.raises(
            DataError, match=r"volume 0: slice 8 of .*volume 1\.nii\.gz, which has 2; .* prepare_volumes"
        ):
            reader()([{**long, "scan": short["scan"], "label": short["label"]}])
        with pytest.raises(DataError, match="volume 0: 3 images for 2 slices; expected one each"):
            reader()([{**long, "slices": [0, 4]}])

    def test_label_of_another_shape(self, tmp_path):
        one, other = rows_of(tmp_path, blocks([4, 4]), blocks([4, 4, 4]))
        with pytest.raises(DataError, match=r"volume 1_label\.nii\.gz: the label has the shape \(3, 24, 40\)"):
            reader()([{**one, "label": other["label"]}])
