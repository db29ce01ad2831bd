"""A training that can be watched: `results.csv` and `curves.png` while it runs, and how long the whole run takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from segrl.reports.history import CURVES, TABLE, curve_panels, draw_curves, write_table
from segrl.scripts.phases import Phases

__all__ = ["Watch"]

TABLE_EVERY, CURVES_EVERY = 2.0, 20.0  # seconds
LARGEST_SHARE = 0.02  # of the time, for drawing


class Watch(TrainerCallback):
    """Write the log of a stage as a table and as curves while it is trained, and say how long the run takes.

    Both files are made of the log alone, so they go on where a resumed training goes on. At its end `train_and_save`
    writes them once more, in full.

    Args:
        phases: Of the run.
        name: Of the stage's phase.

    Example:
        >>> Watch(Phases({"stage 1": 1.0}), "stage 1").name
        'stage 1'
    """

    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name
        self._table = self._curves = self._cost = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phases.begin(self.name, state.global_step / max(1, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phases.progress(state.global_step / max(1, state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder, now = Path(args.output_dir), time.monotonic()
        if now - self._table >= TABLE_EVERY:
            self._table = now
            write_table(state.log_history, folder / TABLE)
        if now - self._curves >= max(CURVES_EVERY, self._cost / LARGEST_SHARE):
            draw_curves(curve_panels(state.log_history), folder / CURVES)
            self._curves = time.monotonic()
            self._cost = self._curves - now
