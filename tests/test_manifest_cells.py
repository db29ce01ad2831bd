"""Tables as people and spreadsheets write them: one right reading, or one error; no row vanishes."""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segrl.data import load_folder, load_split, load_volumes
from segrl.errors import DataError, UnknownNameError

MASK = np.zeros((8, 12), np.uint8)
MASK[2:4, 5:8] = 255
NAMES = ("a", "b", "c")
TABLE = """image,mask,split,lesion
images/a.png,masks/a.png,train,cyst
images/b.png,masks/b.png,train,cyst
images/c.png,masks/c.png,test,cyst
"""


def make_images(folder: Path, table: str = TABLE) -> Path:
    """Three images with masks."""
    for number, name in enumerate(NAMES):
        for kind, pixels in (("images", np.full((8, 12, 3), 60 * number + 9, np.uint8)), ("masks", MASK)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{name}.png")
    (folder / "manifest.csv").write_text(table, encoding="utf-8")
    return folder


def make_volumes(folder: Path, table: str = TABLE) -> Path:
    """The same as scans and labels; the table's files and columns are renamed."""
    rng = np.random.default_rng(0)
    label = np.zeros((4, 8, 8), np.uint8)
    label[1, 2:4, 5:8] = 1
    for name in NAMES:
        for kind, voxels in (("images", rng.random((4, 8, 8))), ("masks", label)):
            (folder / kind).mkdir(exist_ok=True)
            file = folder / kind / f"{name}.npy"
            np.save(file, np.ascontiguousarray(voxels.T))
    text = re.sub(r"\bmask\b", "label", table.replace(".png", ".npy")).replace("Mask,", "Label,")
    (folder / "manifest.csv").write_text(text, encoding="utf-8")
    return folder


DOORS = {"images": (make_images, load_folder), "volumes": (make_volumes, load_volumes)}
READ = {
    "blanks behind splits": TABLE.replace("train,", "train ,"),
    "blanks around commas": TABLE.replace(",", " , "),
    "capitals of splits": TABLE.replace("b.png,train", "b.png,Train").replace("a.png,train", "a.png,TRAIN"),
    "capitals of columns": TABLE.replace("image,mask,split,lesion", "Image,Mask,Split,Lesion"),
    "semicolons": TABLE.replace(",", ";"),
    "tabs": TABLE.replace(",", "\t"),
    "separators of Windows": TABLE.replace("/", "\\"),
    "lines of Windows": TABLE.replace("\n", "\r\n"),
    "lines of an old Mac": TABLE.replace("\n", "\r"),
    "byte order mark": "\ufeff" + TABLE,
    "empty columns at the end": TABLE.replace("\n", ",,\n"),
    "rows of commas": TABLE + ",,,\n",
    "quoted": TABLE.replace("cyst", '"cyst"').replace("images/a.png", '"images/a.png"'),
    "quoted behind a blank": TABLE.replace(",cyst", ', "cyst"'),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("door", DOORS)
def test_cells_are_read(door, kind, tmp_path):
    make, load = DOORS[door]
    folder = make(tmp_path, READ[kind])
    for split, count in (("train", 2), ("test", 1), ("Test ", 1), (None, 3)):
        rows = load(folder, split)
        assert len(rows) == count
        assert set(rows["lesion"]) == {"cyst"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("door", DOORS)
def test_names_with_accents(door, form: Any, tmp_path):
    """The table in one Unicode form, folder and file in the other."""
    make, load = DOORS[door]
    make(tmp_path)
    other: Any = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / "images").rename(tmp_path / unicodedata.normalize(other, "Brüste"))
    file = next((tmp_path / unicodedata.normalize(other, "Brüste")).glob("a.*"))
    file.rename(file.with_stem(unicodedata.normalize(other, "Läsion")))
    table = (tmp_path / "manifest.csv").read_text().replace("images/a", "images/Läsion").replace("images/", "Brüste/")
    (tmp_path / "manifest.csv").write_text(unicodedata.normalize(form, table), encoding="utf-8")
    assert len(load(tmp_path)) == 3


ERRORS = {
    "no split": (TABLE.replace("b.png,train", "b.png,"), r"1 problems in 2 rows.*\n  line 3 \(.*b\..*'split' is empty"),
    "commas": (
        TABLE.replace("train,cyst", "train,cyst, round", 1),
        r"line 2 .*: 5 cells, expected 4; quote cells that",
    ),
    "semicolons": (
        TABLE.replace(",", ";").replace("train;cyst", "train;cyst; round", 1),
        r"line 2 .*: 5 cells, expected 4; quote cells that hold semicolons",
    ),
    "a cell is missing": (TABLE.replace("b.png,train", "b.png"), r"line 3 .*: 3 cells, expected 4"),
    "an open quote": (TABLE.replace("train,cyst", 'train,"cyst', 1), r"line 2: not a CSV row .*close every quote"),
    "text behind a quote": (TABLE.replace("train,cyst", 'train,"cyst"s', 1), r"line 2: not a CSV row"),
    "spaces instead of commas": (TABLE.replace(",", " "), r"no column .*expected image and (mask|label) in the first"),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("door", DOORS)
def test_what_has_no_one_reading_is_an_error_with_its_line(door, kind, tmp_path):
    make, load = DOORS[door]
    table, message = ERRORS[kind]
    with pytest.raises(DataError, match=message):
        load(make(tmp_path, table), "train")


def test_text_in_another_encoding_names_the_line(tmp_path):
    make_images(tmp_path)
    (tmp_path / "manifest.csv").write_bytes(TABLE.replace("cyst", "Läsion").encode("latin-1"))
    with pytest.raises(DataError, match=r"not a UTF-8 CSV file \(line 2: .*save it as CSV in UTF-8"):
        load_folder(tmp_path)


def test_a_split_that_is_nowhere(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        load_folder(make_images(tmp_path), "tran")


# ---- several masks of one image --------------------------------------------------------------------------------------


def second_mask(folder: Path, shape: tuple[int, int] = (8, 12)) -> np.ndarray:
    other = np.zeros(shape, np.uint8)
    other[6:8, 0:3] = 255
    Image.fromarray(other).save(folder / "masks" / "a_1.png")
    return other


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_several_masks_of_a_cell_are_merged(delimiter, validate, tmp_path):
    make_images(tmp_path, TABLE.replace("masks/a.png", "masks/a.png; masks\\a_1.png").replace(",", delimiter))
    other = second_mask(tmp_path)
    rows = load_folder(tmp_path, "train", validate=validate)
    np.testing.assert_array_equal(np.asarray(rows[0]["mask"]), (MASK | other) > 0)
    np.testing.assert_array_equal(np.asarray(rows[1]["mask"]), MASK)


def test_masks_that_cannot_be_merged(tmp_path):
    make_images(tmp_path, TABLE.replace("masks/a.png", "masks/a.png;masks/a_1.png"))
    with pytest.raises(DataError, match=r"line 2 .*mask \S*a_1\.png: no such file"):
        load_folder(tmp_path)
    second_mask(tmp_path, (9, 9))
    with pytest.raises(DataError, match=r"line 2 .*the masks of one row have the sizes 12 x 8, 9 x 9 px"):
        load_folder(tmp_path)


def test_a_name_that_holds_a_semicolon_is_one_file(tmp_path):
    make_images(tmp_path, TABLE.replace("masks/a.png", "masks/a;b.png"))
    (tmp_path / "masks/a.png").rename(tmp_path / "masks/a;b.png")
    assert len(load_folder(tmp_path)) == 3


# ---- files outside the folder ----------------------------------------------------------------------------------------


def outside(folder: Path, way: str, make, ending: str) -> Path:
    """A folder whose first image is outside of it."""
    data = folder / "data"
    data.mkdir()
    make(data)
    secret = folder / f"a.{ending}"
    (data / "images" / f"a.{ending}").rename(secret)
    name = {"dots": f"../a.{ending}", "absolute": str(secret), "Windows": f"..\\a.{ending}"}.get(way)
    if name is None:
        (data / "images" / f"a.{ending}").symlink_to(secret)
    else:
        table = (data / "manifest.csv").read_text().replace(f"images/a.{ending}", name)
        (data / "manifest.csv").write_text(table)
    return data


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "Windows"])
@pytest.mark.parametrize("door", DOORS)
def test_a_manifest_does_not_reach_outside_its_folder(door, way, tmp_path):
    make, load = DOORS[door]
    folder = outside(tmp_path, way, make, "png" if door == "images" else "npy")
    with pytest.raises(DataError, match=r"line 2 .*image: .* leads outside the folder \S+; .*allow_outside=True"):
        load(folder)
    with pytest.raises(DataError, match="leads outside"):
        load_split(str(folder), "train", folder=load)
    assert len(load(folder, allow_outside=True)) == 3
    assert len(load_split(str(folder), "train", folder=load, allow_outside=True)) == 2


def test_a_linked_folder_and_dots_inside_are_fine(tmp_path):
    (tmp_path / "data").mkdir()
    make_images(tmp_path / "data", TABLE.replace("images/a.png", "masks/../images/a.png"))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(load_folder(tmp_path / "link")) == 3


@pytest.mark.parametrize("door", DOORS)
def test_a_fifo_does_not_hang(door, tmp_path):
    make, load = DOORS[door]
    make(tmp_path)
    for kind in ("images", "masks"):
        file = next((tmp_path / kind).glob("a.*"))
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(DataError, match=r"2 problems in 3 rows"):
        load(tmp_path)
