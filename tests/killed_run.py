"""A training script that kills itself at the n-th event: `killed_run.py N SCRIPT FLAGS`; N = 0 lets it finish.

Events are training steps, trainers that are made, and files that are written. A file at which the process dies is left
half-written, as kill -9 in the middle of a save leaves it. The number of events is the last line of stdout.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerState

LAST = int(sys.argv[1])
events = 0


def dies() -> bool:
    global events
    events += 1
    return events == LAST


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def tear(path: Any) -> None:
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def writes(function: Any, position: int) -> Any:
    """`function` with its file cut in half at the last event; `position` is that of the path."""

    def call(*args: Any, **kwargs: Any) -> Any:
        last = dies()
        result = function(*args, **kwargs)
        if last and isinstance(args[position], str | os.PathLike):
            tear(args[position])
        return result

    return call


def happens(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if dies():
            die()
        return function(*args, **kwargs)

    return call


torch.save = writes(torch.save, 1)
safetensors.torch.save_file = writes(safetensors.torch.save_file, 1)
transformers.modeling_utils.safe_save_file = safetensors.torch.save_file  # type: ignore[attr-defined]
Path.write_text = writes(Path.write_text, 0)
Path.write_bytes = writes(Path.write_bytes, 0)
TrainerState.save_to_json = writes(TrainerState.save_to_json, 1)
Trainer.training_step = happens(Trainer.training_step)
Trainer.__init__ = happens(Trainer.__init__)

script = sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, str(Path(script).parent))
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(f"events: {events}", flush=True)
