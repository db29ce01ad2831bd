"""Validation while training by a function of the trainer, in the place of transformers' loop over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Validate", "ValidationMixin", "no_rows_asked"]

Validate = Callable[[Any], Mapping[str, float]]
"""Measures the model of a trainer, such as its Dice on a validation split; called on every process."""


class ValidationMixin:
    """Mixin whose trainer measures itself by `validate` whenever transformers evaluates.

    So the usual settings say when (`eval_strategy`, `eval_steps`) and what follows (`load_best_model_at_end`,
    `metric_for_best_model`, `EarlyStoppingCallback`). Random numbers, the mode of the model and the side on which the
    tokenizer pads are afterwards as before: without it, training goes on in the same way.
    """

    validate: Validate | None = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure as transformers does, or by `validate` where that was given and no other rows are.

        Args:
            eval_dataset: As in transformers.
            ignore_keys: As in transformers.
            metric_key_prefix: As in transformers.
        """
        if self.validate is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        trainer: Any = self
        model, tokenizer = trainer.model, getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        training, side = model.training, tokenizer.padding_side
        model.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad(), trainer.accelerator.autocast():
                found = self.validate(trainer)
            metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
            trainer.log(metrics)
        finally:
            model.train(training)
            tokenizer.padding_side = side
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


@contextmanager
def no_rows_asked(args: Any, validate: Validate | None) -> Iterator[None]:
    """Inside the context, the settings of a trainer that has `validate` ask for no rows to evaluate on.

    transformers refuses to build a trainer that evaluates and has none.
    """
    if validate is None or getattr(args, "eval_strategy", "no") == "no":
        yield
        return
    strategy = args.eval_strategy
    args.eval_strategy = type(strategy)("no")
    try:
        yield
    finally:
        args.eval_strategy = strategy
