"""Rewards made of rewards: steps, sums, and the same as YAML."""

import asyncio
import inspect
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import EMPTY, GOOD, TARGET, as_trl_calls, mask_of, read, reloaded, says

from segrl.errors import FrameError, RewardError, UnknownNameError
from segrl.rewards import CompletionFormat, dump_reward, load_reward, make_reward, weighted_sum
from segrl.rewards.builtin import presets
from segrl.rewards.transforms import Schedule

finite = st.floats(-5, 5)
scores = st.lists(st.none() | finite, min_size=1, max_size=8)


class Given:
    """Scores the numbers in the texts; None for "-"."""

    def score_batch(self, predictions, targets):
        return [None if p.text == "-" else float(p.text) for p in predictions]


def score_of(reward, values, **options):
    predictions = [read("-" if value is None else repr(float(value))) for value in values]
    return reward.score_batch(predictions, [TARGET] * len(values), **options)


given_scores = make_reward(Given)


def one_box(prediction, target):
    return float(len(prediction.boxes) == 1)


def from_a_folder(prediction, target, *, folder=None):
    return 0.0


async def one_box_later(prediction, target):
    await asyncio.sleep(0.001)
    return one_box(prediction, target)


# --- steps


@given(scores, finite, st.floats(0, 5), finite, finite)
def test_clip_and_scale_map_every_score(values, low, width, factor, offset):
    high = low + width
    wanted = [None if v is None else factor * min(max(v, low), high) + offset for v in values]
    reward = given_scores.clip(low, high).scale(factor, offset)
    assert score_of(reward, values) == wanted
    assert reward.range is not None
    assert all(reward.range[0] - 1e-9 <= v <= reward.range[1] + 1e-9 for v in wanted if v is not None)


def test_steps_apply_in_order():
    assert score_of(given_scores.scale(2).clip(0, 1), [0.7]) == [1.0]
    assert score_of(given_scores.clip(0, 1).scale(2), [0.7]) == [1.4]


def test_a_schedule_follows_the_training_progress():
    reward = given_scores.schedule({0.5: 1, 0.1: 0})
    assert [score_of(reward, [2, None], progress=p)[0] for p in (0, 0.1, 0.3, 0.5, 1)] == pytest.approx([0, 0, 1, 2, 2])
    assert score_of(reward, [None], progress=0.3) == [None]
    assert given_scores.schedule({0: -1, 1: 3}).range is None
    assert make_reward("box_f1").schedule({0: -1, 1: 3}).range == (-1.0, 3.0)
    state = type("State", (), {"global_step": 3, "max_steps": 10})()
    call = {"completions": [GOOD], "mask": [TARGET.mask]}
    assert make_reward("format").schedule({0: 0, 1: 1})(**call, trainer_state=state) == [pytest.approx(0.3)]
    assert make_reward("format").schedule({0: 0, 1: 1})(**call) == [1.0]


@pytest.mark.parametrize("points", [{}, {2: 1}, {0: math.inf}, {-0.1: 1}, [(0, 1), (0, 2)], {"a": 1}, 3, [1, 2]])
def test_a_schedule_that_is_none(points):
    with pytest.raises(RewardError, match=r"schedule: points=.*expected factors by progress in \[0, 1\]"):
        Schedule(points)


def test_a_gate_scores_only_where_another_reward_holds():
    gated = make_reward("box_f1", require_valid=False).gate("format")
    assert gated.score(read(GOOD), TARGET) == 1.0
    assert gated.score(read(GOOD + "!"), TARGET) == 0.0
    assert make_reward("box_f1").gate("format", above=1.0).score(read(GOOD), TARGET) == 0.0
    assert make_reward("box_f1").gate("format", above=1.0, otherwise=-2).score(read(GOOD), TARGET) == -2.0
    assert make_reward("box_f1").gate("format", otherwise=-2).range == (-2.0, 1.0)


def test_a_closed_gate_never_scores_more_than_the_lowest_score():
    mask = make_reward("dual_granularity_mask", require_valid=False).gate("format")
    far = says(mask=mask_of([36, 0, 40, 2]), reasoning="x")
    open_score = mask.score(far, TARGET)
    closed = read(far.text + "!").with_mask(TARGET.mask)
    assert open_score is not None
    assert -1 < open_score < 0
    assert mask.score(closed, TARGET) == -1.0
    assert mask.range == (-1.0, 3.0)
    assert mask.needs_mask


