"""Every form of a reward inside real trainers: ours, and TRL's own."""

import asyncio
from functools import partial
from types import FunctionType
from typing import Any

import pytest
from builders import grpo_args, seg_bias, tiny_headed_model, tiny_model, tiny_rows
from datasets import concatenate_datasets
from trainer_checks import Collect, history, letters, written_rollout
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl.errors import SegRLError
from segrl.predictions import frame_for
from segrl.rewards import CompletionFormat, make_reward, register_reward, weighted_sum
from segrl.scoring import score_file, statistics
from segrl.trainers import SegGRPOTrainer
from segrl.trainers.reward_funcs import check_groups

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

GOOD = "<think>One.</think><answer>[1, 2, 30, 40]<seg></answer>"
TWO = "<think>Two.</think><answer>[1, 2, 30, 40], [40, 40, 60, 60]<seg></answer>"
TEXTS = [GOOD, "nothing", TWO, GOOD]


@register_reward("test_in_trainer_function")
def boxes_found(prediction, target, *, log_metric, progress):
    log_metric("boxes", len(prediction.boxes))
    return float(len(prediction.boxes))


@register_reward("test_in_trainer_async")
async def boxes_found_later(prediction, target):
    await asyncio.sleep(0.001)
    return float(len(prediction.boxes))


@register_reward("test_in_trainer_class")
class BoxesFound:
    def score_batch(self, predictions, targets):
        return [float(len(prediction.boxes)) for prediction in predictions]


class MoreThanTheOthers:
    def score_group(self, predictions, targets):
        most = max(len(prediction.boxes) for prediction in predictions)
        return [float(len(prediction.boxes) == most) for prediction in predictions]


def train(kind: Any, rewards: Any, folder: Any, *, rows: Any = None, **settings: Any) -> Any:
    """A trained trainer; `rewards` may be a function of the processor."""
    model, processor = tiny_model()
    if kind is GRPOTrainer:
        settings["kind"] = GRPOConfig
    trainer = kind(
        model,
        rewards(processor) if isinstance(rewards, FunctionType) else rewards,
        grpo_args(folder, **settings),
        train_dataset=tiny_rows(4, processor, completions=False) if rows is None else rows(processor),
        processing_class=processor,
        rollout_func=written_rollout(TEXTS),
    )
    trainer.train()
    return trainer


def with_frame(*rewards):
    """The rewards of a plain trainer, which has to be told the frame of the boxes."""

    return lambda processor: [make_reward(reward, frame=partial(frame_for, processor)) for reward in rewards]


def rewards_of(trainer, name):
    return [entry[f"rewards/{name}/mean"] for entry in history(trainer) if f"rewards/{name}/mean" in entry]


NAMES = ["test_in_trainer_function", "test_in_trainer_async", "test_in_trainer_class"]


@pytest.mark.slow
def test_every_form_is_scored_alike_by_both_trainers(tmp_path):
    forms = [boxes_found, boxes_found_later, BoxesFound]
    ours = train(SegGRPOTrainer, [*forms, MoreThanTheOthers], tmp_path / "ours")
    plain = train(GRPOTrainer, with_frame(*forms, MoreThanTheOthers), tmp_path / "plain")
    for trainer in (ours, plain):
        assert trainer.reward_func_names == [*NAMES, "MoreThanTheOthers"]
        for name in NAMES:
            assert rewards_of(trainer, name) == [1.0, 1.0]  # (1 + 0 + 2 + 1) / 4 boxes
        assert rewards_of(trainer, "MoreThanTheOthers") == [0.25, 0.25]
        assert [entry["boxes"] for entry in history(trainer) if "boxes" in entry] == [1.0, 1.0]
    assert history(plain)[0]["valid_completions"] == 0.75


def test_a_file_of_rewards_with_a_schedule_and_logged_parts(tmp_path):
    file = tmp_path / "rewards.yaml"
    file.write_text(
        "name: mine\nrewards:\n- reward: format\n- reward: test_in_trainer_class\n  name: boxes\n  weight: 2\n"
        "  steps:\n  - schedule: {0: 0, 0.5: 1}\n"
    )
    trainer = train(SegGRPOTrainer, str(file), tmp_path / "run", max_steps=4)
    assert trainer.reward_func_names == ["mine"]
    entries = [entry for entry in history(trainer) if "mine/boxes" in entry]
    assert [entry["mine/boxes"] for entry in entries] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert [entry["mine/format"] for entry in entries] == [0.75] * 4
    assert rewards_of(trainer, "mine") == pytest.approx([0.75, 1.75, 2.75, 2.75])


def test_a_trl_function_is_left_to_trl(tmp_path):
    collect = Collect()
    trainer = train(SegGRPOTrainer, [letters, collect, "format"], tmp_path)
    assert trainer.reward_funcs[:2] == [letters, collect]
    assert collect.calls[0]["prediction"][0].text == GOOD


