"""`tests/contract.py`: what it compares, and its arguments; running it on other versions needs the network."""

import pytest
from contract import PACKAGES, ROOT, TABLE, main, moved, oldest, sources, with_rows


def test_moved():
    before, after = {"A.f": "x\ny", "A.g": "x", "A.i": "same"}, {"A.f": "x\nz", "A.h": "x", "A.i": "same"}
    assert moved(before, after) == ["A.f: 1 lines more, 1 less", "A.g: gone", "A.h: new"]


def test_sources_are_those_of_overridden_methods():
    found = sources()
    assert {"GRPOTrainer._generate", "GRPOTrainer._compute_loss", "SFTTrainer.compute_loss", "Trainer._save"} <= set(
        found
    )
    assert "def _generate(" in found["GRPOTrainer._generate"]
    assert "GRPOTrainer._get_train_sampler" not in found  # not overridden


@pytest.mark.parametrize("text", ["trl", "trl==1.16.0", "trl>1"])
def test_arguments(text, capsys):
    with pytest.raises(SystemExit):
        main([text])
    assert "expected package=version, such as transformers=5.17.0" in capsys.readouterr().err


def test_oldest_of_each_pin():
    found = oldest((ROOT / "pyproject.toml").read_text())
    assert {item.split("=")[0] for item in found} == set(PACKAGES) - {"torch"}
    assert all(item.split("=")[1][0].isdigit() for item in found)


def test_the_table_gets_other_rows_and_keeps_the_rest():
    page = TABLE.read_text()
    rows = [f"| {' | '.join('1' * len(PACKAGES))} | {n} passed, 0 failed |" for n in (5, 7, 9)]
    found = with_rows(page, rows)
    assert [line for line in found.splitlines() if line not in page.splitlines()] == rows
    kept = [line for line in page.splitlines() if " passed, " not in line]
    assert [line for line in found.splitlines() if line not in rows] == kept
    with pytest.raises(SystemExit, match="no table with the columns trl, "):
        with_rows("| other |", rows)


def test_a_table_of_given_versions_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--table", "trl=1.16.0"])
    assert "drop the versions" in capsys.readouterr().err
