"""Published scores as data: well formed, equal where tables repeat themselves, and commands that our scripts take."""

from pathlib import Path
from typing import Any

import pytest
from script_modules import ROOT, Example

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import DataError
from segrl.reports import PublishedRow, load_published
from segrl.scripts import check_rewards, parse

FILES = {name: ROOT / "examples" / name / "published.yaml" for name in ("core_seg", "medvol_r1")}
RUNS = {"core_seg": "CoreSegRun", "medvol_r1": "MedVolRun", "lisa": "LisaRun", "seg_zero": "SegZeroRun"}
CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]


@pytest.fixture(params=FILES)
def name(request) -> str:
    return request.param


def scores(rows: list[PublishedRow], **where: str) -> Any:
    (row,) = [row for row in rows if all(getattr(row, key) == value for key, value in where.items())]
    return tuple(round(100 * value, 2) for value in row.scores.values())


def test_rows_are_well_formed(name):
    rows = load_published(FILES[name])
    allowed = {"mdice", "miou", "fail"} if name == "core_seg" else {"mdice", "miou"}
    by_setting: dict[Any, set[Any]] = {}
    for row in rows:
        assert set(row.scores) <= allowed
        assert row.scores or row.note
        assert row.scores.get("miou", 0) <= row.scores.get("mdice", 1)
        by_setting.setdefault((row.data, row.command, row.method), set()).add(tuple(row.scores.items()))
    assert len({(row.table, row.data, row.method) for row in rows}) == len(rows)
    assert all(len(found) == 1 for found in by_setting.values())  # a row that two tables have is the same in both


def test_values_of_core_seg():
    rows = load_published(FILES["core_seg"])
    assert {table: sum(row.table == table for row in rows) for table in "12345"} == dict(
        zip("12345", (14, 16, 6, 4, 3), strict=True)
    )
    assert scores(rows, table="1", method="CORE-Seg") == (37.06, 27.79, 18.42)
    assert scores(rows, table="1", method="LISA-3B") == (22.17, 16.49, 44.28)
    assert scores(rows, table="2", method="SG-A, S1 + S2", data="ISPY") == (38.71, 13.0)
    assert scores(rows, table="3", method="CoT, r_fmt + r_bbox") == (26.87, 18.91, 30.08)
    assert scores(rows, table="4", method="whole answer, S1") == (32.25, 23.9, 24.82)
    assert scores(rows, table="5", method="SAM-Med2D, S1") == (19.58, 13.44, 45.28)
    anatomy = [row.groups["anatomy"] for row in rows if row.table == "1"]
    assert all(
        list(found) == ["Head", "Abdomen", "Lung", "Eye", "Neck", "Skin", "Foot", "Breast", "Heart"]
        for found in anatomy
    )
    assert (anatomy[-1]["Eye"], anatomy[-1]["Breast"]) == (0.0828, 0.7099)


def test_values_of_medvol_r1():
    rows = load_published(FILES["medvol_r1"])
    assert {table: sum(row.table == table for row in rows) for table in ("1", "2a", "2b")} == {
        "1": 15,
        "2a": 7,
        "2b": 4,
    }
    assert scores(rows, table="1", method="SFT + RL", data="KiTS23") == (45.46, 29.42)
    assert scores(rows, table="1", method="BiomedParseV2", data="CT-ORG") == (40.23, 25.18)
    assert scores(rows, table="2a", method="RL only") == ()
    assert scores(rows, table="2b", method="SFT + RL, delta 15") == (83.99, 72.4)


def test_commands_are_ones_that_the_scripts_take(name):
    rows = load_published(FILES[name])
    assert sum(bool(row.command) for row in rows) >= 15
    for command in {row.command for row in rows if row.command}:
        place, *flags = command
        *other, script = place.removeprefix("../").split("/")
        example = other[0] if other else name
        runs = getattr(Example(example).modules["recipe"], RUNS[example])
        stage = script.removeprefix("train_")
        config = {"sft": SegSFTConfig, "grpo": SegGRPOConfig}[stage]
        arguments, _, given = parse([*flags, *CPU], runs.training_flags, config)
        check_rewards(arguments.rewards or runs.recipes["tiny"].rewards, arguments.drop_rewards or ())
        assert stage == "grpo" or not given & set(runs.stage2_flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "cannot be read"),
        ("rows: []", "expected 'unit: percent' and a list 'rows'"),
        ("unit: percent\nrows: [3]", "row 1: 3, expected a mapping"),
        ("unit: percent\nrows: [{table: 1}]", "row 1: table=1, expected a text"),
        ("unit: percent\nrows: [{tabel: a}]", "unknown key 'tabel'; did you mean 'table'"),
        ("unit: percent\nrows: [{table: a, data: b, method: c, scores: {mdice: 101}}]", "mdice=101, expected a number"),
        ("unit: percent\nrows: [{table: a, data: b, method: c, scores: 3}]", "row 1: 3, expected scores by name"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text, message):
    file = tmp_path / "published.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_published(file)
