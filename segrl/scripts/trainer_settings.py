"""Settings of trainers that TRL, transformers and PyTorch judge late: when a trainer is built, or in its first step.

`check_trainer` builds from the settings what they will build, so that a wrong flag fails before an output folder is
claimed, and one of stage 2 before stage 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from transformers.trainer import Trainer

from segrl.errors import SegRLError
from segrl.predictions.prompt_settings import PromptSettings
from segrl.rewards.reward import Reward
from segrl.tasks import make_task
from segrl.trainers.reward_funcs import check_groups, common_format

__all__ = ["check_counts", "check_trainer"]

_LIBRARY_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, AttributeError, KeyError, ArithmeticError)

# smallest value of each; None and settings that a trainer lacks are left out
_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    "num_generations": 2,
    "num_generations_eval": 1,
    **dict.fromkeys(("generation_batch_size", "global_batch_size", "steps_per_generation", "num_iterations"), 1),
    "max_completion_length": 1,
    **dict.fromkeys(("max_length", "save_total_limit", "ref_model_sync_steps", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("warmup_steps", "dataloader_num_workers", "max_grad_norm", "weight_decay", "beta"), 0),
    "max_sampling_gap": 0,
    **dict.fromkeys(("learning_rate", "head_learning_rate", "epsilon", "text_weight", "policy_weight"), 0),
    **dict.fromkeys(("feature_cache_memory", "feature_cache_disk", "kept_groups"), 0),
}
_ABOVE_0 = ("logging_steps", "save_steps", "eval_steps")
_GRPO_CHOICES: Mapping[str, Sequence[str]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}
_PACKAGES = {"use_vllm": ("vllm", "trl[vllm]"), "use_liger_kernel": ("liger_kernel", "liger-kernel")}
_SAMPLING: Mapping[str, Callable[[Any], Any]] = {
    "temperature": TemperatureLogitsWarper,
    "top_p": TopPLogitsWarper,
    "top_k": lambda value: value and TopKLogitsWarper(value),  # 0 takes all tokens
    "min_p": MinPLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
}


def check_counts(config: Any) -> None:
    """Refuse numbers of a trainer that are too small, or not finite.

    Args:
        config: A trainer's config, or the values that one is to be made from: TRL divides by some of them.

    Raises:
        SegRLError: Names the flag, its value and what was expected.

    Example:
        >>> from types import SimpleNamespace
        >>> check_counts(SimpleNamespace(per_device_train_batch_size=0))
        Traceback (most recent call last):
        segrl.errors.SegRLError: --per_device_train_batch_size 0: expected 1 or more
    """
    for name, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise SegRLError(f"--{name} {value}: expected a finite number")
        if name in _LEAST and value < _LEAST[name]:
            raise SegRLError(f"--{name} {value}: expected {_LEAST[name]} or more")
        if name in _ABOVE_0 and value <= 0:
            raise SegRLError(f"--{name} {value}: expected more than 0")


def check_trainer(
    config: Any, rewards: Sequence[Reward] = (), prompt: PromptSettings | None = None, *, validated: bool = False
) -> None:
    """Refuse settings with which a trainer cannot be built, or fails in its first step.

    Reporters, sampling of tokens, optimizer and learning-rate schedule are built once and thrown away.

    Args:
        config: An `SFTConfig` or a `GRPOConfig`.
        rewards: Rewards of GRPO.
        prompt: How the model is asked; its task must be that of the rewards.
        validated: Whether there is a validation split; without one, nothing can be evaluated while training.

    Raises:
        SegRLError: Names the flag, its value and what is wrong.

    Example:
        >>> from segrl import SegGRPOConfig
        >>> check_trainer(SegGRPOConfig("run", use_cpu=True, bf16=False, report_to="none", temperature=0.0))
        Traceback (most recent call last):
        segrl.errors.SegRLError: --temperature 0.0: `temperature` (=0.0) has to be a strictly positive float, ...
    """
    check_counts(config)
    samples = hasattr(config, "num_generations")  # GRPO
    if config.max_steps <= 0 and not config.num_train_epochs > 0:
        raise SegRLError(f"--num_train_epochs {config.num_train_epochs}: expected more than 0, or --max_steps")
    for name, choices in _GRPO_CHOICES.items() if samples else ():  # the parser knows those of SFT
        if getattr(config, name, choices[0]) not in choices:
            raise SegRLError(f"--{name} {getattr(config, name)}: expected one of {', '.join(map(str, choices))}")
    for name, (package, source) in _PACKAGES.items():
        if getattr(config, name, False) and find_spec(package) is None:
            title = "vLLM" if package == "vllm" else package
            raise SegRLError(f"--{name}: {title} is not installed; pip install '{source}', or drop the flag")
    _check_evaluation(config, validated)
    if rewards and prompt is not None:
        task, made_later = make_task(None, prompt), prompt.task == "volumes"  # the propagator of a volume's masks
        task.check([reward for reward in rewards if not (made_later and reward.needs_mask and reward.volume)], None)
        common_format(list(rewards), prompt)
        check_groups(list(rewards), config, config.num_generations)
    weights = getattr(config, "reward_weights", None)
    if weights is not None and len(weights) != len(rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise SegRLError(f"--reward_weights {weights}: expected {len(rewards)} numbers, for {names}")
    _check_reporters(config)
    if samples:
        _check_sampling(config)
    _check_optimizer(config)


def _check_evaluation(config: Any, validated: bool) -> None:
    """Without a validation split, trainers get no rows to evaluate on: the scripts evaluate when training is done."""
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    if validated:
        if config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_deepspeed_zero3_enabled():
            raise SegRLError("--val_fraction and --val_split do not go with FSDP or ZeRO-3 yet; drop one of the two")
        return
    for name, asked, value in (
        ("eval_strategy", strategy != "no", strategy),
        ("eval_on_start", config.eval_on_start, True),
        ("load_best_model_at_end", config.load_best_model_at_end, True),
    ):
        if asked:
            raise SegRLError(
                f"--{name} {value}: training gets no evaluation data, it is evaluated at its end; pass --val_fraction "
                "0.1 or --val_split NAME, or drop it"
            )


def _check_reporters(config: Any) -> None:
    reporters = config.report_to if isinstance(config.report_to, list) else [config.report_to]
    for name in reporters:
        try:
            for callback in get_reporting_integration_callbacks(name):
                callback()
        except _LIBRARY_ERRORS as error:
            raise SegRLError(f"--report_to {name}: {_line(error)}; install it, or pass --report_to none") from error


def _check_sampling(config: Any) -> None:
    given = {name: getattr(config, name, None) for name in _SAMPLING} | dict(config.generation_kwargs or {})
    for name, build in _SAMPLING.items():
        value = given.get(name)
        try:
            if value is not None:
                build(value)
        except _LIBRARY_ERRORS as error:
            raise SegRLError(f"--{name} {value}: {_line(error)}") from error
    try:
        GenerationConfig(
            **{
                "do_sample": True,
                "max_new_tokens": config.max_completion_length,
                "cache_implementation": config.cache_implementation,
                **given,
            }
        ).validate(strict=True)
    except _LIBRARY_ERRORS as error:
        raise SegRLError(f"settings of the generation: {_line(error)}") from error


def _check_optimizer(config: Any) -> None:
    if config.deepspeed or any(name in str(config.optim) for name in ("galore", "apollo", "lomo")):
        return  # made from a file, or from a model
    what = f"--optim {getattr(config.optim, 'value', config.optim)}"
    try:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(config)
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        optimizer = made([{"params": parameters, "weight_decay": config.weight_decay}], **settings)
        what = f"--lr_scheduler_type {getattr(config.lr_scheduler_type, 'value', config.lr_scheduler_type)}"
        steps = config.max_steps if config.max_steps > 0 else 100
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except _LIBRARY_ERRORS as error:
        raise SegRLError(f"{what}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
