"""`sync_ref_model` for a policy with a mask head, which the reference model lacks."""

from __future__ import annotations

from typing import Any

from trl.trainer.callbacks import SyncRefModelCallback

from segrl.trainers.mask_head_mixin import head_detached

__all__ = ["sync_without_head"]


class _SyncWithoutHead(SyncRefModelCallback):
    """TRL's callback, which pairs the parameters of both models one by one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        with head_detached(model if self.accelerator is None else self.accelerator.unwrap_model(model)):
            super().on_step_end(args, state, control, **kwargs)


def sync_without_head(trainer: Any) -> None:
    """Let TRL's `SyncRefModelCallback` of a trainer, if it has one, leave the mask head out."""
    known = trainer.pop_callback(SyncRefModelCallback)
    if known is not None:
        trainer.add_callback(_SyncWithoutHead(known.ref_model, known.accelerator))
