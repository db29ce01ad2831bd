"""`benchmarks/newcomer.py`: its four layouts hold the same images, so that a run of one is a run of all."""

import runpy
import shlex
from typing import Any

import numpy as np
import pytest
from script_modules import ROOT

from segrl.cli.main import main
from segrl.data import load_folder

SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "newcomer.py"))


@pytest.mark.slow
def test_four_layouts_become_one_data_set(tmp_path, monkeypatch):
    found = {}
    for layout, write in SCRIPT["LAYOUTS"].items():
        home = tmp_path / layout
        home.mkdir()
        write(home)
        monkeypatch.chdir(home)
        program, *words = shlex.split(SCRIPT["CONVERT"][layout])
        assert program == "segrl"
        assert main(words) == 0
        parts = [load_folder("data", split=split) for split in ("train", "test")]
        assert [len(part) for part in parts] == [32, 8]
        rows: list[Any] = [row for part in parts for row in part]
        values = [(np.asarray(row["image"].convert("L")), np.asarray(row["mask"]) > 0) for row in rows]
        texts = [(row["query"], row["lesion"]) for row in rows]
        found[layout] = sorted(
            (*map(np.ndarray.tobytes, pair), *text) for pair, text in zip(values, texts, strict=True)
        )
    assert set(found) == {"pairs", "coco", "nnunet", "hf"}
    assert all(rows == found["pairs"] for rows in found.values())
    assert {text for row in found["pairs"] for text in row[2:]} == {"Where is the nodule?", "nodule"}