def test_a_gate_is_closed_where_its_reward_does_not_apply_and_none_stays_none():
    gated = make_reward("format").gate(make_reward(lambda prediction, target: None))
    assert gated.score(read(GOOD), TARGET) == 0.0
    assert make_reward(lambda prediction, target: None).gate("format").score(read(GOOD), TARGET) is None


def test_group_relative_known_values():
    values = [1.0, 3.0, None, 3.0, 0.0]
    assert score_of(given_scores.group_relative(), values) == [1 / 3, 2.5 / 3, None, 2.5 / 3, 0.0]
    assert score_of(given_scores.group_relative("best"), values) == [0.0, 1.0, None, 1.0, 0.0]
    assert score_of(given_scores.group_relative("center"), values) == [-0.75, 1.25, None, 1.25, -1.75]
    spread = np.std([1, 3, 3, 0])
    expected = [-0.75 / spread, 1.25 / spread, None, 1.25 / spread, -1.75 / spread]
    assert score_of(given_scores.group_relative("zscore"), values) == [
        v if v is None else pytest.approx(v) for v in expected
    ]
    assert score_of(given_scores.group_relative("zscore"), [0.1] * 3) == [0.0] * 3
    assert score_of(given_scores.group_relative("zscore"), [0.0, 1e-200]) == [-1.0, 1.0]
    assert score_of(given_scores.group_relative(), [7.0]) == [0.5]
    assert score_of(given_scores.group_relative(), [None]) == [None]
    assert make_reward("box_f1").group_relative("center").range == (-1.0, 1.0)
    assert make_reward("box_f1").group_relative("rank").range == (0.0, 1.0)
    assert make_reward("box_f1").group_relative("zscore").range is None


def test_groups_by_size_by_id_and_by_truth():
    values = [0.0, 1.0, 2.0, 3.0]
    best = given_scores.group_relative("best")
    assert score_of(best, values) == [0.0, 0.0, 0.0, 1.0]
    assert score_of(best, values, groups=[0, 1, 0, 1]) == [0.0, 0.0, 1.0, 1.0]
    assert score_of(given_scores.group_relative("best", 2), values) == [0.0, 1.0, 0.0, 1.0]
    predictions = [read(str(v)) for v in values]
    assert best.score_batch(predictions, [TARGET, TARGET, EMPTY, EMPTY]) == [0.0, 1.0, 0.0, 1.0]
    with pytest.raises(RewardError, match="4 rows are not a multiple of group_size=3"):
        score_of(given_scores.group_relative("best", 3), values)
    with pytest.raises(RewardError, match="mode='top'; expected one of rank"):
        given_scores.group_relative("top")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RewardError, match="group_size=0; expected a positive"):
        given_scores.group_relative("rank", 0)


@given(st.lists(finite, min_size=1, max_size=8), st.randoms())
def test_the_rank_depends_on_the_order_of_scores_only(values, random):
    ranks = dict(zip(values, score_of(given_scores.group_relative(), values), strict=True))
    shuffled = random.sample(values, len(values))
    assert score_of(given_scores.group_relative(), shuffled) == [ranks[v] for v in shuffled]
    assert sum(score_of(given_scores.group_relative(), values)) == pytest.approx(len(values) / 2)  # pyright: ignore


def test_a_composition_that_overflows_names_the_row():
    with pytest.raises(RewardError, match=r"reward 'Given', row 1 .*returned inf after its steps"):
        score_of(given_scores.scale(1e300), [1.0, 1e300])
    with pytest.raises(RewardError, match=r"reward 'total', row 0 .*returned inf"):
        score_of(weighted_sum([(given_scores, 1e300), ("format", 1.0)]), [1e300, 1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: r.clip(1, 0), "clip: low=1, high=0; expected low <= high"),
        (lambda r: r.clip(0, math.nan), "clip: low=0, high=nan"),
        (lambda r: r.scale(math.inf), "scale: factor=inf; expected a finite number"),
        (lambda r: r.gate("format", above=math.nan), "gate: above=nan"),
        (lambda r: r.gate("fromat"), "unknown reward 'fromat'; did you mean 'format'"),
    ],
)
def test_steps_check_their_settings(make, message):
    with pytest.raises((RewardError, UnknownNameError), match=message):
        make(given_scores)


# --- sums


def test_a_sum_adds_up_weights_and_leaves_out_what_does_not_apply():
    total = weighted_sum([(given_scores, 2.0), (make_reward("format"), 0.5)])
    assert score_of(total, [3, None]) == [6.0, 0.0]
    assert weighted_sum({Given: 2.0}).score(read("-"), TARGET) is None
    assert total.components([read("3"), read("-")], [TARGET] * 2) == {
        "Given": [3.0, None],
        "format": [0.0, 0.0],
        "total": [6.0, 0.0],
    }
    assert given_scores.components([read("3")], [TARGET]) == {"total": [3.0]}
    assert [(part.name, weight) for part, weight in total.parts] == [("Given", 2.0), ("format", 0.5)]
    assert total.clip(0, 1).parts == ((total.clip(0, 1), 1.0),)


