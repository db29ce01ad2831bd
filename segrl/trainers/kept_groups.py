"""Groups of answers that a trainer keeps in its folder and sends to its reporters, spread over its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from transformers.integrations.integration_utils import TensorBoardCallback

from segrl.predictions.prediction import Prediction
from segrl.reports.groups import GROUPS, group_answer, group_header, group_picture, write_group
from segrl.tasks import Task

__all__ = ["KeptGroups", "write_records"]


def write_records(trainer: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers of the last batch beside TRL's table of completions, for `segrl rewards score`."""
    path = Path(str(trainer.args.output_dir), "completions", f"predictions_{trainer.state.global_step:05d}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


class KeptGroups:
    """The first group of every so many steps.

    Args:
        trainer: A `SegGRPOTrainer`.
        count: Groups at most, in the whole training.
    """

    def __init__(self, trainer: Any, count: int) -> None:
        self.trainer, self.count = trainer, count
        self._part: int | None = None
        self._open: tuple[dict[str, Any], Image.Image | None, list[dict[str, Any]]] | None = None

    @classmethod
    def of(cls, trainer: Any) -> KeptGroups | None:
        """Return what the settings of a trainer ask for; TRL's own ask for none."""
        count = getattr(trainer.args, "kept_groups", 0)
        return cls(trainer, count) if count > 0 else None

    def see(self, task: Task, inputs: Sequence[Mapping[str, Any]], rows: Sequence[Any],
            predictions: Sequence[Prediction]) -> None:  # fmt: skip
        """Note the first group of a batch, if it is time for one; called on every process."""
        trainer = self.trainer
        if trainer._mode() != "train":
            return
        part = trainer.state.global_step // self._spacing()
        if part == self._part or not rows:
            return
        self._part = part
        image, index = task.view(inputs[0], rows[0])
        group = trainer.num_generations or 1
        own = [
            group_answer(prediction, row.target, index)
            for prediction, row in zip(predictions[:group], rows[:group], strict=True)
        ]
        answers = gather_object(own)[:group]  # of a group that two processes share, too
        self._open = group_header(image, rows[0].target, index), image, answers

    def close(self) -> None:
        """Add rewards and advantages, which TRL has logged by now, and write the group."""
        if self._open is None:
            return
        (header, image, answers), self._open = self._open, None
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return
        logs, weights = trainer._logs, trainer.reward_weights.tolist()
        advantages = list(logs["advantages"])
        first = len(advantages) - self._batch(len(advantages))
        for number, answer in enumerate(answers):
            rewards = {name: list(logs["rewards"][name])[first + number] for name in trainer.reward_func_names}
            known = [w * r for w, r in zip(weights, rewards.values(), strict=True) if not math.isnan(r)]
            answer |= {"rewards": rewards, "reward": sum(known) if known else None}
            answer["advantage"] = advantages[first + number]
        step = trainer.state.global_step
        record = {"step": step, **header, "answers": answers}
        name = f"{(self._part or 0) * self._spacing():05d}"
        write_group(Path(str(trainer.args.output_dir), GROUPS), name, record, image)
        self._send(record, image, step)

    def _spacing(self) -> int:
        return max(1, math.ceil(self.trainer.state.max_steps / self.count))

    def _batch(self, logged: int) -> int:
        """Completions of the last rollout; TRL keeps at most as many."""
        return min(logged, int(self.trainer.args.generation_batch_size or logged))

    def _send(self, record: dict[str, Any], image: Image.Image | None, step: int) -> None:
        """Show the group to whatever `report_to` names."""
        trainer = self.trainer
        writers = [
            callback.tb_writer
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None
        ]
        reporters = [name for name in ("wandb", "trackio") if name in (trainer.args.report_to or [])]
        if not writers and not reporters:
            return
        picture = group_picture(record, image)
        for writer in writers:
            writer.add_image("groups", np.asarray(picture), step, dataformats="HWC")
        for name in reporters:
            reporter: Any = import_module(name)
            if name == "trackio" or reporter.run is not None:
                reporter.log({"groups": reporter.Image(picture), "train/global_step": step})
