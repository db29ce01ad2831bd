import json

import numpy as np
import pytest
from scipy import sparse

from segrl.data import M3D_SEG_DATASETS, load_m3d_seg, read_label, read_volume
from segrl.errors import DataError, UnknownNameError

SHAPE = (8, 8, 5)  # X, Y, Z
LABELS = {"0": "background", "1": "liver", "2": "bladder", "3": "lungs"}


def write_case(folder, channels, shape=SHAPE):
    """A case as M3D's preprocessing saves it: a standardised image, and one row of a sparse matrix per structure."""
    folder.mkdir(parents=True)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    np.save(folder / "image.npy", image)
    label = np.zeros((3, *shape), np.int32)
    for channel in channels:
        label[channel - 1, channel, 2:4, 1] = 1
    name = f"mask_{label.shape}.npz"
    sparse.save_npz(folder / name, sparse.csr_matrix(label.reshape(3, -1)))
    return f"{folder.name}/image.npy", f"{folder.name}/{name}"


def pairs(*files, prefix="0012/"):
    return [{"image": prefix + image, "label": prefix + label} for image, label in files]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "M3D_Seg" / "0012"
    one, two, three = (write_case(folder / f"case {n}", c) for n, c in ((1, [1, 3]), (2, [2]), (3, [])))
    write_listing(folder, train=pairs(one, three), test=pairs(two))
    return tmp_path / "M3D_Seg"


