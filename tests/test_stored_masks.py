"""`segrl eval`: runs, and masks that another system wrote, on images and volumes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_headed_model, tiny_model, tiny_segmenter
from datasets import Dataset, DatasetDict
from PIL import Image, ImageFile
from script_modules import read_json
from test_files import killed_while_writing

from segrl.cli.main import main
from segrl.data import (
    Volume,
    load_folder,
    make_synthetic,
    make_synthetic_volumes,
    read_label,
    read_volume,
    write_folder,
    write_mask,
    write_volume,
)
from segrl.data.formats import FormatRow, coco_annotations
from segrl.errors import DataError
from segrl.evaluation import CocoResults, StoredMasks, evaluate, evaluate_masks
from segrl.geometry import mask_to_rle, rle_to_mask
from segrl.geometry.run_lengths import rle_counts
from segrl.inference import ReasoningSegmenter
from segrl.metrics import dice, hausdorff
from segrl.predictions import ImagePromptSettings
from segrl.reports.cases import choose_cases, encode_case


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(make_synthetic(4, size=48, seed=3), tmp_path / "data", split="test")


@pytest.fixture
def rows(data: Path) -> Dataset:
    return load_folder(data)


def moved(mask: Image.Image) -> np.ndarray:
    return np.roll(np.asarray(mask), 3, axis=1)


def write(folder: Path, rows: Dataset, name: str = "{}.png") -> Path:
    """The masks of another system: the true ones, three pixels to the right."""
    for row in map(dict, rows):
        path = folder / name.format(Path(row["name"]).stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moved(row["mask"])).save(path)
    return folder


@pytest.mark.parametrize("name", ["{}.png", "masks/{}.png", "{}.bmp", "images/{}.PNG"])
def test_masks_are_found_by_the_names_of_rows(rows, tmp_path, name):
    records = evaluate_masks(write(tmp_path / "theirs", rows, name), rows, progress=False, batch_size=3)
    assert [record["name"] for record in records] == rows["name"][:]
    for record, row in zip(records, map(dict, rows), strict=True):
        assert record["dice"] == dice(moved(row["mask"]) > 0, np.asarray(row["mask"]) > 0)
        assert record["fail"] is (record["dice"] == 0)


def test_rows_with_names_of_their_own(tmp_path):
    """Two questions about one image: the names of the rows tell their masks apart, not that of the image."""
    scene = make_synthetic(2, size=48)
    named = scene.remove_columns("name").add_column("name", ["a cyst.x", "a cyst.y"])
    folder = tmp_path / "theirs"
    folder.mkdir()
    for row in map(dict, named):
        row["mask"].save(folder / f"{row['name']}.png")
    assert [record["dice"] for record in evaluate_masks(folder, named, progress=False)] == [1, 1]


def test_what_does_not_fit_is_listed_at_once(rows, tmp_path):
    folder = write(tmp_path / "theirs", rows)
    names = [Path(name).stem for name in rows["name"]]
    (folder / f"{names[0]}.png").unlink()
    shutil.copy(folder / f"{names[1]}.png", folder / f"{names[1]}.bmp")
    shutil.copy(folder / f"{names[1]}.png", folder / "other.png")
    with pytest.raises(DataError) as caught:
        StoredMasks(folder, rows)
    message = str(caught.value)
    counts = "no file: 1, several files: 1, files of no row: 2"
    assert f"{folder} does not hold one mask for each of 4 rows: {counts}:" in message
    assert f"\n  no file: row 0 ({rows['name'][0]})" in message
    assert f"\n  several files: row 1 ({rows['name'][1]})" in message
    assert "\n  files of no row: other.png" in message
    assert "pass --missing_empty if no file means an empty mask" in message


def test_a_file_answers_one_row(rows, tmp_path):
    twice = Dataset.from_list([dict(rows[0]), {**rows[0], "query": "Where?"}], features=rows.features)
    folder = write(tmp_path / "theirs", rows.select([0]))
    with pytest.raises(DataError, match=r"the file of an earlier row: row 1 \("):
        StoredMasks(folder, twice)


def test_no_file_is_an_empty_mask_only_when_asked(rows, tmp_path):
    folder = write(tmp_path / "theirs", rows.select([1, 2, 3]))
    with pytest.raises(DataError, match="no file: 1"):
        StoredMasks(folder, rows)
    stored = StoredMasks(folder, rows, missing_empty=True)
    records = evaluate_masks(stored, rows, progress=False)
    assert (records[0]["dice"], records[0]["fail"]) == (0, True)
    assert records[1:] == evaluate_masks(folder, rows.select([1, 2, 3]), progress=False)


@pytest.mark.parametrize(
    ("size", "message"),
    [((24, 48), r"00\.png: the mask is 48 x 24, the true one of \S+ 48 x 48 \(rows x columns\)"), (None, "0.png")],
)
def test_files_that_are_no_mask_of_the_image_are_named(rows, tmp_path, size, message):
    folder = write(tmp_path / "theirs", rows)
    path = folder / f"{Path(rows['name'][0]).stem}.png"
    if size is None:
        path.write_bytes(b"nothing")
    else:
        Image.new("L", size).save(path)
    with pytest.raises(DataError, match=message):
        evaluate_masks(folder, rows, progress=False)


def test_all_masks_that_do_not_fit_are_listed(rows, tmp_path):
    folder = write(tmp_path / "theirs", rows)
    names = [f"{Path(name).stem}.png" for name in rows["name"]]
    Image.new("L", (24, 48)).save(folder / names[0])
    (folder / names[2]).write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        evaluate_masks(folder, rows, progress=False, batch_size=1)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{folder}: 2 of 4 masks do not fit:"
    assert [name in line for name, line in zip((names[0], names[2]), lines, strict=True)] == [True, True]


def test_what_a_killed_process_left_is_no_mask(rows, tmp_path):
    write_folder(rows, tmp_path / "theirs")
    masks = tmp_path / "theirs/masks"
    killed_while_writing(masks / "of_no_row.png", ".png")
    assert [record["dice"] for record in evaluate_masks(masks, rows, progress=False)] == [1.0] * 4


def test_folders_without_masks(rows, tmp_path):
    with pytest.raises(DataError, match="none: no such folder; expected one mask file for each row"):
        StoredMasks(tmp_path / "none", rows)
    (tmp_path / "file.npz").touch()
    with pytest.raises(DataError, match=r"file\.npz: is a file, and no \.json of answers; expected one mask file"):
        StoredMasks(tmp_path / "file.npz", rows)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no files that end in \.png, .*; expected one mask for each row"):
        StoredMasks(tmp_path / "none", rows)


def test_masks_of_volumes_are_put_on_the_grid_of_the_scan(tmp_path):
    made = make_synthetic_volumes(2, tmp_path / "data", depth=6, size=32)
    (tmp_path / "theirs").mkdir()
    expected = []
    for row in map(dict, made):
        scan = read_volume(row["scan"])
        label = read_label(row["label"], scan)
        guess = np.roll(label, 2, axis=2)
        write_mask(tmp_path / "theirs" / f"{Path(row['name']).name.removesuffix('.nii.gz')}.nii.gz", guess, scan)
        expected.append((dice(guess, label), hausdorff(guess, label, spacing=scan.spacing_mm)))
    records = evaluate_masks(tmp_path / "theirs", made, progress=False)
    assert [(record["dice"], record["hd95_mm"]) for record in records] == expected
    assert "slice_visibility" not in records[0]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_masks_by_the_command(data, rows, tmp_path, capsys):
    folder = write(tmp_path / "theirs", rows)
    assert main(["eval", "--predictions", str(folder), "--data", str(data)]) == 0
    out = tmp_path / "theirs_evaluation"
    assert f"Written to {out}" in capsys.readouterr().out
    results, records = read_json(out / "results.json"), read_json(out / "predictions.json")
    assert records == json.loads(json.dumps(evaluate_masks(folder, rows, progress=False)))
    assert results["model"]["mdice"] == pytest.approx(np.mean([record["dice"] for record in records]))
    assert "statuses" not in results["model"]
    assert results["config"]["predictions"] == str(folder)
    assert (out / "predictions.png").is_file()
    assert main(["eval", "--predictions", str(folder), "--data", str(data)]) == 2
    assert "is not empty" in capsys.readouterr().err
    flags = ["--limit", "2", "--pictures", "0", "--output_dir", str(tmp_path / "two")]
    assert main(["eval", "--predictions", str(folder), "--data", str(data), *flags]) == 2  # two files are of no row
    assert "files of no row: 2" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_with_a_limit_no_other_file_is_decoded(data, rows, tmp_path, monkeypatch, saved):
    folder = write(tmp_path / "theirs", rows.select(range(2)))
    if saved:
        DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "saved"))
    decoded, load = [], ImageFile.ImageFile.load

    def counted(image: Any) -> Any:
        if image.tile:  # not decoded yet
            decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    flags = ["--limit", "2", "--pictures", "0", "--data", str(tmp_path / "saved" if saved else data)]
    assert main(["eval", "--predictions", str(folder), *flags]) == 0
    assert len(decoded) == 2 * 3  # image, mask and predicted mask of each row
    assert len(read_json(tmp_path / "theirs_evaluation/predictions.json")) == 2


def test_with_a_limit_no_other_scan_is_read(tmp_path):
    made = make_synthetic_volumes(3, tmp_path / "data", depth=6, size=32)
    (tmp_path / "theirs").mkdir()
    for row in map(dict, made.select(range(2))):
        shutil.copy(row["label"], tmp_path / "theirs" / f"{Path(row['name']).name.removesuffix('.nii.gz')}.nii.gz")
    Path(made[2]["scan"]).write_bytes(b"broken")
    DatasetDict({"test": made}).save_to_disk(str(tmp_path / "saved"))
    flags = ["--volumes", "--limit", "2", "--pictures", "0", "--data", str(tmp_path / "saved")]
    assert main(["eval", "--predictions", str(tmp_path / "theirs"), *flags]) == 0


def test_only_the_cases_that_are_shown_are_encoded(tmp_path, monkeypatch):
    """The files of `cases/` are those of all pictures encoded at once, as they were made before."""
    made = make_synthetic(30, size=48, seed=4)
    folder = write(tmp_path / "theirs", made)
    calls = []

    def counted(*shown: Any) -> bytes:
        calls.append(shown)
        return encode_case(*shown)

    monkeypatch.setattr("segrl.scripts.results.encode_case", counted)
    data = write_folder(made, tmp_path / "data", split="test")
    assert main(["eval", "--predictions", str(folder), "--data", str(data), "--pictures", "1"]) == 0
    out = tmp_path / "theirs_evaluation"
    chosen = {number for kind in choose_cases(read_json(out / "predictions.json")).values() for number in kind}
    found = {path.name: path.read_bytes() for path in (out / "cases").iterdir()}
    assert found == {f"{number:05d}.jpg": encode_case(made[number]["image"]) for number in chosen}
    assert len(calls) == len(chosen) < 30


def test_masks_of_volumes_by_the_command(tmp_path, capsys):
    made = make_synthetic_volumes(2, tmp_path / "data", depth=6, size=32)
    (tmp_path / "theirs").mkdir()
    for row in map(dict, made):
        shutil.copy(row["label"], tmp_path / "theirs" / f"{Path(row['name']).name.removesuffix('.nii.gz')}.nii.gz")
    DatasetDict({"test": made}).save_to_disk(str(tmp_path / "saved"))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(tmp_path / "saved"), "--volumes"]
    assert main([*argv, "--split", "tset"]) == 2
    assert "did you mean 'test'" in capsys.readouterr().err
    assert main(argv) == 0
    assert "│ model" in capsys.readouterr().out
    model = read_json(tmp_path / "theirs_evaluation" / "results.json")["model"]
    assert (model["mdice"], model["hd95_mm"]) == (1, 0)
    assert "slice_boxes" not in model


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two images of COCO, one with two categories, converted; and what a detector found on them."""
    rows = []
    for n, lesion in enumerate(("cyst", "node", "cyst")):
        mask = np.zeros((20, 24), dtype=bool)
        mask[2 + n : 9, 3:10] = True
        image, name = Image.new("RGB", (24, 20), n // 2), f"im age {n // 2}.png"
        rows.append(FormatRow(image, mask, name, "test", {"lesion": lesion}))
    (tmp_path / "images").mkdir()
    for n in (0, 2):
        rows[n].image.save(tmp_path / "images" / rows[n].name)
    content = coco_annotations(rows)
    (tmp_path / "a.json").write_text(json.dumps(content))
    convert = ["coco", str(tmp_path / "a.json"), str(tmp_path / "images"), str(tmp_path / "data"), "--split", "test"]
    assert main(["data", "convert", *convert]) == 0
    moved = [np.roll(row.mask, 1, axis=1) for row in rows]
    results = [
        {"image_id": 1, "category_id": 1, "segmentation": mask_to_rle(moved[0], compressed=True), "score": 0.9},
        {"image_id": 1, "category_id": 1, "segmentation": [[0, 12, 4, 12, 4, 16, 0, 16]], "score": 0.6},
        {"image_id": 1, "category_id": 1, "segmentation": mask_to_rle(np.ones((20, 24), bool)), "score": 0.4},
        {"image_id": 2, "category_id": 2, "segmentation": mask_to_rle(moved[1])},  # nobody asks for it
        {"image_id": 2, "category_id": 1, "segmentation": mask_to_rle(moved[2]), "bbox": [0, 0, 1, 1]},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def detections(coco: Path, *more: str) -> int:
    files = ["--predictions", str(coco / "results.json"), "--annotations", str(coco / "a.json")]
    return main(["eval", *files, "--data", str(coco / "data"), "--pictures", "0", *more])


def test_detections_of_coco(coco, capsys):
    with pytest.warns(UserWarning, match="1 detections are of categories that no row about their image asks for"):
        assert detections(coco, "--conventions", "segrl") == 0
    records = read_json(coco / "results_evaluation" / "predictions.json")
    assert [(record["lesion"], bool(rle_counts(record["predicted_mask"])[1::2].sum())) for record in records] == [
        ("cyst", True),
        ("node", False),
        ("cyst", True),
    ]
    rows = load_folder(coco / "data", "test")
    for n in (0, 2):
        true = np.asarray(dict(rows[n])["mask"]) > 0
        predicted = np.roll(true, 1, axis=1)
        predicted[12:16, 0:4] |= n == 0
        assert records[n]["dice"] == dice(predicted, true)
    with pytest.warns(UserWarning, match="1 detections"):
        assert detections(coco, "--min_score", "0.3", "--output_dir", str(coco / "low")) == 0
    assert rle_to_mask(read_json(coco / "low" / "predictions.json")[0]["predicted_mask"]).all()


def test_answers_as_cocos_results_come_back_exactly(coco, capsys):
    """Through the ids of given annotations, and of those that are written; from an evaluation, and from its records."""
    from pycocotools.coco import COCO

    folder = coco / "theirs"
    folder.mkdir()
    answers = {}
    for n, row in enumerate(map(dict, load_folder(coco / "data", "test").select([0, 2]))):
        answers[row["name"], row["lesion"]] = np.random.default_rng(n).random((20, 24)) < 0.4 * n  # the first is empty
        Image.fromarray(answers[row["name"], row["lesion"]]).save(folder / f"{Path(row['name']).stem}.png")
    manifest = (coco / "data" / "manifest.csv").read_text().splitlines()
    (coco / "data" / "manifest.csv").write_text("\n".join(line for line in manifest if "node" not in line) + "\n")
    argv = ["eval", "--data", str(coco / "data"), "--pictures", "0", "--predictions"]
    own, given, again = coco / "own.json", coco / "given.json", coco / "again.json"
    assert main([*argv, str(folder), "--coco", str(own)]) == 0
    more = ["--coco", str(given), "--annotations", str(coco / "a.json"), "--overwrite"]
    assert main([*argv, str(folder), *more]) == 0
    stored = coco / "theirs_evaluation" / "predictions.json"
    assert main(["eval", "--predictions", str(stored), "--coco", str(again)]) == 0
    assert read_json(again) == read_json(own)
    capsys.readouterr()
    for results, annotations in ((own, coco / "own_annotations.json"), (given, coco / "a.json")):
        assert main([*argv, str(results), "--annotations", str(annotations)]) == 0
        back = read_json(coco / f"{results.stem}_evaluation" / "predictions.json")
        assert back == read_json(stored)
        assert all(np.array_equal(rle_to_mask(r["predicted_mask"]), answers[r["name"], r["lesion"]]) for r in back)
        found = COCO(str(annotations)).loadRes(str(results))
        one: Any = found.loadAnns(found.getAnnIds())[0]
        assert np.array_equal(rle_to_mask(one["segmentation"]), list(answers.values())[1])
        assert one["area"] == list(answers.values())[1].sum()  # as pycocotools counts

    def refused(*more: str) -> str:
        assert main([*argv, str(folder), "--overwrite", *more]) == 2
        return capsys.readouterr().err

    assert main([*argv, str(folder), "--coco", str(own), "--output_dir", str(coco / "o")]) == 2
    assert "own.json: exists; pass --overwrite, or another name" in capsys.readouterr().err
    assert "there is no folder" in refused("--coco", str(coco / "nowhere" / "a.json"))
    content = read_json(coco / "a.json")
    (coco / "less.json").write_text(json.dumps({**content, "images": content["images"][:1]}))
    error = refused("--coco", str(coco / "b.json"), "--annotations", str(coco / "less.json"))
    assert "COCO's results: 1 problems, expected none" in error
    assert "the image is not in" in error
    assert not (coco / "b.json").exists()


def test_rows_that_coco_cannot_tell_apart():
    with pytest.raises(DataError, match=r"3 problems(?s:.)*row 0 \(a.png\): no lesion(?s:.)*row 2 \(a.png\): asks f"):
        CocoResults(["a.png", "a.png", "a.png", "b/a.jpg"], ["", "cyst", "Cyst", "node"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "result 0: image_id 9 is not in"),
        ({"category_id": "cyst"}, "result 0: category_id 'cyst' is not in"),
        (
            {"segmentation": {"size": [4, 4], "counts": [16]}},
            "result 0: run lengths of the size [4, 4], expected",
        ),
        ({"segmentation": [[1, 2]]}, "result 0: a polygon of 1 points; expected three or more"),
        ({"segmentation": {"size": [20, 24], "counts": "~"}}, "result 0: compressed run lengths with the character"),
        ({"score": "high"}, "result 0: score 'high', expected a number"),
    ],
)
def test_broken_detections(coco, change, message, capsys):
    results = read_json(coco / "results.json")
    (coco / "results.json").write_text(json.dumps([{**results[0], **change}, {**results[1], **change}]))
    assert detections(coco) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{coco / 'results.json'}: 2 problems, expected none:" in error
    assert not (coco / "results_evaluation").exists()


def test_detections_for_other_data(coco, capsys):
    assert main(["eval", "--predictions", str(coco / "results.json"), "--data", str(coco / "data")]) == 2
    assert "holds COCO's results; pass --annotations" in capsys.readouterr().err
    assert detections(coco, "--missing_empty") == 2
    assert "--missing_empty is for folders" in capsys.readouterr().err
    assert detections(coco, "--volumes", "--split", "test") == 2
    (coco / "results.json").write_text('[{"image_id": 1, "category_id": 1}]')
    capsys.readouterr()
    assert detections(coco) == 2
    assert "result 0 has no segmentation; expected image_id, category_id, segment" in capsys.readouterr().err
    folder = write(coco / "theirs", load_folder(coco / "data", "test").select([0]))
    assert main(["eval", "--predictions", str(folder), "--data", str(coco / "data"), "--min_score", "0.5"]) == 2
    assert "--min_score is for --predictions of COCO's results; drop it" in capsys.readouterr().err


def test_volumes_in_the_conventions_of_evaluators(tmp_path, capsys):
    """One volume with a target, one without, both with voxels that do not count; scored again from what is stored."""
    grey = np.random.default_rng(0).normal(100, 20, (2, 5, 12, 12)).astype(np.float32)
    label, guess = np.zeros((2, 2, 5, 12, 12), dtype=np.uint8)
    label[0, 1:4, 3:8, 3:8], label[:, 1:4, 3:8, 8:10] = 2, 9
    guess[0, 1:4, 3:8, 4:10], guess[1, 2, 7, 9] = 2, 9  # the second is only where it does not count
    for n in range(2):
        for part, name, voxels in (("data/images", "scan", grey[n]), ("data/labels", "label", label[n]),
                                   ("theirs", "scan", guess[n])):  # fmt: skip
            path = tmp_path / part / f"{name}{n}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(path, Volume(voxels, (3.0, 1.0, 1.0)))
    lines = [f"images/scan{n}.nii.gz,labels/label{n}.nii.gz,2,9,test,cyst,MRI" for n in range(2)]
    head = "image,label,label_value,ignored_value,split,lesion,modality"
    (tmp_path / "data" / "manifest.csv").write_text("\n".join([head, *lines]))
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(tmp_path / "data")]
    assert main(argv) == 2
    assert "set allow_empty=True (--allow_empty) if there is nothing to find" in capsys.readouterr().err
    assert main([*argv, "--allow_empty", "--conventions", "all", "--pictures", "0"]) == 0
    out = capsys.readouterr().out
    assert "model: N-acc 100.0 % of 1 rows without a target; T-acc 100.0 % of the others" in out
    evaluated = tmp_path / "theirs_evaluation"
    records, found = read_json(evaluated / "predictions.json"), read_json(evaluated / "results.json")
    shared, guessed, true = 3 * 5 * 4, 3 * 5 * 4, 3 * 5 * 5  # of those that count
    assert records[0]["dice"] == 2 * shared / (guessed + true)
    assert np.array_equal(rle_to_mask(records[0]["ignored_mask"]), label[0] == 9)
    assert records[0]["spacing_mm"] == [3, 1, 1]
    scores = {name: one["scores"] for name, one in found["conventions"]["conventions"].items()}
    reasons = {name: one["reason"] for name, one in found["conventions"]["conventions"].items()}
    assert [name for name in scores if scores[name]] == ["m3d", "nnunet", "segrl"]
    assert "(no target" not in reasons["lisa"]
    assert "states no rule for 2 of 2 rows (volumes)" in reasons["lisa"]
    assert "(ignored pixels)" in reasons["unibiomed"]
    assert scores["segrl"]["mdice"] == pytest.approx((records[0]["dice"] + 1) / 2)
    assert scores["nnunet"]["mdice"] == pytest.approx(records[0]["dice"])  # without the row of two empty masks
    assert scores["m3d"]["mdice"] == pytest.approx(shared / (3 * 5 * 6 + true + 1))  # there it is background
    assert scores["segrl"]["hd95_mm"] == records[0]["hd95_mm"] / 2
    assert main(["eval", "--predictions", str(evaluated / "predictions.json")]) == 0
    assert read_json(evaluated / "predictions_evaluation" / "results.json")["conventions"] == found["conventions"]


