"""One split from a folder, a data set on disk, or the hub."""

import re

import pytest
from datasets import Dataset, DatasetDict

from segrl.data import load_folder, load_split, make_synthetic, write_folder
from segrl.errors import DataError, UnknownNameError


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return make_synthetic(5, size=64)


def as_lists(rows: Dataset) -> list[dict]:
    return [{name: value for name, value in dict(row).items() if isinstance(value, str)} for row in rows]


def test_a_folder_is_read_as_load_folder_does(rows, tmp_path):
    folder = write_folder(rows, tmp_path / "data", split=["train"] * 3 + ["test"] * 2)
    for split, n in (("train", 3), ("test", 2)):
        found = load_split(str(folder), split)
        assert as_lists(found) == as_lists(load_folder(folder, split))
        assert len(found) == n


def test_a_folder_of_another_kind_has_its_own_reader(tmp_path):
    (tmp_path / "train.txt").write_text("one\ntwo")

    def read(source: str, split: str) -> Dataset:
        return Dataset.from_dict({"line": (tmp_path / f"{split}.txt").read_text().split()})

    assert load_split(str(tmp_path), "train", folder=read)["line"] == ["one", "two"]


def test_splits_on_disk(rows, tmp_path):
    DatasetDict({"train": rows.select(range(3)), "test": rows.select([3, 4])}).save_to_disk(str(tmp_path / "data"))
    assert as_lists(load_split(str(tmp_path / "data"), "test")) == as_lists(rows.select([3, 4]))


def test_texts_that_are_missing_or_none_are_filled(rows, tmp_path):
    sparse = rows.remove_columns(["modality", "name", "lesion"]).add_column("lesion", [None, "cyst", None, "", "mass"])
    DatasetDict({"train": sparse}).save_to_disk(str(tmp_path / "data"))
    found = load_split(str(tmp_path / "data"), "train")
    assert found["modality"] == [""] * 5
    assert found["lesion"] == ["", "cyst", "", "", "mass"]
    assert found["name"] == [f"row {n}" for n in range(5)]
    assert found["anatomy"] == rows["anatomy"]
    plain = load_split(str(tmp_path / "data"), "train", texts=())
    assert set(plain.column_names) == set(sparse.column_names)


def test_rows_of_another_kind_have_their_own_check(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"scan": ["a.nii.gz"]})}).save_to_disk(str(tmp_path / "data"))

    def check(rows: Dataset) -> None:
        raise DataError(f"{rows[0]['scan']}: no such file")

    with pytest.raises(DataError, match=r"a\.nii\.gz: no such file"):
        load_split(str(tmp_path / "data"), "train", check=check)
    found = load_split(str(tmp_path / "data"), "train", check=lambda rows: None, texts=["name", "label"])
    assert dict(found[0]) == {"scan": "a.nii.gz", "name": "row 0", "label": ""}


def test_an_unknown_split_suggests_the_closest(rows, tmp_path):
    DatasetDict({"train": rows, "tset": rows}).save_to_disk(str(tmp_path / "data"))
    folder = write_folder(rows, tmp_path / "folder", split="train")
    with pytest.raises(UnknownNameError, match=r"unknown split of .*data 'test'; did you mean 'tset'\?"):
        load_split(str(tmp_path / "data"), "test")
    with pytest.raises(UnknownNameError, match=r"unknown split of .*manifest.csv 'tran'; did you mean 'train'\?"):
        load_split(str(folder), "tran")


def test_no_such_data(rows, tmp_path):
    rows.save_to_disk(str(tmp_path / "one"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for source, message in [
        (tmp_path / "nothing", "--scans '{}': no such folder, nor a data set name owner/name"),
        (tmp_path / "one", "--scans '{}' is one data set; expected the splits train and test"),
        (tmp_path / "broken", "--scans '{}' cannot be loaded: "),
        ("no_such_owner/name", "--scans '{}' cannot be loaded: "),
    ]:
        with pytest.raises(DataError, match=re.escape(message.format(source))) as caught:
            load_split(str(source), "train", argument="--scans")
        assert "\n" not in str(caught.value)
