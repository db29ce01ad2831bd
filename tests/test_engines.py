"""FSDP2 and DeepSpeed ZeRO on two CPU processes: DDP's losses, checkpoints, uneven ranks, bad settings."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from builders import questions
from script_modules import ROOT
from torch.distributed.fsdp import StateDictType
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from segrl import inference
from segrl.errors import CheckpointError
from segrl.heads.decoding import generation_states
from segrl.heads.requests import Recording
from segrl.models.whole_loading import whole_loading
from segrl.trainers.engines import check_written_by

pytestmark = pytest.mark.timeout(600)  # several runs in one launch, since importing takes longer than training
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra 'deepspeed')"
)
SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save": True}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "mask_head.safetensors")


def launch(
    home: Path, cases: list[dict[str, Any]], *, killed: bool = False, processes: int = 2
) -> list[dict[str, Any]]:
    """Return what the cases logged, which must be the same on all processes; a hang fails here."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    with (home / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, str(tests / "engine_runs.py"), str(home), json.dumps(cases)],
            **{"env": environment, "stdout": output, "stderr": subprocess.STDOUT, "cwd": home},
        )
        try:
            code: int | str = process.wait(timeout=540)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its two processes
            process.wait(timeout=40)
            code = "a timeout"
    text = (home / "output.txt").read_text(encoding="utf-8", errors="replace")
    if killed:
        assert "SIGKILL" in text, text[-3000:]
        return []
    assert code == 0, f"ended with {code}: {text[-6000:]}"
    first, *others = (json.loads((home / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(processes))
    for number, one in enumerate(first):
        assert "crash" not in one, one["crash"][-3000:]
        for name in ("loss", "grad_norm", "dense/dice_ce", "eval_loss"):
            assert all(one.get(name) == other[number].get(name) for other in others)
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
    cases: list[Any] = [{"kind": kind, "engine": engine} for kind in ("sft", "grpo") for engine in ("ddp", "fsdp2")]
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


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_evaluation_best_model_and_limits(kind, tmp_path):
    """Five rows are evaluated by two processes of four; the best model is that of the whole run with DDP."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    more = {**SAVING, **evaluated, "learning_rate": 0.3, "short": kind == "grpo"}
    cases = [{"kind": kind, "engine": engine, **more} for engine in ("ddp", "fsdp2", "fsdp2_sharded")]
    ddp, *sharded = launch(tmp_path, cases)
    for number, result in enumerate(sharded, 1):
        np.testing.assert_allclose(result["eval_loss"], ddp["eval_loss"], rtol=1e-3)
        assert Path(result["best"]).name == Path(ddp["best"]).name
        left = [path.name for path in (tmp_path / f"run{number}").glob("checkpoint-*")]
        assert Path(result["best"]).name in left
        assert len(left) <= 2
        check_answers(tmp_path / f"run{number}")


@pytest.mark.long
def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path):
    case = {"kind": "grpo", "engine": "fsdp2", **SAVING, "save_steps": 1, "folder": "killed"}
    launch(tmp_path, [{**case, "kill": 3}], killed=True)
    launch(tmp_path, [{**case, "resume": True, "start": 5}, {**case, "folder": "alone"}])
    assert equal_weights(tmp_path / "killed", tmp_path / "alone") == [WEIGHTS[0], WEIGHTS[2]]


@pytest.mark.long
def test_what_an_engine_cannot_do_is_an_error(tmp_path):
    saved = {"folder": "saved", "resume": "saved/checkpoint-2"}
    cases = [
        {"engine": "fsdp2_apart", "max_steps": 1},
        {"engine": "fsdp2", "max_steps": 1, "ignored": r"mask_head\..*"},
        {"engine": "fsdp2_sharded", **SAVING, "max_steps": 2, "folder": "saved"},
        {"engine": "fsdp2", **saved},
        {"engine": "ddp", **saved},
    ]
    apart, ignored, done, *refused = launch(tmp_path, [{"kind": "sft", **case} for case in cases])
    assert "FSDP shards segmenter of the mask head apart from its model" in apart["error"]
    assert "fsdp_transformer_layer_cls_to_wrap" in apart["error"]
    assert "trained parameters of the mask head out" in ignored["error"]
    assert "take the head out of fsdp_ignored_modules" in ignored["error"]
    assert "error" not in done
    for result, engine in zip(refused, ("FSDP with FULL_STATE_DICT", "no engine that shards"), strict=True):
        assert f"was written by FSDP with SHARDED_STATE_DICT, and this run has {engine}" in result["error"]


@pytest.mark.long
def test_a_checkpoint_of_two_processes_in_one(tmp_path):
    """FSDP's are read by any number of processes."""
    case = {"kind": "sft", "engine": "fsdp2_sharded", **SAVING, "folder": "saved"}
    launch(tmp_path, [{**case, "max_steps": 2}])
    (done,) = launch(tmp_path, [{**case, "resume": "saved/checkpoint-2", "start": 5}], processes=1)
    assert "error" not in done
    assert len(done["loss"]) == 4  # two of them are those of the checkpoint


OPTIMIZERS = [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
WRITTEN = {  # files by which a checkpoint's engine is known
    "no engine that shards": ["optimizer.pt"],
    "FSDP with FULL_STATE_DICT": ["pytorch_model_fsdp.bin"],
    "FSDP with SHARDED_STATE_DICT": ["pytorch_model_fsdp_0/__0_0.distcp"],
    "DeepSpeed ZeRO stage 1 or 2 on 2 processes": [*OPTIMIZERS, "global_step2/mp_rank_00_model_states.pt"],
    "DeepSpeed ZeRO stage 3 on 2 processes": [
        *OPTIMIZERS,
        *(f"global_step2/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)),
    ],
}


def accelerator_of(engine: str, processes: int) -> Any:
    """Return what accelerate says of itself on an engine."""
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)
    if engine.startswith("FSDP"):
        kind = StateDictType[engine.split()[-1]]
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    elif engine.startswith("DeepSpeed"):
        state.deepspeed_plugin = SimpleNamespace(zero_stage=3 if "stage 3" in engine else 2)
    return SimpleNamespace(state=state, num_processes=processes)


@pytest.mark.parametrize("written", WRITTEN)
def test_a_checkpoint_goes_on_where_it_was_written(written, tmp_path):
    for name in WRITTEN[written]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for engine in WRITTEN:
        if engine == written:
            check_written_by(accelerator_of(engine, 2), str(tmp_path))
            continue
        with pytest.raises(CheckpointError) as caught:
            check_written_by(accelerator_of(engine, 2), str(tmp_path))
        assert f"was written by {written}, and this run has {engine}" in str(caught.value)
    if written.startswith("DeepSpeed"):
        with pytest.raises(CheckpointError, match=r"on 2 processes, and this run has .* on 4 processes"):
            check_written_by(accelerator_of(written, 4), str(tmp_path))
    else:
        check_written_by(accelerator_of(written, 4), str(tmp_path))


@pytest.mark.long
def test_plain_trl_on_fsdp2(tmp_path):
    """The baseline: GRPO has DDP's losses; in SFT the gradient of the output embeddings is not the mean."""
    cases = [
        {"kind": kind, "engine": engine, "plain": True, "max_steps": 2}
        for kind in ("grpo", "sft")
        for engine in ("ddp", "fsdp2")
    ]
    results = launch(tmp_path, cases)
    np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(results[0]["grad_norm"], results[1]["grad_norm"], rtol=1e-4)
    # if this fails, TRL or accelerate has been mended: `gather_output_embeddings` may go
    assert abs(results[2]["grad_norm"][0] - results[3]["grad_norm"][0]) > 0.01


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


# ---- fast ------------------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "examples").glob("*/accelerate/*.yaml"))


def test_both_examples_have_four_configs():
    names = ["fsdp2_1x80gb", "fsdp2_2x48gb", "zero3_1x80gb", "zero3_2x48gb"]
    assert [(path.parts[-3], path.stem) for path in CONFIGS] == [
        (example, name) for example in ("core_seg", "medvol_r1") for name in names
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_configs_are_read_by_accelerate(path):
    """Unknown keys are errors of accelerate; the values are those that segrl needs."""
    config: Any = load_config_from_file(str(path))
    engine, hardware = path.stem.split("_")
    assert config.num_processes == int(hardware[0])
    assert config.mixed_precision == "bf16"
    if engine == "zero3":
        assert config.distributed_type.value == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == 3
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
        assert config.deepspeed_config["zero3_init_flag"] is False
        return
    assert config.distributed_type.value == "FSDP"
    known = FullyShardedDataParallelPlugin.__dataclass_fields__
    settings = {key.removeprefix("fsdp_"): value for key, value in config.fsdp_config.items()}
    assert settings.pop("version") == 2
    assert settings.pop("offload_params") is (hardware == "1x80gb")
    assert settings.pop("cpu_ram_efficient_loading") is False
    assert set(settings) <= set(known)


def test_states_of_a_generation_that_waits_for_other_processes():
    """Behind the prompt's forward come those of the tokens, and then those that mean nothing."""
    recording = Recording(last_only=True, calls=[torch.full((2, 1, 1), float(n)) for n in range(6)])
    states = generation_states(recording, [[7, 8, 9], [7]], synced=True)
    assert states is not None
    assert states[0, :, 0].tolist() == [1.0, 2.0]
    assert generation_states(recording, [[7], [7]], synced=True) is None
    alone = generation_states(recording, [[7, 8, 9], [7]])
    assert alone is not None
    assert alone[0, :, 0].tolist() == [4.0, 5.0]


def test_a_model_is_loaded_whole_beside_a_trainer_on_zero3():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # kept: transformers refers to it weakly
    set_hf_deepspeed_config(config)
    try:
        assert is_deepspeed_zero3_enabled()
        with whole_loading():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    with whole_loading():
        assert not is_deepspeed_zero3_enabled()
