"""Data in the layouts that people have: read, written as a folder that trains, and what can be wrong with it."""

import csv
import inspect
import json
import os
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from datasets import DatasetDict, concatenate_datasets
from PIL import Image
from pycocotools import mask as coco
from scipy import sparse
from script_modules import ROOT
from shapely.geometry import Polygon

from segrl.cli.formats import FORMATS, TEXTS, imported
from segrl.cli.main import main
from segrl.data import load_folder, load_volumes, make_synthetic, read_case, read_label, write_folder
from segrl.data.benchmarks import BENCHMARKS
from segrl.data.formats import (
    FormatRow,
    ScanRow,
    coco_annotations,
    coco_mask,
    read_biomedparse,
    read_coco,
    read_columns,
    read_cvc_clinicdb,
    read_imed_361m,
    read_m3d_refseg,
    read_medsegbench,
    read_mmr,
    read_nnunet,
    read_pairs,
    read_pickled_lists,
    read_reasonseg,
    read_refcoco,
    read_rows,
    read_sa_med2d,
    write_biomedparse,
    write_coco,
    write_columns,
    write_nnunet,
    write_pairs,
    write_rows,
)
from segrl.data.formats.coco import coco_tables
from segrl.data.overview import data_overview
from segrl.errors import DataError, SegRLError, UnknownNameError
from segrl.evaluation.conventions import CONVENTIONS
from segrl.geometry import mask_to_rle
from segrl.predictions import Target

LESION = {"lesion": "polyp"}
REAL = ROOT.parent / "shared" / "data" / "lesions2d"


def masks(count: int, seed: int = 0, shape: tuple[int, int] = (13, 17)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(shape) < rng.choice([0.02, 0.3, 0.9]) for _ in range(count)]


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def picture(seed: int, shape: tuple[int, int] = (13, 17)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def back(folder: Path, split: str = "train") -> dict[str, np.ndarray]:
    """Masks of a converted folder by the name of the image and the lesion."""
    rows = load_folder(folder, split)
    return {f"{Path(r['name']).stem}/{r['lesion']}": np.asarray(r["mask"]) > 0 for r in map(dict, rows)}


# ---- what is read is what was there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a{n}.jpg", "a{n}_mask.png"),
        ("images/a{n}.png", "masks/a{n}.png"),
        ("Images/a{n}.png", "Ground Truth/a{n}.tif"),
        ("train/images/a{n}.png", "train/labels/a{n}_seg.png"),
        ("set/train/a{n}.bmp", "set/train/a{n}_segmentation.png"),
    ],
)
def test_paired_files(image, mask, tmp_path):
    truth = masks(4)
    for n, found in enumerate(truth):
        save(tmp_path / "src" / image.format(n=n), picture(n))
        save(tmp_path / "src" / mask.format(n=n), grey(found))
    rows = list(read_pairs(tmp_path / "src", texts=LESION))
    assert [row.split for row in rows] == ["train"] * 4
    assert write_rows(rows, tmp_path / "out") == {"train": 4}
    assert {name: found.tolist() for name, found in back(tmp_path / "out").items()} == {
        f"a{n}/polyp": found.tolist() for n, found in enumerate(truth)
    }


def test_splits_of_paired_files(tmp_path):
    for n in range(20):
        folder = ("training", "validation", "test")[n % 3]
        save(tmp_path / "named" / folder / f"{n}.png", picture(n))
        save(tmp_path / "named" / folder / f"{n}_mask.png", grey(masks(1, n)[0]))
        save(tmp_path / "plain" / f"{n}.png", picture(n))
        save(tmp_path / "plain" / f"{n}_mask.png", grey(masks(1, n)[0]))
    assert {row.split for row in read_pairs(tmp_path / "named", texts=LESION)} == {"train", "val", "test"}
    drawn = [
        [row.split for row in read_pairs(tmp_path / "plain", texts=LESION, test_fraction=0.25, seed=s)]
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0].count("test") == 5
    with pytest.raises(DataError, match="test_fraction=1"):
        list(read_pairs(tmp_path / "plain", texts=LESION, test_fraction=1))


def test_a_thousand_masks_survive_coco_exactly(tmp_path):
    truth = masks(1000)
    rows = [FormatRow(Image.new("RGB", (17, 13)), mask, f"{n}.png", "train", LESION) for n, mask in enumerate(truth)]
    for n in range(1000):
        save(tmp_path / "images" / f"{n}.png", picture(0)) if n < 2 else os.link(
            *(tmp_path / "images" / f"{k}.png" for k in (0, n))
        )
    (tmp_path / "a.json").write_text(json.dumps(coco_annotations(rows)))
    found = list(read_coco(tmp_path / "a.json", tmp_path / "images", texts={}))
    assert all(np.array_equal(row.mask, mask) for row, mask in zip(found, truth, strict=True))
    assert {row.texts["lesion"] for row in found} == {"polyp"}
    for mask in truth[:200]:  # what pycocotools writes
        packed: Any = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        text = {**packed, "counts": packed["counts"].decode()}
        assert np.array_equal(coco_mask(text, 13, 17), mask)
        assert np.array_equal(coco_mask(packed, 13, 17), mask)


