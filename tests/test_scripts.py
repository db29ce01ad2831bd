"""Command lines of training scripts: what a flag, a preset and a default give, and every wrong one in one line."""

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError, UnknownNameError
from segrl.reports import say
from segrl.scripts import (
    MACHINE_FLAGS,
    EvaluationArguments,
    Parser,
    RunArguments,
    TwoStageArguments,
    check_numbers,
    check_rewards,
    find_preset,
    first_stage_settings,
    missing_processes,
    parse,
    run_script,
)


@dataclass
class Mine(RunArguments):
    """A script's own flags."""

    data: str | None = field(default=None, metadata={"help": "Scans."})
    depth: int = field(default=8, metadata={"help": "Slices."})


@dataclass
class Training:
    """A small trainer's flags, with a contradiction that it finds itself."""

    steps: int = field(default=10, metadata={"help": "Steps."})
    rate: float = field(default=0.1, metadata={"help": "Rate."})
    shuffle: bool = field(default=True, metadata={"help": "Shuffle."})

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("steps is 13,\n  which nothing divides")


PRESETS = {"tiny": {"steps": 2}, "large": {"steps": 99, "rate": 0.5}}


def read(*argv: str, **settings: Any) -> Any:
    defaults = settings.pop("defaults", lambda known: find_preset(known.preset, PRESETS))
    return parse(argv, Mine, Training, defaults=defaults, **settings)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_flags_over_preset_over_defaults():
    mine, training, given_flags = read("--preset", "large", "--rate=0.25", "--no_shuffle", "--eval-limit", "3")
    assert asdict(training) == {"steps": 99, "rate": 0.25, "shuffle": False}
    assert (mine.preset, mine.eval_limit, mine.depth, mine.data) == ("large", 3, 8, None)
    assert given_flags == {"preset", "rate", "no_shuffle", "eval_limit"}


def test_without_flags_and_without_presets():
    mine, training, given_flags = parse([], Mine, Training)
    assert (mine, training, given_flags) == (Mine(), Training(), set())
    assert read()[1] == Training(steps=2)


NUMBERS = st.fixed_dictionaries({}, optional={"steps": st.integers(20, 90), "rate": st.floats(0, 1)})


@given(preset=NUMBERS, flags=NUMBERS)
def test_each_setting_has_the_most_specific_value(preset, flags):
    argv = [part for name, value in flags.items() for part in (f"--{name}", repr(value))]
    _, training, given_flags = read(*argv, defaults=lambda known: preset)
    assert asdict(training) == {"steps": 10, "rate": 0.1, "shuffle": True, **preset, **flags}
    assert given_flags == set(flags)


def test_the_preset_may_depend_on_any_flag_of_the_script():
    _, training, _ = read("--depth", "4", defaults=lambda known: {"steps": 100 * known.depth})
    assert training.steps == 400


def test_help_lists_each_flag_once_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help", description="What it does.")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    flags = re.findall(r"^  (--\w+)", shown, re.MULTILINE)
    assert flags[:2] == ["--data", "--depth"]  # of the example
    assert flags.index("--depth") < flags.index("--preset") < flags.index("--overwrite")
    assert len(set(flags)) == len(flags)
    assert not any("-" in flag[2:] for flag in flags)  # no second spelling
    assert "Scans." in shown
    assert "What it does." in shown


def test_limits_and_inputs():
    rows = Dataset.from_dict({"n": list(range(5))})
    arguments = TwoStageArguments(data="d", model="m", train_limit=2, eval_limit=9)
    assert arguments.limited(rows, "train")["n"] == [0, 1]
    assert arguments.limited(rows, "test")["n"] == list(range(5))
    assert RunArguments().limited(rows, "train") is rows
    assert arguments.inputs() == {
        **{"model": "m", "data": "d", "segmenter": None},
        **{"descriptions": None, "paraphrases": None},
    }
    assert EvaluationArguments(model="m").inputs()["model"] == "m"


