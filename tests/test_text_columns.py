"""Texts of data sets of others, and rows that name no lesion: what is written into questions and answers."""

import re
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from segrl.data import (
    Queries,
    check_rows,
    check_volumes,
    load_split,
    make_synthetic,
    make_synthetic_volumes,
    name_classes,
    prepare,
    prepare_volumes,
)
from segrl.errors import DataError, RewardError
from segrl.predictions import ImagePromptSettings, Target, VolumePromptSettings, read_target
from segrl.rewards import make_reward
from segrl.tasks import ImageTask

SETTINGS = ImagePromptSettings(frame_kind="original_px", reasoning=True)
VOLUME_SETTINGS = VolumePromptSettings(slices=4, size=32, frame_kind="original_px", reasoning=True)
CLASSES = ClassLabel(names=["cyst", "mass", "abscess"])


def images(**columns: Any) -> Dataset:
    """Three rows of another data set: other images, the same question."""
    rows = make_synthetic(3, size=48).select_columns(["image", "mask"])
    for name, values in ({"query": ["Find it."] * 3} | columns).items():
        feature = None
        if isinstance(values, tuple):
            values, feature = values
        rows = rows.add_column(name, values, feature=feature)  # type: ignore[call-arg]
    return rows


def saved(rows: Dataset, folder: Any) -> str:
    DatasetDict({"Train": rows, "test": rows.select([0])}).save_to_disk(str(folder / "data"))
    return str(folder / "data")


def answers(rows: Dataset) -> list[str]:
    made = prepare(rows, None, SETTINGS, completions=True)
    return [row["completion"][0]["content"] for row in map(dict, made)]  # type: ignore[call-overload]


FILLED = {name: [""] * 3 for name in ("modality", "anatomy")} | {"name": ["a", "b", "c"]}


@pytest.mark.parametrize("door", ["load_split", "prepare", "name_classes"])
def test_classes_count_by_their_names(door, tmp_path):
    rows = images(lesion=([2, 0, 1], CLASSES), **FILLED)
    if door == "load_split":
        rows = load_split(saved(rows, tmp_path), "train")
        assert rows["lesion"][:] == ["abscess", "cyst", "mass"]
    if door == "name_classes":
        rows = name_classes(rows)
    for text, lesion in zip(answers(rows), ("abscess", "cyst", "mass"), strict=True):
        assert f"The {lesion} is located at [" in text
        assert not re.search(r"\b[012]\b", text.split("</think>")[0])


def test_a_query_of_classes_is_asked_by_name(tmp_path):
    rows = images(query=([2, 0, 1], CLASSES), lesion=["x"] * 3, **FILLED)
    check_rows(rows)
    assert load_split(saved(rows, tmp_path), "train")["query"][:] == ["abscess", "cyst", "mass"]
    prompts = prepare(rows, None, SETTINGS, completions=False)["prompt"]
    assert [prompt[0]["content"].split()[0] for prompt in prompts] == ["abscess", "cyst", "mass"]


def test_a_missing_class_is_empty_and_columns_keep_their_places():
    rows = images(lesion=([None, -1, 1], CLASSES), site=([0, 1, 2], CLASSES), **FILLED)
    found = name_classes(rows)
    assert found["lesion"][:] == ["", "", "mass"]
    assert found.column_names == rows.column_names
    assert found["site"][:] == [0, 1, 2]  # no text of segrl


def test_volumes_and_questions_read_classes(tmp_path):
    rows = make_synthetic_volumes(1, tmp_path, depth=8, size=32)
    features = Features({**rows.features, "lesion": CLASSES})
    classed = rows.remove_columns("lesion").add_column("lesion", [1]).select_columns(rows.column_names).cast(features)  # type: ignore[call-arg]
    check_volumes(classed)
    made = prepare_volumes(classed, None, VOLUME_SETTINGS, completions=True)
    assert "mass" in made[0]["completion"][0]["content"]  # type: ignore[index]
    asked = Queries.from_texts({"mass": ["Grows slowly."]}).ask(classed)
    assert "Grows slowly" in asked["query"][0]


