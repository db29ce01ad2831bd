"""The three ways to write a reward, in plain trainers and out of them, and what happens when one is wrong."""

import asyncio
import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from reward_cases import EMPTY, GOOD, TARGET, as_trl_calls, read, says
from trl.trainer.utils import is_async_callable

from segrl.errors import RewardError, UnknownNameError
from segrl.predictions import Prediction, Target, VolumeTarget
from segrl.rewards import list_rewards, make_reward, register_reward, registry, reward_info
from segrl.rewards.describe import describe_all

PREDICTIONS = [says([4, 4, 16, 14]), says(), read("no")]
TARGETS = [TARGET, EMPTY, TARGET]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Forgets what a test registers."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def box_count(prediction: Prediction, target: Target, *, factor: float = 1.0) -> float | None:
    return None if target.empty else factor * len(prediction.boxes)


async def slow_box_count(prediction, target, *, factor=1.0):
    await asyncio.sleep(0.001)
    return box_count(prediction, target, factor=factor)


class BoxCounts:
    def __init__(self, factor: float = 1.0):
        if factor < 0:
            raise RewardError(f"factor={factor}; expected at least 0")
        self.factor = factor

    def score_batch(self, predictions, targets):
        return [box_count(p, t, factor=self.factor) for p, t in zip(predictions, targets, strict=True)]


class SlowBoxCounts(BoxCounts):
    async def score_batch(self, predictions, targets):
        await asyncio.sleep(0.001)
        return super().score_batch(predictions, targets)


def box_counts_for_trl(completions, target, factor=1.0, **columns):
    brackets = [str(text).count("[") for text in completions]
    return [None if t.empty else factor * n for n, t in zip(brackets, target, strict=True)]


FORMS = [box_count, slow_box_count, BoxCounts, SlowBoxCounts, box_counts_for_trl]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_scores_alike(form):
    reward = make_reward(form, factor=2, frame="original_px")
    assert reward.score_batch(PREDICTIONS, TARGETS) == [2.0, None, 0.0]
    assert [reward.score(p, t) for p, t in zip(PREDICTIONS, TARGETS, strict=True)] == [2.0, None, 0.0]
    assert reward.score_batch([], []) == []
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert pickle.loads(pickle.dumps(reward)).score_batch(PREDICTIONS, TARGETS) == [2.0, None, 0.0]
    assert reward.name == form.__name__
    assert reward.is_async == is_async_callable(reward) == form.__name__.startswith(("slow", "Slow"))


@pytest.mark.parametrize("form", FORMS[:4], ids=lambda form: form.__name__)
def test_every_form_can_be_called_by_a_plain_trl_trainer(form):
    reward = make_reward(form, frame="original_px")
    masks = [target.mask for target in TARGETS]
    texts = [prediction.text for prediction in PREDICTIONS]
    result, logged = as_trl_calls(reward, texts, mask=masks)
    assert (asyncio.run(result) if inspect.iscoroutine(result) else result) == [1.0, None, 0.0]
    assert logged == {"valid_completions": pytest.approx(2 / 3)}


def test_an_async_reward_also_scores_inside_a_running_loop():
    async def notebook():
        return make_reward(slow_box_count).score_batch(PREDICTIONS, TARGETS)

    assert asyncio.run(notebook()) == [1.0, None, 0.0]


def test_a_function_that_hides_that_it_waits_is_refused():
    hidden = make_reward(lambda prediction, target: slow_box_count(prediction, target)).named("hidden")
    with pytest.raises(RewardError, match=r"reward 'hidden' \(scan_7\.png\): .*awaited"):
        hidden.score(says([1, 1, 2, 2]), TARGET)


def test_async_rows_wait_side_by_side():
    running = []

    async def judge(prediction, target):
        running.append(1)
        await asyncio.sleep(0.01)
        return float(len(running))  # all rows have started when the first one goes on

    assert make_reward(judge).score_batch(PREDICTIONS, TARGETS) == [3.0, 3.0, 3.0]


def test_a_trl_function_gets_what_trl_passes():
    seen = {}

    def brevity(prompts, completions, completion_ids, lesion, trainer_state, log_metric, limit=3, **rest):
        seen.update(rest)
        log_metric("brevity", 1.0)
        return torch.tensor([float(len(text) <= limit) for text in completions])

    reward = make_reward(brevity, limit=2)
    result, logged = as_trl_calls(reward, ["ab", "abc"], lesion=["cyst", "cyst"], mask=["not read", "not read"])
    assert result == [1.0, 0.0]
    assert logged == {"brevity": 1.0}
    assert {"mask", "log_extra"} <= seen.keys()
    with pytest.raises(UnknownNameError, match="setting of reward 'brevity' 'limt'"):
        make_reward(brevity, limt=2)


