"""Names on disk or on the hub, and other libraries' errors in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segrl.errors import CheckpointError, DataError, SegRLError, unknown_name
from segrl.hub import check_source, is_hub_name, reraise_as


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("mine", False),
        ("a/b/c", False),
        ("./mine", False),
        ("../mine", False),
        ("~/mine", False),
        ("/mine", False),
        ("mine/", False),
        ("data/my scans", False),
        ("", False),
    ],
)
def test_what_looks_like_a_name(text, expected):
    assert is_hub_name(text) is expected


def test_folders_and_names_pass(tmp_path):
    check_source("--model", str(tmp_path), "model")
    check_source("--model", "owner/name", "model")


@pytest.mark.parametrize("value", ["mine", "./no/such", ""])
def test_neither_folder_nor_name(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        check_source("--data", value, "data set", DataError)
    assert str(caught.value) == f"--data {value!r}: no such folder, nor a data set name owner/name"


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), max_size=6), st.sampled_from("\n\t "))
def test_many_lines_become_one(words, gap):
    with pytest.raises(CheckpointError) as caught, reraise_as("--model 'mine'", CheckpointError):
        raise OSError(gap.join(words))
    assert str(caught.value) == f"--model 'mine': {' '.join(words)}"
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass_as_they_are():
    own = DataError("ours")
    for error in (own, TypeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, reraise_as("--data 'mine'", SegRLError):
            raise error
        assert caught.value is error


def test_without_an_error_nothing_happens():
    with reraise_as("--data 'mine'"):
        value = 1
    assert value == 1


def test_unknown_names_get_a_suggestion():
    error = unknown_name("reward", "box_f2", iter(["format", "box_f1"]))
    assert str(error) == "unknown reward 'box_f2'; did you mean 'box_f1'? Known: box_f1, format"
    assert "did you mean" not in str(unknown_name("reward", "zzz", ["format"]))
    assert str(unknown_name("head", "x", [])).endswith("Known: none")
