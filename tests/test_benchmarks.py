"""Benchmarks read as they are downloaded: as `segrl data convert` reads the same files, and what can be missing."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from scipy import sparse
from test_data_volumes_m3d_seg import LABELS, SHAPE, write_case
from test_formats import grey, masks, mmr, refcoco, sa_med2d, save

from segrl.cli.main import main
from segrl.data import load_folder, make_synthetic
from segrl.data.benchmarks import BENCHMARKS, benchmark_folder
from segrl.data.formats import read_medsegbench_folder
from segrl.errors import DataError

LISTS = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p", "grefcoco": "grefs(unc).json"}
COCO = Path("images", "mscoco", "images")


def refer(home: Path, name: str) -> list[list[str]]:
    """One of REFER's data sets in its folder, with COCO's images beside it; returns what converts it."""
    images = home / COCO / "train2014"
    refs = refcoco(home / name, images=images)
    (home / name / "grefs(unc).json").unlink()
    of_kind = refs if name == "grefcoco" else [ref for ref in refs if ref["ann_id"] in ([1], 3)]
    path = home / name / LISTS[name]
    path.write_bytes(json.dumps(refs).encode() if path.suffix == ".json" else pickle.dumps(of_kind, protocol=2))
    return [["refcoco", str(path), str(home / name / "instances.json"), str(images)]]


def mmr_files(home: Path) -> list[list[str]]:
    names = ("train", "val", "test_mixed", "test_obj_only", "test_part_only")
    images = home / "refer_seg" / COCO
    for seed, name in enumerate(names):
        mmr(home / "MMR" / f"MMR_{name}.json", images, masks(3, seed))
    return [["mmr", str(home / "MMR" / f"MMR_{name}.json"), str(images)] for name in names]


def medsegbench(home: Path) -> list[list[str]]:
    """A binary set in two sizes, and one with two values."""
    rng = np.random.default_rng(0)
    home.mkdir(parents=True)
    for name, high in (("kvasir_128", 2), ("kvasir_256", 2), ("wbc_512", 3)):
        arrays = {}
        for split in ("train", "val", "test"):
            arrays[f"{split}_images"] = rng.integers(0, 255, (2, 8, 9, 3), dtype=np.uint8)
            arrays[f"{split}_label"] = rng.integers(0, high, (2, 8, 9)).astype(np.uint8)
        np.savez(home / f"{name}.npz", **arrays)
    return [
        ["medsegbench", str(home / "kvasir_256.npz"), "--lesion", "polyp", "--modality", "Endoscopy"],
        ["medsegbench", str(home / "wbc_512.npz"), "--labels", "1=cytoplasm", "2=nucleus", "--modality", "Microscopy"],
    ]


def sa_med2d_files(home: Path) -> list[list[str]]:
    sa_med2d(home / "SAMed2Dv1", masks(9))
    return [["sa_med2d", str(home / "SAMed2Dv1"), "--test_fraction", "0.2"]]


def umrg(home: Path, *, parquet: bool = False) -> list[list[str]]:
    names = {"query": "question", "lesion": "category"}
    rows = make_synthetic(3, size=32).rename_columns(names).add_column("think", ["It is round."] * 3)  # type: ignore[call-arg]
    splits = DatasetDict({"train": rows.select([0, 1]), "test": rows.select([2])})
    if parquet:
        home.mkdir(parents=True)
        for split, part in splits.items():
            part.to_parquet(home / f"{split}-00000-of-00001.parquet")
    else:
        splits.save_to_disk(home)
    return [["hf", str(home), "--columns", "question=query", "think=reasoning"]]


def mmr_masks(home: Path) -> list[list[str]]:
    return [[*command, "--masks", "each"] for command in mmr_files(home)]


DOWNLOADS: dict[str, tuple[str, Callable[[Path], list[list[str]]]]] = {
    **{name: (name, lambda home, name=name: refer(home, name)) for name in LISTS},
    "mmr": ("mmr", mmr_files),
    "mmr_masks": ("mmr_masks", mmr_masks),
    "medsegbench": ("medsegbench", medsegbench),
    "sa_med2d_20m": ("sa_med2d_20m", sa_med2d_files),
    "u_mrg_14k on disk": ("u_mrg_14k", umrg),
    "comlesion_14k as parquet": ("comlesion_14k", lambda home: umrg(home, parquet=True)),
}


def rows_of(folder: Any) -> dict[tuple[str, ...], list[Any]]:
    """Masks of a folder by split, image, lesion or query (built queries vary with the name), and reasoning."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for row in map(dict, load_folder(folder)):
        name = re.sub(r"^(kvasir|wbc)_", "", Path(row["name"]).stem)
        key = (row["split"], name, row["lesion"] or row["query"], row.get("reasoning") or "")
        found.setdefault(key, []).append((np.asarray(row["mask"]) > 0).tolist())
    return found


