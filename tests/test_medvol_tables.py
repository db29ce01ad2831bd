"""The command that prints published rows beside those of runs."""

import importlib.util
import json
from pathlib import Path

import pytest

from segrl.errors import DataError, SegRLError
from segrl.evaluation import summarise_volumes
from segrl.reports import write_results

SCRIPT = Path(__file__).parents[1] / "examples" / "medvol_r1" / "tables.py"
SPEC = importlib.util.spec_from_file_location("medvol_r1_tables", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)

PUBLISHED = ["slice_format", "slice_visibility", "slice_boxes", "propagated_dice"]
SCORES = {"iou": 0.4, "fail": False, "nsd": 0.75, "slice_visibility": 0.8, "slice_boxes": 0.3, "lesion": "liver"}


def summary(dice: float, distance: float | None = 12.5) -> dict:
    return summarise_volumes([{**SCORES, "dice": dice, "hd95_mm": distance}])


def write(folder: Path, **results) -> Path:
    return write_results(folder / "results.json", {"versions": {}, **results}).parent


def printed(capsys, *runs: object) -> dict[str, list[str]]:
    """The cells of each row by its label."""
    tables.check([str(run) for run in runs])()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_published_rows_stand_beside_those_of_runs(tmp_path, capsys):
    config = {"rewards": PUBLISHED, "reach": 5, "skip_stage1": False, "data": "somewhere/kits"}
    main = write(tmp_path / "main", oracle=summary(0.9), stage1=summary(0.5), stage2=summary(0.6), config=config)
    other = write(tmp_path / "other", stage2=summary(0.0, None), config={**config, "skip_stage1": True, "data": None})
    rows = printed(capsys, main, other / "results.json")
    published = {label.removeprefix("published, "): row for label, row in rows.items() if label.startswith("publ")}
    assert list(rows)[len(published) :] == [
        f"{main}, kits: oracle boxes",
        f"{main}, kits: SFT only",
        f"{main}, kits: SFT + RL",
        f"{other}/results.json, synthetic: RL only",
    ]
    assert published["CT-ORG: SFT + RL"][:2] == ["85.43", "74.57"]
    assert published["AbdomenCT-1K: SFT + RL"][:2] == ["89.86", "81.59"]
    assert published["KiTS23: SFT only"][:2] == ["36.21", "22.11"]
    assert published["CT-ORG: SFT + RL, delta 2"][:2] == ["84.41", "73.03"]
    assert published["AbdomenCT-1K: SFT + RL, w/o R_c"][:2] == ["88.61", "79.55"]
    assert published["AbdomenCT-1K: RL only"][:2] == ["-", "-"]
    assert all(row[2:] == ["-"] * 5 + [""] for row in published.values())
    assert len(published) == 15 + 5 + 3  # tables 1, 2a and 2b; both have rows of table 1
    assert rows[f"{main}, kits: SFT + RL"] == [
        *("60.00 [60.0, 60.0]", "40.00 [40.0, 40.0]", "12.50 [12.5, 12.5]", "75.00 [75.0, 75.0]"),
        *("80.00 [80.0, 80.0]", "30.00 [30.0, 30.0]", "0.00 [0.0, 0.0]", "1"),
    ]
    assert rows[f"{other}/results.json, synthetic: RL only"][2] == "-"


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, "SFT + RL"),
        ({"rewards": None, "reach": None}, "SFT + RL"),
        ({"rewards": ["medvol_r1"], "reach": 5}, "SFT + RL"),
        ({"rewards": PUBLISHED[1:], "reach": 5}, "SFT + RL, w/o R_f"),
        ({"rewards": ["slice_format", "slice_boxes", "propagated_dice"]}, "SFT + RL, w/o R_a"),
        ({"rewards": ["slice_format", "slice_visibility"], "reach": 10}, "SFT + RL, w/o R_s, w/o R_c"),
        ({"rewards": PUBLISHED, "reach": 10}, "SFT + RL, delta 10"),
        ({"rewards": [*PUBLISHED, "non_repeat"], "skip_stage1": True}, "RL only, with non_repeat"),
    ],
)
def test_a_run_is_named_by_its_ablation(config, label):
    assert tables.ablation(config, Path("results.json")) == label


def test_files_that_are_no_results_are_refused(tmp_path):
    good = {"config": {"rewards": PUBLISHED}, "stage2": summary(0.5)}

    def refused(content: object, match: str) -> None:
        file = tmp_path / "results.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=f"results.json: {match}"):
            tables.run_rows(str(tmp_path))

    with pytest.raises(DataError, match=r"results.json: cannot be read \(No such file or directory\); pass the"):
        tables.run_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"elsewhere: cannot be read"):
        tables.run_rows(str(tmp_path / "elsewhere"))
    refused("{", "not JSON")
    refused([1], "no mapping 'config'")
    refused({**good, "config": 3}, "no mapping 'config'")
    refused({"config": {}}, r"none of oracle, stage1, stage2, control, model; expected .*, got \['config'\]")
    refused({**good, "config": {"rewards": "medvol_r1"}}, r"config\['rewards'\] is 'medvol_r1'; expected a list")
    refused({**good, "stage2": 0.5}, "stage2 lacks mdice, miou, hd95_mm")
    plane = {"mdice": 0.5, "miou": 0.4, "fail": 0.1, "n": 3}
    refused({**good, "stage2": plane}, "stage2 lacks hd95_mm, nsd, slice_visibility, slice_boxes; expected scores")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"results.json: not JSON"):
        tables.run_rows(str(tmp_path))


def test_a_score_that_is_none_names_run_and_stage(tmp_path):
    run = write(tmp_path / "run", stage1={**summary(0.5), "mdice": 50.0}, config={})
    with pytest.raises(DataError, match=r"run, synthetic: SFT only: mdice is 50.0; expected a fraction"):
        tables.check([str(run)])()


def test_the_command_line_wants_runs():
    with pytest.raises(SegRLError, match="the following arguments are required: RUN"):
        tables.check([])
    with pytest.raises(SegRLError, match="unrecognized arguments: --nonsense"):
        tables.check(["run", "--nonsense"])
