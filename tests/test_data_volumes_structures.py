"""Scans with several structures: read and kept once through every door; and what is said about their grey values."""

import csv
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from datasets import Dataset

from segrl.data import (
    CaseReader,
    check_volumes,
    grey_values,
    load_volumes,
    prepare_volumes,
    read_grey,
    read_volume,
    write_manifest,
)
from segrl.data.volumes.case import say_note
from segrl.errors import DataError
from segrl.predictions import VolumePromptSettings
from segrl.tasks import VolumeTask

nib: Any = nibabel
VOLUMES3D = Path(__file__).parents[2] / "shared" / "data" / "volumes3d"
SETTINGS = VolumePromptSettings(slices=4, size=32, frame_kind="original_px")
SHAPE = (36, 32, 8)  # X, Y, Z
HU = np.random.default_rng(0).normal(0, 300, SHAPE).clip(-1024, 3000).round()


def save(folder: Path, name: str, voxels: Any) -> str:
    nib.save(nib.Nifti1Image(np.asarray(voxels), np.diag([-1.0, -1.0, 2.0, 1.0])), folder / name)
    return name


def write_rows(folder: Path, scans: int = 2, voxels: Any = HU, **fields: Any) -> list[dict[str, Any]]:
    """Scans with six structures each; the rows of a scan are far from each other."""
    label = np.zeros(SHAPE, np.uint8)
    for value in range(1, 7):
        label[5 * value : 5 * value + 4, 4:20, 1:7] = value
    files = [
        {"image": save(folder, f"{n}.nii.gz", voxels.astype(np.float32) + (n if fields == {} else 0)),
         "label": save(folder, f"{n}_label.nii.gz", label)}
        for n in range(scans)
    ]  # fmt: skip
    texts = {"modality": "CT", "anatomy": "Abdomen", "intensity": "", **fields}
    rows = [
        {**file, "label_value": value, "lesion": f"organ {value}", "name": f"{file['image']} {value}", **texts}
        for value in (1, 2, 3, 4, 5, "5,6")
        for file in files
    ]
    write_manifest(folder, rows)
    return rows


@pytest.fixture
def reads(monkeypatch):
    """How often the voxels of each file were read."""
    from segrl.data.volumes import voxel_files

    found: Counter[str] = Counter()
    opened = voxel_files._decompressed

    def count(path: Path) -> Any:
        found[path.name] += 1
        return opened(path)

    monkeypatch.setattr(voxel_files, "_decompressed", count)
    return found


ONCE = {f"{n}{kind}.nii.gz": 1 for n in range(2) for kind in ("", "_label")}


