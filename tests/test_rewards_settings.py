"""Wrong settings fail when a built-in reward is made, with name, value and range; many objects; inputs of others."""

import math
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
from answers import HEIGHT, LEFT, RIGHT, WIDTH, says, target_of
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import built_in

from segrl.errors import RewardError, SegRLError
from segrl.registry import resolve_attribute
from segrl.registry.plugins import load_plugin
from segrl.rewards import easyr1_compute_score, load_reward, make_reward, reward_info, swift_orm
from segrl.rewards.builtin import point_distance


def number_settings() -> list[tuple[str, str, bool]]:
    """Reward, setting, and whether it is a list, for every number that a built-in reward takes."""
    found = []
    for name in built_in():
        function = reward_info(name).function
        assert function is not None
        hints = get_type_hints(function)
        for setting in reward_info(name).settings:
            options = get_args(hints[setting]) or (hints[setting],)
            listed = get_origin(hints[setting]) is not None and float in options and "Sequence" in str(hints[setting])
            if int in options or float in options:
                found.append((name, setting, listed))
    return found


NUMBERS = number_settings()


def test_there_are_numbers():
    assert ("box_f1", "min_iou", False) in NUMBERS
    assert ("box_ap", "thresholds", True) in NUMBERS
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "x"], ids=str)
@pytest.mark.parametrize(("name", "setting", "listed"), NUMBERS)
def test_no_number(name, setting, listed, value):
    with pytest.raises(RewardError, match=f"{name}") as caught:
        make_reward(name, **{setting: [value] if listed else value})
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(("name", "setting", "listed"), [case for case in NUMBERS if case[1] != "weights"])
def test_negative(name, setting, listed):
    with pytest.raises(RewardError, match=rf"reward '{name}'.*expected"):
        make_reward(name, **{setting: [-1] if listed else -1})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("box_f1", {"min_iou": 1.0}, r"reward 'box_f1': min_iou=1\.0; expected a number in \[0, 1\), such as 0\.5"),
        ("core_seg", {"min_iou": 1.0}, r"reward 'core_seg': reward 'box_f1': min_iou=1\.0"),
        ("dual_granularity_mask", {"dice_threshold": 1.5}, r"dice_threshold=1\.5; expected a number in \[0, 1\]"),
        ("length_budget", {"minimum": 300}, "minimum=300; expected a number from 0 to limit=256"),
        ("json_format", {"keys": []}, r"keys=\(\); expected a list"),
        ("propagated_dice", {"delta": -1}, "delta=-1; expected a whole number of slices"),
    ],
)
def test_the_message_names_reward_setting_value_and_range(name, settings, message):
    with pytest.raises(RewardError, match=message):
        make_reward(name, **settings)


def test_defaults_are_right():
    for name in built_in():
        assert make_reward(name).name == name


# ---- many objects ----------------------------------------------------------------------------------------------------

coordinate = st.integers(0, 2 * WIDTH).map(lambda value: value / 2)
box = st.tuples(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1), st.integers(1, 9), st.integers(1, 9)).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], WIDTH), min(b[1] + b[3], HEIGHT)]
)


@given(
    points=st.lists(st.tuples(coordinate, coordinate.map(lambda y: min(y, HEIGHT))), max_size=6, unique=True),
    boxes=st.lists(box, max_size=6),
)
def test_points_inside_boxes_equal_a_slow_reading(points, boxes):
    prediction = says(*boxes, points=points)
    kept = [
        [x, y]
        for n, (x, y) in enumerate(prediction.points.tolist())
        if any(
            a <= x <= c and b <= y <= d
            for a, b, c, d in (
                [prediction.boxes[n].tolist()]
                if len(prediction.points) == len(prediction.boxes)
                else prediction.boxes.tolist()
            )
        )
    ]
    target = target_of(LEFT, RIGHT)
    settings = {"within_px": 100.0, "graded": True, "require_valid": False}
    found = point_distance(prediction, target, inside_box=True, **settings)
    fewer = point_distance(says(points=kept), target, **settings) * max(len(kept), 2) if kept else 0.0
    if prediction.points.size or prediction.boxes.size:
        assert found == pytest.approx(fewer / max(len(prediction.points), 2))


@pytest.mark.parametrize("fewer", [0, 1])
def test_the_work_is_linear_in_the_objects(fewer):
    def scored(count):
        boxes = [[n % 20, n % 15, n % 20 + 9 + n * 1e-7, 31] for n in range(count)]
        points = [[n % 30 + n * 1e-7, n % 31 + n * 1e-7] for n in range(count - fewer)]
        prediction = says(*boxes, points=points)
        assert (len(prediction.boxes), len(prediction.points)) == (count, count - fewer)
        return lambda: point_distance(prediction, target_of(LEFT, RIGHT), inside_box=True)

    assert grows_linearly(scored, 300)


# ---- inputs of others ------------------------------------------------------------------------------------------------

BOXES = {"boxes": [[0, 0, 8, 8]], "size": [16, 8]}
SAID = "<think>Dark.</think><answer>At [0, 0, 500, 1000].<seg></answer>"


def test_a_file_that_is_nested_too_deep_is_one_line(tmp_path):
    file = tmp_path / "deep.yaml"
    file.write_text("{rewards: [" * 1500 + "format" + "]}" * 1500)
    with pytest.raises(RewardError, match=r"deep\.yaml: nested too deep") as caught:
        load_reward(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raised", ["BaseException", "SystemExit", "GeneratorExit", "ValueError"])
def test_whatever_a_plugin_raises_is_one_line(tmp_path, monkeypatch, raised):
    name = f"raises_{raised.lower()}"
    (tmp_path / f"{name}.py").write_text(f"raise {raised}('broken')")
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[segrl.rewards]\n{name} = {name}:score\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for find in (
        lambda: make_reward(f"{name}:score"),
        lambda: make_reward(name),
        lambda: resolve_attribute(f"{name}:score"),
        lambda: load_plugin("segrl.rewards", name, "reward"),
    ):
        with pytest.raises(SegRLError, match=f"cannot be imported.*{raised}: broken"):
            find()


def test_numpy_columns_of_ms_swift():
    truths = np.array([BOXES, BOXES], dtype=object)
    orm = swift_orm("box_iou", ground_truth="solution")()
    assert orm([SAID, SAID], solution=truths) == [1.0, 1.0]
    masks = np.ones((2, 8, 16), dtype=bool)
    assert swift_orm("box_iou")()([SAID, SAID], mask=masks) == [0.5, 0.5]
    for call in (
        lambda: orm([SAID, SAID], solution=truths[:1]),
        lambda: swift_orm("box_iou")()([SAID, SAID], mask=masks[:1]),
        lambda: easyr1_compute_score("box_iou")([{"response": SAID}]),
    ):
        with pytest.raises(RewardError, match="reward 'box_iou'"):
            call()


@pytest.mark.parametrize(
    "written",
    [
        "json:dumps",
        "reward: 'json:dumps'",
        "rewards: [format, 'json:dumps']",
        "reward: format\nsteps: [{gate: {reward: 'json:dumps'}}]",
    ],
)
def test_files_of_others_import_nothing(tmp_path, written):
    file = tmp_path / "theirs.yaml"
    file.write_text(f"'{written}'" if written == "json:dumps" else written)
    with pytest.raises(RewardError, match=r"theirs\.yaml.*'json:dumps' would import code, and allow_imports=False"):
        load_reward(file, allow_imports=False)
    file.write_text("rewards: [format, {reward: box_f1, steps: [{gate: {reward: format}}]}]")
    assert load_reward(file, allow_imports=False) == load_reward(file)
