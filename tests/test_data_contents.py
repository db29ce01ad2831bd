"""What splits hold: contradicting rows are errors, shared images and odd masks are said; nothing is read twice."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from test_manifest_cells import DOORS, MASK, TABLE, make_images, make_volumes

from segrl.data import SplitContents, check_rows, check_volumes, load_folder, load_split, load_volumes, make_synthetic
from segrl.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def other_mask(folder: Path, name: str) -> None:
    for file in (folder / "masks").glob(f"{name}.*"):
        if file.suffix == ".png":
            Image.fromarray(np.ascontiguousarray(MASK[:, ::-1])).save(file)
        else:
            np.save(file, np.ascontiguousarray(np.load(file)[::-1]))


def copy_image(folder: Path, source: str, target: str) -> None:
    for file in (folder / "images").glob(f"{source}.*"):
        file.with_stem(target).write_bytes(file.read_bytes())


@pytest.mark.parametrize("same", ["path", "content"])
@pytest.mark.parametrize("door", DOORS)
def test_the_same_question_with_two_masks_is_an_error(door, same, tmp_path):
    make, load = DOORS[door]
    make(tmp_path, TABLE if same == "content" else TABLE.replace("images/b", "images/a"))
    copy_image(tmp_path, "a", "b")
    assert len(load(tmp_path, "train")) == 2  # the same mask twice contradicts nothing
    other_mask(tmp_path, "b")
    with pytest.raises(
        DataError, match=r"1 problems in 2 rows.*\n  line 3 \(.*\): asks the same of the same image as "
    ):
        load(tmp_path, "train")
    with pytest.raises(
        DataError, match=r"as line 2 \(images/a\..*\), with another mask; .*masks/a\.png;masks/a_1\.png"
    ):
        load(tmp_path, "train")


@pytest.mark.parametrize("door", DOORS)
def test_other_questions_about_the_same_image_have_other_masks(door, tmp_path):
    make, load = DOORS[door]
    make(tmp_path, TABLE.replace("b.png,train,cyst", "b.png,train,mass"))
    copy_image(tmp_path, "a", "b")
    other_mask(tmp_path, "b")
    assert len(load(tmp_path, "train")) == 2


def test_rows_of_others_are_compared_too(tmp_path):
    rows = make_synthetic(2, size=48)
    pair = Dataset.from_list(
        [{**dict(rows[0]), "query": "Find  it."}, {**dict(rows[1]), "image": rows[0]["image"], "query": "find it."}],
        features=rows.features,
    )
    with pytest.raises(DataError, match=r"row 1 .*: asks the same of the same image as row 0 "):
        check_rows(pair)
    DatasetDict({"train": pair}).save_to_disk(str(tmp_path))
    with pytest.raises(DataError, match=r"split 'train' of [\s\S]*row 1 .*: asks the same of the same image as row 0 "):
        load_split(str(tmp_path), "train")


@pytest.mark.parametrize("door", DOORS)
def test_splits_that_share_an_image_are_said_once(door, tmp_path):
    make, load = DOORS[door]
    make(tmp_path)
    copy_image(tmp_path, "a", "c")
    contents = SplitContents()
    for split in ("train", "test"):
        assert len(load(tmp_path, split)) == len(load_split(str(tmp_path), split, folder=load))  # each alone is fine
    load_split(str(tmp_path), "train", folder=load, contents=contents)
    message = r"1 images are in the splits 'train' and 'test' \(line 2 .*a\..* and line 4 .*c\.\w+\)\): scores"
    with pytest.warns(UserWarning, match=message):
        load_split(str(tmp_path), "test", folder=load, contents=contents)
    load_split(str(tmp_path), "test", folder=load, contents=contents)
    with pytest.warns(UserWarning, match=message):
        load(tmp_path)  # the column split


def test_splits_on_disk_that_share_an_image(tmp_path):
    rows = make_synthetic(5, size=48)
    DatasetDict({"train": rows.select(range(4)), "test": rows.select([2, 4])}).save_to_disk(str(tmp_path))
    contents = SplitContents()
    load_split(str(tmp_path), "train", contents=contents)
    with pytest.warns(UserWarning, match=r"1 images are in the splits 'train' and 'test' \(row 2 .* and row 0 "):
        load_split(str(tmp_path), "test", contents=contents)


@pytest.mark.parametrize(("value", "message"), [(0, "are empty: nothing to find"), (255, "cover the whole image")])
def test_masks_that_are_all_alike_are_said_per_split(value, message, tmp_path):
    make_images(tmp_path)
    for name in ("a", "b"):
        Image.fromarray(np.full_like(MASK, value)).save(tmp_path / f"masks/{name}.png")
    with pytest.warns(UserWarning, match=f"all 2 masks of split 'train' {message}"):
        load_folder(tmp_path, "train")
    load_folder(tmp_path, "test")
    with pytest.warns(UserWarning, match=f"all 2 masks of split 'train' {message}"):
        load_folder(tmp_path)


def test_volumes_without_foreground(tmp_path):
    make_volumes(tmp_path)
    for file in (tmp_path / "masks").glob("*.npy"):
        np.save(file, np.zeros_like(np.load(file)))
    with pytest.warns(UserWarning, match="all 3 masks of the data set are empty"):
        check_volumes(load_volumes(tmp_path, validate=False).remove_columns("split"), allow_empty=True)


def test_one_lesion_in_a_split_beside_several_in_another(tmp_path):
    make_images(tmp_path, TABLE.replace("c.png,test,cyst", "c.png,test,mass") + "images/d.png,masks/a.png,test,scar\n")
    Image.fromarray(np.full((8, 12, 3), 222, np.uint8)).save(tmp_path / "images/d.png")
    with pytest.warns(
        UserWarning, match=r"split 'train' has one lesion only \('cyst'\), split 'test' has 2; was a sorted"
    ):
        load_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path, "train")


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    make_images(tmp_path)
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.append(str(file)) or real(file, *rest))
    load_folder(tmp_path)
    assert sorted(opened) == sorted(
        str(tmp_path / kind / f"{name}.png") for kind in ("images", "masks") for name in "abc"
    )


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(("name", "load", "count"), [("lesions2d", load_folder, 511), ("volumes3d", load_volumes, 7)])
def test_no_false_alarm_on_real_data(name, load, count):
    contents = SplitContents()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [load_split(str(SHARED / name), split, folder=load, contents=contents) for split in ("train", "test")]
    assert sum(map(len, rows)) == count
