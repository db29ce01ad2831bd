"""`benchmarks/gate.py`: what is compared, what moved, and the committed numbers of record."""

import json
from pathlib import Path

import pytest
import torch
from script_modules import script_modules

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    with script_modules(BENCHMARKS) as found:
        yield found


@pytest.fixture(scope="module")
def gate(modules):
    return modules["gate"]


class TestOperations:
    """Bytes are those of storages: 4 a number here."""

    def test_by_phase(self, modules):
        with modules["step_counts"].Operations("first") as found:
            kept = torch.zeros(1000)
            kept.view(10, 100).add_(1.0)  # one operation that makes no tensor
            with found.during("second"):
                (kept + 1).sum()  # 4000 bytes for a while, and a scalar
            del kept
        assert found.total == {"first": 2, "second": 2}
        assert found.peak == {"first": 4000, "second": 8004}
        assert found.live == 0

    def test_what_was_there_before_does_not_count(self, modules):
        before = torch.zeros(1000)
        with modules["step_counts"].Operations() as found:
            before += 1
            before[:10].mul_(2)
        assert (found.live, found.peak.total(), found.total.total()) == (0, 0, 2)

    def test_what_the_backward_pass_needs(self, modules):
        weight = torch.zeros(1000, requires_grad=True)
        with modules["step_counts"].Operations() as found:
            loss = weight.exp().exp().sum()  # both results are saved for their derivatives
            assert found.live == 8004
            loss.backward()
            del loss
            assert found.live == 4000  # the gradient
        weight.grad = None
        assert found.live == 0

    def test_every_kind_of_result(self, modules):
        with modules["step_counts"].Operations() as found:
            values, indices = torch.zeros(8, 16).max(dim=1)
            parts = torch.ones(16).split(4)  # views of one storage
        assert found.live == 8 * 4 + 8 * 8 + 16 * 4
        del values, indices, parts
        assert found.live == 0


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

    def test_peaks_of_memory(self, gate):
        for path in gate.BASELINES.glob("*.json"):
            record = json.loads(path.read_text())
            for arm in gate.SCENARIOS[path.stem].arms:
                assert record[f"{arm}/peak_bytes/loss"] > record[f"{arm}/peak_bytes/rollout"] > 0


class TestCommand:
    def test_an_unknown_scenario(self, gate, capsys):
        with pytest.raises(SystemExit):
            gate.main(["shrot"])
        assert "unknown scenarios ['shrot']" in capsys.readouterr().err

    def test_no_record(self, gate, tmp_path):
        with pytest.raises(SystemExit, match="no numbers of record for 'short'; write them with --update"):
            gate.main(["short", "--baselines", str(tmp_path)])

    @pytest.mark.slow
    @pytest.mark.long
    @pytest.mark.parametrize("name", ["short", "core_seg", "medvol", "lora", "accumulated"])
    def test_the_records_hold(self, gate, name):
        assert gate.main([name]) == 0

    @pytest.mark.slow
    def test_a_run(self, gate, tmp_path, capsys):
        """The record holds; one that says otherwise ends with status 1 and a table."""
        assert gate.main(["filled"]) == 0
        record = json.loads((gate.BASELINES / "filled.json").read_text())
        changed = {**record, "segrl/loss_operations": record["segrl/loss_operations"] * 0.9}
        changed["segrl/peak_bytes/loss"] *= 2
        (tmp_path / "filled.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert gate.main(["filled", "--baselines", str(tmp_path)]) == 1
        found = capsys.readouterr()
        assert "moved by more than 5%" in found.out
        assert "filled  segrl/loss_operations" in found.out
        assert "+11.1%" in found.out
        assert "filled  segrl/peak_bytes/loss" in found.out
        assert "-50.0%" in found.out
        assert "seconds/loss" in found.err
        assert gate.main(["filled", "--baselines", str(tmp_path), "--update"]) == 0
        assert json.loads((tmp_path / "filled.json").read_text()) == pytest.approx(record)
