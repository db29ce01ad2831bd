"""What a trainer does in a step: time by phase, and how often its networks run.

A phase is entered and left with the calls of named methods of one trainer object; time counts for the innermost phase,
so the phases add up to the step.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

# Method of a trainer: the phase that its call belongs to.
_METHODS = {
    "training_step": "backward",  # what is left of it when the phases inside are taken off
    "_prepare_inputs": "other",
    "_generate": "generate",
    "_tokenize_prompts": "preprocess",
    "_get_per_token_logps_and_entropies": "old_ref",  # where it is no part of the loss
    "_calculate_rewards": "reward",
    "_with_predictions": "masks",  # segrl: rows, parsing, image features and masks for the rewards
    "compute_loss": "forward",
}
PHASES = (
    *("preprocess", "generate", "old_ref", "masks", "reward", "other", "forward", "backward", "optimizer"),
)  # in the order of a step


class Probe(TrainerCallback):
    """Times and counts of one trainer, one record per optimiser step.

    Attributes:
        steps: for every step seconds by phase, see `PHASES`.
        counts: for every step how often what ran: `lm_forwards/<phase>`, `lm_tokens/<phase>` (positions that went
            through the decoder, the reference model's too; the phase generate is split into prefill and decode),
            `vision_images/<phase>` (of the trained model), `sam_encodes`.
    """

    def __init__(self, trainer: Any, cuda: bool) -> None:
        self._cuda, self._stack, self._since = cuda, [], 0.0
        self._time: defaultdict[str, float] = defaultdict(float)
        self._count: Counter[str] = Counter()
        self._head = getattr(trainer, "mask_head", None)
        self._encoded = 0
        self.steps: list[dict[str, float]] = []
        self.counts: list[dict[str, int]] = []
        for name, phase in _METHODS.items():
            method = getattr(trainer, name, None)
            if method is not None:
                setattr(trainer, name, self._timed(method, phase))
        backbone_of(trainer).visual.register_forward_pre_hook(self._count_images, with_kwargs=True)
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                decoder = backbone_of(trainer, model).language_model
                decoder.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        trainer.add_callback(self)

    # ---- time --------------------------------------------------------------------------------------------------------

    def _timed(self, method: Any, phase: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return method(*args, **kwargs)

        return call

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time inside counts for `name`, except where a phase inside has its own. The loss has no phases inside."""
        if "forward" in self._stack:
            yield
            return
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self._time[self._stack[-1]] += now - self._since
        self._since = now

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turn()
        self._stack.append("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turn()
        self._stack.pop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._head is not None:
            self._count["sam_encodes"] = self._head.encoded_images - self._encoded
            self._encoded = self._head.encoded_images
        self.steps.append({phase: self._time[phase] for phase in PHASES})
        self.counts.append(dict(self._count))
        self._time.clear()
        self._count.clear()

    # ---- counts ------------------------------------------------------------------------------------------------------

    def _count_tokens(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows, tokens = given.shape[:2]
        phase = self._stack[-1] if self._stack else "outside"
        if phase == "generate":
            phase = "prefill" if tokens > 1 else "decode"
        self._count[f"lm_forwards/{phase}"] += 1
        self._count[f"lm_tokens/{phase}"] += rows * tokens

    def _count_images(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._count[f"vision_images/{self._stack[-1] if self._stack else 'outside'}"] += len(grid)


def backbone_of(trainer: Any, model: Any = None) -> Any:
    """The `Qwen2_5_VLModel` inside a trainer's model (or `model`), also inside PEFT."""
    model = trainer.accelerator.unwrap_model(trainer.model if model is None else model)
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def total(counts: dict[str, float], name: str) -> float:
    """Sum of a count over its phases."""
    return sum(value for key, value in counts.items() if key.split("/")[0] == name)


class StateOfOptimizer(TrainerCallback):
    """Gives the optimiser its state before the first step, which is otherwise the only one without it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0 * group["lr"]
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