def test_a_trl_function_without_keywords_gets_only_what_it_names():
    def lengths(completions):
        return [len(text) for text in completions]

    assert as_trl_calls(make_reward(lengths), ["ab", ""])[0] == [2.0, 0.0]


def test_progress_and_log_metric_are_filled_in():
    logged = {}

    def late(prediction, target, *, progress, log_metric):
        log_metric("late", progress)
        return progress

    reward = make_reward(late)
    assert reward.settings == {}
    assert reward.score(says(), TARGET, progress=0.25) == 0.25
    assert reward.score(says(), TARGET) == 1.0
    state = type("State", (), {"global_step": 3, "max_steps": 12})()
    assert reward(completions=[GOOD], mask=[TARGET.mask], trainer_state=state, log_metric=logged.__setitem__) == [0.25]
    assert logged == {"valid_completions": 1.0, "late": 0.25}


class BestOfGroup:
    def score_group(self, predictions, targets):
        most = max(len(p.boxes) for p in predictions)
        return [float(len(p.boxes) == most) for p in predictions]


def test_a_class_may_score_the_answers_to_one_prompt_together():
    reward = make_reward(BestOfGroup, frame="original_px")
    none, one = says(), says([1, 1, 2, 2])
    again = Target.from_mask(TARGET.mask, name="scan_7.png")
    assert reward.compares_answers
    assert reward.score_batch([none, one, none], [TARGET, TARGET, EMPTY]) == [0.0, 1.0, 1.0]
    assert reward.score_batch([none, one, none], [TARGET, again, TARGET]) == [0.0, 1.0, 0.0]
    assert reward.score_batch([none, one, none], [TARGET] * 3, groups=["a", "b", "a"]) == [1.0, 1.0, 1.0]
    with pytest.raises(RewardError, match="2 group ids for 3 predictions"):
        reward.score_batch([none, one, none], [TARGET] * 3, groups=[1, 2])
    texts = [none.text, one.text, one.text, none.text]
    prompts = ["p", "p", "q", "q"]
    call = {"completions": texts, "mask": [TARGET.mask] * 4}
    assert reward(prompts=prompts, **call) == [0.0, 1.0, 1.0, 0.0]
    assert reward(prompts=["p"] * 4, **call) == [0.0, 1.0, 1.0, 0.0]
    assert reward(prompts=["p", "q", "r", "s"], **call) == [1.0] * 4


# --- wrong ones


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"'wrong', rows 0 to 1: returned 1 scores for 2 rows; expected one per row"),
        ([1.0, float("nan")], r"'wrong', row 1 .*returned nan; expected a finite number"),
        ([float("inf"), 1.0], r"'wrong', row 0 .*returned inf"),
        ([1.0, "0.5"], r"'wrong', row 1 .*TypeError: the score is the text '0\.5'; expected a number or None"),
        ([1.0, [2.0]], r"'wrong', row 1 .*TypeError"),
        (None, r"'wrong', rows 0 to 1: TypeError: 'NoneType' object is not iterable"),
        (np.array([1.0, np.nan]), r"row 1 .*returned nan"),
    ],
)
def test_what_a_batch_may_not_return(returned, message):
    class Wrong:
        def score_batch(self, predictions, targets):
            return returned

    def wrong(completions, **columns):
        return returned

    for form in (Wrong, wrong):
        with pytest.raises(RewardError, match=message):
            make_reward(form).named("wrong").score_batch([says(), says()], [TARGET, TARGET])


def test_a_class_that_raises_names_its_rows():
    class Wrong:
        def score_group(self, predictions, targets):
            return {1: [0.0]}[len(predictions)]

    with pytest.raises(RewardError, match="reward 'Wrong', rows 1 to 2: KeyError: 2"):
        make_reward(Wrong).score_batch([says()] * 3, [EMPTY, TARGET, TARGET])


def test_bad_settings_of_a_class_fail_where_it_is_made():
    with pytest.raises(RewardError, match="factor=-1; expected at least 0"):
        make_reward(BoxCounts, factor=-1)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda: 0.0, r"takes neither \(prediction, target\) nor completions"),
        (lambda prediction: 0.0, r"takes neither"),
        (type("Neither", (), {}), "class Neither has neither of score_batch and score_group"),
        (
            type("Both", (), {"score_batch": lambda *_: [], "score_group": lambda *_: []}),
            "class Both has score_batch and score_group of score_batch and score_group; expected exactly one",
        ),
        (3, "is a int; expected a function or a class"),
    ],
)
def test_what_is_no_reward(form, message):
    with pytest.raises(RewardError, match=message):
        make_reward(form)
    with pytest.raises(RewardError, match=message):
        register_reward("test_wrong")(form)


