"""Two systems on the same samples: matched, compared, broken down, and refused when they were not asked the same."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segrl.cli.main import main
from segrl.errors import DataError
from segrl.evaluation import compare_records, read_records
from segrl.metrics import paired_bootstrap_ci, paired_difference
from segrl.scripts.results import results_for


def records(dice: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": f"image {n}", "query": "Segment the cyst.", "modality": ("CT", "MR")[n % 2], "dice": value, **more}
        for n, value in enumerate(dice)
    ]


ONE, OTHER = [0.5, 0.25, 1.0, 0.0], [0.75, 0.25, 0.5, 0.5]


def write(folder: Path, found: list[dict[str, Any]], name: str = "predictions.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(found))
    return folder


def test_differences_over_all_samples_and_by_group():
    found = compare_records(records(ONE), records(OTHER))
    dice = found["scores"]["dice"]
    assert (found["n"], dice["n"], dice["first"], dice["second"], dice["difference"]) == (4, 4, 0.4375, 0.5, 0.0625)
    assert tuple(dice["ci95"]) == paired_bootstrap_ci(OTHER, ONE)
    assert list(found["groups"]) == ["modality"]  # all have one anatomy and one lesion: none is given
    by_modality = {name: group["dice"]["difference"] for name, group in found["groups"]["modality"].items()}
    assert by_modality == {"CT": -0.125, "MR": 0.25}
    assert [(case["name"], case["difference"]) for case in found["gained"]] == [("image 3", 0.5), ("image 0", 0.25)]
    assert [(case["name"], case["difference"]) for case in found["lost"]] == [("image 2", -0.5)]
    assert len(compare_records(records(ONE), records(OTHER), cases=1)["gained"]) == 1
    assert compare_records(records(ONE), records(OTHER), cases=0)["lost"] == []


def test_samples_are_matched_by_name_and_question():
    order = [2, 0, 3, 1]
    shuffled = [records(OTHER)[n] for n in order]
    assert compare_records(records(ONE), shuffled) == compare_records(records(ONE), records(OTHER))
    same_image = [{**record, "name": "a", "query": f"question {n}"} for n, record in enumerate(records(ONE))]
    assert compare_records(same_image, same_image[::-1])["scores"]["dice"]["ci95"] == [0, 0]


def test_scores_that_do_not_apply_to_a_sample_are_left_out_of_its_mean():
    first, second = records(ONE, hd95_mm=2.0), records(OTHER, hd95_mm=3.0)
    first[1]["hd95_mm"] = second[2]["hd95_mm"] = None
    row = compare_records(first, second)["scores"]["hd95_mm"]
    assert (row["n"], row["first"], row["second"], row["difference"]) == (2, 2.0, 3.0, 1.0)
    for record in first:
        record["hd95_mm"] = None
    row = compare_records(first, second, scores=["hd95_mm"])["scores"]["hd95_mm"]
    assert row == {"n": 0, "first": None, "second": None, "difference": None, "ci95": None}
    assert compare_records(first, second, scores=["hd95_mm"])["gained"] == []


def test_only_scores_that_both_have_are_compared():
    first, second = records(ONE, iou=0.5, fail=False), records(OTHER, fail=True)
    found = compare_records(first, second)["scores"]
    assert list(found) == ["dice", "fail"]
    assert found["fail"]["difference"] == 1.0
    with pytest.raises(DataError, match=r"score 'iou' is not in the records of second, which have \['dice', 'fail'\]"):
        compare_records(first, second, scores=["iou"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:3], r"of 4 and 3 samples are 1 only in first, such as 'image 3'; evaluate both on one"),
        (lambda found: [*found, {**found[0], "name": "b"}], r"of 4 and 5 samples are 1 only in second, such as 'b'"),
        (
            lambda found: [{**found[0], "query": "Where is it?"}, *found[1:]],
            r"1 only in first, such as 'image 0'; 1 only in second, such as 'image 0'",
        ),
    ],
)
def test_systems_that_were_not_asked_the_same_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        compare_records(records(ONE), change(records(OTHER)))


def test_samples_that_cannot_be_told_apart_keep_their_order_or_are_refused():
    alike = [{**record, "name": ""} for record in records(ONE)]
    assert compare_records(alike, [{**r, "dice": 0.5} for r in alike])["n"] == 4
    twice = [{**record, "name": name} for record, name in zip(records(ONE), "aabc", strict=True)]
    with pytest.raises(DataError, match=r"1 samples occur more than once, in another order, such as 'a'"):
        compare_records(twice, twice[::-1])


def test_files_of_a_run(tmp_path):
    run = write(tmp_path / "run", records(ONE))
    write(run, records(OTHER), "predictions_stage1.json")
    assert read_records(run) == records(ONE) == read_records(run / "predictions.json")
    assert read_records(run, "stage1") == records(OTHER)
    with pytest.raises(DataError, match=r"predictions_control.json: no such file \(there: \['predictions.json', 'pre"):
        read_records(run, "control")
    for text, message in [("[1]", "expected a list of records"), ("{", "not JSON"), ("[]", "expected a list")]:
        (run / "predictions.json").write_text(text)
        with pytest.raises(DataError, match=rf"predictions\.json: {message}"):
            read_records(run)


def test_the_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    first = rng.random(40).tolist()
    second = [min(1.0, value + 0.1) for value in first]
    one, other = write(tmp_path / "one", records(first)), write(tmp_path / "other", records(second, text="[/red]"))
    assert main(["compare", str(one), str(other), str(one / "predictions.json"), "--cases", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{other} - {one}, 40 samples" in out
    gain = 100 * (np.mean(second) - np.mean(first))
    assert re.search(
        rf"all +│ dice % +│ +{100 * np.mean(first):.2f} │ +{100 * np.mean(second):.2f} │ +\+{gain:.2f} ", out
    )
    assert out.count("largest gains, dice") == 1  # none between a run and itself
    assert main(["compare", str(one), str(other), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert math.isclose(100 * found["scores"]["dice"]["difference"], gain)
    assert (found["first"], found["second"]) == (str(one), str(other))


def test_a_run_and_a_part_of_it(tmp_path, capsys):
    run = write(tmp_path / "run", records(OTHER))
    write(run, records(ONE), "predictions_stage1.json")
    assert main(["compare", str(run), "--stage", "stage1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["scores"]["dice"]["difference"] == 0.0625
    assert main(["compare", str(run)]) == 2
    assert "expected two runs or more, or one with --stage, got one" in capsys.readouterr().err
    assert main(["compare", str(run), str(run)]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    assert main(["compare", str(run), str(tmp_path / "none")]) == 2
    assert "none: no such folder; pass the output_dir of a run" in capsys.readouterr().err


def test_a_modality_called_all_is_a_group_like_any_other(tmp_path):
    before = [{**record, "modality": "all"} for record in records(ONE)]
    after = [{**record, "dice": 1.0} for record in before]
    assert results_for("images")(tmp_path).gain_by_group(after, before) == {"all": paired_difference([1.0] * 4, ONE)}
