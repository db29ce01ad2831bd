"""Folds and sources that are left out: nothing is lost, and what is shared is not torn apart."""

import re
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from segrl.data import Division, load_split, make_synthetic, make_synthetic_volumes, write_folder
from segrl.errors import DataError, SegRLError, UnknownNameError


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return make_synthetic(24, size=32)


def folds_of(rows: Dataset, folds: int, **more: str) -> list[set[str]]:
    """The names of the test rows of each fold, after a look at its training rows."""
    found = []
    for fold in range(1, folds + 1):
        splits = Division(folds=folds, fold=fold, **more).divide(rows)
        train, test = splits["train"]["name"][:], splits["test"]["name"][:]
        assert sorted(train + test) == sorted(rows["name"])
        assert [name for name in rows["name"] if name in set(train)] == train
        found.append(set(test))
    return found


def test_every_row_is_tested_once(rows):
    folds = folds_of(rows, 5)
    assert sorted(name for fold in folds for name in fold) == sorted(rows["name"])
    assert {len(fold) for fold in folds} <= {4, 5, 6}
    assert folds_of(rows, 5) == folds


def test_every_modality_and_lesion_is_spread(rows):
    twenty = rows.select([n for n in range(24) if rows[n]["modality"] in ("CT", "MRI")])
    shown = Counter(zip(twenty["modality"], twenty["lesion"], strict=True))
    by_name = {row["name"]: (row["modality"], row["lesion"]) for row in map(dict, twenty)}
    for fold in folds_of(twenty, 2):
        for kind, count in Counter(by_name[name] for name in fold).items():
            assert abs(count - shown[kind] / 2) <= 0.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=30), st.integers(2, 4))
def test_patients_and_scans_are_kept_together(pairs, folds):
    """Rows (patient, scan): whatever joins two rows, directly or by others, joins their folds."""
    table = {
        "name": [f"p{patient}_{n}" for n, (patient, _) in enumerate(pairs)],
        "scan": [str(scan) for _, scan in pairs],
        "lesion": ["cyst"] * len(pairs),
    }
    groups: list[tuple[set, set]] = []  # patients and scans of each group, merged until nothing is shared
    for patient, scan in pairs:
        touched = [group for group in groups if patient in group[0] or scan in group[1]]
        groups = [group for group in groups if group not in touched]
        groups.append(({patient}.union(*(g[0] for g in touched)), {scan}.union(*(g[1] for g in touched))))
    if len(groups) < folds:
        with pytest.raises(DataError, match=rf"at most as many as patients, which are {len(groups)}$"):
            Division(folds=folds, fold=1, patients=r"^p\d").divide(Dataset.from_dict(table))
        return
    found = folds_of(Dataset.from_dict(table), folds, patients=r"^p\d")
    assert all(found)
    for patients, _ in groups:
        names = {name for name in table["name"] if int(name[1]) in patients}
        assert sum(bool(names & fold) for fold in found) == 1


def test_a_column_patient_is_read(rows):
    known = rows.add_column("patient", [str(n // 4) for n in range(24)])
    for fold in folds_of(known, 3):
        assert len({known["patient"][known["name"].index(name)] for name in fold}) == len(fold) / 4 == 2
    unknown = rows.add_column("patient", [""] * 24)
    assert folds_of(unknown, 3) == folds_of(rows, 3)


def test_one_image_under_two_names_is_one_patient(rows):
    twice = rows.select([0, 1, 2, 3, 0]).remove_columns("name").add_column("name", list("abcde"))
    (fold,) = [fold for fold in folds_of(twice, 2) if "a" in fold]
    assert "e" in fold


def test_a_source_is_left_out(rows):
    known = rows.add_column("source", ["north", "south", "east"] * 8)
    splits = Division(source="south").divide(known)
    assert splits["test"]["name"][:] == rows["name"][1::3]
    assert set(splits["train"]["source"]) == {"north", "east"}
    with pytest.warns(UserWarning, match=r"1 rows of the source 'south' show images of other sources.*\(again\)"):
        Division(source="south").divide(
            Dataset.from_list(
                [dict(known[0]), {**known[0], "source": "south", "name": "again"}], features=known.features
            )
        )


def test_all_splits_of_every_kind_of_data_are_divided(rows, tmp_path):
    splits = ["train"] * 10 + ["test"] * 10 + ["validation"] * 4
    folder = write_folder(rows, tmp_path / "folder", split=splits)
    parts: dict[Any, Dataset] = {
        name: rows.select([n for n in range(24) if splits[n] == name]) for name in dict.fromkeys(splits)
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    found = [folds_of(load_split(str(path), None), 4) for path in (folder, tmp_path / "saved")]
    assert [sorted(map(sorted, folds)) for folds in found] == [sorted(map(sorted, folds_of(rows, 4)))] * 2
    scans = make_synthetic_volumes(4, tmp_path / "scans", depth=4, size=32)
    assert sorted(map(len, folds_of(scans, 2))) == [2, 2]


def test_splits_with_other_columns_are_not_mixed(rows, tmp_path):
    DatasetDict({"train": rows, "test": rows.remove_columns("lesion").add_column("more", ["x"] * 24)}).save_to_disk(
        str(tmp_path)
    )
    with pytest.raises(DataError, match=r"split 'test' has the columns \[.*'more'.*\], the first one .*; expected the"):
        load_split(str(tmp_path), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--folds and --hold_out_source: expected one of the two"),
        ({"folds": 2, "fold": 1, "source": "a"}, "--folds and --hold_out_source: expected one of the two"),
        ({"folds": 1, "fold": 1}, "--folds 1: expected 2 or more"),
        ({"folds": 3}, "--fold None: expected 1 to 3, the fold to test on"),
        ({"folds": 3, "fold": 4}, "--fold 4: expected 1 to 3, the fold to test on"),
        ({"source": "a", "fold": 1}, "--fold 1 belongs to --folds; drop it"),
        ({"folds": 3, "fold": 1, "patients": "("}, "--patients '(' is no regular expression: missing )"),
    ],
)
def test_flags_that_make_no_division(flags, message):
    with pytest.raises(SegRLError, match=re.escape(message)):
        Division(**flags)


def test_data_that_cannot_be_divided(rows):
    with pytest.raises(DataError, match=r"no column source, only \['image', 'mask', .*; add one that says where"):
        Division(source="a").divide(rows)
    known = rows.add_column("source", ["north"] * 24)
    with pytest.raises(UnknownNameError, match="north"):
        Division(source="nort").divide(known)
    with pytest.raises(DataError, match="all 24 rows are of it, none is left to train on"):
        Division(source="north").divide(known)
    with pytest.raises(DataError, match=r"--patients '0000\.' is not found in 14 of 24 names, such as 'synthetic_0_0"):
        Division(folds=2, fold=1, patients="0000.").divide(rows)
    with pytest.raises(DataError, match=re.escape(r"such as '_(0\d*)_5|.*'") + "$"):  # as one types it
        Division(folds=2, fold=1, patients=r"_(0\d*)_5").divide(rows)
