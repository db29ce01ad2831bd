import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segrl.data import (
    Volume,
    check_volumes,
    load_volumes,
    read_label,
    read_volume,
    write_manifest,
    write_mask,
    write_volume,
)
from segrl.errors import DataError

VOLUMES3D = Path(__file__).parents[2] / "shared" / "data" / "volumes3d"
HEADER = ["image", "label", "split", "modality", "anatomy", "lesion", "site"]
SHAPE = (3, 4, 5)  # D, H, W


def write_csv(folder, rows, header=HEADER):
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def row(number, split="train", lesion="dark cyst"):
    return [f"images/{number}.nii.gz", f"labels/{number}.nii.gz", split, "CT", "Abdomen", lesion, "ward A"]


def save_label(folder, number, values, z=5.0):
    write_volume(folder / f"labels/{number}.nii.gz", Volume(np.asarray(values, np.float32), (z, 0.5, 0.5)))


@pytest.fixture
def folder(tmp_path):
    """Three good rows: 3 slices of 4 x 5 px with the labels 1 and 3."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    values = np.zeros(SHAPE)
    values[1, 1, 2:4], values[2, 3, 3] = 1, 3
    for number in range(3):
        voxels = np.full(SHAPE, 40 * number, np.float32)
        write_volume(tmp_path / f"images/{number}.nii.gz", Volume(voxels, (5.0, 0.5, 0.5)))
        save_label(tmp_path, number, values)
    write_csv(tmp_path, [row(0), row(1), row(2, split="test")])
    return tmp_path


def test_columns_and_voxels(folder):
    dataset = load_volumes(folder)
    columns = "scan label label_value intensity query modality anatomy lesion name split site"
    assert dataset.column_names == columns.split()
    assert dataset["name"] == [f"images/{number}.nii.gz" for number in range(3)]
    second = dataset[1]
    assert (second["label_value"], second["intensity"], second["site"]) == ("0", "", "ward A")
    volume = read_volume(second["scan"])
    assert np.unique(volume.voxels).tolist() == [40]
    assert np.argwhere(read_label(second["label"], volume)).tolist() == [[1, 1, 2], [1, 1, 3], [2, 3, 3]]


def test_query_says_scan_and_is_built_once_and_for_all(folder):
    queries = load_volumes(folder)["query"]
    assert all("dark cyst in this CT scan of the abdomen" in query for query in queries)
    assert load_volumes(folder, "test")["query"] == queries[2:]


def test_split_limit_and_a_query_of_ones_own(folder):
    assert load_volumes(folder, "train")["name"] == ["images/0.nii.gz", "images/1.nii.gz"]
    assert load_volumes(folder, "train", limit=1)["name"] == ["images/0.nii.gz"]
    write_csv(folder, [[*row(0)[:2], "Where is it?"]], ["image", "label", "query"])
    assert load_volumes(folder)[0]["query"] == "Where is it?"


def test_one_row_per_structure(folder):
    write_csv(
        folder,
        [[*row(0)[:2], "3", "window:0:40", "cyst"], [*row(0)[:2], "1.0", "", "tumour"], [*row(0)[:2], "", "", "any"]],
        ["image", "label", "label_value", "intensity", "lesion"],
    )
    dataset = load_volumes(folder)
    assert dataset["label_value"] == ["3", "1", "0"]
    assert dataset["intensity"] == ["window:0:40", "", ""]
    sizes = [read_label(line["label"], None, line["label_value"]).sum() for line in dataset]  # type: ignore[index]
    assert sizes == [1, 2, 3]


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def spoil_scan(folder, voxels, kind="images"):
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.5, -0.5, 5.0, 1.0])), folder / f"{kind}/1.nii.gz")


NAN = np.full((5, 4, 3), np.nan, np.float32)
NOISE = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
BAD_FILES = {
    "no scan": (
        lambda f: (f / "images/1.nii.gz").unlink(),
        r"images/1\.nii\.gz: no such file; give the path of the sc",
    ),
    "no label": (
        lambda f: (f / "labels/1.nii.gz").unlink(),
        r"labels/1\.nii\.gz: no such file; give the path of the l",
    ),
    "truncated": (
        lambda f: (
            spoil_scan(f, NOISE),
            spoil_scan(f, (NOISE > 0).astype(np.uint8), "labels"),
            cut(f / "images/1.nii.gz"),
        ),
        r"images/1\.nii\.gz: the voxels cannot be read \(.*\); the file is damaged or cut off",
    ),
    "4D": (lambda f: spoil_scan(f, np.zeros((5, 4, 3, 2), np.uint8)), r"has the shape \(5, 4, 3, 2\), expected 3D"),
    "NaN": (lambda f: spoil_scan(f, NAN), r"60 of 60 voxels are NaN or infinite"),
    "label of another shape": (
        lambda f: save_label(f, 1, np.ones((2, 4, 5))),
        r"labels/1\.nii\.gz: the label has the shape \(2, 4, 5\) as \(D, H, W\), \S*images/1\.nii\.gz has \(3, 4, 5\)",
    ),
    "label of another affine": (
        lambda f: save_label(f, 1, np.ones(SHAPE), z=5.5),
        r"labels/1\.nii\.gz: the label lies up to 2 voxels away from \S*images/1\.nii\.gz: their affines differ",
    ),
    "no foreground": (
        lambda f: save_label(f, 1, np.zeros(SHAPE)),
        r"labels/1\.nii\.gz: the label has no foreground; remove the row, or set allow_empty=True",
    ),
    "not whole": (
        lambda f: save_label(f, 1, np.full(SHAPE, 0.5)),
        r"labels/1\.nii\.gz: 60 voxels of the label are not whole numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line_and_the_fix(folder, case):
    spoil, message = BAD_FILES[case]
    spoil(folder)
    with pytest.raises(DataError, match=rf"manifest\.csv: 1 problems in 3 rows, expected none:\n  line 3 .*{message}"):
        load_volumes(folder)
    assert len(load_volumes(folder, validate=False)) == 3
    with pytest.raises(DataError, match=rf"dataset: 1 problems in 3 rows, expected none:\n  row 1 .*{message}"):
        check_volumes(load_volumes(folder, validate=False))


def test_allow_empty(folder):
    save_label(folder, 1, np.zeros(SHAPE))
    assert len(load_volumes(folder, allow_empty=True)) == 3
    check_volumes(load_volumes(folder, validate=False), allow_empty=True)


def test_a_bad_scan_is_reported_for_each_of_its_rows(folder):
    (folder / "images/1.nii.gz").unlink()
    write_csv(folder, [row(1), row(1), row(0)])
    with pytest.raises(
        DataError, match=r"2 problems in 3 rows, expected none:\n  line 2 .*no such file.*\n  line 3 .*no"
    ):
        load_volumes(folder)


def values(label_value, intensity=""):
    return ["image", "label", "label_value", "intensity", "lesion"], [[*row(0)[:2], label_value, intensity, "cyst"]]


BAD_ROWS = {
    "no rows": (HEADER, [], r"manifest\.csv: no rows under the header; expected one line per scan"),
    "no label column": (
        ["image", "lesion"],
        [["a", "b"]],
        r"no column \['label'\]; expected image and label in the fi",
    ),
    "scan column": ([*HEADER, "scan"], [[*row(0), "x"]], r"a column 'scan' beside 'image'.*rename it"),
    "value": (*values("liver"), r"line 2 .*: label_value 'liver': expected a whole number, 0 for every voxel"),
    "fraction": (*values("1.5"), r"line 2 .*: label_value '1.5': expected a whole number"),
    "negative": (*values("-1"), r"line 2 .*: label_value '-1': expected a whole number"),
    "infinite": (*values("inf"), r"line 2 .*: label_value 'inf': expected a whole number"),
    "intensity": (*values("1", "window"), r"line 2 .*: intensity 'window': expected 'window:<low>:<high>' or"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_manifest(folder, case):
    """What only scans have; the other rules are those of images, see test_data_images_folder.py."""
    header, rows, message = BAD_ROWS[case]
    write_csv(folder, rows, header)
    with pytest.raises(DataError, match=message):
        load_volumes(folder, validate=False)


def test_an_absent_value_says_which_are_there(folder):
    header, rows = values("2")
    write_csv(folder, rows, header)
    with pytest.raises(
        DataError, match=r"has no voxel with the value 2, only 1, 3; correct label_value, remove the row"
    ):
        load_volumes(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("label"), r"dataset lacks the columns \['label'\]: expected scan, label, query"),
        (
            lambda d: d.remove_columns("label").add_column("label", ["", None, ""]),
            r"3 problems in 3 rows, .*\n  row 0 \(images/0\.nii\.gz\): the label is missing; give a file or delete",
        ),
        (
            lambda d: d.remove_columns("label_value").add_column(
                "label_value", [0, 0, 2]
            ),  # numbers, as others write them
            r"1 problems in 3 rows, .*\n  row 2 .*has no voxel with the value 2, only 1, 3",
        ),
        (
            lambda d: d.remove_columns("intensity").add_column("intensity", ["", "x:1:2", ""]),
            r"1 problems in 3 rows, .*\n  row 1 .*intensity kind 'x': expected 'window'",
        ),
    ],
)
def test_check_volumes_refuses(folder, change, message):
    with pytest.raises(DataError, match=message):
        check_volumes(change(load_volumes(folder)))


def test_check_volumes_needs_three_columns(folder):
    check_volumes(load_volumes(folder).select_columns(["scan", "label", "query"]))


def test_a_written_manifest_is_read_back(folder):
    rows = [{"image": "images/0.nii.gz", "label": "labels/0.nii.gz", "label_value": 3, "lesion": 'a "cyst", dark'}]
    for _ in range(2):  # the second replaces the first
        assert write_manifest(folder, rows) == folder / "manifest.csv"
    line = load_volumes(folder)[0]
    assert (line["label_value"], line["lesion"]) == ("3", 'a "cyst", dark')
    assert sorted(path.name for path in folder.iterdir()) == ["images", "labels", "manifest.csv"]


def test_manifests_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"no rows for \S*manifest\.csv: expected at least one"):
        write_manifest(tmp_path, [])
    with pytest.raises(
        DataError, match=r"row 1 for \S*manifest\.csv has the columns \['label'\], row 0 has \['image'\]"
    ):
        write_manifest(tmp_path, [{"image": "a"}, {"label": "b"}])


@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
def test_real_volumes_load_and_pass(tmp_path):
    dataset = load_volumes(VOLUMES3D)
    assert len(dataset) == 7
    assert len(load_volumes(VOLUMES3D, "train", validate=False)) == 4
    assert len(load_volumes(VOLUMES3D, "test", validate=False)) == 3
    for line in dataset:
        assert isinstance(line, dict)
        assert read_label(line["label"], None, line["label_value"]).sum() == int(line["lesion_voxels"])
    assert "MRI scan of the head" in dataset[0]["query"]
    # the label of another patient of the same size does not pass for a mask of this scan once it is moved
    volume = read_volume(dataset[0]["scan"])
    assert volume.affine is not None
    moved = Volume(volume.voxels, volume.spacing_mm, "moved", volume.affine + np.eye(4, k=3), volume.file_shape)
    write_mask(tmp_path / "label.nii.gz", volume.voxels > 0, moved)
    with pytest.raises(DataError, match=r"lies up to 1 voxels away"):
        read_label(tmp_path / "label.nii.gz", volume)
