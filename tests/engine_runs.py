"""What each of the two processes of `test_engines.py` runs: `engine_runs.py FOLDER CASES_AS_JSON`.

accelerate refuses FSDP on CPU processes, and DeepSpeed sees one process there. `cpu_processes` is the work-around: the
processes count as those of an accelerator, whose device is the CPU. It is used in tests only. A case names the engine,
the trainer (TRL's own where `plain`) and what it does.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "ACCELERATE_BYPASS_DEVICE_MAP": "true"}

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from builders import add_head, seg_bias, tiny_model, tiny_rows, with_answers
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.errors import SegRLError
from segrl.models import seg_token_id
from segrl.predictions import ImagePromptSettings

WITH = "<think>One.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"
WITHOUT = "<think>None.</think><answer>No dark cyst.</answer>"
ENVIRONMENT = set(os.environ)


def zero(stage: int) -> dict[str, Any]:
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimization = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    return {"deepspeed": {"zero_optimization": optimization, **dict.fromkeys(sizes, "auto")}}


def fsdp2(kind: str, **more: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind, **more}}


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": fsdp2("FULL_STATE_DICT"),
    "fsdp2_sharded": fsdp2("SHARDED_STATE_DICT"),
    "fsdp2_apart": fsdp2("FULL_STATE_DICT", transformer_layer_cls_to_wrap=["Qwen2_5_VLDecoderLayer", "Sam2Segmenter"]),
    "zero2": zero(2),
    "zero3": zero(3),
}


def cpu_processes() -> None:
    """Let accelerate take CPU processes for those of an accelerator."""
    dist.init_process_group("gloo")
    with suppress(ImportError):
        import deepspeed  # type: ignore[import-not-found]

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_XPU)  # type: ignore
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore


def length_reward(completions: Any, **_: Any) -> Any:
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def trainer_of(
    folder: str,
    kind: str,
    engine: str,
    peft: bool = False,
    plain: bool = False,
    short: bool = False,
    start: int = 0,
    family: str = "qwen2_5_vl",
    probe: str = "seg_token",
    **more: Any,
) -> Any:
    """A trainer in whose batches only rank 0 has a `<seg>`; where `short`, rank 1 ends every answer at its first token.

    `start` seeds the weights: a resumed run must not depend on them.
    """
    common: dict[str, Any] = {
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": False, "seed": 7},
        **{"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        **{"activation_checkpointing": False, "optim": "adamw_torch"},
        **ENGINES[engine],
        **more,
    }
    evaluates = common.get("eval_strategy", "no") != "no"
    if evaluates:
        common["per_device_eval_batch_size"] = 4
    set_seed(11)
    first = int(os.environ["RANK"]) == 0
    model, processor = tiny_model(family, tie_word_embeddings=False, seed=0)
    if peft:
        model.name_or_path = model.config._name_or_path = f"{folder}/base"
        if first:
            model.save_pretrained(f"{folder}/base")
            processor.save_pretrained(f"{folder}/base")
        dist.barrier()
    else:
        set_seed(start)
        for parameter in model.parameters():
            parameter.data += start * 0.01 * torch.randn_like(parameter)
    token = seg_token_id(processor)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    shared: dict[str, Any] = {"processing_class": processor, "peft_config": lora if peft else None}
    if not plain:
        model = add_head(model, processor, standardise=True, seed=start)
        shared["dense_losses"] = [DenseLoss("dice_ce")]
        shared["prompt_settings"] = ImagePromptSettings(instruction="Answer.")
    set_seed(11)
    if kind == "sft":
        rows = with_answers(tiny_rows(40, processor), [WITH] * 4 + [WITHOUT] * 4)
        rows = rows.select_columns(["prompt", "completion", "image"]) if plain else rows
        make, config = (SFTTrainer, SFTConfig) if plain else (SegSFTTrainer, SegSFTConfig)
        args: Any = config(folder, max_length=None, train_sampling_strategy="sequential", **common)
        held = rows.select(range(5)) if evaluates else None
        return make(model, args, train_dataset=rows, eval_dataset=held, **shared)
    never = seg_bias(processor)["suppress_tokens"]
    bias: dict[str, Any] = {"suppress_tokens": never, "sequence_bias": [[[token], 8.0]]}
    if not first and not plain:
        bias = {"suppress_tokens": [*never, token]}
    if not first and short:
        bias["sequence_bias"] = [[[processor.tokenizer.eos_token_id], 100.0]]
    sizes: dict[str, Any] = {"num_generations": 4, "max_completion_length": 10, "generation_kwargs": bias, "beta": 0.0}
    rows = tiny_rows(40, processor, completions=False)
    held = rows.select(range(5)) if evaluates else None
    if plain:
        rows = rows.select_columns(["prompt", "image"])
        return GRPOTrainer(model, length_reward, GRPOConfig(folder, **sizes, **common), train_dataset=rows, **shared)
    args = SegGRPOConfig(folder, **sizes, **common)
    return SegGRPOTrainer(model, ["format", length_reward], args, train_dataset=rows, eval_dataset=held, **shared)


class Killed(TrainerCallback):
    """Kill the process behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: str,
    resume: Any = None,
    save: bool = False,
    kill: int | None = None,
    ignored: str | None = None,
    **case: Any,
) -> dict[str, Any]:
    """Train, save where asked, and return what was logged; an error of segrl is returned as text.

    `ignored` are modules that FSDP leaves alone, as `fsdp_ignored_modules` of an accelerate file says.
    """
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    for name in set(os.environ) - ENVIRONMENT:  # transformers tells accelerate of engines through the environment
        del os.environ[name]
    if ignored is not None:
        os.environ["FSDP_IGNORED_MODULES"] = ignored
    try:
        trainer = trainer_of(folder, **case)
        if kill is not None:
            trainer.add_callback(Killed(kill))
        trainer.train(resume_from_checkpoint=resume)
    except SegRLError as error:
        return {"error": str(error)}
    if save:
        trainer.save_model()
    history = trainer.state.log_history
    names = ("loss", "grad_norm", "dense/dice_ce", "eval_loss", "completions/max_length")
    logged = {name: [entry[name] for entry in history if name in entry] for name in names}
    head = getattr(trainer, "mask_head", None)
    return {
        **logged,
        "wrapped": type(trainer.model_wrapped).__name__,
        "encoded": None if head is None else head.encoded_images,
        "best": trainer.state.best_model_checkpoint,
    }


if __name__ == "__main__":
    home, cases = sys.argv[1], json.loads(sys.argv[2])
    cpu_processes()
    rank, results = dist.get_rank(), []
    for number, case in enumerate(cases):
        print(f"[{rank}] {number} {case}", flush=True)
        folder = f"{home}/{case.pop('folder', f'run{number}')}"
        if isinstance(case.get("resume"), str):
            case["resume"] = f"{home}/{case['resume']}"
        try:
            results.append(run(folder, **case))
        except Exception:
            text = traceback.format_exc()
            print(f"[{rank}] {text}", flush=True)
            results.append({"crash": text})
        print(f"[{rank}] {str(results[-1])[-600:]}", flush=True)
    with open(f"{home}/rank{rank}.json", "w", encoding="utf-8") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()
