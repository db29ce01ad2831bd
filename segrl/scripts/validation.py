"""The validation split of a run: rows held out, Dice on them while training, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from segrl.errors import SegRLError

__all__ = ["LiveDice", "check_validation", "early_stopping", "is_validated", "validation_defaults"]

SHARE = 0.1  # of the steps of a stage, from one validation to the next
_OFF = ("false", "no", "0", "f", "n")


def is_validated(arguments: Any) -> bool:
    """Return whether flags ask for a validation split.

    Example:
        >>> from segrl.scripts import TwoStageArguments
        >>> is_validated(TwoStageArguments()), is_validated(TwoStageArguments(val_fraction=0.1))
        (False, True)
    """
    return arguments.val_fraction is not None or arguments.val_split is not None


def check_validation(arguments: Any, values: Mapping[str, Sequence[str]]) -> None:
    """Refuse flags about validation that contradict each other.

    Args:
        arguments: The flags of the script.
        values: All flags that were given, from `flag_values`.

    Raises:
        SegRLError: Names the flag and the fix.

    Example:
        >>> from segrl.scripts import TwoStageArguments
        >>> check_validation(TwoStageArguments(), {"load_best_model_at_end": ["True"]})
        Traceback (most recent call last):
        segrl.errors.SegRLError: --load_best_model_at_end: there are no rows to choose by; pass --val_fraction 0.1 ...
    """
    fraction, split = arguments.val_fraction, arguments.val_split
    if fraction is not None and split is not None:
        raise SegRLError("--val_fraction and --val_split: expected one of the two")
    if fraction is not None and not 0 < fraction < 1:
        raise SegRLError(f"--val_fraction {fraction}: expected a number between 0 and 1, such as 0.1")
    try:
        re.compile(arguments.patients or "")
    except re.error as error:
        raise SegRLError(f"--patients '{arguments.patients}' is no regular expression: {error}") from error
    if split is not None and split.strip().casefold() in ("train", "test"):
        why = "it is trained on" if split.strip().casefold() == "train" else "the run is measured on it at its end"
        raise SegRLError(f"--val_split {split}: {why}; pass another split, or --val_fraction 0.1")
    if split is not None and arguments.data is None:
        raise SegRLError(f"--val_split {split}: synthetic data has the splits train and test; pass --val_fraction 0.1")
    if not is_validated(arguments):
        for name in ("load_best_model_at_end", "early_stopping"):
            if _is_on(values, name):
                raise SegRLError(f"--{name}: there are no rows to choose by; pass --val_fraction 0.1 or --val_split "
                                 "NAME")  # fmt: skip
        return
    if (values.get("eval_strategy") or ["steps"])[0] == "no":
        flag = "val_split" if fraction is None else "val_fraction"
        raise SegRLError(f"--{flag} with --eval_strategy no: the rows held out would not be used; drop one of the two")


def validation_defaults(arguments: Any, values: Mapping[str, Sequence[str]], stage: str) -> dict[str, Any]:
    """Return defaults of trainer settings where a run is validated: ten times a stage, by Dice; empty otherwise.

    Args:
        arguments: The flags of the script.
        values: All flags that were given, from `flag_values`.
        stage: "sft" or "grpo".

    Example:
        >>> from segrl.scripts import TwoStageArguments
        >>> given = {"load_best_model_at_end": ["True"]}
        >>> found = validation_defaults(TwoStageArguments(val_fraction=0.1), given, "sft")
        >>> found["eval_steps"], found["save_steps"], found["metric_for_best_model"]
        (0.1, 0.1, 'dice')
    """
    if not is_validated(arguments):
        return {}
    found: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": SHARE, "metric_for_best_model": "dice"}
    if stage == "grpo":
        found["num_generations_eval"] = 1  # answers of a validation are greedy; TRL checks the number all the same
    best = _is_on(values, "load_best_model_at_end")
    if arguments.early_stopping is not None:
        found |= {"load_best_model_at_end": True, "restore_callback_states_from_checkpoint": True}
        best = True
    if best:  # transformers wants checkpoints where it validates
        found["save_strategy"] = (values.get("eval_strategy") or ["steps"])[0]
        found["save_steps"] = (values.get("eval_steps") or [SHARE])[0]
        found["save_total_limit"] = 2  # the best and the last
    return found


def _is_on(values: Mapping[str, Sequence[str]], name: str) -> bool:
    """Whether a flag was given, alone or with another value than false."""
    return name in values and (values[name] or ["true"])[0].casefold() not in _OFF


def early_stopping(arguments: Any) -> list[TrainerCallback]:
    """Return the callback that `--early_stopping` asks for.

    Example:
        >>> from segrl.scripts import TwoStageArguments
        >>> early_stopping(TwoStageArguments()), len(early_stopping(TwoStageArguments(early_stopping=3)))
        ([], 1)
    """
    patience = arguments.early_stopping
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


class LiveDice:
    """Ask a model in training about the validation rows, greedily, and score its masks as the evaluation at the end.

    Every process answers its part of the rows.

    Args:
        rows: The validation split.
        segmenter: `segmenter(trainer)` returns the model as it is asked after training.
        evaluate: `evaluate(segmenter, rows, batch_size=..., progress=False)` returns records.
        batch_size: Rows per generation.
    """

    def __init__(
        self,
        rows: Dataset,
        segmenter: Callable[[Any], Any],
        evaluate: Callable[..., list[dict[str, Any]]],
        batch_size: int = 16,
    ) -> None:
        self.rows, self.segmenter, self.evaluate, self.batch_size = rows, segmenter, evaluate, batch_size

    def __call__(self, trainer: Any) -> dict[str, float]:
        """Return mean Dice, and the shares of failed and of valid answers.

        Raises:
            SegRLError: The parameters are spread over processes (FSDP, ZeRO-3), which cannot generate one by one.
        """
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise SegRLError("--val_fraction and --val_split do not go with FSDP or ZeRO-3 yet; drop one of the two")
        state = PartialState()
        own = self.rows.select(range(state.process_index, len(self.rows), state.num_processes))
        asked = {"batch_size": self.batch_size, "progress": False}
        records = self.evaluate(self.segmenter(trainer), own, **asked) if len(own) else []
        scores = [(record["dice"], float(record["fail"]), float(record["status"] == "valid")) for record in records]
        means = [sum(column) / len(self.rows) for column in zip(*gather_object(scores), strict=True)]
        return dict(zip(("dice", "fail", "valid"), means, strict=True))
