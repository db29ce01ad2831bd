"""Rewards called as verl, EasyR1 and ms-swift call them, with the signatures that were read in those frameworks."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reward_cases import EMPTY, GOOD, HEIGHT, TARGET, TRUE_BOXES, WIDTH

from segrl.errors import RewardError, UnknownNameError
from segrl.geometry import mask_to_rle
from segrl.rewards import SwiftORM, easyr1_compute_score, make_reward, swift_orm, verl_compute_score, weighted_sum

ROOT = Path(__file__).parents[1]
BOXES = make_reward("box_f1", frame="original_px")
TRUTH = {"mask": mask_to_rle(TARGET.mask), "query": "Where is the cyst?", "name": "scan_7.png"}
ONE = "<think>One.</think><answer>[4, 4, 16, 14]<seg></answer>"


def applies_sometimes(prediction, target):
    """Does not apply to invalid texts."""
    return 1.0 if prediction.valid else None


SUM = weighted_sum([(make_reward(name, frame="original_px"), weight) for name, weight in
                    [("format", 1.0), ("box_f1", 2.0), (applies_sometimes, 4.0)]], "mine")  # fmt: skip
EXPECTED = {
    GOOD: {"total": 7.0, "format": 1.0, "box_f1": 1.0, "applies_sometimes": 1.0},
    "": {"total": 0.0, "format": 0.0, "box_f1": 0.0, "applies_sometimes": None},
}


def scored(total: str, text: str, none: float = 0.0) -> dict[str, float]:
    return {total if key == "total" else key: none if score is None else score for key, score in EXPECTED[text].items()}


# --- verl, as its reward managers "naive" and "batch" call it


def verl_single(compute_score: Any, text: str, truth: Any, **kwargs: Any) -> Any:
    wrapped = partial(lambda raw, extra, *args, **kw: raw(*args, **{**kw, **extra}), compute_score, kwargs)
    return wrapped(data_source="lesions", solution_str=text, ground_truth=truth, extra_info={"num_turns": None})


def verl_batch(compute_score: Any, texts: list[str], truths: list[Any], indices: list[Any]) -> Any:
    infos = [{"index": index, "num_turns": None} for index in indices]
    return compute_score(
        data_sources=["lesions"] * len(texts), solution_strs=texts, ground_truths=truths, extra_infos=infos
    )


def test_verl_single_rows():
    assert verl_single(verl_compute_score(BOXES), GOOD, TRUTH) == 1.0
    assert type(verl_single(verl_compute_score(BOXES), "", TRUTH)) is float
    for text in EXPECTED:
        assert verl_single(verl_compute_score(SUM), text, TRUTH) == scored("score", text)
        assert verl_single(verl_compute_score(SUM, none=-9.0), text, TRUTH) == scored("score", text, -9.0)
    with_judge = {"reward_router_address": "host:1", "reward_model_tokenizer": object()}
    assert verl_single(verl_compute_score(BOXES), GOOD, TRUTH, **with_judge) == 1.0


def test_verl_batches():
    compute_score = verl_compute_score(SUM, batch=True)
    assert verl_batch(compute_score, list(EXPECTED), [TRUTH] * 2, [0, 1]) == [
        scored("score", text) for text in EXPECTED
    ]
    assert verl_batch(compute_score, [], [], []) == []
    assert compute_score(["lesions"], [GOOD], [TRUTH]) == [scored("score", GOOD)]


def test_verl_batches_compare_the_answers_to_one_prompt():
    best = BOXES.group_relative("best")
    with pytest.raises(RewardError, match="'box_f1' compares the answers to one prompt"):
        verl_compute_score(best)
    compute_score = verl_compute_score(best, batch=True)
    other = {**TRUTH, "query": "Where is the tumour?"}
    assert verl_batch(compute_score, [GOOD, ONE, ONE], [TRUTH] * 3, [1, 2, 1]) == [1.0, 1.0, 0.0]
    assert verl_batch(compute_score, [GOOD, ONE, ONE], [TRUTH, TRUTH, other], [1, 1, 1]) == [1.0, 0.0, 1.0]
    assert verl_batch(compute_score, [GOOD, ONE], [TRUTH, dict(reversed(TRUTH.items()))], [None, None]) == [1.0, 0.0]


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(TypeError, match="min_iou"):
        verl_single(verl_compute_score(BOXES), GOOD, TRUTH, min_iou=0.3)


# --- EasyR1, as its batch reward manager calls it


def test_easyr1():
    inputs = [{"response": text, "response_length": len(text), "ground_truth": TRUTH} for text in EXPECTED]
    assert easyr1_compute_score(SUM)(inputs) == [scored("overall", text) for text in EXPECTED]
    assert partial(easyr1_compute_score(BOXES))(inputs) == [{"overall": 1.0}, {"overall": 0.0}]
    assert easyr1_compute_score(SUM, none=-1.0)(inputs)[1]["applies_sometimes"] == -1.0
    assert easyr1_compute_score(BOXES.group_relative())(inputs) == [{"overall": 1.0}, {"overall": 0.0}]


def test_easyr1_needs_batches():
    with pytest.raises(RewardError, match="EasyR1 passed a single row"):
        easyr1_compute_score(BOXES)({"response": "", "response_length": 0, "ground_truth": TRUTH})  # pyright: ignore


# --- ms-swift: the class goes into `orms`, is called with `args=` once, and with all columns of the batch every step


def swift(orm_class: Any, completions: list[str], **columns: Any) -> Any:
    orms = {"mine": orm_class}
    reward = orms["mine"](args=SimpleNamespace(reward_funcs=["mine"]))
    kwargs = {
        "trainer_state": SimpleNamespace(global_step=5, max_steps=10),
        "messages": [[]] * len(completions),
        **columns,
    }
    return reward(completions, **kwargs)


def test_swift():
    columns = {key: [value] * 2 for key, value in TRUTH.items()}
    assert swift(swift_orm(SUM), list(EXPECTED), **columns) == [7.0, 0.0]
    assert swift(swift_orm(applies_sometimes), list(EXPECTED), **columns) == [1.0, None]
    assert swift(swift_orm(applies_sometimes, none=0.0), list(EXPECTED), **columns) == [1.0, 0.0]
    assert swift(swift_orm(BOXES, ground_truth="solution"), [GOOD], solution=[json.dumps(TRUTH)]) == [1.0]
    assert swift(swift_orm("format"), [GOOD]) == [1.0]
    assert swift(swift_orm("format", ground_truth="solution"), [GOOD]) == [1.0]


def test_swift_names_groups_and_schedules():
    assert swift_orm(SUM).__name__ == "mine"
    assert issubclass(swift_orm(SUM), SwiftORM)
    columns = {key: [value] * 3 for key, value in TRUTH.items()}
    columns["query"] = ["a", "b", "a"]
    assert swift(swift_orm(BOXES.group_relative("best")), [GOOD, ONE, ONE], **columns) == [1.0, 1.0, 0.0]
    assert swift(swift_orm(BOXES.schedule({0: 0, 1: 1})), [GOOD], mask=[TARGET.mask]) == [0.5]
    assert swift_orm(BOXES.schedule({0: 0, 1: 1}))()([GOOD], mask=[TARGET.mask]) == [1.0]


def test_swift_misses_columns():
    with pytest.raises(RewardError, match="reward 'box_f1': no column 'solution'"):
        swift(swift_orm(BOXES, ground_truth="solution"), [GOOD])
    with pytest.raises(RewardError, match=r"reward 'box_f1', row 0: the ground truth is {}"):
        swift(swift_orm(BOXES), [GOOD])


# --- what they share


@pytest.mark.parametrize(
    ("adapter", "recorded"),
    [
        (verl_compute_score("format"), lambda data_source, solution_str, ground_truth, extra_info=None: 0.0),
        (
            verl_compute_score("format", batch=True),
            lambda data_sources, solution_strs, ground_truths, extra_infos: [0.0],
        ),
        (easyr1_compute_score("format"), lambda reward_inputs: [{"overall": 0.0}]),
        (swift_orm("format"), lambda args=None, **kwargs: None),
        (swift_orm("format")(), lambda completions, **kwargs: [0.0]),
    ],
)
def test_signatures_are_the_recorded_ones(adapter, recorded):
    """The parameters of the frameworks come first and in order; any that follow have defaults."""
    theirs = list(inspect.signature(recorded).parameters.values())
    ours = list(inspect.signature(adapter).parameters.values())
    assert [(p.name, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.kind) for p in theirs]
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    "truth",
    [
        TRUTH,
        json.dumps(TRUTH),
        TRUTH["mask"],
        json.dumps(TRUTH["mask"]),
        TARGET.mask,
        Image.fromarray(TARGET.mask),
        {"boxes": TRUE_BOXES, "size": [WIDTH, HEIGHT], "mask": None},
        {"boxes": np.array([np.array(box) for box in TRUE_BOXES], dtype=object), "size": np.array([WIDTH, HEIGHT])},
    ],
    ids=lambda truth: type(truth).__name__,
)
def test_every_form_of_a_truth(truth):
    assert verl_single(verl_compute_score(BOXES), GOOD, truth) == 1.0
    score = easyr1_compute_score(BOXES.group_relative("best"))
    inputs = [{"response": text, "ground_truth": truth} for text in (GOOD, ONE)]
    assert score(inputs) == [{"overall": 1.0}, {"overall": 0.0}]


def test_images_of_equal_size_are_told_apart():
    score = easyr1_compute_score(BOXES.group_relative("best"))
    for truths in ((TARGET.mask, EMPTY.mask), (Image.fromarray(TARGET.mask), Image.fromarray(EMPTY.mask))):
        inputs = [{"response": ONE, "ground_truth": truth} for truth in truths]
        assert score(inputs) == [{"overall": 1.0}, {"overall": 1.0}]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (None, "row 0: the ground truth is None; expected 'mask', 'boxes' with 'size', or 'volume'"),
        ("", "row 0: the ground truth is ''"),
        ("lost.png", r"row 0: column 'mask': lost\.png: no such file"),
        ("{", "row 0: the truth: '{' is not valid JSON"),
        ({"boxes": TRUE_BOXES}, "row 0: column 'boxes': without a mask the column 'size' is needed"),
        ({"boxes": [[9, 9, 1, 1]], "size": [40, 32]}, "row 0: column 'boxes': "),
    ],
)
def test_a_bad_truth_is_an_error_and_never_a_score(truth, message):
    for call in (
        lambda: verl_single(verl_compute_score(BOXES), GOOD, truth),
        lambda: easyr1_compute_score(BOXES)([{"response": GOOD, "ground_truth": truth}]),
        lambda: swift(swift_orm(BOXES, ground_truth="solution"), [GOOD], solution=[truth]),
    ):
        with pytest.raises(RewardError, match=f"reward 'box_f1', {message}"):
            call()


@pytest.mark.parametrize(
    "adapt", [verl_compute_score, partial(verl_compute_score, batch=True), easyr1_compute_score, swift_orm]
)
class TestMaking:
    def test_names_functions_and_rewards(self, adapt):
        for reward in ("format", applies_sometimes, BOXES, "vision_reasoner"):
            adapt(reward)
        with pytest.raises(UnknownNameError, match="did you mean 'format'"):
            adapt("fromat")

    def test_predicted_masks_are_refused(self, adapt):
        for reward in ("mask_iou", "core_seg", BOXES.gate("mask_iou")):
            with pytest.raises(RewardError, match=r"reads predicted masks, and .* decodes none"):
                adapt(reward)

    def test_async_rewards_work(self, adapt):
        async def waits(prediction, target):
            return 0.25

        made = adapt(waits)
        calls = {
            verl_compute_score: lambda: verl_single(made, GOOD, TRUTH),
            easyr1_compute_score: lambda: made([{"response": GOOD, "ground_truth": TRUTH}])[0]["overall"],
            swift_orm: lambda: swift(made, [GOOD], mask=[TARGET.mask])[0],
        }
        assert calls.get(adapt, lambda: verl_batch(made, [GOOD], [TRUTH], [0])[0])() == 0.25


def test_a_part_with_the_name_of_the_whole_is_refused():
    clash = weighted_sum([(BOXES.named("score"), 1.0), ("format", 1.0)])
    with pytest.raises(RewardError, match="a part is named 'score', as the whole is there"):
        verl_compute_score(clash)
    easyr1_compute_score(clash)
    with pytest.raises(RewardError, match="a part is named 'overall'"):
        easyr1_compute_score(weighted_sum([(BOXES.named("overall"), 1.0)]))


def test_they_pickle():
    for made in (verl_compute_score(SUM), verl_compute_score(SUM, batch=True), easyr1_compute_score(SUM, none=2.0)):
        assert pickle.loads(pickle.dumps(made)) == made
    orm = swift_orm(BOXES, ground_truth="solution")(args="args")
    copy = pickle.loads(pickle.dumps(orm))
    assert type(copy).__name__ == "box_f1"
    assert (copy.reward, copy.ground_truth, copy.args) == (BOXES, "solution", "args")


def load(path: Path, name: str) -> Any:
    """What verl and EasyR1 do with the user's file."""
    spec = importlib.util.spec_from_file_location("custom_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.slow
def test_the_files_of_the_how_to_are_loaded_by_path(tmp_path):
    page = (ROOT / "docs" / "how-to" / "use-elsewhere.md").read_text()
    files = {block.splitlines()[0].removeprefix("# "): block for block in page.split("```py\n")[1:]}
    files = {name: block.partition("```")[0] for name, block in files.items()}
    assert set(files) == {"verl_reward.py", "easyr1_reward.py", "swift_plugin.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    answer = '<think>There.</think><answer>[{"bbox_2d": [100, 125, 400, 438], "point_2d": [225, 280]}]</answer>'
    truth = json.dumps({"boxes": [[4, 4, 16, 14]], "size": [WIDTH, HEIGHT]})
    score = verl_single(load(tmp_path / "verl_reward.py", "compute_score"), answer, truth)
    assert score["score"] == 7.0
    (score,) = load(tmp_path / "easyr1_reward.py", "compute_score")([{"response": answer, "ground_truth": truth}])
    assert score["overall"] == 7.0
    assert load(tmp_path / "easyr1_reward.py", "REWARD_TYPE") == "batch"
    code = (
        "import sys, types; rewards = types.ModuleType('swift.rewards'); rewards.orms = {}\n"
        "sys.modules['swift'] = types.ModuleType('swift'); sys.modules['swift.rewards'] = rewards\n"
        f"exec(open({str(tmp_path / 'swift_plugin.py')!r}).read())\n"
        f"(name, orm), = rewards.orms.items(); print(name, orm(args=None)([{answer!r}], solution=[{truth!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "vision_reasoner [7.0]\n", done.stderr