def test_group_relative_rewards_see_whole_groups(tmp_path):
    def doubled(processor):
        rows = tiny_rows(2, processor, completions=False)
        return concatenate_datasets([rows, rows])

    relative = make_reward(BoxesFound).group_relative("center", group_size=4).named("relative")
    trainer = train(SegGRPOTrainer, [relative, "format"], tmp_path, rows=doubled, per_device_train_batch_size=8)
    assert rewards_of(trainer, "relative") == pytest.approx([0.0, 0.0])
    assert history(trainer)[0]["rewards/relative/std"] > 0.5
    torn = grpo_args(tmp_path, per_device_train_batch_size=2, num_generations=2)  # as on two processes with G = 4
    with pytest.raises(SegRLError, match=r"'relative' compares the answers to a prompt, and 2 completions per process"):
        check_groups([relative], torn, 4)


def test_rewards_decide_how_completions_are_read(tmp_path):
    answer = '<think>One.</think><answer>[{"bbox_2d": [1, 2, 30, 40], "point_2d": [9, 9]}]</answer>'
    collect = Collect()
    completion_format: dict[str, Any] = {"answer_format": "json", "require_seg": False}
    model, processor = tiny_model()
    trainer = SegGRPOTrainer(
        model,
        [make_reward("format", **completion_format), make_reward("box_f1", **completion_format), collect],
        grpo_args(tmp_path, max_steps=1),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        rollout_func=written_rollout([answer, GOOD, answer, answer]),
    )
    trainer.train()
    assert rewards_of(trainer, "format") == [0.75]
    assert [len(p.points) for p in collect.joined("prediction")] == [1, 0, 1, 1]
    with pytest.raises(SegRLError, match="rewards read completions in different ways"):
        train(SegGRPOTrainer, [make_reward("format", **completion_format), "box_f1"], tmp_path)


def test_probabilities_are_kept_for_rewards_that_read_them(tmp_path):
    @register_reward("test_in_trainer_probability", needs_mask=True, needs_probability=True)
    def certain(prediction, target):
        seen.append(prediction)
        return 0.0 if prediction.probability is None else float(abs(prediction.probability - 0.5).mean())

    seen: list[Any] = []
    total = weighted_sum([("test_in_trainer_probability", 1.0), ("format", 1.0)], completion_format=CompletionFormat())
    model, processor = tiny_headed_model()
    SegGRPOTrainer(
        model,
        total,
        grpo_args(tmp_path, max_steps=1, generation_kwargs=seg_bias(processor)),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        rollout_func=written_rollout(TEXTS),
    ).train()
    assert [p.probability is not None for p in seen] == [True, False, True, True]
    for prediction in seen:
        if prediction.probability is not None:
            assert ((prediction.probability > 0.5) == prediction.mask).all()
            assert 0 <= prediction.probability.min() <= prediction.probability.max() <= 1


def test_logged_predictions_can_be_scored_again(tmp_path):
    total = weighted_sum({"box_giou": 1.0, "dual_granularity_mask": 2.0})
    model, processor = tiny_headed_model()
    trainer = SegGRPOTrainer(
        model,
        total,
        grpo_args(tmp_path, log_completions=True, per_device_train_batch_size=8),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        rollout_func=written_rollout(TEXTS),
    )
    trainer.train()
    logged = [entry["rewards/total/mean"] for entry in history(trainer) if "rewards/total/mean" in entry]
    assert len(logged) == 2
    for step, mean in enumerate(logged, 1):  # boxes are in the processor's frame, which the file has to say
        scores = score_file(total, tmp_path / "completions" / f"predictions_{step:05d}.jsonl")
        assert statistics(scores.columns["total"])["mean"] == pytest.approx(mean, abs=1e-5)
        assert len(set(scores.columns["box_giou"])) > 2
    best = score_file(make_reward(BoxesFound).group_relative("best"), tmp_path / "completions")
    assert best.columns["test_in_trainer_class"] == [0.0, 0.0, 1.0, 0.0] * 4


def test_the_first_log_says_what_is_invalid_and_why(tmp_path, capsys):
    """End tokens that are kept do no harm; a box in an unread notation is invalid, and the run says so once."""
    unread = GOOD.replace("[1, 2, 30, 40]", "{1, 2, 30, 40}")
    corners = GOOD.replace("[1, 2, 30, 40]", "(1,2),(30,40)")
    collect = Collect()
    model, processor = tiny_model()
    trainer = SegGRPOTrainer(
        model,
        ["format", collect],
        grpo_args(tmp_path),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        rollout_func=written_rollout([GOOD + "</s>", unread, "no tags", corners]),
    )
    capsys.readouterr()
    trainer.train()
    assert [prediction.status.value for prediction in collect.joined("prediction")[:4]] == [
        "valid",
        "malformed_boxes",
        "no_answer",
        "valid",
    ]
    first, *_, last = collect.joined("prediction")[:4]
    assert first.boxes.tolist() == last.boxes.tolist() != []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first rollouts")]
    assert lines == [
        "first rollouts: 2 of 4 answers are invalid (50.0 %): 1 malformed_boxes (a bad box, or coordinates in a "
        "notation that is not read); 1 no_answer (no closed <answer> block with text in it)"
    ]


def test_a_run_whose_answers_are_all_valid_says_so(tmp_path, capsys):
    model, processor = tiny_model()
    SegGRPOTrainer(
        model,
        "format",
        grpo_args(tmp_path, max_steps=1),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        rollout_func=written_rollout([GOOD]),
    ).train()
    assert "first rollouts: 0 of 4 answers are invalid\n" in capsys.readouterr().out