WRONG = {
    "text": (
        {"text": ["Where?"] * 3, "query": None},
        r"lacks the columns \['query'\].*rename_column\('text', 'query'\)",
    ),
    "list": (
        {"query": [["Where?", "Find it."]] * 3},
        r"column 'query' has the type List.*one text a row.*\['query'\]\[0\]",
    ),
    "numbers": (
        {"lesion": [0, 1, 2]},
        r"column 'lesion' has the type Value\('int64'\), expected one text a row.*NAMES",
    ),
    "reasoning": ({"reasoning": [["Dark."]] * 3}, "column 'reasoning' has the type List"),
    "fractions": ({"modality": [0.5, 1.0, 2.0]}, "column 'modality' has the type Value"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_something_else_than_texts_names_split_column_and_fix(kind, tmp_path):
    columns, message = WRONG[kind]
    rows = images(**{name: values for name, values in columns.items() if values})
    rows = rows.remove_columns([name for name, values in columns.items() if not values])
    with pytest.raises(DataError, match=rf"split 'Train' of \S*data: .*{message}"):
        load_split(saved(rows, tmp_path), "train")
    with pytest.raises(DataError, match=message):
        check_rows(rows)


@pytest.mark.parametrize("kind", ["list", "numbers"])
def test_prepare_refuses_the_same(kind):
    rows = images(**({"lesion": ["cyst"] * 3, **FILLED} | WRONG[kind][0]))
    with pytest.raises(DataError, match="has the type"):
        prepare(rows, None, SETTINGS, completions=True)
    with pytest.raises(DataError, match="has the type"):
        prepare(rows, None, SETTINGS, completions=False)


def test_names_may_be_numbers(tmp_path):
    rows = images(name=[7, 8, 9], lesion=["cyst"] * 3)
    assert load_split(saved(rows, tmp_path), "train")["name"][:] == ["7", "8", "9"]


@pytest.mark.parametrize("column", ["query", "lesion", "anatomy", "modality"])
def test_numbers_in_rows_of_batches_and_records_are_refused(column):
    mask = np.eye(4, dtype=bool)
    reward: Any = make_reward("box_f1")
    for read, kind in (
        (lambda: Target.texts_of({column: 0}), DataError),
        (lambda: read_target({"mask": mask, column: 3}), DataError),
        (
            lambda: reward(completions=["x"], prompts=["y"], mask=[mask], **{column: [0]}),
            RewardError,
        ),
    ):
        with pytest.raises(kind, match=rf"column '{column}'.*[03], expected a text"):
            read()
    assert Target.texts_of({"name": 3, "lesion": None})["name"] == "3"
    with pytest.raises(DataError, match=rf"^row 7: column '{column}': 2, expected a text"):
        ImageTask(None, SETTINGS).read([{"mask": mask, "name": "row 7", column: 2}])


# ---- rows that name no lesion ----------------------------------------------------------------------------------------


def test_an_answer_never_contradicts_its_question(tmp_path):
    """Rows without a lesion were answered with "The lesion is located at", whatever they asked."""
    rows = load_split(saved(images(query=["Segment the liver.", "Where is the Lesion?", "x"]), tmp_path), "train")
    message = r"2 of 3 rows name no lesion; row 0: the column lesion is empty, and the query 'Segment the liver\.'"
    for reasoning in (True, False):
        settings = ImagePromptSettings(frame_kind="original_px", reasoning=reasoning)
        with pytest.raises(DataError, match=message):
            prepare(rows, None, settings, completions=True)
    assert len(prepare(rows, None, SETTINGS, completions=False)) == 3  # no answer is written
    assert "The lesion is located at" in answers(rows.select([1]))[0]
    named = rows.map(lambda row: {"lesion": row["query"].split()[-1].strip(".")})
    assert "The liver is located at" in answers(named)[0]


def test_template_reasoning_of_volumes_needs_a_name(tmp_path):
    rows = make_synthetic_volumes(1, tmp_path, depth=8, size=32).map(
        lambda row: {"lesion": "", "query": "Segment the liver."}
    )
    with pytest.raises(DataError, match=r"the column lesion is empty, and the query 'Segment the liver\.'"):
        prepare_volumes(rows, None, VOLUME_SETTINGS, completions=True)
    given = rows.add_column("reasoning", ["A bright organ."])  # type: ignore[call-arg]
    assert len(prepare_volumes(given, None, VOLUME_SETTINGS, completions=True)) == 1
    plain = VolumePromptSettings(slices=4, size=32, frame_kind="original_px", reasoning=False)
    assert len(prepare_volumes(rows, None, plain, completions=True)) == 1


def test_images_of_paths_need_no_texts_but_the_query(tmp_path):
    """The smallest data set of others: two images and a question."""
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "m.png")
    features = Features({"image": ImageFeature(), "mask": ImageFeature(), "query": Value("string")})
    row = {"image": str(tmp_path / "a.png"), "mask": str(tmp_path / "m.png"), "query": "Where is the lesion?"}
    found = load_split(saved(Dataset.from_list([row], features=features), tmp_path), "test")
    assert isinstance(found.features["lesion"], Value)
    assert not isinstance(found.features["query"], List)