def test_machine_flags_are_flags_of_both_stages():
    for config in (SegSFTConfig, SegGRPOConfig):
        assert set(MACHINE_FLAGS) <= {item.name for item in fields(config)}


@pytest.mark.parametrize(
    ("preset", "flags", "steps"),
    [  # steps of stage 1: its own flag, else the preset's, cut by --max_steps; -1 is "by epochs"
        (650, [], 650),
        (650, ["--max_steps", "2"], 2),
        (650, ["--max_steps", "900"], 650),
        (650, ["--max_steps", "2", "--sft_max_steps", "7"], 7),
        (650, ["--max_steps", "-1"], 650),
        (-1, ["--max_steps", "2"], 2),
        (None, ["--max_steps", "2"], 2),
        (None, [], None),
    ],
)
def test_steps_of_a_first_stage(preset, flags, steps, tmp_path):
    argv = [*flags, "--seed", "5", "--learning_rate", "0.25", "--bf16", "false", "--output_dir", str(tmp_path)]
    arguments, config, flags_given = parse(argv, TwoStageArguments, SegGRPOConfig)
    settings = {"bf16": True, "warmup_steps": 3} | ({} if preset is None else {"max_steps": preset})
    found = first_stage_settings(settings, config, flags_given, arguments, "out/stage1")
    expected = {"bf16": False, "warmup_steps": 3, "output_dir": "out/stage1", "seed": 5}
    assert found == expected | ({} if steps is None else {"max_steps": steps})
    assert settings["bf16"] is True
    arguments.sft_learning_rate = 0.5
    assert first_stage_settings(settings, config, flags_given, arguments, "out")["learning_rate"] == 0.5


def test_rewards_that_can_be_made(tmp_path):
    (tmp_path / "mine.yaml").write_text("reward: format\n")
    names = ("box_f1", "segrl.rewards.builtin.core_seg:format_reward", str(tmp_path / "mine.yaml"))
    assert check_rewards(names) == list(names)
    assert check_rewards([]) == []


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (
            ["--stps", "3"],
            UnknownNameError,
            "unknown flag '--stps'; did you mean '--steps'? --help_all lists all flags",
        ),
        (["--step=3"], UnknownNameError, "unknown flag '--step'; did you mean '--steps'? --help_all lists all flags"),
        (["--zzzz"], UnknownNameError, "unknown flag '--zzzz'; --help_all lists all flags"),
        (["there"], UnknownNameError, "unexpected argument 'there'; expected flags, such as --data there"),
        (["--preset", "tyny"], UnknownNameError, "unknown preset 'tyny'; did you mean 'tiny'? Known: large, tiny"),
        (["--steps", "x"], SegRLError, "argument --steps: invalid int value: 'x'; --help_all lists all flags"),
        (["--steps"], SegRLError, "argument --steps: expected one argument; --help_all lists all flags"),
        (["--steps", "13"], SegRLError, "steps is 13, which nothing divides"),
        (["--depth", "1"], SegRLError, "--depth 1: expected 2 or more; leave the flag out for the default"),
        (["--eval_limit", "0"], SegRLError, "--eval_limit 0: expected 1 or more; leave the flag out for the default"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_lines(argv, error, message):
    with pytest.raises(error) as caught:
        read(*argv, least={"depth": 2})
    assert str(caught.value) == message


def test_a_setting_that_no_flag_has():
    with pytest.raises(UnknownNameError, match="unknown setting of Training 'stepz'; did you mean 'steps'"):
        read(defaults=lambda known: {"stepz": 1})


def test_no_file_of_arguments_is_read(tmp_path, monkeypatch):
    """`HfArgumentParser` alone would take `<script>.args` as flags."""
    (tmp_path / "script.args").write_text("--depth 3")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "script.py")])
    assert Parser(Mine).read([]) == [Mine()]


