"""Nothing fails late: flags of both stages, parts and rewards are judged before a folder is claimed or data is made."""

import json
from pathlib import Path
from typing import Any

import pytest
from script_modules import Example
from test_examples import KINDS, PIN, Kind

from segrl import SegGRPOConfig, make_reward
from segrl.errors import RewardError, SegRLError
from segrl.rewards.trial import try_reward
from segrl.scripts import check_trainer, claimed, image_run

BOTH = [  # flags of either stage
    (["--learning_rate", "-1"], "--learning_rate -1.0: expected 0 or more"),
    (["--learning_rate", "nan"], "--learning_rate nan: expected a finite number"),
    (["--head_learning_rate", "-1"], "--head_learning_rate -1.0: expected 0 or more"),
    (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: expected 1 or more"),
    (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0: expected 1 or more"),
    (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: expected 1 or more"),
    (["--weight_decay", "-1"], "--weight_decay -1.0: expected 0 or more"),
    (["--adam_beta1", "1"], "--optim adamw_torch"),
    (["--adam_epsilon", "-1"], "--optim adamw_torch"),
    (["--optim", "grokadamw"], "--optim grokadamw"),  # whose package is not installed
    (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay"),
    (["--warmup_steps", "-1"], "--warmup_steps -1"),
    (["--max_grad_norm", "inf"], "--max_grad_norm inf: expected a finite number"),
    (["--logging_steps", "0"], "--logging_steps 0"),
    (["--save_strategy", "steps", "--save_steps", "0"], "--save_steps 0"),
    (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1: expected 0 or more"),
    (["--max_steps", "0", "--num_train_epochs", "0"], "--num_train_epochs 0.0: expected more than 0"),
    (["--report_to", "wandb"], "--report_to wandb: WandbCallback requires wandb to be installed"),
    (["--report_to", "nothing_known"], "--report_to nothing_known: nothing_known is not supported"),
    (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_strategy steps: training gets no evaluation data"),
    (["--eval_on_start", "true"], "--eval_on_start True: training gets no evaluation data"),
    (["--loss_type", "gpro"], "loss_type"),
    (["--global_batch_size", "0"], "--global_batch_size 0: expected 1 or more"),
    (["--use_liger_kernel", "true"], "--use_liger_kernel: liger_kernel is not installed"),
]
STAGE2 = [
    (["--temperature", "0"], "--temperature 0.0: `temperature` (=0.0) has to be a strictly positive float"),
    (["--temperature", "-1"], "--temperature -1.0"),
    (["--top_p", "2"], "--top_p 2.0"),
    (["--top_k", "-1"], "--top_k -1"),
    (["--min_p", "-1"], "--min_p -1.0"),
    (["--repetition_penalty", "0"], "--repetition_penalty 0.0"),
    (["--cache_implementation", "none_such"], "none_such"),
    (["--max_completion_length", "0"], "--max_completion_length 0: expected 1 or more"),
    (["--num_generations", "0"], "--num_generations 0: expected 2 or more"),
    (["--num_iterations", "0"], "--num_iterations 0: expected 1 or more"),
    (["--steps_per_generation", "0"], "--steps_per_generation 0: expected 1 or more"),
    (["--beta", "-1"], "--beta -1.0: expected 0 or more"),
    (["--importance_sampling_level", "answer"], "--importance_sampling_level answer: expected one of token, sequence"),
    (["--reward_weights", "1", "2"], "--reward_weights [1.0, 2.0]: expected"),
    (["--sft_learning_rate", "-1"], "--learning_rate -1.0: expected 0 or more"),
]
FEW = ("--train_limit", 3, "--eval_limit", 2)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.example.name)
def kind(request) -> Kind:
    return request.param


def refusal(kind: Kind, script: str, *flags: object) -> str:
    with pytest.raises(SegRLError) as caught:
        getattr(kind.runs, f"check_{script}")([str(flag) for flag in (*FEW, *flags, "--use_cpu", "true")])
    return str(caught.value)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [("sft", *case) for case in BOTH] + [("grpo", *case) for case in BOTH + STAGE2],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_flags_that_fail_late_in_other_libraries(kind, tmp_path, script, flags, message):
    said = refusal(kind, script, *flags, "--output_dir", tmp_path / "run")
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("reward: box_f1\nsettings: {min_iou: 1.0}", "reward 'box_f1': min_iou=1.0; expected a number in [0, 1)"),
        ("reward: dual_granularity_mask\nsettings: {dice_weight: .inf}", "dice_weight=inf; expected a finite number"),
        ("reward: 'json:dumps'", "reward 'dumps'"),
        ("reward: 'operator:truediv'", "a first try on a made-up answer failed: reward 'truediv'"),
    ],
)
def test_rewards_that_cannot_score(kind, tmp_path, written, message):
    (tmp_path / "mine.yaml").write_text(written)
    assert message in refusal(kind, "grpo", "--rewards", tmp_path / "mine.yaml", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rewards_of_the_other_task(tmp_path):
    for kind, name, message in [
        (KINDS[0], "slice_boxes", "reads the ground truth of a volume, and the rows are images"),
        (KINDS[1], "mask_dice", "reads the ground truth of an image, and the rows are volumes"),
        (KINDS[1], "box_f1", "reads the ground truth of an image, and the rows are volumes"),
    ]:
        assert message in refusal(kind, "grpo", "--rewards", name, "--output_dir", tmp_path / "run")


def test_presets_pass(kind, tmp_path):
    for preset, recipe in kind.runs.recipes.items():
        rewards = [make_reward(name) for name in recipe.rewards]
        more = {"bf16": False, "use_cpu": True, "report_to": "none"}
        check_trainer(SegGRPOConfig(**{"output_dir": str(tmp_path), **recipe.grpo, **more}), rewards, recipe.prompt)
        assert preset in kind.runs.recipes


def test_a_trl_function_that_needs_columns_is_not_tried():
    def solved(completions, solution, **kwargs):
        return [float(text == answer) for text, answer in zip(completions, solution, strict=True)]

    def always(completions, **kwargs):
        return ["high"] * len(completions)

    try_reward(make_reward(solved))
    with pytest.raises(RewardError, match="the score is the text 'high'"):
        try_reward(make_reward(always))


# ---- parts -----------------------------------------------------------------------------------------------------------


def counted(make: Any, counts: list[int]) -> Any:
    def call(count: int, *args: Any, **settings: Any) -> Any:
        counts.append(count)
        return make(count, *args, **settings)

    return call


@pytest.fixture
def made(kind, monkeypatch) -> list[int]:
    """Numbers of images or volumes that were made."""
    counts: list[int] = []
    places: list[tuple[Any, str]] = [(image_run, "make_synthetic"), (image_run, "make_scene")]
    if kind.example.name == "medvol_r1":
        places = [(kind.example.modules["recipe"], "make_synthetic_volumes")]
    for module, name in places:
        monkeypatch.setattr(module, name, counted(getattr(module, name), counts))
    return counts


def test_parts_that_are_not_there_are_found_before_data_is_made(kind, made, tmp_path):
    def refused(script: str, *flags: object) -> str:
        with pytest.raises(SegRLError) as caught:
            getattr(kind.runs, f"check_{script}")([*map(str, flags), "--output_dir", str(tmp_path / "run")])
        assert made == []
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    for flags in (["sft"], ["grpo"], ["grpo", "--skip_stage1"], ["evaluation"]):
        assert "--model 'no_such': no such folder" in refused(*flags, "--model", "no_such")
    for script in ("grpo", "evaluation"):
        assert "holds no model" in (said := refused(script, "--model", tmp_path / "empty")) or "no mask head" in said
    for script in ("sft", "grpo"):
        assert "'no.pt' does not exist" in refused(script, "--segmenter", "no.pt")
        if kind.baseline == "baseline":
            assert "unknown adapter 'lineer'" in refused(script, "--adapter", "lineer")
            assert "unknown probe 'answr'" in refused(script, "--probe", "answr")


def test_no_more_is_made_than_is_used(kind, made, tmp_path):
    run = kind.runs(kind.runs.training_flags(train_limit=16, eval_limit=2), 42, tmp_path / "run")
    for split, count in (("train", 16), ("test", 2)):
        rows = run.load(split)
        assert len(run.synthesize(split) if rows is None else rows) == count
    assert made == [16, 2]


# ---- the claim -------------------------------------------------------------------------------------------------------


def test_a_claim_is_taken_back_unless_something_was_written(tmp_path):
    folder = tmp_path / "run"

    def fail(path: Path, text: str | None) -> None:
        with claimed(folder, {"preset": "tiny"}):
            path.mkdir() if text is None else path.write_text(text)
            raise KeyError("late")

    with pytest.raises(KeyError, match="late"):
        fail(folder / "stage1", None)
    assert not folder.exists()
    with pytest.raises(KeyError, match="late"):
        fail(folder / "weights", "precious")
    assert sorted(path.name for path in folder.iterdir()) == ["segrl_run.json", "weights"]
    assert json.loads((folder / "segrl_run.json").read_text())["arguments"] == {"preset": "tiny"}


def test_a_trainer_that_cannot_be_built_leaves_no_folder(tmp_path, monkeypatch):
    """What the checks did not foresee: TRL's constructor makes the folder of stage 1, and fails."""

    def broken(self, model, stage):
        raise SegRLError("not foreseen")

    monkeypatch.setattr(KINDS[0].runs, "trainer_arguments", broken)
    work = KINDS[0].runs.check_sft(
        [*map(str, FEW), "--use_cpu", "true", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    )
    with pytest.raises(SegRLError, match="not foreseen"):
        work()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_reference_model_without_stage1(tmp_path):
    """TRL loads the reference of its KL term by name, and the preset's model comes from nowhere."""
    flags = ("--beta", 0.04, "--skip_stage1", "--max_steps", 2, "--logging_steps", 1, *PIN)
    sizes = ("--train_limit", 16, "--eval_limit", 2, "--max_completion_length", 8, "--num_generations", 2)
    example: Example = KINDS[0].example
    example.done("train_grpo", *flags, *sizes, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "run")
    history = json.loads(Path(tmp_path, "run", "log_history.json").read_text())
    steps = [entry for entry in history if "kl" in entry]
    assert len(steps) == 2
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # the reference is the model that training began with
    assert not any("mask_head" in path.name for path in Path(tmp_path, "run", "start").iterdir())
