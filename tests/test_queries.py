"""Questions that do not name the structure, from files in the layout of M3D's term dictionary and from paraphrases."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from script_modules import Example

from segrl import SegGRPOConfig
from segrl.data import Queries, make_synthetic
from segrl.errors import DataError, SegRLError

# in the layout, and with the faults, of M3D's Data/data/M3D-Seg/term_dictionary.json: repeats, and texts with the name
TERMS = {
    "liver": [
        "Produces bile, a fluid that aids in digestion.",
        "Large organ in the upper right abdomen.",
        "Large organ in the upper right abdomen.",
        "Liver: Vital organ involved in digestion.",
    ],
    "lungs": ["A lung takes up oxygen.", "Pair of organs that take up oxygen."],
    "kidney tumor": ["A tumor that grows in the kidney.", "Abnormal mass on an organ that filters blood."],
}


def written(folder: Path, content: Any) -> str:
    path = folder / "terms.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def rows_of(*lesions: str) -> Dataset:
    return Dataset.from_list(
        [{"name": f"case {n}", "lesion": name, "query": f"Segment the {name}."} for n, name in enumerate(lesions)]
    )


def test_no_question_names_its_structure(tmp_path):
    queries = Queries.from_files(written(tmp_path, TERMS), None)
    assert queries is not None
    assert queries.left_out == 3
    rows = rows_of(*["liver", "Lung", "kidney tumor"] * 20)
    asked = queries.ask(rows)
    for row in map(dict, asked):  # type: ignore[call-overload]
        words = set(re.findall(r"\w+", row["query"].lower()))
        assert not set(row["lesion"].lower().split()) <= words
        assert any(text.rstrip(".") in row["query"] for texts in TERMS.values() for text in texts)
    assert len(set(asked["query"])) >= 8
    assert asked["lesion"] == rows["lesion"]
    assert queries.ask(rows)["query"][:] == asked["query"][:]


def test_paraphrases_are_asked_as_they_are(tmp_path):
    queries = Queries.from_files(None, written(tmp_path, {"kidney tumor": ["Where is the abnormal mass?"]}))
    assert queries is not None
    assert queries.ask(rows_of("kidney tumors"))["query"][:] == ["Where is the abnormal mass?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"--descriptions '.*terms.json' cannot be read"),
        ([1], "holds a list, expected an object of texts by structure"),
        ({}, "expected an object of texts"),
        ({"liver": "bile"}, "'liver' holds 'bile', expected a list of texts"),
        ({"liver": ["The liver."]}, "all texts of 'liver' name it, expected at least one that does not"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        Queries.from_files(written(tmp_path, content), None)


def test_structures_without_a_text_are_named(tmp_path):
    queries = Queries.from_files(written(tmp_path, TERMS), None)
    assert queries is not None
    with pytest.raises(DataError, match="no text for 'pancreas', 'spleen', found in the column lesion"):
        queries.ask(rows_of("spleen", "liver", "pancreas"))
    with pytest.raises(SegRLError, match="--descriptions and --paraphrases both replace the questions"):
        Queries.from_files("a.json", "b.json")
    with pytest.raises(DataError, match=r"--paraphrases 'no_such\.json' cannot be read"):
        Queries.from_files(None, "no_such.json")


def test_scripts_ask_for_every_split(tmp_path, capsys):
    """The synthetic lesions of CORE-Seg, which its own questions name."""
    rows: Any = make_synthetic(60, size=32)
    kinds = {row["lesion"] for row in rows}
    terms = written(
        tmp_path, {kind: [f"What an expert calls number {n}.", f"A {kind}."] for n, kind in enumerate(sorted(kinds))}
    )
    runs = Example("core_seg").modules["recipe"].CoreSegRun
    flags = ["--descriptions", terms, "--train_limit", "4", "--eval_limit", "2", "--use_cpu", "true"]
    run, _ = runs._begin([*flags, "--output_dir", str(tmp_path / "run")], SegGRPOConfig, "grpo", "x")
    assert f"{len(kinds)} texts left out, they name their structure" in capsys.readouterr().out
    for split in ("train", "test"):
        assert all("What an expert calls number" in query for query in run.rows[split]["query"])
    said = Example("core_seg").refused("train_grpo", *flags[2:6], "--descriptions", "no.json")
    assert "--descriptions 'no.json' cannot be read" in said