class TestReadOnce:
    def test_by_the_check_of_a_folder(self, tmp_path, reads):
        write_rows(tmp_path)
        rows = load_volumes(tmp_path)
        assert reads == ONCE
        assert rows["label_value"][:] == [text for value in (1, 2, 3, 4, 5, "5,6") for text in [str(value)] * 2]

    def test_by_the_check_of_a_data_set(self, tmp_path, reads):
        write_rows(tmp_path)
        check_volumes(load_volumes(tmp_path, validate=False))
        assert reads == ONCE

    def test_by_preparation_which_keeps_the_order(self, tmp_path, reads):
        write_rows(tmp_path)
        rows = load_volumes(tmp_path, validate=False)
        prepared = prepare_volumes(rows, None, SETTINGS, completions=True)
        assert reads == ONCE
        assert prepared["name"][:] == rows["name"][:]
        one = prepare_volumes(rows.select([7]), None, SETTINGS, completions=True)[0]
        assert {key: value for key, value in prepared[7].items() if key != "images"} == {
            key: value for key, value in one.items() if key != "images"
        }
        assert all(np.array_equal(a, b) for a, b in zip(prepared[7]["images"], one["images"], strict=True))

    def test_by_training(self, tmp_path, reads):
        write_rows(tmp_path)
        prepared = prepare_volumes(load_volumes(tmp_path, validate=False), None, SETTINGS, completions=False)
        reads.clear()
        task = VolumeTask(None, SETTINGS)
        read = task.read(list(prepared))  # type: ignore[arg-type]
        assert reads == ONCE
        assert len({id(row.case.grey) for row in read}) == 2
        for row, value in zip(read[::2], (1, 2, 3, 4, 5, 6), strict=True):
            assert row.target is not None
            assert row.target.mask.sum() == 4 * 16 * 6 * (2 if value == 6 else 1)

    def test_rows_of_one_scan_count_it_once(self, tmp_path):
        """A budget for one scan and six masks keeps all six rows."""
        write_rows(tmp_path, 1)
        rows = list(prepare_volumes(load_volumes(tmp_path), None, SETTINGS, completions=False))
        task = VolumeTask(None, SETTINGS, memory_bytes=7 * HU.size)
        first = task.read(rows)  # type: ignore[arg-type]
        assert all(one is other for one, other in zip(first, task.read(rows), strict=True))  # type: ignore[arg-type]

    @pytest.mark.parametrize("spellings", [("CT", "CT scan", "Computed tomography", "ct")])
    def test_spellings_of_a_modality_are_one_scaling(self, tmp_path, reads, spellings):
        write_rows(tmp_path, 1)
        row = load_volumes(tmp_path, validate=False)[0]
        read = CaseReader()
        cases = [read({**row, "modality": spelling}) for spelling in spellings]
        assert reads["0.nii.gz"] == 1
        assert len({id(case.grey) for case in cases}) == 1
        assert read.nbytes == 2 * HU.size
        other = read({**row, "intensity": "window:-500:500"})
        assert not np.array_equal(other.grey, cases[0].grey)


def damaged_header(folder: Path, name: str) -> None:
    import gzip

    raw = bytearray(gzip.decompress((folder / name).read_bytes()))
    raw[42:48] = np.array([32767] * 3, "<i2").tobytes()
    (folder / name).write_bytes(gzip.compress(bytes(raw)))


class TestBadFilesTogether:
    def test_one_with_a_huge_header_hides_no_other(self, tmp_path):
        rows = write_rows(tmp_path, 4)
        damaged_header(tmp_path, "0.nii.gz")
        (tmp_path / "1_label.nii.gz").unlink()
        damaged_header(tmp_path, "2_label.nii.gz")
        write_manifest(tmp_path, rows[:4])
        with pytest.raises(DataError, match=r"3 problems in 4 rows") as caught:
            load_volumes(tmp_path)
        _, *lines = str(caught.value).splitlines()
        for line, number, text in zip(lines, (2, 3, 4), ("has 32767 x", "no such file", "has 32767 x"), strict=True):
            assert f"line {number} " in line
            assert text in line

    def test_memory_that_runs_out_at_one_file(self, tmp_path, monkeypatch):
        rows = write_rows(tmp_path, 3)
        (tmp_path / "2_label.nii.gz").unlink()
        write_manifest(tmp_path, rows[:3])
        from segrl.data.volumes import folder

        def choose(volume: Any, *arguments: Any) -> Any:
            if volume.name.endswith("1.nii.gz"):
                raise MemoryError("Unable to allocate 3 TiB")
            return "", ""

        monkeypatch.setattr(folder, "choose_scaling", choose)
        with pytest.raises(
            DataError, match=r"2 problems in 3 rows.*\n  line 3 .*1\.nii\.gz: not enough memory .*\n  line 4 .*no such"
        ):
            load_volumes(tmp_path)

    def test_negative_labels_are_reported_for_each_row(self, tmp_path):
        rows = write_rows(tmp_path, 1)
        label = np.zeros(SHAPE, np.int16)
        label[0], label[1] = -1, 1
        save(tmp_path, "0_label.nii.gz", label)
        write_manifest(tmp_path, [{**row, "label_value": 0} for row in rows[:2]])
        with pytest.raises(DataError, match=r"2 problems in 2 rows.*\n  line 2 .*256 voxels of the label are negative"):
            load_volumes(tmp_path)


Z_SCORED = (HU - HU.mean()) / HU.std()
SAID = "a CT with voxels from -3.4"


