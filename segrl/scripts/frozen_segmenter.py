"""`FrozenSegmenterRun`: a run whose masks come from a frozen segmenter behind written boxes, kept with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from segrl.errors import CheckpointError, SegRLError
from segrl.hub import reraise_as
from segrl.inference.base import SegmenterBase
from segrl.scripts.arguments import EvaluationArguments
from segrl.scripts.two_stages import TwoStageRun
from segrl.segmenters.sam2 import SEGMENTER_CONFIG
from segrl.segmenters.stored import load_segmenter, save_segmenter

__all__ = ["SEGMENTER_HELP", "FrozenSegmenterRun"]

SEGMENTER_HELP = (
    "SAM 2 weights, a .pt file or owner/repo:file.pt; or NAME:SOURCE of `segrl parts list`, such as "
    "sam:facebook/sam-vit-base; or a folder that a run wrote; default: the run's, else the preset's."
)


class FrozenSegmenterRun(TwoStageRun):
    """A run whose masks come from a frozen segmenter, which is saved in the run's folder.

    It is that of `--segmenter`, or else of the run that is continued, or else the preset's, which is trained first
    where it has random weights.

    Example:
        >>> class MyRun(FrozenSegmenterRun):
        ...     trains_segmenter = False  # its weights are published
    """

    @property
    def trains_segmenter(self) -> bool:
        """Whether the preset's own segmenter has random weights."""
        raise NotImplementedError

    def gather_segmenter_data(self) -> Any:
        """Return what `train_segmenter` learns from; all processes meet in it. None by default."""

    def train_segmenter(self, segmenter: Any) -> None:
        """Train a segmenter with random weights in place, on the first process."""
        raise NotImplementedError

    def find_parts(self, stage1: Path | None) -> None:
        weights = self.arguments.segmenter
        homes = [self.folder] if self.progress.inside else []
        homes += [Path(self.progress.checkpoint).parent] if self.progress.checkpoint else []
        homes += [stage1, stage1.parent] if stage1 is not None else []
        if weights is None:
            weights = next((str(home) for home in homes if (home / SEGMENTER_CONFIG).is_file()), None)
        if self.segmenter is None and (weights is not None or not self.trains_segmenter):
            self.segmenter = self.build_segmenter(weights)

    def make_parts(self) -> None:
        if isinstance(self.arguments, EvaluationArguments):
            return
        state = PartialState()
        if self.segmenter is None:
            self.gather_segmenter_data()
            if state.is_main_process:
                torch.manual_seed(self.seed)
                self.segmenter = self.build_segmenter(None)
                self.train_segmenter(self.segmenter)
        kept = self.progress.inside and (self.folder / SEGMENTER_CONFIG).is_file()  # a continued run has its own
        if self.segmenter is not None and state.is_main_process and not kept:
            save_segmenter(self.segmenter, self.folder)
        state.wait_for_everyone()
        if self.segmenter is None:
            self.segmenter = load_segmenter(self.folder)
        self.segmenter.requires_grad_(False)

    def load_run(self, folder: str | Path, **settings: Any) -> SegmenterBase:
        loaded = super().load_run(folder, segmenter=self.segmenter, **settings)
        if not isinstance(self.arguments, EvaluationArguments):
            return loaded
        if (weights := self.arguments.segmenter) is not None:  # type: ignore[attr-defined]
            with reraise_as(f"--segmenter {weights!r}", CheckpointError):
                other = load_segmenter(weights, getattr(loaded.segmenter, "config", None))
            return type(loaded)(loaded.model, loaded.processor, loaded.settings, other.to(loaded.model.device))
        if loaded.segmenter is None:
            raise SegRLError(f"--model {str(folder)!r} has no segmenter; pass --segmenter with SAM 2 weights")
        return loaded