def write_listing(folder, labels=LABELS, **splits):
    content = {"name": "0012 Dataset", "modality": {"0": "CT"}, "labels": labels, "numTrain": 2} | splits
    (folder / "0012.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_one_row_per_case_and_structure_present(root):
    dataset = load_m3d_seg(root, "CT-ORG")
    columns = "scan label label_value intensity query modality anatomy lesion name split source"
    assert dataset.column_names == columns.split()
    assert dataset["name"] == ["0012/case 1/liver", "0012/case 1/lungs", "0012/case 2/bladder"]
    assert dataset["lesion"] == ["liver", "lungs", "bladder"]
    assert dataset["label_value"] == ["1", "3", "2"]
    assert dataset["split"] == ["train", "train", "test"]
    assert set(dataset["source"]) == {"CT-ORG"}
    assert set(dataset["intensity"]) == {"percentile:0:100"}
    assert "liver in this CT scan" in dataset[0]["query"]
    assert load_m3d_seg(root, "0012", "test")["lesion"] == ["bladder"]
    assert load_m3d_seg(root, "CT-ORG", "train", limit=1)["lesion"] == ["liver"]


def test_scan_and_label_lie_on_each_other(root):
    for row in load_m3d_seg(root, "CT-ORG"):
        assert isinstance(row, dict)
        volume = read_volume(row["scan"])
        mask = read_label(row["label"], volume, row["label_value"])
        array = np.load(row["scan"])[0]
        # foreground voxels of the file, in the order of the file, hold the same intensities as those of the volume
        inside = array[int(row["label_value"]), 2:4, 1]
        assert sorted(volume.voxels[mask].tolist()) == sorted(inside.tolist())
        assert volume.voxels.shape == SHAPE[::-1]


@pytest.mark.parametrize("place", ["", "..", "0012"])
def test_the_folder_may_be_named_at_three_levels(root, place):
    assert len(load_m3d_seg(root / place, "CT-ORG")) == 3


@pytest.mark.parametrize("prefix", ["0012/", "", "/somebody/data/M3D_Seg/0012/"])
def test_paths_may_begin_anywhere(root, prefix):
    files = [path.name for path in (root / "0012" / "case 1").iterdir()]
    label = next(name for name in files if name.endswith("npz"))
    write_listing(root / "0012", train=pairs(("case 1/image.npy", f"case 1/{label}"), prefix=prefix))
    assert len(load_m3d_seg(root, "CT-ORG", "train")) == 2


def test_known_names_stand_in_for_missing_labels(root):
    listing = json.loads((root / "0012" / "0012.json").read_text())
    write_listing(root / "0012", labels=None, train=listing["train"])
    assert load_m3d_seg(root, "CT-ORG")["lesion"] == ["liver", "lungs"]


def test_slices_first_as_in_kits(tmp_path):
    folder = tmp_path / "0004"
    files = write_case(folder / "case_00000", [1], shape=(5, 8, 8))
    (folder / "0004.json").write_text(json.dumps({"train": pairs(files, prefix="0004/"), "test": []}))
    dataset = load_m3d_seg(tmp_path, "KiTS23")
    assert (dataset[0]["lesion"], dataset[0]["anatomy"]) == ("kidney", "Abdomen")
    assert read_volume(dataset[0]["scan"]).voxels.shape == (5, 8, 8)


def test_the_three_data_sets_of_the_paper():
    assert M3D_SEG_DATASETS == {"AbdomenCT-1K": "0003", "KiTS23": "0004", "CT-ORG": "0012"}


def first(root, pattern):
    return next((root / "0012" / "case 1").glob(pattern))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


BAD_FILES = {
    "no label": (lambda r: first(r, "*.npz").unlink(), r"train case 0: \S*case 1/mask_.*npz: no such file", 1),
    "cut label": (lambda r: cut(first(r, "*.npz")), r"train case 0: .*cannot be read as a scipy sparse matrix", 1),
    "no image": (lambda r: first(r, "image.npy").unlink(), r"train case 0: liver: \S*case 1/image\.npy: no such", 2),
    "cut image": (lambda r: cut(first(r, "image.npy")), r"train case 0: liver: .*cannot be read as a numpy array", 2),
    "image of another shape": (
        lambda r: np.save(first(r, "image.npy"), np.zeros((1, 8, 8, 6))),
        r"train case 0: liver: .*has the shape \(5, 8, 8\) as \(D, H, W\), \S*case 1/image\.npy has \(6, 8, 8\)",
        2,
    ),
    "NaN": (
        lambda r: np.save(first(r, "image.npy"), np.full((1, *SHAPE), np.nan)),
        r"train case 0: liver: .*320 of 320 voxels are NaN or infinite",
        2,
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_their_case(root, case):
    spoil, message, count = BAD_FILES[case]
    spoil(root)
    with pytest.raises(DataError, match=rf"0012\.json: {count} problems in 3 rows, expected none:\n  {message}"):
        load_m3d_seg(root, "CT-ORG")


def relabelled(**labels):
    return lambda r: write_listing(
        r / "0012", labels=labels, train=json.loads((r / "0012/0012.json").read_text())["train"]
    )


BAD_LISTINGS = {
    "no JSON": (lambda r: (r / "0012/0012.json").write_text("{"), r"0012\.json: not a JSON file \(.*\); replace it"),
    "a list": (
        lambda r: (r / "0012/0012.json").write_text("[]"),
        r"expected the lists 'train' and 'test' of image and",
    ),
    "no splits": (lambda r: write_listing(r / "0012"), r"expected the lists 'train' and 'test'"),
    "no cases": (
        lambda r: write_listing(r / "0012", train=[]),
        r"no structure in any case of \['train'\]; expected at",
    ),
    "no paths": (
        lambda r: write_listing(r / "0012", train=["a"]),
        r"train case 0: 'a': expected the paths 'image' and",
    ),
    "other labels": (relabelled(liver=1), r"0012\.json: labels \{'liver': 1\}; expected names by number, as"),
    "few labels": (
        relabelled(**{"0": "background", "1": "liver"}),
        r"has the structure 3, but the labels of 0012\.json end at 1; complete them",
    ),
    "prepared": (
        lambda r: write_listing(r / "0012", train=pairs(("1/image.npy", "1/masks/mask_0.npy"))),
        r"1/masks/mask_0\.npy: expected a sparse \.npz label; M3D's own preparation, which squeezes",
    ),
    "none": (
        lambda r: (r / "0012/0012.json").unlink(),
        r"no data set 0012 of M3D-Seg; expected \S*0012/0012\.json; unp",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTINGS)
def test_bad_listings(root, case):
    spoil, message = BAD_LISTINGS[case]
    spoil(root)
    with pytest.raises(DataError, match=message):
        load_m3d_seg(root, "CT-ORG", validate=False)


def test_bad_arguments(root):
    with pytest.raises(UnknownNameError, match=r"unknown data set of M3D-Seg 'CTORG'; did you mean 'CT-ORG'"):
        load_m3d_seg(root, "CTORG")
    with pytest.raises(UnknownNameError, match=r"unknown split of \S*0012\.json 'tset'; did you mean 'test'"):
        load_m3d_seg(root, "CT-ORG", "tset")
    with pytest.raises(DataError, match=r"limit=0: expected 1 or more rows"):
        load_m3d_seg(root, "CT-ORG", limit=0)
    with pytest.raises(DataError, match=r"intensity 'full': expected 'window:<low>:<high>'"):
        load_m3d_seg(root, "CT-ORG", intensity="full")