class TestGreyValues:
    def test_a_folder_says_it_in_one_line(self, tmp_path, caplog):
        write_rows(tmp_path, 3, Z_SCORED, modality="Computed Tomography")
        rows = load_volumes(tmp_path)
        (line,) = caplog.messages
        assert line.startswith(f"'{tmp_path}/0.nii.gz': {SAID}")
        assert line.endswith("not in Hounsfield units: scaled by percentile:0.5:99.5 (and 2 more scans)")
        caplog.clear()
        prepared = prepare_volumes(rows, None, SETTINGS, completions=False)
        assert len(caplog.messages) == 1
        VolumeTask(None, SETTINGS).read(list(prepared))  # type: ignore[arg-type]
        assert len(caplog.messages) == 1
        for image in prepared[0]["images"]:
            assert len(np.unique(np.asarray(image))) > 100

    @pytest.mark.parametrize("door", [lambda p: read_grey(p, modality="CTA")[1],
                                      lambda p: grey_values(read_volume(p), modality="CTA")])  # fmt: skip
    def test_a_file_says_it_in_one_line(self, tmp_path, caplog, door):
        path = str(tmp_path / save(tmp_path, "scan.nii.gz", Z_SCORED))
        for _ in range(3):
            assert len(np.unique(door(path))) > 100
        (line,) = caplog.messages
        assert line.startswith(f"'{path}': {SAID}")

    @pytest.mark.parametrize("modality", ["CT", "MRI", ""])
    def test_a_given_window_that_blanks_a_scan_is_refused(self, tmp_path, modality):
        write_rows(tmp_path, 1, Z_SCORED, modality=modality, intensity="window:-160:240")
        match = r"0\.nii\.gz: intensity window:-160:240: leaves 5 grey levels of voxels from -3\.4.*; expected at least"
        with pytest.raises(DataError, match=rf"6 problems in 6 rows.*\n  line 2 .*{match}"):
            load_volumes(tmp_path)
        rows = load_volumes(tmp_path, validate=False)
        for door in (
            lambda: check_volumes(rows),
            lambda: prepare_volumes(rows, None, SETTINGS, completions=False),
            lambda: CaseReader()(rows[0]),
            lambda: read_grey(rows[0]["scan"], intensity="window:-160:240"),
        ):
            with pytest.raises(DataError, match=match):
                door()

    def test_hounsfield_units_say_nothing(self, tmp_path, caplog):
        write_rows(tmp_path, 2)
        prepare_volumes(load_volumes(tmp_path), None, SETTINGS, completions=True)
        assert caplog.messages == []


@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
def test_real_scans_are_read_with_one_remark_about_windowed_ct(caplog):
    """No error, no warning (they are errors in tests), no scan that goes blank; MR scans are not remarked on."""
    say_note.cache_clear()  # a remark is made once in a process
    with caplog.at_level(logging.DEBUG, "segrl"):
        rows = load_volumes(VOLUMES3D)
    (line,) = caplog.messages
    assert line.endswith("deeplesion_000001_02_01_008-023.nii.gz': a CT with voxels from 0 to 1023, not in Hounsfield "
                         "units: scaled by percentile:0.5:99.5 (and 2 more scans)")  # fmt: skip
    with (VOLUMES3D / "manifest.csv").open() as file:
        assert len(rows) == len(list(csv.DictReader(file)))
    read = CaseReader(0)
    for row in rows:
        assert isinstance(row, dict)
        case = read(row)
        assert len(np.unique(case.grey)) > 100


def test_rows_of_other_types_are_read_alike(tmp_path):
    """Data sets of others hold label values as numbers or lists."""
    write_rows(tmp_path, 1)
    row = load_volumes(tmp_path, validate=False)[0]
    for value, area in ((2, 1), (2.0, 1), ([2, 3], 2), ("2,3", 2), (None, 6)):
        rows = Dataset.from_list([{**row, "label_value": value}])
        check_volumes(rows)
        mask = CaseReader()(rows[0]).mask
        assert mask is not None
        assert mask.sum() == area * 4 * 16 * 6
