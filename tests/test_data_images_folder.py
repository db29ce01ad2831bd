import csv
from pathlib import Path

import numpy as np
import pytest
from datasets import Image, Value
from PIL import Image as PILImage

from segrl.data import check_rows, load_folder, make_synthetic
from segrl.errors import DataError, UnknownNameError
from segrl.geometry import boxes_from_mask

LESIONS2D = Path(__file__).parents[2] / "shared" / "data" / "lesions2d"

HEADER = ["image", "mask", "split", "modality", "anatomy", "lesion", "site"]


def write_csv(folder, rows, header=HEADER):
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def row(number, split="train", lesion="dark cyst"):
    return [f"images/{number}.png", f"masks/{number}.png", split, "MRI", "Head", lesion, "ward A"]


def save(array, path, **settings):
    PILImage.fromarray(np.asarray(array)).save(path, **settings)


@pytest.fixture
def folder(tmp_path):
    """Three good rows: 12 px wide, 8 px high, one 3 x 2 lesion."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    mask = np.zeros((8, 12), np.uint8)
    mask[2:4, 5:8] = 255
    for number in range(3):
        save(np.full((8, 12, 3), 40 * number, np.uint8), tmp_path / f"images/{number}.png")
        save(mask, tmp_path / f"masks/{number}.png")
    write_csv(tmp_path, [row(0), row(1), row(2, split="test")])
    return tmp_path


def test_columns_and_pixels(folder):
    dataset = load_folder(folder)
    assert dataset.column_names == ["image", "mask", "query", "modality", "anatomy", "lesion", "name", "split", "site"]
    assert dataset["name"] == ["images/0.png", "images/1.png", "images/2.png"]
    assert dataset[1]["site"] == "ward A"
    assert dataset[1]["image"].size == (12, 8)
    assert np.asarray(dataset[1]["image"])[0, 0].tolist() == [40, 40, 40]
    np.testing.assert_array_equal(boxes_from_mask(np.asarray(dataset[1]["mask"])), [[5, 2, 8, 4]])


def test_query_is_built_once_and_for_all(folder):
    queries = load_folder(folder)["query"]
    assert all("dark cyst in this MRI image of the head" in query for query in queries)
    assert load_folder(folder, "test")["query"] == queries[2:]


def test_a_query_column_is_taken_as_it_is(folder):
    write_csv(folder, [["images/0.png", "masks/0.png", "Where is it?"]], ["image", "mask", "query"])
    dataset = load_folder(folder)
    assert dataset[0]["query"] == "Where is it?"
    assert dataset[0]["lesion"] == ""


def test_split_and_limit(folder):
    assert load_folder(folder, "train")["name"] == ["images/0.png", "images/1.png"]
    assert load_folder(folder, "train", limit=1)["name"] == ["images/0.png"]


def test_utf8_with_byte_order_mark_and_blank_lines(folder):
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text("\n\n".join(text.splitlines()) + "\n\n", encoding="utf-8-sig")
    assert len(load_folder(folder)) == 3


@pytest.mark.parametrize("values", [(0, 0), (0, 1), (0, 255), (0, 7), (1, 1), (255, 255)])
def test_every_binary_mask_is_accepted(folder, values):
    mask = np.full((8, 12), values[0], np.uint8)
    mask[0, 0] = values[1]
    save(mask, folder / "masks/1.png")
    assert len(load_folder(folder)) == 3


def test_a_rotated_photo_fits_its_upright_mask(folder):
    turned = PILImage.fromarray(np.zeros((12, 8, 3), np.uint8))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "images/1.png", exif=turned.getexif())
    assert load_folder(folder)[1]["image"].size == (12, 8)
    turned.getexif()[0x0112] = 1
    turned.save(folder / "images/1.png", exif=turned.getexif())
    with pytest.raises(DataError, match=r"mask is 12 x 8 px, the image 8 x 12; expected the same size after EXIF"):
        load_folder(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


BAD_FILES = {
    "no image": (lambda f: (f / "images/1.png").unlink(), r"image: no such file \S*images/1\.png; copy it"),
    "no mask": (lambda f: (f / "masks/1.png").unlink(), r"mask: no such file \S*masks/1\.png; copy it"),
    "truncated": (lambda f: truncate(f / "images/1.png"), r"image: cannot be decoded \(.*\); replace the file"),
    "not an image": (lambda f: (f / "images/1.png").write_text("x"), r"image: cannot be decoded \(.*identify"),
    "a folder": (
        lambda f: ((f / "images/1.png").unlink(), (f / "images/1.png").mkdir()),
        r"image: cannot be decoded \(.*directory",
    ),
    "size": (
        lambda f: save(np.zeros((4, 4), np.uint8), f / "masks/1.png"),
        r"the mask is 4 x 4 px, the image 12 x 8; expected the same size .*; resize the mask",
    ),
    "three values": (
        lambda f: save(np.arange(96, dtype=np.uint8).reshape(8, 12) % 3, f / "masks/1.png"),
        r"mask: a mask may hold 0 and one positive value, got 3 values \(0, 1, 2\); threshold it first, .*masks/1\.png",
    ),
    "colour mask": (
        lambda f: save(np.eye(12, dtype=np.uint8)[:8, :, None] * np.array([255, 0, 0], np.uint8), f / "masks/1.png"),
        r"mask: the 3 channels of the mask differ; save it as an 8-bit mask",
    ),
    "16-bit image": (
        lambda f: save(np.full((8, 12), 4000, np.uint16), f / "images/1.png"),
        r"image: has I;16 pixels, expected 8 bits per channel; window it and scale it to 0-255 .*images/1\.png",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line_and_the_fix(folder, case):
    spoil, message = BAD_FILES[case]
    spoil(folder)
    with pytest.raises(DataError, match=rf"manifest\.csv: 1 problems in 3 rows, expected none:\n  line 3 .*{message}"):
        load_folder(folder)
    assert len(load_folder(folder, validate=False)) == 3
    with pytest.raises(DataError, match=rf"dataset: 1 problems in 3 rows, expected none:\n  row 1 .*{message}"):
        check_rows(load_folder(folder, validate=False))


def test_all_problems_are_counted_and_listed(folder):
    write_csv(folder, [row(0), *(row(number) for number in range(10, 16))])
    with pytest.raises(DataError, match=r"12 problems in 7 rows") as caught:
        load_folder(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 13
    assert lines[1].startswith("  line 3 (images/10.png): image: no such file")
    assert lines[-1].startswith("  line 8 (images/15.png): mask: no such file")


BAD_ROWS = {
    "empty lesion": (HEADER, [row(0), row(1, lesion=" ")], r"line 3 \(images/1.png\): column 'lesion' is empty; fill"),
    "empty mask cell": (
        HEADER,
        [["images/0.png", "", *row(0)[2:]]],
        r"line 2 \(images/0.png\): column 'mask' is empty",
    ),
    "empty query": (
        ["image", "mask", "query"],
        [["images/0.png", "masks/0.png", ""]],
        r"line 2 \(images/0.png\): column 'query' is empty; fill the cell or delete the row",
    ),
    "comma": (HEADER, [row(0), [*row(1), "left"]], r"line 3 \(images/1.png\): 8 cells, expected 7; quote cells"),
    "short": (HEADER, [row(0), ["images/1.png"]], r"line 3 \(images/1\.png\): 1 cells, expected 7"),
    "no rows": (HEADER, [], r"manifest\.csv: no rows under the header; expected one line per image"),
    "no mask column": (
        ["image", "lesion"],
        [["a", "b"]],
        r"no column \['mask'\]; expected image and mask in the first",
    ),
    "nothing to ask": (["image", "mask"], [["a", "b"]], r"neither a query nor a lesion column in .*; add one"),
    "column twice": ([*HEADER, "site"], [[*row(0), ""]], r"a column is named twice in .*rename one"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_manifest(folder, case):
    header, rows, message = BAD_ROWS[case]
    write_csv(folder, rows, header)
    with pytest.raises(DataError, match=message):
        load_folder(folder, validate=False)


def test_unreadable_manifest(folder):
    (folder / "manifest.csv").write_bytes(b"image,mask,lesion\n\xff\xfe,b,c\n")
    with pytest.raises(DataError, match=r"manifest\.csv: not a UTF-8 CSV file .*; save it as CSV in UTF-8"):
        load_folder(folder)
    (folder / "manifest.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"manifest\.csv: no column \['image', 'mask'\]"):
        load_folder(folder)
    (folder / "manifest.csv").unlink()
    with pytest.raises(DataError, match=r"manifest\.csv: no such file; expected a CSV file"):
        load_folder(folder)


def test_unknown_split_lists_the_known_ones(folder):
    with pytest.raises(UnknownNameError, match=r"'tset'.*did you mean 'test'.*train"):
        load_folder(folder, "tset")
    write_csv(folder, [["images/0.png", "masks/0.png", "cyst"]], ["image", "mask", "lesion"])
    with pytest.raises(DataError, match=r"split='train' was asked for, but there is no split column; add it or drop"):
        load_folder(folder, "train")


def test_limit_below_one(folder):
    with pytest.raises(DataError, match=r"limit=0: expected 1 or more rows, or None for all"):
        load_folder(folder, limit=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("query"), r"dataset lacks the columns \['query'\]: expected image, mask, query"),
        (lambda d: d.select([]), r"dataset has no rows: expected at least one; check the split"),
        (
            lambda d: d.remove_columns("mask").add_column("mask", ["m.png"] * 3),
            r"column 'mask' has the type Value.*: expected datasets\.Image; use dataset\.cast_column\('mask'",
        ),
        (
            lambda d: d.remove_columns("query").add_column("query", ["where?", " ", "where?"]),
            r"1 problems in 3 rows, expected none:\n  row 1 \(synthetic_0_00001\): the query is empty; write",
        ),
        (
            lambda d: d.remove_columns("mask").add_column("mask", [None] * 3).cast_column("mask", Image()),
            r"3 problems in 3 rows, .*\n  row 0 \(synthetic_0_00000\): mask: is missing \(None\); give a file",
        ),
    ],
)
def test_check_rows_refuses(change, message):
    with pytest.raises(DataError, match=message):
        check_rows(change(make_synthetic(3, size=32)))


def test_check_rows_needs_no_name_column():
    check_rows(make_synthetic(2, size=32).remove_columns("name"))


@pytest.mark.skipif(not LESIONS2D.is_dir(), reason="the real data set is not on this machine")
def test_real_lesions_load_and_pass():
    dataset = load_folder(LESIONS2D)
    assert len(dataset) == 511
    assert all(isinstance(dataset.features[column], Value) for column in ("query", "source", "foreground_fraction"))
    assert len(load_folder(LESIONS2D, "train", validate=False)) + len(load_folder(LESIONS2D, "test")) == 511
    for line in dataset.select(range(0, 511, 50)):
        assert isinstance(line, dict)
        assert (np.asarray(line["mask"]) > 0).mean() == pytest.approx(float(line["foreground_fraction"]), abs=1e-5)