def test_a_sum_declares_what_follows_from_its_parts():
    total = weighted_sum({"format": 1.0, "box_f1": 2.0, "dual_granularity_mask": -1.0}, name="mine")
    assert total.range == (-3.0, 4.0)
    assert total.needs_mask
    assert total.needs_target
    assert set(total.info.invariant) == {"box_order", "flip", "rescale"}
    assert total.info.equation == "1 · format + 2 · box_f1 + -1 · dual_granularity_mask"
    assert not weighted_sum({"format": 1.0}).needs_target


def test_a_sum_logs_the_mean_of_every_part():
    total = weighted_sum(
        {"format": 1.0, "box_f1": 2.0}, name="mine", completion_format=CompletionFormat(frame="original_px")
    )
    result, logged = as_trl_calls(total, [GOOD, "no"], mask=[TARGET.mask] * 2)
    assert result == [3.0, 0.0]
    assert logged == {"valid_completions": 0.5, "mine/format": 0.5, "mine/box_f1": 0.5}


def test_a_sum_with_an_async_part_is_async():
    total = weighted_sum([("format", 1.0), (one_box_later, 1.0)])
    assert total.is_async
    assert make_reward("format").gate(make_reward(one_box_later)).is_async
    one = says([1, 1, 2, 2])
    assert total.score_batch([one, says()], [TARGET] * 2) == [2.0, 1.0]
    result, _ = as_trl_calls(total, [one.text], mask=[TARGET.mask])
    assert inspect.iscoroutine(result)
    assert asyncio.run(result) == [2.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "a sum of no parts"),
        ([("format", 1.0), ("format", 2.0)], r"two parts are named 'format'; rename one with \.named"),
        ({"format": math.inf}, "weight of 'format' is inf; expected a finite number"),
        ({"format": "1"}, "weight of 'format' is '1'"),
    ],
)
def test_what_is_no_sum(parts, message):
    with pytest.raises(RewardError, match=message):
        weighted_sum(parts)


def test_a_whole_reads_completions_as_its_parts_do():
    json = make_reward("format", answer_format="json", require_seg=False)
    pixels = make_reward("box_f1", frame="original_px")
    assert weighted_sum([(json, 1.0), ("box_f1", 1.0)]).completion_format == json.completion_format
    assert make_reward("box_f1").gate(json).completion_format == json.completion_format
    with pytest.raises(RewardError, match="its parts read completions in different ways"):
        weighted_sum([(json, 1.0), (pixels, 1.0)])
    assert (
        weighted_sum(
            [(json, 1.0), (pixels, 1.0)], completion_format=CompletionFormat(seg_token="<m>")
        ).completion_format.seg_token
        == "<m>"
    )
    assert make_reward(json, frame="original_px").completion_format == CompletionFormat(
        "original_px", require_seg=False, answer_format="json"
    )
    with pytest.raises(RewardError, match=r"is made already"):
        make_reward(pixels, min_iou=0.1)


# --- files

YAML = """\
name: mine
completion_format: {frame: original_px, require_seg: false}
rewards:
  - reward: format
  - reward: box_f1
    name: boxes
    weight: 2.0
    settings: {min_iou: 0.3}
    steps:
      - gate: format
      - clip: [0, 1]
      - schedule: {0: 0, 0.3: 1}
  - name: both
    weight: 0.5
    rewards:
      - {reward: box_f1, weight: 1}
      - reward: dual_granularity_mask
        steps:
          - gate: {reward: {reward: box_f1, settings: {min_iou: 0.1}, steps: [{scale: 2}]}, above: 0.5, otherwise: 0}
          - group_relative: {mode: rank, group_size: 4}
steps:
  - scale: {factor: 0.5, offset: 1}
"""


def composed():
    gate = make_reward("box_f1", min_iou=0.1).scale(2)
    both = weighted_sum(
        [("box_f1", 1), (make_reward("dual_granularity_mask").gate(gate, 0.5, 0).group_relative("rank", 4), 1)], "both"
    )
    boxes = make_reward("box_f1", min_iou=0.3).named("boxes").gate("format").clip(0, 1).schedule({0: 0, 0.3: 1})
    completion_format = CompletionFormat("original_px", require_seg=False)
    return weighted_sum([("format", 1), (boxes, 2), (both, 0.5)], "mine", completion_format=completion_format).scale(
        0.5, 1
    )