LAYOUTS: dict[str, Any] = {
    "pairs": (write_pairs, lambda home: read_pairs(home, texts={})),
    "coco": (write_coco, lambda home: read_coco(home / "train.json", home / "images", texts={})),
    "nnunet": (write_nnunet, lambda home: read_nnunet(home, texts={})),
    "biomedparse": (write_biomedparse, lambda home: read_biomedparse(home, texts={})),
    "hf": (write_columns, lambda home: read_columns(home, columns={}, texts={})),
    "folder": (write_rows, read_rows),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_thousand_masks_survive_every_layout_exactly(layout, tmp_path):
    """Written and read back; two of an image where a layout has room for two."""
    truth = masks(1000)
    each = 1 if layout in ("pairs", "hf") else 2
    rows = []
    for n, mask in enumerate(truth):
        image, which = divmod(n, each)
        if layout == "nnunet":  # one value a pixel, and no row without one
            mask &= np.arange(17) // 9 == which
            mask[0, 9 * which] = True
        texts = {"lesion": f"kind {which}", "modality": "CT", "anatomy": "liver", "source": "set"}
        picture = Image.new("RGB", (17, 13), (image % 256, image // 256, 0))
        rows.append(FormatRow(picture, mask, f"{image}", "train", texts))
    write, read = LAYOUTS[layout]
    assert write(rows, tmp_path / "out") == {"train": 1000}
    found = {
        (Path(row.name).stem.split("_")[0], row.texts.get("lesion", "kind 0")): row for row in read(tmp_path / "out")
    }
    assert len(found) == 1000
    for row in rows:
        again = found[row.name, row.texts["lesion"]]
        assert np.array_equal(again.mask, row.mask)
        assert again.split == "train"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_target_survives_the_layouts_that_have_a_place_for_it(layout, tmp_path):
    texts = {"lesion": "cyst", "modality": "CT", "anatomy": "liver"}
    rows = [
        FormatRow(Image.new("RGB", (4, 4), n), np.eye(4, dtype=bool) & bool(n), f"{n}", "train", texts) for n in (0, 1)
    ]
    write, read = LAYOUTS[layout]
    write(rows, tmp_path / "out")
    assert len(list(read(tmp_path / "out"))) == (1 if layout == "nnunet" else 2)  # there a label without a value


def test_what_a_layout_has_no_place_for(tmp_path):
    mask = np.eye(4, dtype=bool)
    texts = {"lesion": "cyst", "modality": "CT", "anatomy": "liver"}
    row = FormatRow(Image.new("RGB", (4, 4)), mask, "x", "train", texts)
    scan = ScanRow(Path("s.nii.gz"), Path("l.nii.gz"), "1", "train", texts)
    cases: list[tuple[Any, list[Any], str]] = [
        (write_pairs, [row, replace(row, mask=~mask)], "x: has several rows, and pairs hold one mask"),
        (write_pairs, [replace(row, split="testA")], "split of pairs 'testA'"),
        (write_pairs, [scan], "pairs holds images, and this is a scan"),
        (write_coco, [row, row], "x: two rows ask for 'cyst'"),
        (write_coco, [replace(row, texts={})], "x: has no lesion"),
        (write_coco, [replace(row, ignored=mask)], "coco has no place for ignored pixels"),
        (write_nnunet, [row, replace(row, texts={**texts, "lesion": "node"})], "masks overlap"),
        (write_nnunet, [row, replace(row, texts={**texts, "modality": "US"})], "the modalities CT, US"),
        (write_nnunet, [row, scan], "images and scans"),
        (write_nnunet, [replace(row, split="val")], "split of nnunet 'val'"),
        (write_nnunet, [replace(scan, label_value="1,2")], "cyst has the value 1,2"),
        (write_biomedparse, [replace(row, texts={**texts, "anatomy": ""})], "anatomy ''; biomedparse writes it"),
        (write_biomedparse, [replace(row, texts={**texts, "lesion": "a_b"})], "lesion 'a_b'; biomedparse writes it"),
        (write_biomedparse, [row, row], "two rows ask for 'cyst'"),
    ]
    for write, rows, message in cases:
        with pytest.raises(SegRLError, match=re.escape(message)):
            write(rows, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_export_by_the_command(tmp_path, capsys):
    """Images to BiomedParse, with texts that they have not, and scans to nnU-Net and back."""
    rows = make_synthetic(4, size=40)
    data = write_folder(rows, tmp_path / "data", split=["train", "train", "train", "test"])
    argv = ["data", "export", "biomedparse", str(data), str(tmp_path / "bp")]
    assert main([*argv, "--modality", "US", "--anatomy", "breast"]) == 0
    assert "1 test, 3 train" in capsys.readouterr().out
    found = [row for row in read_biomedparse(tmp_path / "bp", texts={}) if row.split == "train"]
    assert sorted(row.texts["lesion"] for row in found) == sorted(rows["lesion"][:3])
    nnunet(tmp_path / "src", ".nii.gz")
    assert main(["data", "convert", "nnunet", str(tmp_path / "src"), str(tmp_path / "scans")]) == 0
    assert main(["data", "export", "nnunet", str(tmp_path / "scans"), str(tmp_path / "again")]) == 0
    first, second = (json.loads((tmp_path / part / "dataset.json").read_text()) for part in ("src", "again"))
    assert all(first[name] == second[name] for name in ("labels", "channel_names", "file_ending"))
    for label in (tmp_path / "src" / "labelsTr").iterdir():
        assert label.read_bytes() == (tmp_path / "again" / "labelsTr" / label.name).read_bytes()
    assert main(["data", "export", "pairs", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "nothing: no manifest.csv; segrl data convert makes such a folder" in capsys.readouterr().err


def test_cvc_clinicdb(tmp_path):
    for n in (1, 25, 26, 50, 206, 612):
        save(tmp_path / "CVC" / "Original" / f"{n}.tif", picture(n))
        save(tmp_path / "CVC" / "Ground Truth" / f"{n}.tif", grey(masks(1, n)[0]))
    rows = list(read_cvc_clinicdb(tmp_path / "CVC", texts={}, test_fraction=0.5, seed=3))
    sequences = {int(row.name): row.texts["patient"] for row in rows}
    assert sequences == {n: f"sequence {k}" for n, k in ((1, 1), (25, 1), (26, 2), (50, 2), (206, 11), (612, 29))}
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.texts["patient"], set()).add(row.split)
    assert sorted(map(len, splits.values())) == [1, 1, 1, 1]
    assert sum(found == {"test"} for found in splits.values()) == 2
    save(tmp_path / "CVC" / "Original" / "613.tif", picture(0))
    save(tmp_path / "CVC" / "Ground Truth" / "613.tif", grey(masks(1)[0]))
    with pytest.raises(DataError, match="613: expected frames 1 to 612"):
        list(read_cvc_clinicdb(tmp_path / "CVC", texts={}))


def test_a_format_is_one_entry_whose_flags_are_its_readers_arguments(capsys):
    for name, layout in FORMATS.items():
        arguments = inspect.signature(imported(layout.read)).parameters
        own = [*layout.places, "texts", *layout.flags]
        assert list(arguments)[: len(layout.places)] == list(layout.places) or len(layout.places) == 1, name
        assert set(own[len(layout.places) :]) <= set(arguments), name
        assert not layout.write or callable(imported(layout.write))
        with pytest.raises(SystemExit):
            main(["data", "convert", name, "--help"])
        shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
        assert shown == {*layout.flags, *TEXTS, "hardlink", "help", "import"}, name


def test_a_thousand_masks_survive_the_folder_exactly(tmp_path):
    truth = masks(1000, 3)
    image = Image.fromarray(picture(1))
    rows = [FormatRow(image, mask, f"row {n // 2}", "train", {"lesion": f"l{n % 2}"}) for n, mask in enumerate(truth)]
    write_rows(rows, tmp_path / "out")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 500  # once, however many rows are about it
    loaded = load_folder(tmp_path / "out", "train", validate=False)
    assert all(
        np.array_equal(np.asarray(row["mask"]) > 0, mask) for row, mask in zip(map(dict, loaded), truth, strict=True)
    )


def test_polygons_are_filled_as_pycocotools_fills_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        angles = np.sort(rng.random(9)) * 2 * np.pi
        points = np.stack([20 + 15 * rng.random() * np.cos(angles), 16 + 12 * np.sin(angles)], 1)
        if not Polygon(points).is_valid:
            continue
        found = coco_mask([points.ravel().tolist()], 32, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            outlines: Any = [points.ravel().tolist()]
            expected = coco.decode(coco.frPyObjects(outlines, 32, 40))[..., 0]
        assert np.array_equal(found, expected.astype(bool))


def test_coco_makes_one_row_of_an_image_and_a_category(tmp_path):
    save(tmp_path / "images" / "x.png", picture(0, (8, 8)))
    save(tmp_path / "images" / "y.png", picture(1, (8, 8)))
    box = [[0, 0, 3, 0, 3, 3, 0, 3]]
    other = [[4, 4, 8, 4, 8, 8, 4, 8]]
    content = {
        "images": [{"id": n, "file_name": f"{name}.png", "height": 8, "width": 8} for n, name in ((7, "x"), (9, "y"))],
        "categories": [{"id": 1, "name": "cyst"}, {"id": 2, "name": "node"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": box},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": other},
            {"id": 3, "image_id": 7, "category_id": 2, "segmentation": [*box, *other]},
            {"id": 4, "image_id": 9, "category_id": 2, "segmentation": mask_to_rle(np.eye(8, dtype=bool))},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert (
        main(["data", "convert", "coco", *(str(tmp_path / p) for p in ("a.json", "images", "out")), "--modality", "CT"])
        == 0
    )
    found = back(tmp_path / "out")
    assert set(found) == {"x/cyst", "x/node", "y/node"}
    assert found["x/cyst"].sum() == 9 + 16
    assert np.array_equal(found["x/cyst"], found["x/node"])
    assert load_folder(tmp_path / "out", "train")["modality"][0] == "CT"
    assert "source" not in load_folder(tmp_path / "out", "train").column_names


def nnunet(home: Path, ending: str, cases: int = 3, channels: int = 1, tests: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = {}
    for split, (images, folder) in {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}.items():
        for n in range(cases if split == "train" else tests):
            label = rng.integers(0, 3, (6, 7, 5) if ending == ".nii.gz" else (6, 7)).astype(np.uint8)
            truth[f"{split}{n}"] = label
            for channel in range(channels):
                name = f"{split}{n}_{channel:04d}{ending}"
                if ending == ".nii.gz":
                    (home / images).mkdir(parents=True, exist_ok=True)
                    nib.save(
                        nib.Nifti1Image(rng.normal(size=label.shape).astype(np.float32), np.eye(4)),
                        home / images / name,
                    )
                else:
                    save(home / images / name, picture(n + channel, (6, 7)))
            if ending == ".nii.gz":
                (home / folder).mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(label, np.eye(4)), home / folder / f"{split}{n}{ending}")
            else:
                save(home / folder / f"{split}{n}{ending}", label)
    content = {
        "channel_names": {str(n): name for n, name in enumerate(["T1", "FLAIR"][:channels])},
        "labels": {"background": 0, "core": 1, "edema": 2},
        "file_ending": ending,
    }
    (home / "dataset.json").write_text(json.dumps(content))
    return truth


def test_nnunet_images(tmp_path):
    truth = nnunet(tmp_path / "src", ".png")
    assert main(["data", "convert", "nnunet", str(tmp_path / "src"), str(tmp_path / "out"), "--anatomy", "Head"]) == 0
    for split in ("train", "test"):
        for name, mask in back(tmp_path / "out", split).items():
            case, lesion = name.split("/")
            label = truth[case.removesuffix("_0000")]
            assert np.array_equal(mask, label == {"core": 1, "edema": 2}[lesion])
    assert load_folder(tmp_path / "out", "train")["modality"][0] == "T1"


def test_nnunet_scans(tmp_path):
    truth = nnunet(tmp_path / "src", ".nii.gz", channels=2)
    argv = ["data", "convert", "nnunet", str(tmp_path / "src"), str(tmp_path / "out"), "--hardlink"]
    assert main(argv) == 2  # two channels
    assert main([*argv, "--channel", "flair"]) == 0
    rows = load_volumes(tmp_path / "out", "train")
    assert sorted(set(rows["lesion"])) == ["core", "edema"]
    assert len(rows) == 6
    assert set(rows["modality"]) == {"FLAIR"}
    copied = nib.load(tmp_path / "out" / "labels" / "train0.nii.gz")
    assert np.array_equal(np.asarray(copied.dataobj), truth["train0"])  # type: ignore[attr-defined]
    assert os.stat(tmp_path / "src" / "labelsTr" / "train0.nii.gz").st_nlink == 2


def test_hugging_face_columns(tmp_path):
    rows = make_synthetic(4, size=40).rename_columns({"query": "text", "mask": "gt"})
    DatasetDict({"train": rows.select(range(3)), "test": rows.select([3])}).save_to_disk(tmp_path / "src")
    argv = ["data", "convert", "hf", str(tmp_path / "src"), str(tmp_path / "out")]
    assert main(argv) == 2
    assert main([*argv, "--columns", "text=query", "gt=mask"]) == 0
    found = load_folder(tmp_path / "out", "train")
    assert found["query"][:] == rows["text"][:3]
    for row, theirs in zip(map(dict, found), map(dict, rows), strict=False):
        assert np.array_equal(np.asarray(row["mask"]) > 0, np.asarray(theirs["gt"]) > 0)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(theirs["image"]))


@pytest.mark.skipif(not REAL.is_dir(), reason="no shared data")
def test_real_images_through_coco(tmp_path):
    rows = load_folder(REAL, "test", limit=30)
    given = [
        FormatRow(row["image"], np.asarray(row["mask"]) > 0, f"{n}.png", "test", {"lesion": row["lesion"]})
        for n, row in enumerate(map(dict, rows))
    ]
    for row in given:
        save(tmp_path / "images" / row.name, np.asarray(row.image))
    (tmp_path / "a.json").write_text(json.dumps(coco_annotations(given)))
    found = list(read_coco(tmp_path / "a.json", tmp_path / "images", texts={}, split="test"))
    write_rows(found, tmp_path / "out")
    assert [np.array_equal(a, b.mask) for a, b in zip(back(tmp_path / "out", "test").values(), given, strict=True)] == [
        True
    ] * 30


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def broken_coco(tmp_path: Path, **changes: Any) -> Path:
    save(tmp_path / "images" / "x.png", picture(0, (8, 8)))
    content = {
        "images": [{"id": 1, "file_name": "x.png", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "cyst"}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3]]}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def annotation(segmentation: Any) -> dict[str, Any]:
    return {"annotations": [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": segmentation}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (annotation([[0, 0, 3, 3]]), "annotation 5: a polygon of 2 points; expected three or more"),
        (annotation([[0, 0, 4, 4, 4, 0, 0, 4]]), "annotation 5: a polygon that cannot be filled: Self-intersection"),
        (annotation([[0, 0, 3]]), "annotation 5: polygon .* expected an even number"),
        (annotation([[0, 0, "3", 0, 3, 3]]), "expected an even number of finite numbers"),
        (annotation({"size": [4, 8], "counts": [32]}), r"run lengths of the size \[4, 8\], expected \[8, 8\]"),
        (annotation({"size": [8, 8], "counts": [3]}), "the counts cover 3 pixels"),
        (annotation([]), "expected polygons or run lengths"),
        (annotation(None), "expected polygons or run lengths"),
        ({"annotations": [{"id": 5, "image_id": 2, "category_id": 1}]}, "annotation 5: image_id 2 is not in the file"),
        ({"annotations": [{"image_id": 1, "category_id": 8}]}, "annotation 0: category_id 8 is not in the file"),
        ({"categories": [{"id": 1, "name": "Cyst"}, {"id": 2, "name": "cyst "}]}, "categories 1 and 2 are both called"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no name"),
        ({"images": "x"}, "expected an object with the lists"),
        ({"images": [{"id": 1, "file_name": "y.png", "height": 8, "width": 8}]}, "image y.png: no such file in"),
        ({"images": [{"id": 1, "file_name": "x.png", "height": 8, "width": 9}]}, "x.png: 8 x 8 px, expected 9 x 8 as"),
    ],
)
def test_broken_coco(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        list(read_coco(broken_coco(tmp_path, **changes), tmp_path / "images", texts={}))


def of_two(entry: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    return [entry, {**entry, **changes}]


PICTURE = {"id": 1, "file_name": "x.png", "height": 8, "width": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": of_two(PICTURE, file_name="y.png")}, r"id 1: entry 0 \(x\.png\) and entry 1 \(y\.png\)"),
        ({"images": of_two(PICTURE, height=9)}, r"images of \S*a\.json: 1 ids cannot be told apart"),
        ({"images": [{**PICTURE, "id": None}]}, r"entry 0 \(x\.png\): id None, expected a number or a text"),
        (
            {"categories": of_two({"id": 1, "name": "cyst"}, name="node")},
            r"categories of \S*a\.json(?s:.)*id 1: entry 0 \(cyst\) and entry 1 \(node\)",
        ),
    ],
)
def test_two_entries_of_one_id(changes, message, tmp_path):
    path = broken_coco(tmp_path, **changes)
    save(tmp_path / "images" / "y.png", picture(1, (8, 8)))
    with pytest.raises(DataError, match=message):
        list(read_coco(path, tmp_path / "images", texts={}))
    with pytest.raises(DataError, match=message):
        coco_tables(path)  # results of other systems are read with it


def test_an_entry_that_is_there_twice_counts_once(tmp_path):
    path = broken_coco(tmp_path, images=of_two(PICTURE), categories=of_two({"id": 1, "name": "cyst"}))
    assert len(list(read_coco(path, tmp_path / "images", texts={}))) == 1


@pytest.mark.parametrize(
    ("key", "changes"), [("images", {"file_name": "y.jpg"}), ("annotations", {"segmentation": [[0, 0, 1, 0, 1, 1]]})]
)
def test_two_entries_of_one_id_in_refcoco(key, changes, tmp_path):
    refcoco(tmp_path)
    save(tmp_path / "images" / "y.jpg", picture(1, (10, 12)))
    content = json.loads((tmp_path / "instances.json").read_text())
    content[key].append({**content[key][0], **changes})
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{key} of \S*instances\.json: 1 ids cannot(?s:.)*entry 0.* and entry \d"):
        list(read_refcoco(tmp_path / "grefs(unc).json", tmp_path / "instances.json", tmp_path / "images", texts={}))


OUTSIDE = "ct_00--KiTS--case_1--x_0040.png"  # a name that every layout takes


def outside_of_coco(home: Path, name: str) -> Any:
    return read_coco(broken_coco(home, images=[{**PICTURE, "file_name": name}]), home / "images", texts={})


def outside_of_refcoco(home: Path, name: str) -> Any:
    refcoco(home)
    text = (home / "instances.json").read_text().replace('"x.jpg"', json.dumps(name))
    (home / "instances.json").write_text(text)
    return read_refcoco(home / "grefs(unc).json", home / "instances.json", home / "images", texts={})


def outside_of_mmr(home: Path, name: str) -> Any:
    entry = mmr(home / "MMR_val.json", home / "images", masks(3))
    (home / "MMR_val.json").write_text(json.dumps([{**entry, "file_name": name}]))
    return read_mmr(home / "MMR_val.json", home / "images", texts={})


def outside_of_sa_med2d(home: Path, name: str) -> Any:
    folder = sa_med2d(home / "images", masks(9))
    named = json.loads((folder / "SAMed2D_v1.json").read_text())
    (folder / "SAMed2D_v1.json").write_text(json.dumps({**named, name: []}))
    return read_sa_med2d(folder, texts={})


def outside_of_imed_361m(home: Path, name: str) -> Any:
    content = {"labels": {"0": "background", "1": "spleen"}, "test": [{"image": name, "label": "label.npz"}]}
    (home / "images").mkdir()
    (home / "images" / "dataset.json").write_text(json.dumps(content))
    return read_imed_361m(home / "images", texts={})


def outside_of_m3d_refseg(home: Path, name: str) -> Any:
    (home / "images").mkdir()
    line = f"{name},{name},1,Where is it?"
    (home / "images" / "M3D_RefSeg.csv").write_text(f"Image,Mask,Mask_ID,Question\n{line}\n")
    return read_m3d_refseg(home / "images", texts={})


@pytest.mark.parametrize("name", [f"../{OUTSIDE}", f"a/../../{OUTSIDE}", "absolute"])
@pytest.mark.parametrize(
    "read",
    [
        outside_of_coco,
        outside_of_refcoco,
        outside_of_mmr,
        outside_of_sa_med2d,
        outside_of_imed_361m,
        outside_of_m3d_refseg,
    ],
)
def test_files_outside_the_folder_are_not_read(read, name, tmp_path):
    """One that is there, and would be copied into the data set."""
    path = save(tmp_path / OUTSIDE, picture(0, (13, 17)))
    name = str(path) if name == "absolute" else name
    with pytest.raises(
        DataError, match=rf"{re.escape(name)}: leads outside the folder \S*images; copy the file into it"
    ):
        list(read(tmp_path, name))


def test_names_are_followed_through_links(tmp_path):
    """COCO's folders are commonly links."""
    path = broken_coco(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    assert len(list(read_coco(path, tmp_path / "images", texts={}))) == 1


def test_all_problems_of_a_coco_file_are_listed(tmp_path):
    many = [{"id": n, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 1, 1]]} for n in range(25)]
    with pytest.raises(DataError, match=r"25 problems, expected none:") as caught:
        list(read_coco(broken_coco(tmp_path, annotations=many), tmp_path / "images", texts={}))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  annotation {n}" for n in range(25)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": "png"}, "file_ending 'png'; expected one such as"),
        ({"channel_names": {}}, "expected names by number"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, r"label 'whole' is \[1, 2\]; regions"),
        ({"labels": {"background": 0, "core": 1, "Core": 2}}, "two labels have the same name"),
        ({"labels": {"0": "background", "1": "core", "2": "core"}}, "two labels have the same name"),
        ({"labels": {"background": 0, "core": 1, "edema": 1}}, "labels 'core' and 'edema' both have the value 1"),
        ({"channel_names": {"0": "T1", "00": "T2"}}, "two have one number"),
        ({"file_ending": "./../x.png"}, "file_ending './../x.png'; expected one such as"),
        ({"file_ending": ".tif"}, "no labels that end in .tif"),
    ],
)
def test_broken_nnunet(changes, message, tmp_path):
    nnunet(tmp_path, ".png")
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(DataError, match=message):
        list(read_nnunet(tmp_path, texts={}))


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_what_nnunet_ignores(ending, tmp_path):
    truth = nnunet(tmp_path / "src", ending)
    content = json.loads((tmp_path / "src" / "dataset.json").read_text())
    content["labels"] = {"background": 0, "core": 1, "ignore": 2}
    (tmp_path / "src" / "dataset.json").write_text(json.dumps(content))
    assert main(["data", "convert", "nnunet", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    if ending == ".png":
        rows = load_folder(tmp_path / "out", "train")
        assert set(rows["lesion"]) == {"core"}
        for row in map(dict, rows):
            label = truth[Path(row["name"]).stem.removesuffix("_0000")]
            assert np.array_equal(np.asarray(row["ignored"]) > 0, label == 2)
        return
    for row in map(dict, load_volumes(tmp_path / "out", "train")):
        target = read_case(row).target(row)
        assert target.ignored is not None
        assert target.ignored.sum() == (truth[Path(row["label"]).name.removesuffix(ending)] == 2).sum()
    (tmp_path / "out" / "manifest.csv").write_text(
        (tmp_path / "out" / "manifest.csv").read_text().replace(",2,train", ",0,train", 1)
    )
    with pytest.raises(DataError, match=r"line 2.*ignored_value '0': expected a whole number above 0"):
        load_volumes(tmp_path / "out", "train")


def test_nnunet_of_version_1_and_without_an_image(tmp_path):
    nnunet(tmp_path, ".png")
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "core", "2": "edema"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert {row.texts["lesion"] for row in read_nnunet(tmp_path, texts={})} == {"core", "edema"}
    with pytest.raises(UnknownNameError, match="channel 'T2'"):
        list(read_nnunet(tmp_path, texts={}, channel="T2"))
    next((tmp_path / "imagesTr").iterdir()).unlink()
    with pytest.raises(DataError, match=r"1 labels have no image:\n  labelsTr/\S+: no imagesTr/"):
        list(read_nnunet(tmp_path, texts={}))


def test_broken_pairs(tmp_path):
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(DataError, match="no files that end in"):
        list(read_pairs(tmp_path / "empty", texts=LESION))
    save(tmp_path / "a" / "x.png", picture(0))
    save(tmp_path / "a" / "y_mask.png", grey(masks(1)[0]))
    with pytest.raises(DataError, match=r"2 files have no partner .*:\n  x\.png\n  y_mask\.png$"):
        list(read_pairs(tmp_path / "a", texts=LESION))
    save(tmp_path / "b" / "x.png", picture(0))
    save(tmp_path / "b" / "x_mask.png", grey(masks(1)[0]))
    save(tmp_path / "b" / "x_seg.png", grey(masks(1)[0]))
    with pytest.raises(DataError, match=r"1 names are those of several files; .*:\n  x_mask\.png, x_seg\.png$"):
        list(read_pairs(tmp_path / "b", texts=LESION))
    save(tmp_path / "c" / "x.png", picture(0, (9, 9)))
    save(tmp_path / "c" / "x_mask.png", grey(masks(1)[0]))
    with pytest.raises(DataError, match="the mask is 17 x 13 px, the image 9 x 9"):
        list(read_pairs(tmp_path / "c", texts=LESION))


def test_broken_columns(tmp_path):
    make_synthetic(2, size=32).save_to_disk(tmp_path / "src")
    with pytest.raises(UnknownNameError, match=r"column of .* for query 'text'"):
        list(read_columns(tmp_path / "src", columns={"query": "text"}, texts={}))
    with pytest.raises(DataError, match="cannot be loaded as a data set"):
        list(read_columns(tmp_path / "nothing", columns={}, texts={}))
    without = make_synthetic(2, size=32).remove_columns(["query", "lesion"])
    without.save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match="no column for query or lesion"):
        list(read_columns(tmp_path / "plain", columns={}, texts={}))
    assert len(list(read_columns(tmp_path / "plain", columns={}, texts={"lesion": "cyst"}))) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text"], "expected THEIRS=OURS"),
        (["text=qeury"], "column 'qeury'; did you mean 'query'"),
        (["a=query", "b=query"], "a and b are both query"),
    ],
)
def test_columns_on_the_command_line(columns, message, tmp_path, capsys):
    make_synthetic(2, size=32).save_to_disk(tmp_path / "src")
    argv = ["data", "convert", "hf", str(tmp_path / "src"), str(tmp_path / "out"), "--columns", *columns]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pairs", "coco", "nnunet", "nnunet scans", "hf"])
def test_a_source_without_a_test_split_gets_one(kind, tmp_path, capsys):
    """A fifth of the images, whole; none where none is asked for, or where the source has its own."""
    rows = make_synthetic(10, size=32)
    names = [f"{row['name']}.png" for row in map(dict, rows)]
    source, argv = tmp_path / "src", [kind, str(tmp_path / "src")]
    if kind == "pairs":
        argv += ["--lesion", "spot"]
        for name, row in zip(names, map(dict, rows), strict=True):
            save(source / name, np.asarray(row["image"]))
            save(source / name.replace(".png", "_mask.png"), np.asarray(row["mask"]))
    elif kind == "coco":
        given = [
            FormatRow(row["image"], np.asarray(row["mask"]) > 0, name, "", {"lesion": lesion})
            for name, row in zip(names, map(dict, rows), strict=True)
            for lesion in ("a", "b")
        ]
        for row in given:
            save(source / row.name, np.asarray(row.image))
        (tmp_path / "a.json").write_text(json.dumps(coco_annotations(given)))
        argv = ["coco", str(tmp_path / "a.json"), str(source)]
    elif kind == "hf":
        twice = concatenate_datasets([rows, rows.map(lambda row: {"query": f"{row['query']} Again."})])
        twice.rename_columns({"query": "text"}).save_to_disk(source)
        argv += ["--columns", "text=query"]
    else:
        argv[0] = "nnunet"
        nnunet(source, ".png" if kind == "nnunet" else ".nii.gz", cases=10, tests=0)
    counts = []
    for number, more in enumerate(([], ["--test_fraction", "0"], ["--seed", "5"])):
        out = tmp_path / f"out{number}"
        positional = next((n for n, word in enumerate(argv) if word.startswith("--")), len(argv))
        assert main(["data", "convert", *argv[:positional], str(out), *argv[positional:], *more]) == 0
        lines = list(csv.DictReader((out / "manifest.csv").read_text().splitlines()))
        by_split: dict[str, set[str]] = {}
        for line in lines:
            by_split.setdefault(line["split"], set()).add(line["image"])
        assert not by_split["train"] & by_split.get("test", set())
        counts.append({split: len(images) for split, images in by_split.items()})
    assert counts == [{"train": 8, "test": 2}, {"train": 10}, {"train": 8, "test": 2}]


def test_a_folder_that_is_taken_and_sources_without_rows(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("precious")
    row = FormatRow(Image.new("RGB", (4, 4)), np.eye(4, dtype=bool), "a", "train", LESION)
    with pytest.raises(DataError, match="is not an empty folder"):
        write_rows([row], tmp_path / "mine")
    with pytest.raises(DataError, match="the source has no rows"):
        write_rows([], tmp_path / "new")

    def broken() -> Any:
        yield row
        raise DataError("row 2 is broken")

    for folder in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="row 2 is broken"):
            write_rows(broken(), folder)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []
    rows = [
        FormatRow(Image.new("RGB", (4, 4), n), np.eye(4, dtype=bool), f"../{n % 2}/A?.png", "train", LESION)
        for n in (1, 2)
    ]
    write_rows(rows, tmp_path / "names")
    assert sorted(path.name for path in (tmp_path / "names" / "images").iterdir()) == ["A.png", "A_1.png"]


def test_pairs_need_to_say_what_they_show(tmp_path, capsys):
    save(tmp_path / "x.png", picture(0))
    save(tmp_path / "x_mask.png", grey(masks(1)[0]))
    assert main(["data", "convert", "pairs", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "what do the masks show? Pass --lesion" in capsys.readouterr().err
    assert main(["data", "convert", "pairs", str(tmp_path), str(tmp_path / "out"), "--lesion", "polyp"]) == 0
    assert "training needs the split test too" in capsys.readouterr().out  # a fifth of one image is none


# ---- the checker -----------------------------------------------------------------------------------------------------


def test_the_overview_of_a_folder(tmp_path, capsys):
    for n in range(6):
        save(tmp_path / "src" / ("train", "test")[n % 2] / f"{n}.png", picture(n))
        save(
            tmp_path / "src" / ("train", "test")[n % 2] / f"{n}_mask.png",
            grey(masks(1, n)[0] if n else np.zeros((13, 17), bool)),
        )
    assert main(["data", "convert", "pairs", str(tmp_path / "src"), str(tmp_path / "out"), "--lesion", "polyp"]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "out"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "train: 3 rows about 3 images: 3 polyp" in out
    assert "1 empty masks" in out
    assert "all 6 rows can be read" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 2 * 160)
    assert main(["data", "check", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == data_overview(tmp_path / "out")
    assert found["splits"]["train"]["foreground"][0] > 0
    (tmp_path / "out" / "masks" / "1.png").write_bytes(b"no image")
    assert main(["data", "check", str(tmp_path / "out")]) == 2
    assert "1 problems in 3 rows" in capsys.readouterr().err


def test_the_overview_of_volumes_and_of_nothing(tmp_path, capsys):
    nnunet(tmp_path / "src", ".nii.gz")
    assert main(["data", "convert", "nnunet", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    found = data_overview(tmp_path / "out")
    assert found["task"] == "volumes"
    assert found["splits"]["train"]["rows"] == 6
    assert found["splits"]["train"]["images"] == 3
    (tmp_path / "out" / "manifest.csv").write_text(
        (tmp_path / "out" / "manifest.csv").read_text().replace(",2,train,", ",7,train,", 1)
    )
    assert main(["data", "check", str(tmp_path / "out")]) == 2
    assert main(["data", "check", str(tmp_path / "out"), "--allow_empty"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 rows about 3 volumes: 3 core, 3 edema\n  1 rows ask for what is not there" in out
    with pytest.raises(DataError, match=r"no manifest\.csv"):
        data_overview(tmp_path)
    argv = ["data", "check", str(tmp_path / "out"), "--allow_empty", "--sheet", str(tmp_path / "sheet.png")]
    assert main(argv) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 160, 2 * 160)
        drawn = np.asarray(sheet).astype(int).reshape(2, 160, 8, 160, 3)
    outlined: Any = ((drawn[..., 1] > drawn[..., 0] + 80) & (drawn[..., 1] > drawn[..., 2] + 80)).any(axis=(1, 3))
    assert outlined.any(axis=1).all()  # green, in both splits


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["pairs", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("coco", "nnunet", "hf"))]
)
def test_every_format_trains_after_one_command(kind, tmp_path):
    from script_modules import Example

    rows = make_synthetic(24, size=64)
    source, out = tmp_path / "src", tmp_path / "out"
    if kind == "hf":
        rows.rename_columns({"query": "text"}).save_to_disk(source)
        argv = ["hf", str(source), str(out), "--columns", "text=query"]
    elif kind == "pairs":
        for row in map(dict, rows):
            save(source / f"{row['name']}.png", np.asarray(row["image"]))
            save(source / f"{row['name']}_mask.png", np.asarray(row["mask"]))
        argv = ["pairs", str(source), str(out), "--lesion", "spot"]
    elif kind == "coco":
        given = [
            FormatRow(row["image"], np.asarray(row["mask"]) > 0, f"{row['name']}.png", "", {"lesion": row["lesion"]})
            for row in map(dict, rows)
        ]
        for row in given:
            save(source / row.name, np.asarray(row.image))
        (tmp_path / "a.json").write_text(json.dumps(coco_annotations(given)))
        argv = ["coco", str(tmp_path / "a.json"), str(source), str(out)]
    else:
        for n, row in enumerate(map(dict, rows)):
            save(source / "imagesTr" / f"{n}_0000.png", np.asarray(row["image"]))
            save(source / "labelsTr" / f"{n}.png", (np.asarray(row["mask"]) > 0).astype(np.uint8))
        content = {"channel_names": {"0": "US"}, "labels": {"background": 0, "spot": 1}, "file_ending": ".png"}
        (source / "dataset.json").write_text(json.dumps(content))
        argv = ["nnunet", str(source), str(out)]
    assert main(["data", "convert", *argv]) == 0
    short = ("--max_steps", 2, "--eval_limit", 2, "--train_limit", 16, "--max_completion_length", 8)
    Example("core_seg").done("train_grpo", "--data", out, *short, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_images_without_a_target_train_and_are_scored(tmp_path):
    """Every third image shows nothing that is asked for: both stages take them, and N-acc and T-acc are reported."""
    from script_modules import Example

    rows = [
        FormatRow(
            row["image"],
            (np.asarray(row["mask"]) > 0) & bool(n % 3),
            f"{row['name']}.png",
            "train" if n < 16 else "test",
            {"lesion": row["lesion"]},
        )
        for n, row in enumerate(map(dict, make_synthetic(24, size=64)))
    ]
    write_rows(rows, tmp_path / "data")
    assert main(["data", "check", str(tmp_path / "data")]) == 0
    short = ("--max_steps", 2, "--eval_limit", 6, "--train_limit", 16, "--max_completion_length", 8)
    Example("core_seg").done("train_grpo", "--data", tmp_path / "data", *short, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    without = sum(not row.mask.any() for row in rows[16:22])
    for stage in ("stage1", "stage2"):
        found = results[stage]["no_target"]
        assert found["n"] == without == 2
        assert 0 <= found["n_acc"] <= 1
        assert 0 <= found["t_acc"] <= 1


# ---- pixels that do not count ----------------------------------------------------------------------------------------


def reasonseg(home: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three images in the layout of ReasonSeg: one plain, one with regions to ignore, one in another encoding."""
    square = [[2.9, 2], [12, 2], [12, 12], [2, 12]]
    inner = [[5, 5], [8, 5], [8, 8], [5, 8]]
    files = {
        "train/a": ([("target", square)], ["Where is it?", "What is bright?"], "utf-8"),
        "val/b": ([("Ignore", inner), ("target", square), ("flag", [[0, 0]])], ["The thing…"], "utf-8"),
        "test/c": ([("target", inner), ("ignore", square)], ["Größe?"], "cp1252"),
    }
    for n, (name, (shapes, text, encoding)) in enumerate(files.items()):
        save((home / name).with_suffix(".jpg"), picture(n, (16, 20)))
        listed = [{"label": label, "points": points} for label, points in shapes]
        content = json.dumps({"shapes": listed, "text": text, "is_sentence": True}, ensure_ascii=False)
        (home / name).with_suffix(".json").write_bytes(content.encode(encoding))
    large, small = np.zeros((16, 20), dtype=bool), np.zeros((16, 20), dtype=bool)
    large[2:13, 2:13], small[5:9, 5:9] = True, True
    return {
        "train": (large, large & False),
        "val": (large & ~small, small),  # the larger shape is painted first, whatever the order
        "test": (small, large & ~small),
    }


def test_reasonseg(tmp_path):
    pytest.importorskip("cv2")
    truth = reasonseg(tmp_path / "src")
    assert main(["data", "convert", "reasonseg", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    for split, (target, ignored) in truth.items():
        rows = load_folder(tmp_path / "out", split)
        assert len(rows) == 1
        row = dict(rows[0])
        assert np.array_equal(np.asarray(row["mask"]) > 0, target)
        assert (row["ignored"] is None) == (split == "train")
        if split != "train":
            assert np.array_equal(np.asarray(row["ignored"]) > 0, ignored)
    assert load_folder(tmp_path / "out", "test")["query"][0] == "Größe?"
    both = list(read_reasonseg(tmp_path / "src", texts={}, questions="all"))
    assert [row.texts["query"] for row in both][:2] == ["Where is it?", "What is bright?"]
    assert len(both) == 4


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[1]", "holds a list, expected an object")])
@pytest.mark.parametrize("read", [read_nnunet, read_imed_361m])
def test_a_damaged_dataset_json(read, content, message, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=rf"dataset\.json: {message}"):
        list(read(tmp_path, texts={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda home: (home / "train" / "a.json").write_text("{"), "a.json: not JSON"),
        (lambda home: (home / "train" / "a.json").write_text('{"shapes": []}'), "a.json: no shapes, text"),
        (lambda home: (home / "train" / "a.jpg").unlink(), "a.json: no a.jpg"),
        (lambda home: (home / "train" / "a.json").unlink(), "a.jpg: no .json beside it"),
        (
            lambda home: (home / "train" / "a.json").write_text(
                '{"shapes": [{"label": "x", "points": [[1, 2]]}], "text": "a"}'
            ),
            "shape 0 has no label, or fewer than three points",
        ),
    ],
)
def test_broken_reasonseg(change, message, tmp_path):
    reasonseg(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=f"1 problems in (?s:.*){message}"):
        list(read_reasonseg(tmp_path, texts={}))


def test_ignored_pixels_count_nowhere(tmp_path, capsys):
    """What is predicted on them is neither right nor wrong, in records, in summaries and in LISA's convention."""
    true, ignored = np.zeros((13, 17), dtype=bool), np.zeros((13, 17), dtype=bool)
    true[2:8, 2:8], ignored[5:11, 5:11] = True, True
    rows = [FormatRow(Image.fromarray(picture(n)), true, f"r{n}", "test", LESION, ignored) for n in range(2)]
    write_rows(rows, tmp_path / "data")
    kept = true & ~ignored
    save(tmp_path / "theirs" / "r0.png", grey(true | ignored))
    save(tmp_path / "theirs" / "r1.png", grey(np.roll(kept, 2, axis=0)))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(tmp_path / "data"), "--conventions", "all"]
    assert main(argv) == 0
    out = tmp_path / "theirs_evaluation"
    records = json.loads((out / "predictions.json").read_text())
    moved = np.roll(kept, 2, axis=0) & ~ignored
    expected = [1.0, 2 * (moved & kept).sum() / (moved.sum() + kept.sum())]
    assert [record["dice"] for record in records] == pytest.approx(expected)
    found = json.loads((out / "results.json").read_text())["conventions"]["conventions"]
    union = (moved | kept).sum()
    giou = (1 + (moved & kept).sum() / union) / 2
    assert found["lisa"]["scores"]["giou"] == pytest.approx(giou, abs=1e-4)
    assert found["segrl"]["scores"]["giou"] == pytest.approx(giou)
    assert found["vision_reasoner"]["scores"]["giou"] < giou  # there they are background
    assert "ignored pixels" in found["rela"]["reason"]
    assert "- 2 ignored pixels" in capsys.readouterr().out


def test_wrong_ignored_pixels(tmp_path):
    mask = np.eye(13, 17, dtype=bool)
    row = FormatRow(Image.fromarray(picture(1)), mask, "r", "test", LESION, mask)
    write_rows([row], tmp_path / "data")
    save(next((tmp_path / "data" / "ignored").iterdir()), grey(np.ones((5, 5), dtype=bool)))
    with pytest.raises(DataError, match="the ignored pixels are 5 x 5 px, the mask 17 x 13"):
        load_folder(tmp_path / "data", "test")
    with pytest.raises(DataError, match=r"Target\.ignored: shape \(5, 5\)"):
        Target.from_mask(np.eye(3, dtype=bool)).ignoring(np.ones((5, 5), dtype=bool))


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def refcoco(home: Path, *, images: Path | None = None, **changes: Any) -> list[Any]:
    """A small copy of gRefCOCO's layout: one object, two objects, none, and a polygon that crosses itself."""
    save((images or home / "images") / "x.jpg", picture(0, (10, 12)))
    home.mkdir(parents=True, exist_ok=True)
    boxes = {1: [[0, 0, 3, 0, 3, 3, 0, 3]], 2: [[5, 5, 9, 5, 9, 9, 5, 9]], 3: [[0, 0, 4, 4, 4, 0, 0, 4]]}
    content = {
        "images": [{"id": 7, "file_name": "x.jpg", "height": 10, "width": 12}],
        "annotations": [{"id": n, "image_id": 7, "iscrowd": 0, "segmentation": box} for n, box in boxes.items()],
        "categories": [],
    }
    (home / "instances.json").write_text(json.dumps(content))
    said = [["left one", "it"], ["both"], ["dog"], ["bow"]]
    parts = [
        {"ann_id": [1], "split": "train"},
        {"ann_id": [1, 2], "split": "testA"},
        {"ann_id": [-1], "split": "testA"},
        {"ann_id": 3, "split": "val", **changes},
    ]
    refs = [
        {"ref_id": n, "image_id": 7, "sentences": [{"sent": text} for text in texts], **part}
        for n, (texts, part) in enumerate(zip(said, parts, strict=True), 1)
    ]
    (home / "grefs(unc).json").write_text(json.dumps(refs))
    return refs


@pytest.mark.parametrize("kind", ["json", "p"])
def test_refcoco_and_grefcoco(kind, tmp_path):
    refs = refcoco(tmp_path)
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=2))
    file = tmp_path / ("grefs(unc).json" if kind == "json" else "refs.p")
    places = [str(file), str(tmp_path / "instances.json"), str(tmp_path / "images"), str(tmp_path / "out")]
    assert main(["data", "convert", "refcoco", *places]) == 0
    found = {split: load_folder(tmp_path / "out", split) for split in ("train", "testA", "val")}
    assert found["train"]["query"][:] == ["left one", "it"]
    assert [int((np.asarray(row["mask"]) > 0).sum()) for row in map(dict, found["testA"])] == [9 + 16, 0]
    assert (np.asarray(dict(found["val"][0])["mask"]) > 0).any()  # filled as COCO's own data is
    assert main(["data", "convert", "refcoco", *places[:3], str(tmp_path / "only"), "--split", "testA"]) == 0
    assert len(load_folder(tmp_path / "only", "testA")) == 2
    assert main(["data", "convert", "refcoco", *places[:3], str(tmp_path / "x"), "--split", "testC"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ann_id": 9}, "ref 4: ann_id 9 is not in"),
        ({"image_id": 8}, "ref 4: image_id 8 is not in"),
        ({"ann_id": []}, "ref 4: neither ann_id nor no_target"),
    ],
)
def test_broken_refcoco(changes, message, tmp_path):
    refcoco(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        list(read_refcoco(tmp_path / "grefs(unc).json", tmp_path / "instances.json", tmp_path / "images", texts={}))


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_a_pickle_never_runs_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        with pytest.raises(DataError, match=r"refused: it holds (posix|os|nt)\.system"):
            read_pickled_lists(pickle.dumps([{"a": Harmful()}], protocol=protocol), "refs.p")
    assert not Path("harmed").exists()
    with pytest.raises(DataError, match="cannot be read"):
        read_pickled_lists(b"no pickle")
    plain = [{"a": [1, 2.5, "x", None, True, (1, 2)]}]
    assert all(read_pickled_lists(pickle.dumps(plain, protocol=p)) == plain for p in range(6))


def test_biomedparse(tmp_path):
    truth = masks(3)
    for n, (split, target) in enumerate((("train", "liver+tumor"), ("train", "kidney"), ("test", "liver"))):
        save(tmp_path / "SET" / split / f"case_{n}_CT_abdomen.png", picture(n))
        save(tmp_path / "SET" / f"{split}_mask" / f"case_{n}_CT_abdomen_{target}.png", grey(truth[n]))
    assert main(["data", "convert", "biomedparse", str(tmp_path), str(tmp_path / "out")]) == 0
    rows = load_folder(tmp_path / "out", "train")
    assert rows["lesion"][:] == ["liver tumor", "kidney"]
    assert set(zip(rows["modality"], rows["anatomy"], rows["source"], strict=True)) == {("CT", "abdomen", "SET")}
    assert np.array_equal(np.asarray(dict(rows[1])["mask"]) > 0, truth[1])
    save(tmp_path / "SET" / "test_mask" / "other_1_CT_abdomen_liver.png", grey(truth[0]))
    save(tmp_path / "SET" / "test_mask" / "short.png", grey(truth[0]))
    with pytest.raises(
        DataError, match=r"2 of \d masks cannot be read:\n.*no test/other_1_CT_abdomen.png\n  short.png: expected"
    ):
        list(read_biomedparse(tmp_path / "SET", texts={}))


def test_medsegbench(tmp_path, capsys):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (4, 8, 9)).astype(np.uint8)
    images = rng.integers(0, 255, (4, 8, 9, 3), dtype=np.uint8)
    both: dict[str, Any] = {
        "train_images": images,
        "train_label": label,
        "test_images": images[:1],
        "test_label": label[:1],
    }
    np.savez(tmp_path / "a_256.npz", **both)
    argv = ["data", "convert", "medsegbench", str(tmp_path / "a_256.npz"), str(tmp_path / "out")]
    assert main(argv) == 2
    assert "what do the masks show?" in capsys.readouterr().err
    assert main([*argv, "--labels", "1=core"]) == 2
    assert "label 2 of train 0 has no name; pass --labels 2=NAME" in capsys.readouterr().err
    assert main([*argv, "--labels", "one=core"]) == 2
    assert main([*argv, "--labels", "1=core", "2=edema"]) == 0
    for n, row in enumerate(map(dict, load_folder(tmp_path / "out", "train"))):
        assert np.array_equal(np.asarray(row["mask"]) > 0, label[n // 2] == 1 + n % 2)
        assert np.array_equal(np.asarray(row["image"]), images[n // 2])
    assert len(list(read_medsegbench(tmp_path / "a_256.npz", texts=LESION))) == 5
    np.savez(tmp_path / "b.npz", train_images=images, train_label=label[:, :4])
    with pytest.raises(DataError, match=r"train_label \(4, 4, 9\); expected uint8"):
        list(read_medsegbench(tmp_path / "b.npz", texts=LESION))
    np.savez(tmp_path / "c.npz", train_images=np.array([Harmful()]))
    with pytest.raises(DataError, match=r"cannot be read as \.npz: .*pickled objects in it, which are never loaded"):
        list(read_medsegbench(tmp_path / "c.npz", texts=LESION))


def sa_med2d(home: Path, truth: list[np.ndarray]) -> Path:
    """Two slices of a case and one of another set, with two instances of one class, and one class named union_."""
    named: dict[str, list[str]] = {}
    slices = ("ct_00--KiTS--case_1--x_0040", "ct_00--KiTS--case_1--x_0041", "mr_t1--BraTS--case_2--z_0001")
    for n, name in enumerate(slices):
        save(home / "images" / f"{name}.png", picture(n))
        for end in ("0000_000", "0000_001", "0001_000"):
            save(home / "masks" / f"{name}--{end}.png", grey(truth[len(named.get("all", []))]))
            named.setdefault(f"images/{name}.png", []).append(f"masks/{name}--{end}.png")
            named.setdefault("all", []).append(name)
    named.pop("all")
    (home / "SAMed2D_v1.json").write_text(json.dumps(named))
    classes = {"KiTS": {"kidney": "0000", "union_tumor_cyst": "0001"}, "BraTS": {"edema": "0000", "core": "0001"}}
    (home / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(classes))
    return home


def test_sa_med2d(tmp_path, capsys):
    truth = masks(9)
    home = sa_med2d(tmp_path / "SAMed2Dv1", truth)
    argv = ["data", "convert", "sa_med2d", str(home), str(tmp_path / "out"), "--test_fraction", "0.5", "--seed", "1"]
    assert main(argv) == 0
    found = {split: load_folder(tmp_path / "out", split) for split in ("train", "test")}
    assert sorted(map(len, found.values())) == [2, 4]  # slices of one case stay together
    rows = [dict(row) for split in found.values() for row in map(dict, split)]
    expected = {
        (row["name"].split("--")[1], row["name"].split("--")[3][:6], row["lesion"], row["modality"]) for row in rows
    }
    assert expected == {
        *((("KiTS", number, term, "CT")) for number in ("x_0040", "x_0041") for term in ("kidney", "union tumor cyst")),
        *((("BraTS", "z_0001", term, "MRI t1")) for term in ("edema", "core")),
    }
    for row in rows:
        at = 3 * ("x_0040", "x_0041", "z_0001").index(row["name"].split("--")[3][:6])
        mask = truth[at] | truth[at + 1] if row["lesion"] in ("kidney", "edema") else truth[at + 2]
        assert np.array_equal(np.asarray(row["mask"]) > 0, mask)
    assert {row.texts["source"] for row in read_sa_med2d(home, texts={}, sets=["BraTS"])} == {"BraTS"}
    with pytest.raises(UnknownNameError, match=r"BraTs.*did you mean 'BraTS'"):
        list(read_sa_med2d(home, texts={}, sets=["BraTs"]))
    capsys.readouterr()

    other = "masks/mr_t1--BraTS--case_2--z_0001--0000_001.png"
    save(home / other, grey(np.ones((3, 4), dtype=bool)))
    with pytest.warns(
        UserWarning, match=f"1 masks have another size than their image and were left out, such as {other}"
    ):
        kept = {row.texts["lesion"]: row.mask for row in read_sa_med2d(home, texts={}, sets=["BraTS"])}
    assert np.array_equal(kept["edema"], truth[6])
    (home / other).unlink()
    (home / "images" / "ct_00--KiTS--case_1--x_0041.png").unlink()
    terms = json.loads((home / "SAMed2D_v1_class_mapping_id.json").read_text())
    del terms["KiTS"]["kidney"]
    (home / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(terms))
    with pytest.raises(
        DataError, match=r"6 problems in 3 images:(?s:.)*x_0041.png: no such file(?s:.)*class 0000 of KiTS"
    ):
        list(read_sa_med2d(home, texts={}))
    (home / "SAMed2D_v1.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list, expected an object"):
        list(read_sa_med2d(home, texts={}))


def test_sa_med2d_leaves_out_brain_masks_and_turns_the_inverted_disc(tmp_path):
    home, truth = tmp_path / "SAMed2Dv1", masks(2)
    binary = grey(masks(1, seed=5)[0])
    images = {
        "fundus_photography--ichallenge_adam_task2--A0001--2d_none": (picture(0), grey(~truth[0])),
        "mr_t1--Brain_PTM--case_1--x_0001": (binary, grey(truth[0])),
        "mr_t1--Brain_PTM--case_1--x_0002": (picture(1), grey(truth[1])),
        "mr_t2--FeTA--brain-growth_7--x_0001": (binary, grey(truth[0])),
        "mr_t2--FeTA--sub-001--x_0001": (binary, grey(truth[1])),  # of another set: nobody says that it is none
    }
    for name, (image, mask) in images.items():
        save(home / "images" / f"{name}.png", image)
        save(home / "masks" / f"{name}--0000_000.png", mask)
    index = {f"images/{name}.png": [f"masks/{name}--0000_000.png"] for name in images}
    (home / "SAMed2D_v1.json").write_text(json.dumps(index))
    classes = {name.split("--")[1]: {"it": "0000"} for name in images}
    (home / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(classes))
    with pytest.warns(
        UserWarning, match=r"2 images are binary masks of brains .*such as images/mr_t1--Brain_PTM.*0001"
    ):
        rows = {row.name.split("--")[2][:6]: row.mask for row in read_sa_med2d(home, texts={})}
    assert rows.keys() == {"A0001", "case_1", "sub-00"}
    assert np.array_equal(rows["A0001"], truth[0])
    assert np.array_equal(rows["case_1"], truth[1])


def test_m3d_refseg(tmp_path, capsys):
    home, rng, labels = tmp_path / "M3D_RefSeg", np.random.default_rng(0), {}
    for case in ("s0000", "s0001"):
        (home / case).mkdir(parents=True)
        labels[case] = rng.integers(0, 3, (8, 9, 5)).astype(np.uint8)
        nib.save(
            nib.Nifti1Image(rng.normal(0, 300, (8, 9, 5)).astype(np.float32), np.eye(4)), home / case / "ct.nii.gz"
        )
        nib.save(nib.Nifti1Image(labels[case], np.eye(4)), home / case / "mask.nii.gz")
    head = "Image,Mask,Mask_ID,Question_Type,Question,Answer\n"
    lines = [f'{c}/ct.nii.gz,{c}/mask.nii.gz,{n},0,"Where, if at all, is {n}?",[SEG]\n' for c in labels for n in (1, 2)]
    (home / "M3D_RefSeg.csv").write_text(head + "".join(lines))
    argv = ["data", "convert", "m3d_refseg", str(home)]
    assert main([*argv, str(tmp_path / "drawn"), "--test_fraction", "0.5"]) == 0
    assert [len(load_volumes(tmp_path / "drawn", split)) for split in ("train", "test")] == [2, 2]

    (home / "M3D_RefSeg_test.csv").write_text(head + lines[3])
    with pytest.warns(UserWarning, match=r"2 questions about cases of M3D_RefSeg_test\.csv were left out"):
        found = list(read_m3d_refseg(home, texts={}))
    assert [(row.scan.parent.name, row.label_value, row.split) for row in found] == [
        ("s0000", "1", "train"),
        ("s0000", "2", "train"),
        ("s0001", "2", "test"),
    ]
    (home / "M3D_RefSeg_train.csv").write_text(head + "".join(lines[:2]))
    assert main([*argv, str(tmp_path / "out")]) == 0
    (row,) = map(dict, load_volumes(tmp_path / "out", "test"))
    assert row["query"] == "Where, if at all, is 2?"
    mask = read_label(row["label"], row["scan"], row["label_value"])
    assert mask.sum() == (labels["s0001"] == 2).sum()
    assert main(["data", "check", str(home), "--benchmark", "m3d_refseg"]) == 0
    (home / "s0001" / "ct.nii.gz").unlink()
    (home / "M3D_RefSeg_train.csv").write_text(head + lines[0].replace(",1,0,", ",one,0,"))
    with pytest.raises(
        DataError, match=r"2 problems, (?s:.)*Mask_ID 'one'; (?s:.)*line 2: s0001/ct.nii.gz: no such file"
    ):
        list(read_m3d_refseg(home, texts={}))


def test_imed_361m(tmp_path):
    home, truth = tmp_path / "BTCV", np.array(masks(6)).reshape(2, 3, 13, 17)
    truth[1, 1] = False  # not in that image
    (home / "label").mkdir(parents=True)
    entries = []
    for n, stack in enumerate(truth):
        save(home / "image" / f"ABD_{n}.png", picture(n))
        name = f"label/x___ABD_{n}.(3, 13, 17, 1).npz"
        sparse.save_npz(home / name, sparse.csr_matrix(stack.reshape(3, -1).astype(np.int32)))
        entries.append({"image": f"image/ABD_{n}.png", "label": name, "imask": f"imask/x___ABD_{n}.npy"})
    content = {
        "name": "BTCV",
        "modality": {"0": "ct"},
        "labels": {"0": "background", "1": "spleen", "2": "kidney_right", "3": "aorta"},
        "training": entries[:1],
        "test": entries[1:],
    }
    (home / "dataset.json").write_text(json.dumps(content))
    assert main(["data", "convert", "imed_361m", str(tmp_path), str(tmp_path / "out")]) == 0
    found = [back(tmp_path / "out", split) for split in ("train", "test")]
    assert set(found[0]) == {"ABD_0/spleen", "ABD_0/kidney right", "ABD_0/aorta"}
    assert set(found[1]) == {"ABD_1/spleen", "ABD_1/aorta"}
    for n, rows in enumerate(found):
        for name, mask in rows.items():
            assert np.array_equal(mask, truth[n, ["spleen", "kidney right", "aorta"].index(name.split("/")[1])])
    assert load_folder(tmp_path / "out", "test")["modality"][:] == ["CT", "CT"]
    assert main(["data", "check", str(home), "--benchmark", "imed_361m"]) == 0

    for change, message in (
        ({"labels": {"1": "spleen"}}, "expected names by number, from 0"),
        ({"labels": {"0": "background", "1": "spleen"}}, "3 masks of 13 x 17; (?s:.)*names 1 structures"),
        ({"test": [{"image": "image/a.png"}]}, "1 problems, 1 images can be read:(?s:.)*image/a.png: no such file"),
    ):
        (home / "dataset.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=message):
            list(read_imed_361m(home, texts={}))


def mmr(path: Path, images: Path, truth: list[np.ndarray]) -> dict[str, Any]:
    """A file of MMR about one image, with questions about two masks, one and none."""
    save(images / "train2017" / "a.png", picture(0))
    parts = [{"segmentation": mask_to_rle(mask), "bbox": [0, 0, 1, 1]} for mask in truth]
    entry = {
        "file_name": "train2017/a.png",
        "height": 13,
        "width": 17,
        "questions": ["Which two?", "Which one?", "Which none?"],
        "answers": [parts[:2], parts[2:], []],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([entry]))
    return entry


def test_mmr(tmp_path):
    truth, path = masks(3), tmp_path / "MMR_test_mixed.json"
    entry = mmr(path, tmp_path / "images", truth)
    assert main(["data", "convert", "mmr", str(path), str(tmp_path / "images"), str(tmp_path / "out")]) == 0
    rows = [dict(row) for row in map(dict, load_folder(tmp_path / "out", "test_mixed"))]
    assert [row["query"] for row in rows] == entry["questions"]
    for row, mask in zip(rows, (truth[0] | truth[1], truth[2], np.zeros((13, 17), dtype=bool)), strict=True):
        assert np.array_equal(np.asarray(row["mask"]) > 0, mask)
    each = list(read_mmr(path, tmp_path / "images", texts={}, masks="each"))
    assert [row.texts["query"] for row in each] == [entry["questions"][n] for n in (0, 0, 1)]
    assert all(np.array_equal(row.mask, mask) for row, mask in zip(each, truth, strict=True))
    assert [row.texts["name"].partition("#")[2] for row in each] == ["0#0", "0#1", "1#0"]
    with pytest.raises(UnknownNameError, match="masks 'eech'; did you mean 'each'"):
        list(read_mmr(path, tmp_path / "images", texts={}, masks="eech"))
    for change, message in (
        ({"file_name": "b.png"}, "image b.png: no such file in"),
        ({"questions": ["Which?"]}, "1 questions, 3 answers"),
        ({"height": 14}, "13 x 17|13.*14|14"),
        ({"answers": [[{}], [], []]}, "not a list of objects with a segmentation"),
    ):
        path.write_text(json.dumps([{**entry, **change}, {"height": 1}]))
        with pytest.raises(DataError, match=rf"problems, expected none:(?s:.)*{message}(?s:.)*image 1: no file_name"):
            list(read_mmr(path, tmp_path / "images", texts={}))


def test_benchmarks_are_checked_and_evaluated_as_downloaded(tmp_path, capsys):
    """The same scores as of the converted folder, and of it again."""
    pytest.importorskip("cv2")
    home = tmp_path / "ReasonSeg"
    reasonseg(home)
    assert main(["data", "check", str(home), "--benchmark", "reasonseg"]) == 0
    out = capsys.readouterr().out
    assert f"{home}: all 3 rows can be read" in out
    assert "Where is it?" in out
    assert main(["data", "convert", "reasonseg", str(home), str(tmp_path / "data")]) == 0
    split = "test"
    for row in map(dict, load_folder(tmp_path / "data", split)):
        save(tmp_path / "theirs" / f"{Path(row['name']).stem}.png", np.roll(np.asarray(row["mask"]), 1, axis=0))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--split", split]
    scores = []
    for n, (data, more) in enumerate(
        (
            (home, ["--benchmark", "reasonseg"]),
            (tmp_path / "data", ["--benchmark", "reasonseg"]),
            (tmp_path / "data", ["--conventions", "lisa", "vision_reasoner"]),
        )
    ):
        assert main([*argv, "--data", str(data), "--output_dir", str(tmp_path / f"out{n}"), *more]) == 0
        found = json.loads((tmp_path / f"out{n}" / "results.json").read_text())
        scores.append(found["conventions"]["conventions"])
    assert scores[0] == scores[1] == scores[2]
    assert set(scores[0]) == {"lisa", "vision_reasoner"}
    capsys.readouterr()
    assert main([*argv, "--data", str(home), "--benchmark", "reasonsegg"]) == 2
    assert "benchmark 'reasonsegg'; did you mean 'reasonseg'" in capsys.readouterr().err
    assert main([*argv, "--data", str(home), "--benchmark", "m3d_seg"]) == 2
    assert "no data set of M3D-Seg; expected 0012/0012.json" in capsys.readouterr().err
    for command in (["data", "check"], [*argv, "--data"]):
        assert main([*command, str(tmp_path / "nothing"), "--benchmark", "reasonseg"]) == 2
        assert "nothing: no such folder. reasonseg: github.com/dvlab-research/LISA" in capsys.readouterr().err
    for name in ("../nothing_there", "nothing/there"):  # the second could be a data set on the hub
        for command in (["data", "check"], [*argv, "--data"]):
            assert main([*command, name, "--benchmark", "reasonseg"]) == 2
            error = capsys.readouterr().err
            assert f"{name}: no such folder. reasonseg: github.com/dvlab-research/LISA, which links to it; for" in error
            assert "nothing is downloaded here" in error
    (home / "train" / "a.json").unlink()
    assert main(["data", "check", str(home), "--benchmark", "reasonseg"]) == 2
    error = capsys.readouterr().err
    assert "a.jpg: no .json beside it" in error
    assert "reasonseg: github.com/dvlab-research/LISA, which links to it; for research; nothing is downloaded" in error


def test_the_list_of_benchmarks(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert f"{name}: {benchmark.what}" in out
        assert set(benchmark.conventions) <= set(CONVENTIONS)
        words = benchmark.command.split()
        if words[:3] == ["segrl", "data", "convert"]:  # a command that there is
            with pytest.raises(SystemExit) as stopped:
                main(["data", "convert", words[3], "--help"])
            assert stopped.value.code == 0
            shown = capsys.readouterr().out
            assert all(word in shown for word in words if word.startswith("--"))
    assert "Nothing is downloaded here" in out
    assert main(["data", "list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(BENCHMARKS)