@pytest.mark.filterwarnings("ignore:.*images? are in the splits")  # one image is enough for every split
@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_download_is_read_as_convert_reads_its_files(kind, tmp_path, capsys, monkeypatch):
    name, make = DOWNLOADS[kind]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    commands = make(tmp_path / "download")
    assert main(["data", "check", str(tmp_path / "download"), "--benchmark", name]) == 0
    assert "rows can be read" in capsys.readouterr().out
    expected: dict[tuple[str, ...], list[Any]] = {}
    for number, (layout, *more) in enumerate(commands):
        first = next((n for n, word in enumerate(more) if word.startswith("--")), len(more))
        argv = [layout, *more[:first], str(tmp_path / f"out{number}"), *more[first:]]
        assert main(["data", "convert", *argv]) == 0
        for key, found in rows_of(tmp_path / f"out{number}").items():
            expected.setdefault(key, []).extend(found)
    with benchmark_folder(name, tmp_path / "download") as folder:
        found = rows_of(folder)
    assert found == expected


def test_structures_in_arrays_of_their_own(tmp_path):
    rng, names = np.random.default_rng(0), ("microaneurysm", "hemorrhage", "hard exudate", "optic disc")
    arrays = {"test_images": rng.integers(0, 255, (2, 8, 9, 3), dtype=np.uint8)}
    arrays |= {f"test_label_C{n}": rng.integers(0, 2, (2, 8, 9)).astype(np.uint8) for n in (1, 2, 3, 4)}
    np.savez(tmp_path / "idrib_512.npz", **arrays)  # type: ignore[arg-type]
    rows = list(read_medsegbench_folder(tmp_path, texts={}))
    assert [row.texts["lesion"] for row in rows] == [name for name in names for _ in range(2)]
    for number, row in enumerate(rows):
        assert np.array_equal(row.mask, arrays[f"test_label_C{1 + number // 2}"][number % 2] > 0)
        assert row.name == f"idrib_test_0000{number % 2}"


