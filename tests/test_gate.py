"""`benchmarks/gate.py`: what is compared, what moved, and the committed numbers of record."""

import json
from pathlib import Path

import pytest
from script_modules import script_modules

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gate():
    with script_modules(BENCHMARKS) as modules:
        yield modules["gate"]


class TestMoved:
    def test_within_the_tolerance(self, gate):
        assert gate.moved({"a": 100, "b": 0}, {"a": 104.9, "b": 0}) == []
        assert gate.moved({"a": 100}, {"a": 95.1}) == []

    def test_both_directions(self, gate):
        assert gate.moved({"a": 100, "b": 2.5}, {"a": 106, "b": 1.25}) == [
            ["a", "100", "106", "+6.0%"],
            ["b", "2.5", "1.25", "-50.0%"],
        ]

    def test_what_is_on_one_side_only(self, gate):
        found = gate.moved({"a": 1, "c": 0}, {"b": 2, "c": 3})
        assert found == [["a", "1", "-", "missing"], ["b", "-", "2", "new"], ["c", "0", "3", "from 0"]]

    def test_a_tolerance(self, gate):
        assert gate.moved({"a": 100}, {"a": 106}, 0.1) == []


class TestRecords:
    def test_every_scenario_has_one(self, gate):
        assert {path.stem for path in gate.BASELINES.glob("*.json")} == set(gate.SCENARIOS)

    def test_no_time_is_compared(self, gate):
        for path in gate.BASELINES.glob("*.json"):
            record = json.loads(path.read_text())
            assert len(record) > 5
            assert not [name for name in record if "second" in name]
            assert all(value >= 0 for value in record.values())

    def test_filled_micro_batches_are_one_pass(self, gate):
        accumulated, filled = (
            json.loads((gate.BASELINES / f"{name}.json").read_text()) for name in ("accumulated", "filled")
        )
        assert accumulated["segrl/lm_forwards/forward"] == 4 * filled["segrl/lm_forwards/forward"]
        assert accumulated["segrl/lm_tokens/forward"] == filled["segrl/lm_tokens/forward"]
        assert filled["segrl/loss_operations"] < 0.5 * accumulated["segrl/loss_operations"]


class TestCommand:
    def test_an_unknown_scenario(self, gate, capsys):
        with pytest.raises(SystemExit):
            gate.main(["shrot"])
        assert "unknown scenarios ['shrot']" in capsys.readouterr().err

    def test_no_record(self, gate, tmp_path):
        with pytest.raises(SystemExit, match="no numbers of record for 'short'; write them with --update"):
            gate.main(["short", "--baselines", str(tmp_path)])

    @pytest.mark.slow
    def test_a_run(self, gate, tmp_path, capsys):
        """The record holds; one that says otherwise ends with status 1 and a table."""
        assert gate.main(["filled"]) == 0
        record = json.loads((gate.BASELINES / "filled.json").read_text())
        changed = {**record, "segrl/loss_operations": record["segrl/loss_operations"] * 0.9}
        (tmp_path / "filled.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert gate.main(["filled", "--baselines", str(tmp_path)]) == 1
        found = capsys.readouterr()
        assert "moved by more than 5%" in found.out
        assert "filled  segrl/loss_operations" in found.out
        assert "+11.1%" in found.out
        assert "seconds/loss" in found.err
        assert gate.main(["filled", "--baselines", str(tmp_path), "--update"]) == 0
        assert json.loads((tmp_path / "filled.json").read_text()) == pytest.approx(record)
