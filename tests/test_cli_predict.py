"""`segrl predict`: what is found, refused, written and printed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from builders import add_head, tiny_model, tiny_segmenter
from dicom_builders import file_of, write, write_series
from PIL import Image
from pycocotools.coco import COCO

from segrl.cli.main import main
from segrl.data import make_synthetic, read_volume, write_folder
from segrl.data.input_files import find_inputs
from segrl.errors import DataError
from segrl.geometry import read_mask_file
from segrl.inference import ReasoningSegmenter, VolumeSegmenter
from segrl.models import seg_token_id
from segrl.predictions import ImagePromptSettings, VolumePromptSettings

ASK = "Where is the cyst?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    model, processor = tiny_model("qwen2_5_vl")
    model = add_head(model, processor)
    model.generation_config.sequence_bias = [[[seg_token_id(processor)], 9.0]]  # a random model that writes `<seg>`
    model.generation_config.no_repeat_ngram_size = 1  # once
    settings = ImagePromptSettings(instruction="Answer.", max_new_tokens=6)
    ReasoningSegmenter(model.eval(), processor, settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def volume_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    model, processor = tiny_model("qwen3_vl")
    settings = VolumePromptSettings(slices=3, size=32, instruction="Answer.", max_new_tokens=4)
    VolumeSegmenter(model.eval(), processor, settings, tiny_segmenter()).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Five images: PNG, 16-bit PNG and TIFF, DICOM, one pixel; and a text."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "a.png")
    deep = rng.integers(0, 60000, (30, 44), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "b.png")
    Image.fromarray(deep).save(folder / "c.tiff")
    shutil.copy(file_of("CT_small.dcm"), folder / "d.dcm")
    Image.new("L", (1, 1)).save(folder / "e.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def load(path) -> Any:
    return nib.load(path)  # type: ignore[attr-defined]


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().split("\n")[:-1]]


def done(*words, status=0):
    assert main(["predict", *map(str, words), "--device", "cpu"]) == status


def refused(capsys, *words):
    done(*words, status=2)
    error = capsys.readouterr().err
    assert error.startswith("segrl: error: ")
    assert error.count("\n") == 1
    return error


class TestImages:
    def test_a_folder_of_everything(self, run, images, capsys):
        done(run, images, ASK, "-o", "out", "--samples", 2, "--coco", "out/coco.json")
        printed = capsys.readouterr()
        assert "1 files that are no images are left out" in printed.err
        assert printed.out.splitlines()[-1] == "Written to out: predictions.jsonl"
        found = lines("out")
        assert [Path(line["input"]).name for line in found] == ["a.png", "b.png", "c.tiff", "d.dcm", "e.jpg"]
        assert [line["size"] for line in found] == [[50, 40], [44, 30], [44, 30], [128, 128], [1, 1]]
        assert [line["intensity"] for line in found][::3] == ["", "window:-160:240"]
        assert all(line["confidence"]["samples"] == 2 and line["query"] == ASK for line in found)
        coco = COCO("out/coco.json")
        assert [entry["file_name"] for entry in coco.loadImgs(coco.getImgIds())] == [line["input"] for line in found]
        for line in found:
            with Image.open(line["overlay"]) as overlay:
                assert max(overlay.size) >= 256 or max(line["size"]) >= 256
            assert read_mask_file(line["mask"]).shape == tuple(line["size"][::-1])
            assert read_mask_file(line["mask"]).sum() == line["foreground"]

    def test_one_input_is_printed_in_full_and_equals_the_api(self, run, images, capsys):
        done(run, images / "a.png", ASK, "-o", "out", "--json")
        (printed,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert [printed] == lines("out")
        expected = ReasoningSegmenter.from_pretrained(run, device="cpu").predict(images / "a.png", ASK)
        assert (printed["text"], printed["status"]) == (expected.text, expected.status.value)
        done(run, images / "a.png", ASK, "-o", "out")
        assert f"query        {ASK}" in capsys.readouterr().out

    def test_patterns_and_equal_names(self, run, images, capsys):
        (images / "deep").mkdir()
        shutil.copy(images / "a.png", images / "deep" / "a.png")
        done(run, "in/**/a.png", "in/a.png", ASK, "-o", "out", "--no_overlay")
        found = lines("out")
        assert [line["input"] for line in found] == ["in/a.png", "in/deep/a.png"]
        assert "overlay" not in found[0]
        assert found[0]["text"] == found[1]["text"]
        assert [line["mask"] for line in found] == ["out/a_mask.png", "out/a_1_mask.png"]

    def test_answers_that_are_there_are_left_alone(self, run, images, capsys):
        done(run, "in/a.png", ASK, "-o", "out")
        before = (Path("out") / "a_overlay.png").stat().st_mtime_ns
        done(run, "in/a.png", "in/b.png", ASK, "-o", "out", "--no_overwrite")
        assert [line["input"] for line in lines("out")] == ["in/a.png", "in/b.png"]
        assert (Path("out") / "a_overlay.png").stat().st_mtime_ns == before
        assert "1 of 2 inputs have an answer in out" in capsys.readouterr().err
        done(run, "in/a.png", "in/b.png", ASK, "-o", "out", "--no_overwrite")
        done(run, "in/b.png", ASK, "-o", "out")
        assert [line["input"] for line in lines("out")] == ["in/b.png"]

    def test_a_kept_answer_keeps_its_files_when_another_input_has_its_name(self, run, images):
        done(run, "in/a.png", ASK, "-o", "out")
        before = {path: path.read_bytes() for path in Path("out").glob("a_*")}
        Path("other").mkdir()
        shutil.copy(images / "b.png", "other/a.png")
        done(run, "other/a.png", ASK, "-o", "out", "--no_overwrite")
        assert {path: path.read_bytes() for path in before} == before
        assert [line["overlay"] for line in lines("out")] == ["out/a_overlay.png", "out/a_1_overlay.png"]

    def test_what_a_killed_process_left(self, run, images, tmp_path):
        done(run, "in/a.png", "in/b.png", ASK, "-o", "out", "--no_overlay")
        first, second = (tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
        first = first.replace(b'"query": "', '"query": "two\u2028lines'.encode())
        cut = second.replace(b'"text": "', '"text": "\u00e9'.encode()).partition(b"\xc3\xa9")[0] + b"\xc3"
        (tmp_path / "out" / "predictions.jsonl").write_bytes(first + cut)  # killed in the middle of a character
        half = tmp_path / "out" / ".b_mask.png.4194305.tmp.png"  # above the largest number of a process
        half.write_bytes(b"half")
        own = tmp_path / "out" / f".b_overlay.png.{os.getpid()}.tmp.png"
        own.write_bytes(b"of a process that is alive")
        done(run, "in/a.png", "in/b.png", ASK, "-o", "out", "--no_overlay", "--no_overwrite")
        assert [line["input"] for line in lines("out")] == ["in/a.png", "in/b.png"]
        assert "two\u2028lines" in lines("out")[0]["query"]
        assert not half.exists()
        assert own.exists()

    def test_a_bad_file_among_good_ones_is_named_and_the_others_are_answered(self, run, images, capsys):
        (images / "b.png").write_bytes(b"no image")
        done(run, "in/a.png", "in/b.png", "in/c.tiff", ASK, "-o", "out", status=1)
        found = {line["input"]: line for line in lines("out")}
        assert "cannot be decoded" in found["in/b.png"]["error"]
        assert {"in/a.png", "in/b.png", "in/c.tiff"} == set(found)
        printed = capsys.readouterr()
        assert "segrl: error: in/b.png: cannot be decoded" in printed.err
        assert "1 of 3 inputs failed" in printed.out
        shutil.copy(images / "a.png", images / "b.png")
        done(run, "in/a.png", "in/b.png", "in/c.tiff", ASK, "-o", "out", "--no_overwrite")
        assert [line["input"] for line in lines("out")] == ["in/a.png", "in/c.tiff", "in/b.png"]
        assert not any("error" in line for line in lines("out"))

    def test_one_that_abstains_has_no_mask(self, run, images):
        done(run, "in/a.png", ASK, "-o", "out", "--samples", 2, "--abstain_below", "1")
        (line,) = lines("out")
        assert (line["abstained"], line["mask"]) == (True, None)

    def test_dicom_seg(self, run, images):
        done(run, "in/d.dcm", ASK, "-o", "out", "--dicom_seg", "--max_new_tokens", 8)
        (line,) = lines("out")
        assert line["dicom_seg"] == "out/d_mask.dcm"
        assert pydicom.dcmread("out/d_mask.dcm").Modality == "SEG"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["in/a.png"], "the question, in quotes, is missing"),
            (["in/a.png", "in/b.png"], "'in/b.png' is a file, and the last word is the question"),
            (["in/a.png", " "], "the question is empty"),
            (["in/*.dicom", ASK], "'in/*.dicom': no file matches the pattern"),
            (["nowhere.png", ASK], "nowhere.png: no such file or folder"),
            (["empty", ASK], "empty: holds no images"),
            (["in/scan.nii.gz", ASK], "in/scan.nii.gz: is a volume, and the run answers about images"),
            (["in/a.png", ASK, "--dicom_seg"], "--dicom_seg: in/a.png is no DICOM"),
            (["in/a.png", "in/a_mask.png", ASK, "-o", "in"], "in/a_mask.png is an input and would be replaced"),
            (["in/a.png", ASK, "-o", "in/a.png"], "--output_dir in/a.png: a.png is a file"),
            (["in/a.png", ASK, "-o", "in/a.png/deep/er"], "--output_dir in/a.png/deep/er: a.png is a file"),
            (["in/a.png", ASK, "--coco", "in/a.png"], "in/a.png is an input and would be replaced"),
            (["in/a.png", ASK, "--coco", "no/a.json"], "--coco no/a.json: there is no folder no"),
            (["in/a.png", ASK, "--temperature", "0.7"], "--temperature is for --samples"),
            (["in/a.png", ASK, "--spacing_mm", "[1,1,1]"], "--spacing_mm is for volumes"),
            (["in/a.png", ASK, "--intensity", "window:0:9"], "in/a.png: intensity='window:0:9', and the im"),
            (["in/b.png", ASK, "--intensity", "bright"], "in/b.png: intensity 'bright': expected 'window:"),
            (["in/notes.txt", ASK], "in/notes.txt: cannot be decoded"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_is_refused_before_anything_is_written(self, run, images, capsys, words, message):
        Path("empty").mkdir()
        (images / "scan.nii.gz").write_bytes(b"")
        shutil.copy(images / "a.png", images / "a_mask.png")
        before = sorted(path.relative_to(images) for path in images.rglob("*"))
        assert message in refused(capsys, run, *words)
        assert sorted(path.relative_to(images) for path in images.rglob("*")) == before
        assert not Path("predictions").exists()

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("nowhere", "model folder 'nowhere' does not exist; pass an output directory"),
            ("owner/nothing", "'owner/nothing': no such folder, and offline mode is on (HF_HUB_OFFLINE)"),
            ("in", "'in': no segrl.json; expected the output directory of a run"),
        ],
    )
    def test_no_run(self, images, capsys, model, message):
        assert message in refused(capsys, model, "in/a.png", ASK)


class TestVolumes:
    def test_nifti_and_dicom_on_their_own_grids(self, volume_run, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        voxels = np.random.default_rng(0).integers(-1000, 1000, (5, 24, 30), dtype=np.int16)
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        affine[0, 2], affine[1, 0], affine[2, 1] = 5.0, -1.0, 1.0
        nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), "scan.nii.gz")
        files = write_series(tmp_path / "series", voxels)
        done(volume_run, "scan.nii.gz", "series", ASK, "-o", "out", "--modality", "CT")
        found = lines("out")
        assert [line["input"] for line in found] == ["scan.nii.gz", "series"]
        assert load("out/scan_mask.nii.gz").shape == (30, 24, 5)
        assert np.allclose(load("out/scan_mask.nii.gz").affine, affine)
        series: Any = read_volume("series")
        assert np.allclose(load("out/series_mask.nii.gz").affine, series.affine, atol=1e-5)
        assert [line["slice"] for line in found] == [None, None]
        done(volume_run, files[0], ASK, "-o", "seg", "--dicom_seg")
        (line,) = lines("seg")
        assert Path(line["dicom_seg"]).is_file()

    def test_what_is_refused(self, volume_run, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Image.new("L", (9, 9)).save("a.png")
        np.save("scan.npy", np.zeros((4, 5, 6)))
        (tmp_path / "empty").mkdir()
        assert "a.png: is an image, and the run answers about volumes" in refused(capsys, volume_run, "a.png", ASK)
        assert "--coco is for images" in refused(capsys, volume_run, "scan.npy", ASK, "--coco", "a.json")
        assert "empty: holds no volumes" in refused(capsys, volume_run, "empty", ASK)
        message = refused(capsys, volume_run, "scan.npy", ASK, "--spacing_mm", "3x1x1")
        assert "spacing_mm: '3x1x1'; expected millimetres" in message
        (tmp_path / "damaged.nii").write_bytes(b"x" * 400)
        assert "damaged.nii: cannot be read as NIfTI" in refused(capsys, volume_run, "damaged.nii", ASK)


class TestFindInputs:
    def test_folders_of_series_and_files(self, tmp_path):
        for name in ("one", "two"):
            write(tmp_path / name / "1.dcm", np.zeros((3, 4), dtype=np.int16))
        (tmp_path / "scan.nii").write_bytes(b"")
        (tmp_path / "notes.txt").write_text("")
        found, others = find_inputs([str(tmp_path), str(tmp_path / "scan.nii")], "volumes")
        assert ([path.name for path in found], others) == (["one", "scan.nii", "two"], 1)
        with pytest.raises(DataError, match="holds no images"):
            find_inputs([str(tmp_path)], "images")


def test_evaluation_with_samples_says_what_confidence_is_worth(run, tmp_path, capsys):
    data = write_folder(make_synthetic(4, size=64), tmp_path / "data", split="test")
    words = ["eval", "--model", str(run), "--data", str(data), "--device", "cpu", "--samples", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["model"]["calibration"]
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert found["n"] == len(records) == 4
    assert all(record["confidence"]["samples"] == 2 for record in records)
    assert "expected calibration error" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "calibration.png") as chart:
        assert chart.width > 600
    assert main(["eval", "--predictions", str(tmp_path / "out" / "predictions.json"), "--samples", "2"]) == 2
    assert "--samples is for --model; drop it" in capsys.readouterr().err