def test_yaml_and_python_are_two_forms_of_one_thing(tmp_path):
    file = tmp_path / "rewards.yaml"
    file.write_text(YAML)
    loaded = load_reward(file)
    assert loaded == composed()
    assert reloaded(loaded) == loaded
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def test_a_file_may_hold_one_reward(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("reward: box_f1\nsettings: {min_iou: 0.4}\ncompletion_format: {require_seg: false}\n")
    assert load_reward(file) == make_reward("box_f1", min_iou=0.4, require_seg=False)
    assert make_reward(file, require_seg=True) == make_reward("box_f1", min_iou=0.4)
    file.write_text("format")
    assert make_reward(str(file)) == make_reward("format")


settings_ = st.fixed_dictionaries({}, optional={"min_iou": st.floats(0, 0.9), "require_valid": st.booleans()})


@st.composite
def reward_trees(draw, depth=2):
    if depth and draw(st.booleans()):
        parts = [draw(reward_trees(depth - 1)).named(f"part {n}") for n in range(draw(st.integers(1, 3)))]
        reward = weighted_sum([(part, draw(finite)) for part in parts], draw(st.sampled_from(["total", "mine"])))
    else:
        reward = make_reward("box_f1", **draw(settings_))
    for step in draw(st.lists(st.sampled_from(["clip", "scale", "schedule", "gate", "group"]), max_size=2)):
        if step == "clip":
            reward = reward.clip(draw(st.floats(-2, 0)), draw(st.floats(0, 2)))
        elif step == "scale":
            reward = reward.scale(draw(finite), draw(finite))
        elif step == "schedule":
            reward = reward.schedule(draw(st.dictionaries(st.floats(0, 1), finite, min_size=1, max_size=3)))
        elif step == "gate":
            reward = reward.gate(draw(reward_trees(0)), draw(finite), draw(st.none() | finite))
        else:
            reward = reward.group_relative(draw(st.sampled_from(["rank", "center", "zscore", "best"])))
    return reward


@given(reward_trees())
def test_every_tree_round_trips_and_scores_alike(reward):
    loaded = reloaded(reward)
    assert loaded == reward
    rows = [says([4, 4, 16, 14]), says(), read("")], [TARGET, TARGET, EMPTY]
    result = reward.score_batch(*rows, progress=0.4)
    assert loaded.score_batch(*rows, progress=0.4) == result
    if reward.range is not None:
        low, high = reward.range
        assert all(low - 1e-9 <= value <= high + 1e-9 for value in result if value is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: [", r"r\.yaml: not valid YAML"),
        ("reward: format\nreward: box_f1\n", "the key 'reward' is there twice"),
        ("[]", r"r\.yaml: expected a mapping with 'reward' or 'rewards', got \[\]"),
        ("name: x", r"r\.yaml: expected one of 'reward' \(a name\) and 'rewards'"),
        ("rewards: []", r"r\.yaml: reward 'total': a sum of no parts"),
        ("rewards: format", r"r\.yaml\.rewards: expected a list, got 'format'"),
        ("reward: fromat", r"r\.yaml: unknown reward 'fromat'; did you mean 'format'"),
        (
            "rewards:\n- reward: box_f1\n  setings: {}",
            r"key in .*rewards\[0\] 'setings'; did you mean 'settings'",
        ),
        (
            "rewards:\n- reward: box_f1\n  settings: {min_iuo: 1}",
            r"rewards\[0\]: unknown .*did you mean 'min_iou'",
        ),
        ("rewards:\n- reward: box_f1\n  settings: {min_iou: 1e-3}", r"rewards\[0\]: .*min_iou='1e-3'; expected float"),
        ("rewards:\n- reward: format\n  weight: two", r"weight of 'format' is 'two'"),
        ("rewards: [{reward: format}]\nsettings: {a: 1}", "a sum has no 'settings'"),
        ("reward: format\nsteps: {clip: [0, 1]}", r"steps: expected a list"),
        ("reward: format\nsteps: [clip]", r"steps\[0\]: expected one step, such as clip"),
        ("reward: format\nsteps: [{clop: [0, 1]}]", r"unknown step in .*steps\[0\] 'clop'; did you mean 'clip'"),
        ("reward: format\nsteps: [{clip: [0, 1, 2]}]", r"steps\[0\]\.clip: .*at most 2 values \(low, high\)"),
        ("reward: format\nsteps: [{clip: {low: 0}}]", r"steps\[0\]\.clip: needs the setting 'high'"),
        ("reward: format\nsteps: [{clip: {low: 0, hihg: 1}}]", r"steps\[0\]\.clip 'hihg'; did you mean 'high'"),
        ("reward: format\nsteps: [{clip: [a, b]}]", r"steps\[0\]\.clip\.low: 'a'; expected a number"),
        ("reward: format\nsteps: [{clip: [1, 0]}]", r"steps\[0\]\.clip: clip: low=1, high=0"),
        ("reward: format\nsteps: [{gate: fromat}]", r"steps\[0\]\.gate\.reward: unknown reward 'fromat'"),
        ("reward: format\nsteps: [{gate: {}}]", r"steps\[0\]\.gate: needs the setting 'reward'"),
        ("reward: format\nsteps: [{schedule: 3}]", r"steps\[0\]\.schedule: schedule: points=3"),
        ("reward: format\nsteps: [{group_relative: {group_size: 1.5}}]", r"group_size=1\.5; expected a positive"),
        ("reward: format\ncompletion_format: {frame: pixels}", r"completion_format: frame kind 'pixels'"),
        (
            "reward: format\ncompletion_format: {frames: x}",
            r"unknown key in .*completion_format 'frames'; did you mean 'frame'",
        ),
        (
            "reward: format\ncompletion_format: {answer_format: xml}",
            r"completion_format: answer_format='xml'; expected one of text, json",
        ),
        ("reward: format\nname: 3", r"r\.yaml\.name: 3; expected a text"),
        ("reward: 3", r"r\.yaml\.reward: 3; expected the name of a reward"),
        ("reward: !!python/object/apply:os.system [ls]", r"not valid YAML"),
    ],
)
def test_bad_files_name_the_place_and_the_fix(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises((RewardError, UnknownNameError, FrameError, ValueError), match=message):
        load_reward(file)


def test_a_missing_file_and_a_binary_file(tmp_path):
    with pytest.raises(RewardError, match=r"none\.yaml: cannot be read"):
        load_reward(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RewardError, match=r"bytes\.yaml: cannot be read"):
        load_reward(tmp_path / "bytes.yaml")


def test_what_cannot_be_written_says_so():
    with pytest.raises(RewardError, match="its function is neither registered nor at the top of a module"):
        dump_reward(make_reward(lambda prediction, target: 1.0))
    with pytest.raises(RewardError, match="a frame that is a function cannot be written"):
        dump_reward(make_reward("format", frame=lambda shown, original: None))
    with pytest.raises(RewardError, match="'from_a_folder' cannot be written: a setting is no plain value"):
        dump_reward(make_reward(from_a_folder, folder=object()))
    assert dump_reward(make_reward(one_box)) == f"reward: {__name__}:one_box\n"
    assert reloaded(make_reward(one_box)) == make_reward(one_box)


def test_a_completion_format_that_equals_the_defaults_is_kept(tmp_path):
    json = make_reward("vision_reasoner")
    assert json.completion_format.answer_format == "json"
    text = make_reward(json, answer_format="text", require_seg=True)
    assert text.completion_format == CompletionFormat()
    assert reloaded(text) == text
    assert reloaded(json) == json
    assert weighted_sum([(json, 1.0)], completion_format=CompletionFormat()).completion_format == CompletionFormat()
    assert make_reward("slice_boxes", answer_format="text", require_seg=True).completion_format == CompletionFormat()
    assert make_reward("slice_boxes").completion_format.answer_format == "json"
    assert make_reward("format").gate("slice_format").completion_format.answer_format == "json"
    file = tmp_path / "r.yaml"
    file.write_text("reward: lens\nsteps: [{scale: 2}]")
    assert load_reward(file) == make_reward("lens").scale(2)
    file.write_text("reward: lens\ncompletion_format: {frame: original_px}")
    assert load_reward(file) == make_reward("lens", frame="original_px")


@pytest.mark.parametrize("name", presets.__all__)
def test_every_preset_round_trips(name):
    reward = make_reward(name)
    assert reloaded(reward) == reward


def test_the_components_of_a_sum_are_scored_once():
    class Counting:
        calls = 0

        def score_batch(self, predictions, targets):
            Counting.calls += 1
            return [1.0] * len(predictions)

    total = weighted_sum([(Counting, 1.0), ("format", 1.0)]).scale(2)
    assert total.components([says()], [TARGET]) == {"Counting": [1.0], "format": [1.0], "total": [4.0]}
    assert Counting.calls == 1
    with pytest.raises(RewardError, match=r"a part is named 'total', as the sum is"):
        weighted_sum([(total, 1.0)])
