"""Sources of a build read into cases, and the settings file."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from segrl.curation import Case, CurationSettings, SourceSettings, load_sources, read_cases, write_cases
from segrl.data import write_manifest
from segrl.errors import DataError
from segrl.geometry.mask_images import read_mask_file


def write_set(folder: Path, count: int = 20, **columns: Any) -> Path:
    """Write images with one square lesion each, and a manifest; a column is a text or a function of the number."""
    rows = []
    for number in range(count):
        rng = np.random.default_rng(number)
        mask = np.zeros((24, 20), dtype=np.uint8)
        mask[2 + number % 15 :, 4:9] = 255
        image = rng.integers(0, 99, (24, 20), dtype=np.uint8) + mask // 2
        for part, pixels in (("images", image), ("masks", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / part / f"p{number // 2}_{number}.png")
        files = {part[:-1]: f"{part}/p{number // 2}_{number}.png" for part in ("images", "masks")}
        texts = {"lesion": "cyst", "modality": "CT", **columns}
        rows.append({**files, **{key: text(number) if callable(text) else text for key, text in texts.items()}})
    write_manifest(folder, rows)
    return folder


def load(build: Path, path: Path, **settings: Any) -> list[Case]:
    build.mkdir(exist_ok=True)
    return load_sources((SourceSettings(**{"path": path, "licence": "CC0-1.0", **settings}),), build).cases


def test_a_folder_becomes_cases(tmp_path):
    home = write_set(tmp_path / "mine", source=lambda number: "a" if number < 20 else "b", count=40, split="train")
    cases = load(tmp_path / "build", home, licence={"a": "CC0-1.0", "b": "MIT"}, patients=r"(?<=/)p\d+", anatomy="Lung")
    assert len({case.id for case in cases}) == 40
    first, last = cases[0], cases[-1]
    assert (first.source, first.licence, last.source, last.licence) == ("a", "CC0-1.0", "b", "MIT")
    assert (first.patient, first.modality, first.anatomy, first.lesion) == ("p0", "CT", "Lung", "cyst")
    assert first.image == home / "images/p0_0.png"
    assert first.split == "train"


def test_ids_are_those_of_the_content(tmp_path):
    cases = load(tmp_path / "build", write_set(tmp_path / "mine"))
    for part in ("images", "masks"):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for number, path in enumerate(sorted((tmp_path / "mine" / part).iterdir())):
            Image.open(path).save(tmp_path / "pairs" / part / f"{number:02d}.bmp")
    again = load(tmp_path / "other", tmp_path / "pairs", format="pairs", lesion="Cyst", modality="MRI")
    assert {case.id for case in again} == {case.id for case in cases}
    named = load(tmp_path / "third", tmp_path / "mine", lesion="abscess")
    assert not {case.id for case in named} & {case.id for case in cases}


def test_what_is_left_out_is_listed(tmp_path):
    home = write_set(tmp_path / "mine", count=22)
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(home / "masks/p0_0.png")
    for part in ("images", "masks"):
        (home / part / "p10_21.png").write_bytes((home / part / "p0_1.png").read_bytes())
    (tmp_path / "build").mkdir()
    found = load_sources((SourceSettings(path=home, licence="MIT"),), tmp_path / "build")
    assert found.left_out == {
        "empty mask": ["mine: images/p0_0.png"],
        "same image, mask and lesion as an earlier row": ["mine: images/p10_21.png"],
    }
    assert len(found.cases) == 20


def write_scans(home: Path, count: int = 8) -> Path:
    rows = []
    for number in range(count):
        label = np.zeros((10, 12, 14), dtype=np.uint8)  # x, y, z
        label[2:5, 3:7, 4:12] = 1
        scan = np.random.default_rng(number).normal(40, 10, label.shape) + 60 * label
        for part, voxels in (("images", scan.astype(np.float32)), ("labels", label)):
            (home / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 3, 1])), home / part / f"s{number}.nii.gz")  # type: ignore[attr-defined]
        files = {"image": f"images/s{number}.nii.gz", "label": f"labels/s{number}.nii.gz"}
        rows.append({**files, "lesion": "tumour", "modality": "MRI"})
    write_manifest(home, rows)
    return home


def test_scans_become_slices_with_their_position(tmp_path):
    cases = load(tmp_path / "build", write_scans(tmp_path / "scans"))
    assert len(cases) == 24
    assert {(case.volume, case.slice, case.patient) for case in cases[:3]} == {
        ("s0.nii.gz", number, "s0") for number in (4, 8, 11)
    }
    assert all(read_mask_file(case.mask).sum() == 12 for case in cases)
    assert cases[0].image.is_relative_to(tmp_path / "build/sources/scans")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*")}
    assert load(tmp_path / "build", tmp_path / "scans") == cases
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*")} == before


def test_scans_of_one_name_stay_apart(tmp_path):
    home, rows = write_scans(tmp_path / "scans"), []
    for number in range(8):
        files = {"image": f"case{number}/scan.nii.gz", "label": f"case{number}/label.nii.gz"}
        (home / f"case{number}").mkdir()
        for part, path in files.items():
            (home / f"{part}s/s{number}.nii.gz").rename(home / path)
        rows.append({**files, "lesion": "tumour", "modality": "MRI"})
    write_manifest(home, rows)
    cases = load(tmp_path / "build", home)
    assert list(dict.fromkeys(case.patient for case in cases)) == ["scan", *(f"scan_{n}" for n in range(1, 8))]
    assert len({case.image.read_bytes() for case in cases}) == 24


def test_merged_masks_of_names_that_look_alike_stay_apart(tmp_path):
    home = write_set(tmp_path / "mine")
    rows = list(csv.DictReader((home / "manifest.csv").read_text().splitlines()))
    for row in rows:
        number = int(row["image"].split("_")[1].removesuffix(".png"))
        extra = np.zeros((24, 20), np.uint8)
        extra[0, number] = 255
        Image.fromarray(extra).save(home / f"masks/extra{number}.png")
        row["mask"] += f";masks/extra{number}.png"
        row["name"] = "a b" if number == 0 else "a_b" if number == 1 else str(number)
    write_manifest(home, rows)
    cases = load(tmp_path / "build", home)
    for number, case in enumerate(cases):
        assert np.flatnonzero(read_mask_file(case.mask)[0]).tolist() == [number], case.name


def test_half_a_conversion_is_made_again(tmp_path):
    half = tmp_path / "build/sources/.scans.partial"
    half.mkdir(parents=True)
    (half / "manifest.csv").write_text("image,mask\n")
    assert len(load(tmp_path / "build", write_scans(tmp_path / "scans"))) == 24
    assert not half.exists()


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"count": 19}, {}, "the source 'mine' has 19 images with a lesion; expected 20 or more"),
        ({"patient": "7"}, {}, "all 20 images of the source 'mine' are of one patient '7'"),
        ({"modality": lambda n: "CT" if n < 15 else "MRI"}, {}, "'mine' has several modalities (15 CT, 5 MRI)"),
        ({"source": "b"}, {"licence": {"a": "MIT"}}, "the source 'b' has no licence; name it"),
        ({"lesion": "", "query": "Where?"}, {}, "no lesion; add it to the source"),
        ({"modality": ""}, {}, "no modality; add it to the source"),
        ({}, {"patients": "no such"}, "patients='no such' is not found in the name"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_used_is_refused(tmp_path, columns, settings, message):
    home = write_set(tmp_path / "mine", **columns)
    with pytest.raises(DataError, match=re.escape(message)):
        load(tmp_path / "build", home, **settings)


@pytest.mark.filterwarnings("ignore:.*all 20 masks of the data set are empty")
def test_masks_that_are_all_empty_are_refused(tmp_path):
    home = write_set(tmp_path / "mine")
    for path in (home / "masks").iterdir():
        Image.fromarray(np.zeros((24, 20), np.uint8)).save(path)
    with pytest.raises(DataError, match="none of 20 rows is left: all masks are empty"):
        load(tmp_path / "build", home)


def test_no_masks_are_refused(tmp_path):
    (tmp_path / "only/images").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "only/images/a.png")
    with pytest.raises(DataError, match="1 files have no partner"):
        load(tmp_path / "build", tmp_path / "only", format="pairs", lesion="cyst", modality="CT")


def test_two_sources_of_one_name_are_refused(tmp_path):
    source = SourceSettings(path=tmp_path / "mine", licence="MIT")
    for names in (("mine", "Mine"), ("a b", "a_b")):  # the folder of what is converted is one
        with pytest.raises(DataError, match="names occur twice"):
            load_sources(tuple(replace(source, name=name) for name in names), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("3", "the file holds 3; expected keys and values"),
        ("source: []", "unknown key 'source'; did you mean 'sources'?"),
        ("{}", "no sources; add it"),
        ("sources: []", "sources: expected at least one"),
        ("sources: [{path: a}]", "sources[0]: no licence; add it"),
        ("sources: [{path: a, licence: ''}]", "sources[0]: licence of a is empty"),
        ("sources: [{path: a, licence: 3}]", "sources[0].licence=3; expected a text or keys and values"),
        ("sources: [{path: a, licence: b, slices: 1e0}]", "sources[0].slices='1e0'; expected a whole number"),
        ("sources: [{path: a, licence: b, slices: 0}]", "sources[0]: slices=0; expected 1 or more"),
        ("sources: [{path: a, licence: b, format: pair}]", "unknown sources[0].format 'pair'; did you mean 'pairs'?"),
        ("sources: [{path: a, licence: b, patients: '('}]", "no regular expression"),
        ("sources: [{path: a, licence: b, format: coco}]", "images, the folder of the images"),
    ],
)
def test_a_wrong_settings_file_names_file_and_key(tmp_path, text, message):
    (tmp_path / "curate.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        CurationSettings.read(tmp_path / "curate.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'curate.yaml'}: ")


def test_paths_are_relative_to_the_settings_file(tmp_path, monkeypatch):
    (tmp_path / "curate.yaml").write_text("sources: [{path: mine, licence: MIT}, {path: /b, licence: {c: MIT}}]")
    monkeypatch.chdir(tmp_path)
    first, second = CurationSettings.read("curate.yaml").sources
    assert (first.path, second.path, second.licence) == (tmp_path / "mine", Path("/b"), {"c": "MIT"})


def test_cases_are_read_as_they_were_written(tmp_path):
    cases = load(tmp_path, write_set(tmp_path / "mine"))
    write_cases(tmp_path / "cases.jsonl", cases)
    assert read_cases(tmp_path / "cases.jsonl") == cases
    assert json.loads((tmp_path / "cases.jsonl").read_text().splitlines()[0])["image"] == "mine/images/p0_0.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lesson": "cyst"}, "unknown key 'lesson'; did you mean 'lesion'?"),
        ({"lesion": None}, "lesion=None; expected a text"),
        ({"difficulty": "0.5"}, "difficulty='0.5'; expected a number, or null"),
        ({"difficulty": float("nan")}, "difficulty=nan; expected a number, or null"),
        ({"slice": 1.5}, "slice=1.5; expected a whole number, or null"),
    ],
)
def test_a_damaged_line_of_cases_is_named(tmp_path, change, message):
    write_cases(tmp_path / "cases.jsonl", [Case("00", Path("a"), Path("b"), "s", "", "CT", "", "cyst", "MIT")])
    row = json.loads((tmp_path / "cases.jsonl").read_text())
    (tmp_path / "cases.jsonl").write_text(json.dumps({**row, **change}))
    with pytest.raises(DataError, match=re.escape(f"cases.jsonl, line 1: {message}")):
        read_cases(tmp_path / "cases.jsonl")


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    case = Case("00", Path("a"), Path("b"), "s", "", "CT", "", "cyst", "MIT")
    write_cases(tmp_path / "cases.jsonl", [case, case])
    with pytest.raises(DataError, match="line 2: id '00' occurs twice"):
        read_cases(tmp_path / "cases.jsonl")