def test_a_run_by_the_command(data, rows, tmp_path, capsys):
    settings = ImagePromptSettings(instruction="", max_new_tokens=4)
    segmenter = ReasoningSegmenter(*tiny_headed_model(), settings)
    segmenter.save_pretrained(tmp_path / "run")
    flags = ["--model", str(tmp_path / "run"), "--data", str(data), "--device", "cpu"]
    assert main(["eval", *flags, "--batch_size", "2"]) == 0
    found = read_json(tmp_path / "run" / "evaluation" / "predictions.json")
    expected = evaluate(segmenter, rows, batch_size=2, progress=False)
    assert [{**record, "box_f1": None} for record in found] == [
        {**json.loads(json.dumps(record)), "box_f1": None} for record in expected
    ]
    assert "answers are invalid" in capsys.readouterr().out
    for more, message in [
        (["--missing_empty"], "--missing_empty is for --predictions; drop it"),
        (["--segmenter", "sam.pt"], "--segmenter: the run has its segmenter in its mask head; drop the flag"),
    ]:
        assert main(["eval", *flags, *more, "--output_dir", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    without = ReasoningSegmenter(*tiny_model(), settings)
    without.save_pretrained(tmp_path / "without")
    argv = ["eval", "--model", str(tmp_path / "without"), "--data", str(data), "--output_dir", str(tmp_path / "x")]
    assert main(argv) == 2
    assert "without' makes no masks; pass --segmenter with SAM 2 weights" in capsys.readouterr().err
    tiny_segmenter().save_pretrained(tmp_path / "sam")
    assert main([*argv[:-1], str(tmp_path / "y"), "--segmenter", str(tmp_path / "sam"), "--device", "cpu"]) == 0
    assert read_json(tmp_path / "y" / "results.json")["model"]["n"] == 4
    assert main(["eval", "--model", str(tmp_path / "none"), "--data", str(data)]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_rows_without_a_target_are_counted_apart(tmp_path, capsys):
    from PIL import Image

    nothing, something = np.zeros((20, 20), dtype=np.uint8), np.zeros((20, 20), dtype=np.uint8)
    something[3:9, 4:10] = 255
    truth = {"a": something, "b": nothing, "c": nothing, "d": nothing}
    theirs = {"a": something, "b": nothing, "c": something, "d": nothing}
    lines = ["image,mask,split,lesion"]
    for n, name in enumerate(truth):
        for part, array in (("images", np.random.default_rng(n).integers(0, 255, (20, 20, 3), dtype=np.uint8)),
                            ("masks", truth[name]), ("theirs", theirs[name])):  # fmt: skip
            path = tmp_path / ("data" if part != "theirs" else "") / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        lines.append(f"images/{name}.png,masks/{name}.png,test,cyst")
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(lines))
    assert main(["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(tmp_path / "data")]) == 0
    assert "model: N-acc 66.7 % of 3 rows without a target" in capsys.readouterr().out
    model = read_json(tmp_path / "theirs_evaluation" / "results.json")["model"]
    assert model["no_target"] == {"n": 3, "n_acc": pytest.approx(2 / 3), "t_acc": 1}
    assert model["mdice"] == pytest.approx(0.75)
