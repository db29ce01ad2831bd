"""FSDP2 and DeepSpeed ZeRO on two CPU processes: DDP's losses, checkpoints, collectives of uneven ranks, bad settings."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from builders import questions, tiny_segmenter
from script_modules import ROOT

from segrl import inference
from segrl.caching import EncoderFingerprint
from segrl.heads.decoding import generation_states
from segrl.heads.requests import Recording

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra 'deepspeed')"
)
SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save": True}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "mask_head.safetensors")


def launch(home: Path, cases: list[dict[str, Any]], *, killed: bool = False) -> list[dict[str, Any]]:
    """What the cases logged, which must be the same on both processes; a hang fails here."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (home / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, str(tests / "engine_runs.py"), str(home), json.dumps(cases)],
            **{"env": environment, "stdout": output, "stderr": subprocess.STDOUT, "cwd": home},
        )
        try:
            code: int | str = process.wait(timeout=280)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its two processes
            process.wait(timeout=40)
            code = "a timeout"
    text = (home / "output.txt").read_text(encoding="utf-8", errors="replace")
    if killed:
        assert "SIGKILL" in text, text[-3000:]
        return []
    assert code == 0, f"ended with {code}: {text[-6000:]}"
    first, second = (json.loads((home / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert "crash" not in one, one["crash"][-3000:]
        for name in ("loss", "grad_norm", "dense/dice_ce", "eval_loss"):
            assert one.get(name) == other.get(name)
    return first


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two runs logged the same losses and gradient norms of five steps."""
    assert len(one["loss"]) == 5
    for name in ("loss", "dense/dice_ce"):
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-4)


def equal_weights(one: Path, other: Path) -> list[str]:
    """The files of weights in a run's folder, after asserting that those of another run are the same bytes."""
    names = [name for name in WEIGHTS if (one / name).is_file()]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return names


def check_answers(folder: Path) -> None:
    """Assert that a finished run answers in this one process."""
    segmenter = inference.load(folder, device="cpu")
    images, asked = questions(2)
    for image, question in zip(images, asked, strict=True):
        answer = segmenter.predict(image, question)
        assert answer.text is not None


def both(kind: str, engine: str, **more: Any) -> list[dict[str, Any]]:
    """A run left alone, and one with other weights that goes on from its checkpoint."""
    whole, resumed = f"{kind}-{engine}-whole", f"{kind}-{engine}-resumed"
    case = {"kind": kind, "engine": engine, **SAVING, **more}
    return [
        {**case, "folder": whole},
        {**case, "folder": resumed, "resume": f"{whole}/checkpoint-2", **({} if more.get("peft") else {"start": 5})},
    ]


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp2_has_the_losses_of_ddp_and_its_run_can_be_asked(tmp_path):
    """Rank 1 has no `<seg>`, in GRPO also no second token: the ranks generate and score for different times."""
    cases = [{"kind": kind, "engine": engine} for kind in ("sft", "grpo") for engine in ("ddp", "fsdp2")]
    cases[2]["short"] = cases[3]["short"] = cases[3]["save"] = True
    results = launch(tmp_path, cases)
    assert [result["wrapped"][:4] for result in results] == ["Dist", "FSDP"] * 2
    close(results[0], results[1])
    close(results[2], results[3])
    assert results[1]["encoded"] == results[0]["encoded"]  # features are kept from step to step, as with DDP
    check_answers(tmp_path / "run3")


@pytest.mark.long
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_fsdp2_resumes_exactly(kind, peft, tmp_path):
    launch(tmp_path, [case for engine in ("fsdp2", "fsdp2_sharded") for case in both(kind, engine, peft=peft)])
    for engine in ("fsdp2", "fsdp2_sharded"):
        whole = tmp_path / f"{kind}-{engine}-whole"
        names = equal_weights(whole, tmp_path / f"{kind}-{engine}-resumed")
        assert names == [WEIGHTS[peft], WEIGHTS[2]]
        assert (whole / "checkpoint-2" / "mask_head.safetensors").is_file()
        check_answers(whole)
    equal_weights(tmp_path / f"{kind}-fsdp2-whole", tmp_path / f"{kind}-fsdp2_sharded-whole")


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_zero_has_the_losses_of_ddp(kind, tmp_path):
    more = {"short": kind == "grpo"}
    cases = [{"kind": kind, "engine": engine, **more} for engine in ("ddp", "zero2", "zero3")]
    ddp, *zero = launch(tmp_path, cases)
    assert [result["wrapped"] for result in zero] == ["DeepSpeedEngine"] * 2
    for result in zero:
        close(ddp, result)


@needs_deepspeed
@pytest.mark.long
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_zero_resumes_exactly(kind, peft, tmp_path):
    launch(tmp_path, [case for engine in ("zero2", "zero3") for case in both(kind, engine, peft=peft)])
    for engine in ("zero2", "zero3"):
        whole = tmp_path / f"{kind}-{engine}-whole"
        assert equal_weights(whole, tmp_path / f"{kind}-{engine}-resumed") == [WEIGHTS[peft], WEIGHTS[2]]
        check_answers(whole)
