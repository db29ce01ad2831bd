"""`tests/contract.py`: what it compares, and its arguments; running it on other versions needs the network."""

import pytest
from contract import main, moved, sources


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