def test_a_cell_of_a_notebook_may_be_run_twice():
    cell = "@register_reward('test_cell')\ndef cell(prediction, target):\n    return {}\n"
    for value in (1.0, 2.0):
        exec(cell.format(value), {"register_reward": register_reward, "__name__": "__main__"})
        assert make_reward("test_cell").score(says(), TARGET) == value
    with pytest.raises(RewardError, match=r"'test_cell' is registered already, by __main__\.cell"):
        register_reward("test_cell")(box_count)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"invariant": ("fliped",)}, "unknown invariant claim of reward 'test_claims' 'fliped'; did you mean 'flip'"),
        ({"monotone": ("box",)}, "unknown monotone claim"),
        ({"empty": {"bth": 0}}, "unknown empty case of reward 'test_claims' 'bth'; did you mean 'both'"),
        ({"range": (1, 0)}, r"range=\(1, 0\); expected \(low, high\)"),
    ],
)
def test_claims_are_checked(claims, message):
    with pytest.raises((RewardError, UnknownNameError), match=message):
        register_reward("test_claims", **claims)(box_count)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_iou": "0.5"}, r"setting min_iou='0\.5'; expected float \(in YAML write"),
        ({"min_iou": True}, "setting min_iou=True; expected float"),
        ({"min_iou": float("nan")}, "setting min_iou=nan; expected float"),
        ({"require_valid": "yes"}, "setting require_valid='yes'; expected bool$"),
    ],
)
def test_the_type_of_a_setting_is_checked(setting, message):
    with pytest.raises(RewardError, match=message):
        make_reward("box_f1", **setting)


def test_a_volume_reward_and_an_image_reward_tell_what_they_need():
    @register_reward("test_volume", volume=True)
    def depth(prediction, target):
        return target.depth

    volume = VolumeTarget.from_mask(np.zeros((3, 4, 5), np.uint8), name="ct_1")
    assert make_reward("test_volume").score(says(), volume) == 3.0
    with pytest.raises(
        RewardError, match=r"'test_volume' \(scan_7\.png\): the ground truth is a Target, expected a VolumeT"
    ):
        make_reward("test_volume").score(says(), TARGET)
    with pytest.raises(RewardError, match=r"'box_f1' \(ct_1\): the ground truth is a VolumeTarget, expected a Target"):
        make_reward("box_f1").score(says(), volume)
    call = {"completions": [GOOD], "volume": [volume.mask], "spacing_mm": [(5.0, 1.0, 1.0)]}
    assert make_reward("test_volume")(**call) == [3.0]
    with pytest.raises(RewardError, match=r"row 0: cannot build the target from column 'volume': .*three positive"):
        make_reward("test_volume")(**{**call, "spacing_mm": [(0.0, 1.0, 1.0)]})


def test_a_reward_of_the_text_alone_needs_no_truth():
    assert make_reward("format").score(read(GOOD), None) == 1.0
    assert make_reward("format")(completions=[GOOD, ""]) == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"'box_f1': the ground truth is a NoneType, expected a Target"):
        make_reward("box_f1").score(read(GOOD), None)
    with pytest.raises(RewardError, match=r"'format', row 0: cannot build the target from column 'mask'"):
        make_reward("format")(completions=[GOOD], mask=[np.arange(9).reshape(3, 3)])


# --- where rewards come from


def test_a_reward_of_a_module_has_a_path():
    reward = make_reward(f"{__name__}:box_count", factor=3)
    assert reward.score(says([1, 1, 2, 2]), TARGET) == 3.0
    assert reward.name == "box_count"
    assert make_reward("segrl.rewards.builtin.core_seg:box_f1") == make_reward("box_f1")
    with pytest.raises(RewardError, match=r"reward 'nowhere:x' cannot be imported: ModuleNotFoundError"):
        make_reward("nowhere:x")
    with pytest.raises(RewardError, match=r"cannot be imported: AttributeError"):
        make_reward(f"{__name__}:missing")


def test_what_a_reward_declares():
    info = reward_info("box_f1")
    assert (
        info.summary
        == "Return the mean IoU of the matched boxes times the F1 score of the boxes (CORE-Seg, r_bbox, Eq. 8)."
    )
    assert (info.form, info.range, info.origin) == ("function", (0.0, 1.0), "segrl 0.1.0")
    assert dict(info.settings) == {"min_iou": 0.5, "mean_over": "matched", "require_valid": True}
    mask = make_reward("dual_granularity_mask", dice_weight=4.0)
    assert mask.range == (-1.0, 5.0)
    assert mask.info.empty == {"both": 5.0, "prediction": -1.0, "target": -1.0}