@given(st.floats(allow_nan=True) | st.none(), st.floats(-5, 5))
def test_numbers_are_at_least(value, least):
    @dataclass
    class Numbers:
        weight: float | None

    if value is None or value >= least:
        check_numbers(Numbers(value), {"weight": least})
    else:
        with pytest.raises(SegRLError, match=re.escape(f"--weight {value}: expected {least} or more")):
            check_numbers(Numbers(value), {"weight": least})
    check_numbers(Numbers(value))


def test_rewards_that_cannot_be_made():
    with pytest.raises(UnknownNameError, match="unknown reward 'box_f2'; did you mean 'box_f1'"):
        check_rewards(["format", "box_f2"])
    with pytest.raises(SegRLError, match="--rewards format format: a reward is named twice, expected each once"):
        check_rewards(["format", "format"])


# ---- running ---------------------------------------------------------------------------------------------------------


def fail(*_: object) -> Any:
    raise SegRLError("broken")


def interrupt() -> None:
    raise KeyboardInterrupt


def outcome(check: Any, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run_script(check, [])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_the_work_is_done_with_the_command_line(monkeypatch):
    done: list[Sequence[str]] = []
    monkeypatch.setattr("sys.argv", ["script.py", "--of", "the process"])
    run_script(lambda argv: lambda: done.append(argv), ["--a", "1"])
    run_script(lambda argv: lambda: done.append(argv))
    assert done == [["--a", "1"], ["--of", "the process"]]


def test_errors_and_interruptions(capsys, monkeypatch):
    assert outcome(fail, capsys) == (2, "error: broken\n")
    code, said = outcome(lambda argv: interrupt, capsys)
    assert code == 130
    assert said.startswith("interrupted; checkpoints")
    monkeypatch.setenv("RANK", "1")  # the checks fail on all processes alike, and the first one says so
    assert outcome(fail, capsys) == (2, "")
    assert outcome(lambda argv: fail, capsys) == (2, "error on rank 1: broken\n")
    assert outcome(lambda argv: interrupt, capsys) == (130, "")


HOSTILE = "scan\x1b[2J\x07\x9b1m\u202e\udcff.nii"
ESCAPED = r"scan\x1b[2J\x07\x9b1m\u202e\udcff.nii"


def test_names_in_errors_and_warnings_are_escaped(capsys):
    def work() -> None:
        warnings.warn(f"{HOSTILE} is empty", stacklevel=1)
        say(f"reading {HOSTILE}\n  {HOSTILE}")
        raise SegRLError(f"{HOSTILE}: no such file\nand {HOSTILE}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = shown_by_python
        with pytest.raises(SystemExit):
            run_script(lambda argv: work, [])
    out, err = capsys.readouterr()
    assert out == f"reading {ESCAPED}\n  {ESCAPED}\n"
    assert err.endswith(f"error: {ESCAPED}: no such file\nand {ESCAPED}\n")
    assert f"{ESCAPED} is empty" in err
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out + err)


def shown_by_python(message, category, filename, lineno, file=None, line=None):
    """As Python shows a warning outside of pytest, which collects them."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_flags_in_errors_are_escaped(capsys):
    for argv in ([f"--{HOSTILE}"], [HOSTILE], ["--eval_limit", HOSTILE]):
        code, said = outcome(lambda _, argv=argv: Parser(RunArguments).read(argv), capsys)
        assert (code, ESCAPED[:20] in said) == (2, True)
        assert "\x1b" not in said


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda argv: lambda: print(1 / 0), [])


def test_a_process_that_waits_for_no_others_says_so(capsys, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one process and sets an address for the others."""
    launched = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    assert "torchrun --standalone --nproc_per_node 2" in (missing_processes(launched) or "")
    assert missing_processes({**launched, "WORLD_SIZE": "2"}) is None
    assert missing_processes({**launched, "OMPI_COMM_WORLD_SIZE": "2"}) is None
    assert missing_processes({"ACCELERATE_USE_CPU": "True"}) is None
    assert missing_processes({}) is None
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    run_script(lambda argv: lambda: None, [])
    assert capsys.readouterr().err.startswith("warning: accelerate starts one process on a CPU")
