"""A published batch size holds for any number of processes, or is refused with the numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
from script_modules import Example
from transformers import TrainingArguments

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.errors import SegRLError
from segrl.trainers import batches

CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
CORE_SEG = Example("core_seg").modules["recipe"].RECIPES["core_seg_3b"]
CPU_FLAGS = ("--use_cpu", "true", "--bf16", "false", "--report_to", "none")
MEDVOL = Example("medvol_r1").modules["recipe"].RECIPES["medvol_r1_4b"]


@pytest.fixture
def processes(monkeypatch):
    """Say that there are so many processes: by the environment that segrl reads, and by what transformers has found.

    The environment of the whole process would make accelerate wait for the others.
    """

    def start(count: int, found: int | None = None) -> None:
        monkeypatch.setattr(batches, "os", SimpleNamespace(environ={"WORLD_SIZE": str(count)}))
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: found or count))

    return start


def rows_of_a_step(config: Any, world: int) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_core_seg_takes_the_published_batches_on_any_number_of_gpus(processes, world):
    processes(world)
    sft = SegSFTConfig("x", **{**CORE_SEG.sft, **CPU})
    assert rows_of_a_step(sft, world) == 32
    grpo: Any = SegGRPOConfig("x", **{**CORE_SEG.grpo, **CPU})
    assert rows_of_a_step(grpo, world) == grpo.generation_batch_size == 64
    assert (grpo.generation_batch_size, grpo.num_generations) == (64, 4)  # 16 prompts
    if world <= 2:  # the other reading: 16 completions
        other = SegGRPOConfig("x", **{**CORE_SEG.grpo, **CPU, "batch_unit": "completions"})
        assert rows_of_a_step(other, world) == other.generation_batch_size == 16


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_medvol_takes_the_published_batches_of_a_gpu_on_each(processes, world):
    processes(world)
    sft, grpo = (SegSFTConfig("x", **{**MEDVOL.sft, **CPU}), SegGRPOConfig("x", **{**MEDVOL.grpo, **CPU}))
    assert rows_of_a_step(sft, world) == 2 * world
    assert grpo.generation_batch_size == 4 * world  # one prompt, with its four completions, on each


@pytest.mark.parametrize(
    ("world", "settings", "message"),
    [
        (
            3,
            {},
            r"global_batch_size=16 prompts \(64 completions\): 3 processes of per_device_train_batch_size=8 take 24 at "
            r"a time, which does not divide 64; use a number of processes that divides 64",
        ),
        (2, {"per_device_train_batch_size": 12}, r"take 24 at a time.*; use --per_device_train_batch_size 8"),
        (
            4,
            {"batch_unit": "completions"},
            r"16 completions \(16 .*: 4 .*; use --per_device_train_batch_size 4",
        ),
        (
            1,
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=8 with 1 processes.*2 was asked for",
        ),
        (1, {"batch_unit": "prompt"}, "unknown batch_unit 'prompt'; did you mean 'prompts'"),
    ],
)
def test_what_cannot_be_shared_is_refused(processes, world, settings, message):
    processes(world)
    with pytest.raises(SegRLError, match=message):
        SegGRPOConfig("x", **{**CORE_SEG.grpo, **CPU, **settings})


def test_another_number_of_processes_than_the_environment_says_is_refused(processes):
    processes(2, found=1)
    for config, settings in ((SegSFTConfig, CORE_SEG.sft), (SegGRPOConfig, CORE_SEG.grpo)):
        with pytest.raises(SegRLError, match=r"computed for WORLD_SIZE=2 .* but there are 1 processes"):
            config("x", **{**settings, **CPU})


def test_without_a_global_batch_size_nothing_changes():
    assert SegGRPOConfig("x", gradient_accumulation_steps=3, num_generations=2, **CPU).gradient_accumulation_steps == 3
    assert SegSFTConfig("x", gradient_accumulation_steps=3, **CPU).gradient_accumulation_steps == 3


def test_flags_of_the_script():
    runs = Example("core_seg").modules["recipe"].CoreSegRun
    known = runs.training_flags(preset="core_seg_3b")
    assert runs._defaults(known, "sft", {}, "x")["global_batch_size"] == 32
    assert "global_batch_size" not in runs._defaults(known, "sft", {"gradient_accumulation_steps": ["1"]}, "x")
    flags = ["--preset", "core_seg_3b", "--gradient_accumulation_steps", "1", "--global_batch_size", "8", *CPU_FLAGS]
    with pytest.raises(SegRLError, match="--gradient_accumulation_steps follows from --global_batch_size; pass one"):
        runs.check_sft(flags)
