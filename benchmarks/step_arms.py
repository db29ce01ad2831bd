"""The two trainers that `bench_step.py` compares: the same model, rows, settings and tokens."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from step_probe import Probe, StateOfOptimizer, backbone_of
from step_profile import Kept, Profile, profile_loss
from step_shapes import SAM_SIZES, Answers, Shape, build_model, build_rows, count_parameters
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl import DenseLoss, MaskHead, Sam2Segmenter, SegGRPOConfig, SegGRPOTrainer, attach_mask_head, make_reward
from segrl.models import seg_token_id
from segrl.predictions import Frame, frame_for

ARMS = ("trl", "segrl")
BRIEF = 4  # tokens of a brief warm-up


@dataclass(frozen=True)
class Settings:
    """What both arms have in common.

    Attributes:
        device: `cpu` or `cuda`; on `cuda` the weights and the arithmetic are bfloat16.
        beta: weight of the KL term; not 0 makes the pass of the reference model run.
        rollouts: micro-batches of a rollout (`steps_per_generation`); more than 1 makes the old-log-prob pass run.
        checkpointing: recompute the activations of the layers in the backward pass.
        lora: rank of LoRA on the language model; 0 trains it whole.
        vision: `frozen` or `trained` vision tower; with LoRA it is frozen anyway.
        share: `share_prompt` of segrl.
        sam: a name of `SAM_SIZES` in place of the shape's.
        generates: False takes the prepared answers without generating any; then only the loss costs what it costs.
        brief: steps that are not measured generate a few tokens only.
        accumulated: micro-batches of an optimizer step.
        budget: `tokens_per_micro_batch` of segrl.
    """

    device: str = "cpu"
    beta: float = 0.0
    rollouts: int = 1
    checkpointing: bool = False
    lora: int = 0
    vision: str = "frozen"
    share: bool = True
    sam: str | None = None
    generates: bool = True
    brief: bool = False
    accumulated: int = 1
    budget: int | None = None

    @property
    def frozen_vision(self) -> bool:
        """Whether no weight of the vision tower is trained."""
        return self.vision == "frozen" or self.lora > 0


@contextmanager
def replayed(answers: Callable[[Sequence[Sequence[int]]], list[list[int]]]) -> Iterator[None]:
    """Inside the context every `GRPOTrainer` generates at full cost and then goes on with these answers."""
    original = GRPOTrainer._generate_single_turn

    def generate(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        generated, logprobs = original(self, prompt_ids, *args, **kwargs)
        written = answers(prompt_ids)
        lengths = {(len(one), len(other)) for one, other in zip(generated, written, strict=True)}
        if any(one != other for one, other in lengths):
            raise SystemExit(f"generated and prepared completions differ in length: {sorted(lengths)}")
        return written, logprobs

    GRPOTrainer._generate_single_turn = generate
    try:
        yield
    finally:
        GRPOTrainer._generate_single_turn = original


def build_trainer(
    arm: str, shape: Shape, group: int, settings: Settings, steps: int, seed: int, folder: str
) -> tuple[Any, Answers]:
    """A trainer of its own model, `steps` optimiser steps long, and the answers that it is to replay.

    The weights depend on the shape alone, the rows on `seed`: both arms get the same.
    """
    model, processor = build_model(
        shape, device=settings.device, dtype=torch.bfloat16 if settings.device == "cuda" else torch.float32
    )
    if settings.vision == "frozen":
        model.model.visual.requires_grad_(False)
    if settings.beta and not settings.lora:  # TRL reads the reference model from its files
        saved = Path(folder, f"initial-{shape.name}")
        if not saved.exists():
            model.save_pretrained(saved)
        model.config._name_or_path = str(saved)
    micro_batches = max(1, steps // settings.rollouts) * settings.rollouts * settings.accumulated
    rows = build_rows(shape, processor, shape.prompts * micro_batches, seed)
    given = _training_arguments(shape, group, settings, steps, folder)
    shared: dict[str, Any] = {"train_dataset": rows, "processing_class": processor, "peft_config": _lora(settings)}
    if arm == "trl":

        def frame(image_size: tuple[int, int], original_size: tuple[int, int]) -> Frame:
            return frame_for(processor, image_size, original_size)

        trainer: Any = GRPOTrainer(model, [make_reward("box_f1", frame=frame)], GRPOConfig(**given), **shared)
    else:
        if "share_prompt" in {item.name for item in fields(SegGRPOConfig)}:
            given["share_prompt"] = settings.share
        if settings.budget is not None:
            given["tokens_per_micro_batch"] = settings.budget
        torch.manual_seed(0)
        segmenter = Sam2Segmenter(SAM_SIZES[settings.sam or shape.sam])
        head = MaskHead.build(model, segmenter, token_id=seg_token_id(processor)).to(settings.device)
        trainer = SegGRPOTrainer(
            attach_mask_head(model, head), ["format", "box_f1", "dual_granularity_mask"], SegGRPOConfig(**given),
            dense_losses=[DenseLoss("dice_ce")], **shared,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, Answers(shape, processor, rows)


def _training_arguments(shape: Shape, group: int, settings: Settings, steps: int, folder: str) -> dict[str, Any]:
    named = {item.name for item in fields(TrainingArguments)}  # transformers before 5.23 may have the old name
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in named else "gradient_checkpointing"
    tokens = shape.completion_tokens
    return {
        "output_dir": folder, "max_steps": steps, "learning_rate": 1e-7, "beta": settings.beta,
        "per_device_train_batch_size": shape.prompts * group, "num_generations": group,
        "gradient_accumulation_steps": settings.accumulated,
        "steps_per_generation": settings.rollouts * settings.accumulated, "max_completion_length": tokens,
        "generation_kwargs": {"min_new_tokens": tokens}, checkpointing: settings.checkpointing,
        "bf16": settings.device == "cuda", "use_cpu": settings.device == "cpu", "logging_steps": 1, "seed": 0,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _lora(settings: Settings) -> Any:
    if not settings.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora,
        lora_alpha=2 * settings.lora,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        task_type="CAUSAL_LM",
    )


@dataclass
class Turn:
    """What one arm did in one turn.

    Attributes:
        steps, counts: of the measured steps, see `Probe`; of a rollout of several micro-batches as one step.
        memory: bytes; `peak` of the whole process (CPU) or of the allocator in the measured steps (CUDA), `start`
            before training.
        parameters: by part, with those of the mask head.
        rewards: mean of every reward over the steps.
        profile: of the last loss, if asked for.
    """

    steps: list[dict[str, float]]
    counts: list[dict[str, int]]
    memory: dict[str, int]
    parameters: dict[str, int]
    rewards: dict[str, float]
    profile: Profile | None = None


def take_turn(
    arm: str,
    shape: Shape,
    group: int,
    settings: Settings,
    *,
    warmup: int,
    steps: int,
    seed: int,
    folder: str,
    profiled: bool = False,
) -> Turn:
    """Train one arm for `warmup + steps` rollouts; the first `warmup` are not measured. Then profile the last loss."""
    cuda = settings.device == "cuda"
    trainer, answers = build_trainer(arm, shape, group, settings, (warmup + steps) * settings.rollouts, seed, folder)
    if settings.brief or not settings.generates:
        _answer_at_once(trainer, answers, warmup * settings.rollouts if settings.generates else None)
    kept = Kept(trainer) if profiled else None
    probe = Probe(trainer, cuda)
    trainer.add_callback(StateOfOptimizer())
    if cuda:
        trainer.add_callback(PeakFrom(warmup * settings.rollouts))
    gc.collect()
    start = _reset_peak(cuda)
    with replayed(answers):
        trainer.train()
    first, size = warmup * settings.rollouts, settings.rollouts
    head = getattr(trainer, "mask_head", None)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    turn = Turn(
        steps=_joined(probe.steps[first:], size),
        counts=_joined(probe.counts[first:], size),
        memory={"start": start, "peak": _peak(cuda)},
        parameters={
            **count_parameters(backbone_of(trainer)),
            **({} if head is None else {"mask_head": sum(p.numel() for p in head.parameters())}),
            "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        },
        rewards={
            key.split("/")[1]: sum(entry[key] for entry in history) / len(history)
            for key in history[0]
            if key.startswith("rewards/") and key.endswith("/mean")
        },
    )
    if kept is not None:
        turn.profile = profile_loss(kept, cuda)
    trainer.accelerator.free_memory()
    del trainer, probe, head, kept
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return turn


def _answer_at_once(trainer: Any, answers: Answers, steps: int | None) -> None:
    """Take the prepared answers without generating them: always, or in the first steps, for a few tokens as warm-up."""
    generate, trl, config = trainer._generate_single_turn, GRPOTrainer._generate_single_turn, trainer.generation_config

    def answer(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if steps is not None and trainer.state.global_step >= steps:
            return generate(prompt_ids, *args, **kwargs)
        if steps is not None:
            length = config.max_new_tokens
            config.max_new_tokens = config.min_new_tokens = BRIEF
            trl(trainer, prompt_ids, *args, **kwargs)
            config.max_new_tokens = config.min_new_tokens = length
        return answers(prompt_ids), None

    trainer._generate_single_turn = answer


class PeakFrom(TrainerCallback):
    """Starts a new peak of memory on the GPU after a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._steps:
            _reset_peak(cuda=True)


def _joined(records: list[Any], size: int) -> list[Any]:
    """Every `size` records as one, their values added."""
    return [
        {key: sum(r.get(key, 0) for r in records[n : n + size]) for key in sorted({k for r in records for k in r})}
        for n in range(0, len(records), size)
    ]


def _reset_peak(cuda: bool) -> int:
    """Start a new peak, and return the bytes in use now."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # the peak then includes building the model
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(name: str) -> int:
    path = Path(f"/proc/{os.getpid()}/status")
    if not path.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name))