def write_plugin(folder, name, entries, code):
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[segrl.rewards]\n" + "".join(f"{entry}\n" for entry in entries))


def test_broken_packages_are_listed_and_the_others_work(tmp_path, monkeypatch):
    good = "def one(prediction, target, *, height=2):\n    'Always one.'\n    return 1.0\n"
    claims = "from segrl import register_reward\n@register_reward('t_claims', range=(0, 1))\n"
    write_plugin(tmp_path, "test_plug_a", ["t_one = test_plug_a:one", "t_twice = test_plug_a:one"], good)
    write_plugin(tmp_path, "test_plug_b", ["t_raises = test_plug_b:one"], "raise KeyboardInterrupt('stop')\n")
    write_plugin(tmp_path, "test_plug_c", ["t_syntax = test_plug_c:one", "t_twice = test_plug_c:one"], "def (\n")
    write_plugin(tmp_path, "test_plug_d", ["box_f1 = test_plug_d:one", "t_form = test_plug_d:no"], good + "no = 3\n")
    write_plugin(tmp_path, "test_plug_e", ["t_hangs = test_plug_e:one"], "import time\ntime.sleep(600)\n")
    write_plugin(tmp_path, "test_plug_f", ["t_claims = test_plug_f:one"], claims + good)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {(row["name"], row["origin"]): row for row in describe_all(timeout=3.0)}
    one = rows["t_one", "test_plug_a 1.0"]
    assert (one["summary"], one["broken"], one["settings"][0]["default"]) == ("Always one.", None, 2)
    assert rows["t_claims", "test_plug_f 1.0"]["range"] == [0.0, 1.0]
    assert rows["box_f1", "segrl 0.1.0"]["broken"] is None
    reasons = {
        ("t_raises", "test_plug_b 1.0"): "KeyboardInterrupt: stop",
        ("t_syntax", "test_plug_c 1.0"): "SyntaxError",
        ("t_form", "test_plug_d 1.0"): "expected a function or a class",
        ("t_hangs", "test_plug_e 1.0"): "the import did not end within 3 s",
        ("box_f1", "test_plug_d 1.0"): "the name is taken by segrl 0.1.0; use 'test_plug_d:one'",
        ("t_twice", "test_plug_a 1.0, test_plug_c 1.0"): "test_plug_a 1.0 and test_plug_c 1.0 both bring it",
    }
    for row, reason in reasons.items():
        assert reason in rows[row]["broken"]
        assert rows[row]["summary"].startswith("broken: ")
    assert not {name for name in sys.modules if name.startswith("test_plug_")}, "this process imports none of them"
    assert {"t_raises", "t_twice"} <= set(list_rewards())
    assert make_reward("t_one").score(says(), TARGET) == 1.0
    assert make_reward("t_claims").range == (0, 1)
    assert {name for name in sys.modules if name.startswith("test_plug_")} == {"test_plug_a", "test_plug_f"}
    with pytest.raises(RewardError, match=r"'t_syntax' of test_plug_c 1.0 cannot be imported from 'test_plug_c:one'"):
        make_reward("t_syntax")
    with pytest.raises(RewardError, match=r"reward 't_twice': .*both bring it"):
        make_reward("t_twice")
    for name in ("test_plug_a", "test_plug_f"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
def test_a_reward_of_a_module_pickles_into_another_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from segrl import register_reward\n"
        "@register_reward('mine', range=lambda high, **_: (0, high))\n"
        "class Mine:\n"
        "    def __init__(self, high: float = 2.0):\n        self.high = high\n"
        "    def score_batch(self, predictions, targets):\n        return [self.high for _ in predictions]\n"
    )
    code = "import sys; sys.path.insert(0, sys.argv[1]); "
    make = (
        "import pickle, mine; from segrl import make_reward; r = make_reward('mine', high=3).clip(0, 9); r.range; "
        "sys.stdout.buffer.write(pickle.dumps(r))"
    )
    use = "import pickle; r = pickle.load(sys.stdin.buffer); print(r.name, r.range, r.score_batch([None], [None]))"
    run = [sys.executable, "-c"]
    data = subprocess.run([*run, code + make, str(tmp_path)], capture_output=True, check=True).stdout
    use = use.replace("[None], [None]", "[], []")
    done = subprocess.run([*run, code + use, str(tmp_path)], input=data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "mine (0, 3) []"
