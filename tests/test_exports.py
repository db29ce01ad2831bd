"""Masks through every export and back: equal, pixel by pixel."""

import json
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_builders import write_series
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.mask import encode, toBbox

from segrl.data import read_label, read_volume, write_mask
from segrl.data.dicom import write_dicom_seg
from segrl.data.formats import CocoWriter, coco_mask, read_coco
from segrl.errors import DataError
from segrl.geometry import read_mask_file, write_mask_image


def random_masks(count, seed=0):
    """Masks of many sizes and shares of foreground, some empty or full."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        shape = tuple(rng.integers(1, 40, 2))
        share = (0.0, 1.0)[number % 2] if number % 20 < 2 else rng.random()
        yield rng.random(shape) < share


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_png(tmp_path, count):
    for mask in random_masks(count):
        write_mask_image(tmp_path / "a.png", mask)
        assert np.array_equal(read_mask_file(tmp_path / "a.png"), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # pycocotools decodes
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_coco(tmp_path, count):
    masks, writer = list(random_masks(count)), CocoWriter()
    for number, mask in enumerate(masks):
        writer.add(f"{number}.png", mask.shape[::-1], mask, category=f"kind {number % 3}", score=0.5)
    writer.write(tmp_path / "coco.json")
    official = COCO(tmp_path / "coco.json")  # pycocotools' own reader
    own = {entry["image_id"]: entry for entry in json.loads((tmp_path / "coco.json").read_text())["annotations"]}
    for number, mask in enumerate(masks, start=1):
        found = official.loadAnns(official.getAnnIds(imgIds=[number]))
        assert len(found) == mask.any()
        assert np.array_equal(official.annToMask(found[0]) > 0 if found else np.zeros_like(mask), mask)
        if mask.any():
            assert np.array_equal(coco_mask(own[number]["segmentation"], *mask.shape), mask)
            assert own[number]["area"] == mask.sum()
            encoded: Any = encode(np.asfortranarray(mask, dtype=np.uint8))
            assert own[number]["segmentation"]["counts"] == encoded["counts"].decode()
            assert own[number]["bbox"] == toBbox(encoded).tolist()


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_nifti_on_the_grid_of_a_dicom_series(tmp_path, count):
    write_series(tmp_path / "s", np.zeros((4, 5, 6), dtype=np.int16), directions=(0, 1, 0, 0, 0, -1))
    volume, rng = read_volume(tmp_path / "s"), np.random.default_rng(0)
    for _ in range(count):
        mask = rng.random(volume.voxels.shape) < rng.random()
        write_mask(tmp_path / "a.nii.gz", mask, volume)
        assert np.array_equal(read_label(tmp_path / "a.nii.gz", volume, allow_empty=True), mask)


@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
def test_dicom_seg(tmp_path, count):
    import highdicom

    sources = write_series(tmp_path, np.zeros((3, 11, 9), dtype=np.int16), order=range(3))
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in sources]
    rng = np.random.default_rng(0)
    for number in range(count):
        mask = rng.random((3, 11, 9)) < (rng.random() if number else 0.0)
        write_dicom_seg(tmp_path / "m.dcm", mask, sources)
        read = highdicom.seg.segread(tmp_path / "m.dcm")
        found = read.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
        assert np.array_equal(found[..., 0] > 0, mask)


def test_what_the_writers_refuse(tmp_path):
    with pytest.raises(DataError, match=r"a.jpg: expected a name that ends in .png"):
        write_mask_image(tmp_path / "a.jpg", np.zeros((2, 2), dtype=bool))
    with pytest.raises(DataError, match=r"mask of a.png: shape \(2, 3\), expected \(3, 2\)"):
        CocoWriter().add("a.png", (2, 3), np.ones((2, 3), dtype=bool), category="cyst")


def test_coco_files_become_training_data(tmp_path):
    mask = np.zeros((8, 10), dtype=bool)
    mask[2:5, 3:7] = True
    Image.new("L", (10, 8)).save(tmp_path / "a.png")
    writer = CocoWriter()
    writer.add("a.png", (10, 8), mask, category="cyst")
    writer.write(tmp_path / "coco.json")
    (row,) = read_coco(tmp_path / "coco.json", tmp_path, texts={})
    assert np.array_equal(row.mask, mask)
