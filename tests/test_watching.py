"""A run that can be watched: phases, the table and the curves, validation flags, files of flags, help, memory."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_scripts_two_stages import RECIPES

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.data.division import hold_out
from segrl.errors import DataError, SegRLError, UnknownNameError
from segrl.reports.history import curve_panels, draw_curves, rows_by_step, write_curves, write_table
from segrl.scripts import TwoStageArguments, check_rewards, parse
from segrl.scripts.config_file import expand_config, flag_values, write_config
from segrl.scripts.memory import StepSizes, estimate_memory
from segrl.scripts.phases import Phases, duration
from segrl.scripts.run_steps import RunSteps
from segrl.scripts.validation import check_validation, validation_defaults

ROOT = Path(__file__).parents[1]

# ---- phases ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_that_is_left_is_that_of_the_whole_run(capsys):
    clock = Clock()
    phases = Phases({"stage 1": 30.0, "stage 2": 60.0, "evaluation": 10.0}, clock)
    assert phases.left() is None
    phases.begin("stage 1")
    assert phases.progress(0.1) is None  # too early to speak
    clock.now = 60.0
    assert phases.progress(0.5) == "stage 1: 50 % of it; 15 % done, about 6 min left"  # 15 of 100 in 60 s
    clock.now = 120.0
    phases.begin("stage 2")
    phases.begin("a part that no plan names")
    assert phases.done == pytest.approx(0.3)
    assert phases.left() == pytest.approx(280.0)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "phase 1 of 3, stage 1: about 30 % of the whole"
    assert out[-1] == "phase 2 of 3, stage 2: about 60 % of the whole; 30 % done, about 5 min left"


def test_a_run_that_goes_on_counts_only_what_it_does_itself():
    clock = Clock()
    phases = Phases({"stage 1": 30.0, "stage 2": 60.0, "evaluation": 10.0}, clock)
    phases.begin("stage 2", fraction=0.5)  # 30 of 60 were done before
    assert phases.left() is None
    clock.now = 20.0
    phases.progress(0.75)
    assert phases.done == pytest.approx(0.75)
    assert phases.left() == pytest.approx(25 * 20 / 15)


def test_a_stage_costs_its_rows_or_its_answers(tmp_path):
    """Eight rows, twice and once; GRPO writes four answers to each, by epochs as by steps."""
    run = RunSteps()
    run.arguments, run.recipe = TwoStageArguments(), RECIPES["tiny"]
    run.rows = {"train": rows_of(*"abcdefgh"), "test": rows_of("a", "b")}
    plain: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
    sft = SegSFTConfig(str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, **plain)
    by_epochs = {"num_generations": 4, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    grpo = SegGRPOConfig(str(tmp_path), **by_epochs, **plain)
    twice = SegGRPOConfig(str(tmp_path), **by_epochs, num_iterations=2, **plain)
    assert [run.steps(config) for config in (sft, grpo, twice)] == [4, 4, 8]
    plan = run._plan({"stage 2": grpo, "stage 1": sft}).plan
    assert list(plan.items()) == [("stage 1", 16.0), ("stage 2", 32.0), ("evaluation", 4.0)]
    by_steps = SegGRPOConfig(str(tmp_path), **{**by_epochs, "max_steps": 4}, **plain)
    assert run._plan({"stage 2": by_steps}).plan["stage 2"] == plan["stage 2"]


def test_durations():
    assert [duration(s) for s in (0.4, 99, 100, 5999, 6000)] == ["0 s", "99 s", "2 min", "1 h 40 min", "1 h 40 min"]


# ---- the log ---------------------------------------------------------------------------------------------------------

LOG: list[dict[str, Any]] = [
    {"loss": 1.0, "rewards/box_f1/mean": 0.1, "rewards/box_f1/std": 0.2, "kl": None, "step": 5, "step_time": 9.0},
    {"eval_dice": 0.25, "eval_runtime": 3.0, "step": 5, "epoch": 0.5},
    {"loss": 0.5, "rewards/box_f1/mean": math.nan, "dense/dice_ce": 0.75, "policy_weighted": 0.1, "step": 10},
    {"train_runtime": 8.0, "train_loss": 0.7, "step": 10},
]


def test_a_table_has_one_row_a_step_and_no_times(tmp_path):
    assert [row["step"] for row in rows_by_step(LOG)] == [5, 10]
    text = write_table(LOG, tmp_path / "results.csv").read_text()
    head, first, second = (line.split(",") for line in text.splitlines())
    assert head[:2] == ["step", "epoch"]
    assert head[2:] == sorted(head[2:])  # a run that went on has the same table
    assert not any("time" in name for name in head)
    assert dict(zip(head, first, strict=True))["eval_dice"] == "0.25"
    assert dict(zip(head, second, strict=True))["rewards/box_f1/mean"] == ""  # not a number
    assert write_table(LOG, tmp_path / "again.csv").read_bytes() == text.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "results.csv"]


def test_curves(tmp_path):
    panels = curve_panels(LOG)
    assert panels["components of the reward"] == {"box_f1": ([5], [0.1])}
    assert panels["Dice"] == {"validation dice": ([5], [0.25])}
    assert set(panels["loss"]) == {"loss", "policy_weighted"}
    assert "KL and entropy" not in panels
    write_curves(LOG, tmp_path)
    once = (tmp_path / "curves.png").read_bytes()
    write_curves(LOG, tmp_path)
    assert once == (tmp_path / "curves.png").read_bytes()  # nothing in it depends on the time
    assert draw_curves({}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


# ---- the validation split --------------------------------------------------------------------------------------------


def rows_of(*patients: str) -> Dataset:
    count = len(patients)
    return Dataset.from_dict(
        {"name": [f"r{n}" for n in range(count)], "scan": [f"s{n}" for n in range(count)], "patient": list(patients)}
    )


def test_rows_are_held_out_by_patient():
    kept, held = hold_out(rows_of(*"aabbccddeeff"), 0.3)
    assert len(kept) + len(held) == 12
    assert len(held) == 4
    assert not set(kept["patient"]) & set(held["patient"])
    again, _ = hold_out(rows_of(*"aabbccddeeff"), 0.3)
    assert again["name"][:] == kept["name"][:]
    kept, held = hold_out(rows_of(*"aaaaab"), 0.2)  # the large patient stays
    assert held["patient"][:] == ["b"]
    kept, held = hold_out(rows_of(*[""] * 6), 0.5, patients="r[0-2]|r")  # by the names
    assert len(held) == 3
    assert len({"r3", "r4", "r5"} & set(held["name"])) in (0, 3)  # of one patient, "r"


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (rows_of("a", "b", "c"), 0.1, "--val_fraction 0.1 of 3 training rows is 0: none is held out"),
        (rows_of("a", "b", "c"), 0.9, "--val_fraction 0.9 of 3 training rows is 3: none is left to train on"),
        (rows_of("a", "a", "a"), 0.4, "--val_fraction 0.4: all 3 training rows are of one patient"),
    ],
)
def test_a_split_that_would_be_empty(rows, fraction, message):
    with pytest.raises(DataError, match=re.escape(message)):
        hold_out(rows, fraction)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 1.5}, "--val_fraction 1.5: expected a number between 0 and 1"),
        ({"val_fraction": math.nan}, "--val_fraction nan: expected a number between 0 and 1"),
        ({"val_fraction": 0.1, "val_split": "val"}, "--val_fraction and --val_split: expected one of the two"),
        ({"val_split": "test", "data": "x"}, "--val_split test: the run is measured on it at its end"),
        ({"val_split": "train", "data": "x"}, "--val_split train: it is trained on"),
        ({"val_split": "val"}, "--val_split val: synthetic data has the splits train and test"),
        ({"early_stopping": 2}, "--early_stopping: there are no rows to choose by"),
        ({"val_fraction": 0.1, "patients": "("}, "--patients '(' is no regular expression"),
    ],
)
def test_wrong_flags_of_a_validation(flags, message):
    with pytest.raises(SegRLError, match=re.escape(message)):
        check_validation(TwoStageArguments(**flags), {name: [str(value)] for name, value in flags.items()})


def test_settings_that_follow_from_a_validation(tmp_path):
    arguments = TwoStageArguments(val_fraction=0.1)
    assert validation_defaults(TwoStageArguments(), {}, "sft") == {}
    with pytest.raises(SegRLError, match="--val_fraction with --eval_strategy no"):
        check_validation(arguments, {"eval_strategy": ["no"]})
    found = validation_defaults(arguments, {"eval_steps": ["5"], "load_best_model_at_end": ["True"]}, "grpo")
    assert (found["save_steps"], found["save_strategy"], found["num_generations_eval"]) == ("5", "steps", 1)
    assert "save_steps" not in validation_defaults(arguments, {"load_best_model_at_end": ["False"]}, "grpo")
    assert validation_defaults(TwoStageArguments(val_fraction=0.1, early_stopping=2), {}, "sft")["save_steps"] == 0.1


# ---- a file of flags -------------------------------------------------------------------------------------------------


def test_a_file_of_flags_and_the_one_that_a_run_writes(tmp_path, monkeypatch):
    for name in ("SEGRL_TEST", "SEGRL_API_KEY"):
        monkeypatch.setenv(name, "")  # which the file sets, and the end of the test takes back
    path = tmp_path / "my.yaml"
    path.write_text(
        "env: {SEGRL_TEST: 1, SEGRL_API_KEY: secret}\n"
        "learning_rate: 1e-4\nrewards: [format, box_f1]\nbf16: false\nreport_to: [a, b]\n"
        "train_limit: null\nlr_scheduler_kwargs: {num_cycles: 2}\nhub_token: secret\nmax-steps: 7\n"
    )
    argv, files, variables = expand_config(["--max_steps", "9", f"--config={path}", "--no_reasoning"])
    assert argv[-3:] == ["--max_steps", "9", "--no_reasoning"]
    assert set(files) == {"learning_rate", "rewards", "bf16", "report_to", "lr_scheduler_kwargs", "hub_token",
                          "train_limit"}  # fmt: skip
    assert flag_values(argv)["report_to"] == ["a,b"]
    monkeypatch.setenv("SEGRL_TEST", "")
    shown = [part for part in argv if part != "a,b"]
    shown[shown.index("--report_to") + 1 : shown.index("--report_to") + 1] = ["none"]
    arguments, config, _ = parse([*shown, "--output_dir", str(tmp_path), "--use_cpu"], TwoStageArguments, SegGRPOConfig)
    assert (config.learning_rate, config.max_steps, config.bf16, arguments.rewards) == (
        1e-4, 9, False, ["format", "box_f1"]
    )  # fmt: skip
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    told = [*shown, "--output_dir", str(tmp_path)]
    text = write_config(tmp_path, told, arguments, config, variables).read_text()
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "\nreasoning: false\n" in text
    flags = ["--config", str(tmp_path / "config.yaml"), "--output_dir", "other", "--use_cpu"]
    again, _, repeated = expand_config(flags)
    assert (repeated, os.environ["SEGRL_TEST"]) == ({"SEGRL_TEST": "1"}, "1")
    once_more = parse(again, TwoStageArguments, SegGRPOConfig)
    assert once_more[0] == arguments
    assert {**once_more[1].to_dict(), "output_dir": ""} | {"hub_token": ""} == {
        **config.to_dict(), "output_dir": "", "hub_token": ""
    }  # fmt: skip


@pytest.mark.parametrize("value", ["[A-Z]+_", "no", "007", "12:30", "a: b", "null", "1e-4", "true", "0.5"])
def test_a_run_writes_each_value_as_it_was_given(value, tmp_path):
    """YAML would read some as something else: a list that never ends, false, seven, minutes, a mapping, nothing."""
    config = SegSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    path = write_config(tmp_path, ["--patients", value, "--save_strategy", "no"], TwoStageArguments(), config)
    assert expand_config(["--config", str(path)])[0] == ["--patients", value, "--save_strategy", "no"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a", "expected flags and their values"),
        ("config: other.yaml", "a file of flags cannot name another one"),
        ("env: 3", "env: expected names and values"),
        ("rewards: [[a]]", "rewards: expected a value or a list of values"),
    ],
)
def test_a_file_that_holds_no_flags(content, message, tmp_path):
    path = tmp_path / "my.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SegRLError, match=re.escape(f"--config {str(path)!r}")) as caught:
        expand_config(["--config", str(path)])
    assert message in str(caught.value)
    with pytest.raises(SegRLError, match="expected a YAML file of flags"):
        expand_config(["--config"])
    with pytest.raises(SegRLError, match="given twice"):
        expand_config(["--config", "a", "--config", "b"])


def test_names_separated_by_commas():
    with pytest.raises(SegRLError, match="expected names separated by spaces: --rewards format box_f1"):
        check_rewards(["format,box_f1"])
    with pytest.raises(SegRLError, match=r"--drop_rewards box_f1, format: expected .* --drop_rewards box_f1 format"):
        check_rewards(["format", "box_f1"], ["box_f1,", "format"])
    with pytest.raises(UnknownNameError):
        check_rewards(["formt"])


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURED = json.loads((ROOT / "benchmarks/results/2026-11-27_loss_core_seg_3b_h200.json").read_text())["results"][0]
SHORT = json.loads((ROOT / "benchmarks/results/2026-11-27_step_short_3b_h200.json").read_text())["results"][0]


@pytest.mark.parametrize(("result", "tolerance"), [(MEASURED, 0.05), (SHORT, 0.05)])
def test_the_estimate_of_memory_beside_what_was_measured(result, tolerance):
    """Qwen2.5-VL-3B, LoRA of rank 64, bfloat16, checkpointing, on one H200: 11.0 GB for the loss of core_seg."""
    arm = result["arms"]["segrl"]
    parameters, trained = arm["parameters"], arm["parameters"]["trained"]
    lora = result["arms"]["trl"]["parameters"]["trained"]
    whole = parameters["language"] + parameters["vision"]
    found = estimate_memory(
        StepSizes(
            weights=2 * (whole - lora) + 4 * (lora + parameters["mask_head"]),
            trained=4 * trained,
            layers=36,
            hidden=2048,
            intermediate=11008,
            cache_width=2 * 2 * 128,
            width=2,
            lora=True,
            checkpointing=True,
            tokens=arm["counts"]["lm_tokens/forward"],
        )
    )
    assert found.peak == pytest.approx(arm["memory"]["peak"], rel=tolerance)


def test_flags_of_both_trainers_take_validation(tmp_path):
    for config in (SegSFTConfig, SegGRPOConfig):
        arguments, made, _ = parse(
            ["--val_fraction", "0.2", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"],
            TwoStageArguments,
            config,
            defaults=lambda known: validation_defaults(known, {"load_best_model_at_end": ["True"]}, "sft"),
        )
        assert arguments.val_fraction == 0.2
        assert (made.eval_strategy, made.save_strategy, made.metric_for_best_model) == ("steps", "steps", "dice")