@pytest.mark.parametrize("name", ["refcoco", "grefcoco"])
def test_a_split_by_its_published_name(name, tmp_path, capsys):
    refer(tmp_path / "refer_seg", name)
    path = tmp_path / "refer_seg" / name / LISTS[name]
    refs = json.loads(path.read_text()) if path.suffix == ".json" else pickle.loads(path.read_bytes())
    refs[-1]["split"] = "testB"
    path.write_bytes(json.dumps(refs).encode() if path.suffix == ".json" else pickle.dumps(refs))
    with benchmark_folder(name, tmp_path, "testB") as folder:
        (key,) = rows_of(folder)
    assert key[0] == "testB"
    save(tmp_path / "theirs" / "x.png", grey(np.eye(10, 12, dtype=bool)))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(tmp_path), "--benchmark", name]
    assert main([*argv, "--split", "testB", "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["conventions"]["conventions"]
    assert set(found) == set(BENCHMARKS[name].conventions)
    capsys.readouterr()
    assert main([*argv, "--split", "testC", "--output_dir", str(tmp_path / "other")]) == 2
    assert re.search(r"split of \S+ 'testC'.*testB", capsys.readouterr().err)


def test_columns_of_the_published_loader(tmp_path):
    """Lists of one image, and a question in a message."""
    rows = make_synthetic(2, size=32)
    nested = {
        "images": [[row["image"]] for row in map(dict, rows)],
        "masks": [[row["mask"]] for row in map(dict, rows)],
        "prompt": [[{"role": "user", "content": f"Where, if at all, is {n}?"}] for n in range(2)],
    }
    DatasetDict({"test": Dataset.from_dict(nested)}).save_to_disk(tmp_path / "verl")
    with benchmark_folder("u_mrg_14k", tmp_path / "verl") as folder:
        found = load_folder(folder, "test")
        assert found["query"][:] == [f"Where, if at all, is {n}?" for n in range(2)]
        for row, theirs in zip(map(dict, found), map(dict, rows), strict=True):
            assert np.array_equal(np.asarray(row["mask"]) > 0, np.asarray(theirs["mask"]) > 0)
    nested["images"][1] *= 2
    DatasetDict({"test": Dataset.from_dict(nested)}).save_to_disk(tmp_path / "two")
    message = r"image of .*split test, row 1: 2 images, expected one"
    with pytest.raises(DataError, match=message), benchmark_folder("u_mrg_14k", tmp_path / "two"):
        pass


def other_columns(home: Path) -> None:
    umrg(home / "as it is")
    rows = DatasetDict.load_from_disk(home / "as it is").rename_columns({"mask": "gt", "question": "words"})
    rows.save_to_disk(home)
    shutil.rmtree(home / "as it is")


def without(make: Callable[[Path], Any], *parts: str) -> Callable[[Path], None]:
    def made(home: Path) -> None:
        make(home)
        for part in parts:
            path = home / part
            assert path.exists(), part
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return made


def renamed(make: Callable[[Path], Any], part: str, name: str) -> Callable[[Path], None]:
    def made(home: Path) -> None:
        make(home)
        (home / part).rename(home / name)

    return made


REFCOCOG = DOWNLOADS["refcocog"][1]
IMAGES = str(COCO / "train2014")
WRONG: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "another division": (
        "refcocog",
        renamed(REFCOCOG, "refcocog/refs(umd).p", "refcocog/refs(google).p"),
        r"no refs\(umd\)\.p, the division that is reported, only refs\(google\)\.p",
    ),
    "no instances": (
        "refcoco",
        without(DOWNLOADS["refcoco"][1], "refcoco/instances.json"),
        r"instances\.json: cannot be",
    ),
    "no folder of images": (
        "refcoco+",
        without(DOWNLOADS["refcoco+"][1], IMAGES),
        r"no folder train2014 with COCO's images in .*get it from cocodataset\.org, and move or link it: ln -s",
    ),
    "no images": (
        "grefcoco",
        without(DOWNLOADS["grefcoco"][1], f"{IMAGES}/x.jpg"),
        r"1 problems, expected none:(?s:.)*ref 1: x\.jpg: no such file in .*train2014",
    ),
    "another data set": ("refcoco+", DOWNLOADS["refcoco"][1], r"no refs\(unc\)\.p in it, in refcoco\+ or in refer_seg"),
    "no images of MMR": (
        "mmr",
        without(mmr_files, f"refer_seg/{COCO}/train2017"),
        "no folder train2017 or val2017 with COCO's",
    ),
    "an unknown set": (
        "medsegbench",
        renamed(medsegbench, "kvasir_256.npz", "mine_256.npz"),
        r"1 files cannot be read; move them(?s:.)*mine_256\.npz: no set of MedSegBench",
    ),
    "a set without a name": (
        "medsegbench",
        renamed(medsegbench, "kvasir_256.npz", "covidquex_256.npz"),
        r"covidquex_256\.npz: nothing says what its masks show",
    ),
    "other columns": (
        "u_mrg_14k",
        other_columns,
        r"no column for mask, only \['image', 'gt'.*pass --columns(?s:.)*another layout: segrl data convert hf",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_download_lacks(kind, tmp_path):
    name, make, message = WRONG[kind]
    make(tmp_path / "download")
    with pytest.raises(DataError, match=message) as caught, benchmark_folder(name, tmp_path / "download"):
        pass
    assert f"{name}: {BENCHMARKS[name].place}" in str(caught.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_empty_folder(name, tmp_path):
    if name == "reasonseg":
        pytest.importorskip("cv2")
    with (
        pytest.raises(DataError, match=re.escape(f"{name}: {BENCHMARKS[name].place}")),
        benchmark_folder(name, tmp_path),
    ):
        pass


def test_the_folder_of_one_data_set_is_not_another(tmp_path):
    refer(tmp_path, "refcoco")
    message = "refcoco: is the folder of refcoco; read it as refcoco"
    with pytest.raises(DataError, match=message), benchmark_folder("refcoco+", tmp_path / "refcoco"):
        pass
    with benchmark_folder("refcoco", tmp_path / "refcoco") as folder:
        assert len(load_folder(folder, "train")) == 2
    refer(tmp_path / "refcoco", "refcoco+")  # a folder of all of them that is called so
    with benchmark_folder("refcoco+", tmp_path / "refcoco") as folder:
        assert len(load_folder(folder, "train")) == 2


@pytest.mark.parametrize("place", ["refcoco/train2014", "images/train2014", "coco/train2014", "train2014"])
def test_other_places_of_coco(place, tmp_path):
    refer(tmp_path, "refcoco")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / COCO / "train2014", tmp_path / place)
    with benchmark_folder("refcoco", tmp_path) as folder:
        assert len(load_folder(folder, "train")) == 2


def test_masks_of_mmr_in_files_of_their_own(tmp_path, capsys):
    """Scored as MMR scores them, one by one."""
    mmr_files(tmp_path)
    argv = ["--data", str(tmp_path / "MMR"), "--benchmark", "mmr_masks", "--split", "test_mixed"]
    with benchmark_folder("mmr_masks", tmp_path / "MMR", "test_mixed") as folder:
        for number, row in enumerate(map(dict, load_folder(folder))):
            save(tmp_path / "theirs" / f"{row['name']}.png", np.roll(np.asarray(row["mask"]), number, axis=0))
    assert main(["eval", "--predictions", str(tmp_path / "theirs"), *argv]) == 0
    found = json.loads((tmp_path / "theirs_evaluation" / "results.json").read_text())["conventions"]
    truth = masks(3, 2)
    pairs = [(mask, np.roll(mask, number, axis=0)) for number, mask in enumerate(truth)]
    ious = [(one & other).sum() / (one | other).sum() for one, other in pairs]
    assert found["conventions"]["mmr"]["scores"]["giou"] == pytest.approx(np.mean(ious), abs=1e-4)
    assert set(found["conventions"]) == {"mmr"}


def m3d_seg(home: Path) -> None:
    """Two data sets, with three cases of which one shows nothing."""
    for code, labels in (("0012", LABELS), ("0001", {"0": "background", "1": "tooth", "2": "jaw", "3": "gum"})):
        one, two, three = (write_case(home / code / f"case {n}", c) for n, c in ((1, [1, 3]), (2, [1]), (3, [])))
        for number, (image, _) in enumerate((one, two, three)):  # those of the builder are equal
            path = home / code / image
            np.save(path, np.load(path) + number + int(code))
        splits = {"train": [one, three], "test": [two]}
        listed = {
            split: [{"image": image, "label": label} for image, label in cases] for split, cases in splits.items()
        }
        (home / code / f"{code}.json").write_text(json.dumps({"labels": labels, **listed}))


@pytest.mark.parametrize("part", ["", "0012", "0012/case 1/image.npy"])
def test_m3d_seg(part, tmp_path, capsys):
    """Checked and evaluated where it is: all data sets of a folder, or one, with a mask file for each row."""
    home = tmp_path / "M3D_Seg"
    m3d_seg(home)
    if part.endswith(".npy"):
        (home / part).unlink()
        assert main(["data", "check", str(home), "--benchmark", "m3d_seg"]) == 2
        error = capsys.readouterr().err
        assert "2 problems in 4 rows, expected none:" in error
        assert len(re.findall(r"0012/case 1/\w+\): \S+0012/case 1/image.npy", error)) == 2
        return
    several = not part
    assert main(["data", "check", str(home / part), "--benchmark", "m3d_seg", "--sheet", str(tmp_path / "s.png")]) == 0
    out = capsys.readouterr().out
    assert f"train: {4 if several else 2} rows about {2 if several else 1} volumes" in out
    assert "1 liver" in out
    assert ("1 tooth" in out) == several
    expected = {"0012/case 2/liver", *(["0001/case 2/tooth"] if several else [])}
    with benchmark_folder("m3d_seg", home / part, "test") as folder:
        (rows,) = DatasetDict.load_from_disk(folder).values()
        assert set(rows["name"]) == expected
        for row in map(dict, rows):
            label = sparse.load_npz(row["label"]).toarray()[int(row["label_value"]) - 1].reshape(SHAPE)
            (tmp_path / "theirs" / row["name"]).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "theirs" / f"{row['name']}.npy", label.astype(np.uint8))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(home / part), "--benchmark", "m3d_seg"]
    assert main(argv) == 0
    model = json.loads((tmp_path / "theirs_evaluation" / "results.json").read_text())["model"]
    assert (model["n"], model["mdice"]) == (len(expected), 1)
    assert main([*argv, "--split", "tset", "--output_dir", str(tmp_path / "x")]) == 2
    assert "'tset'; did you mean 'test'" in capsys.readouterr().err


def test_every_choice_is_listed(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert f"as downloaded: --benchmark {name}" in out
        assert benchmark.default in out
