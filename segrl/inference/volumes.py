"""`VolumeSegmenter`: a volume and a question in; a key slice, boxes on it and a mask of the whole volume out."""

# D slices, H/W pixels of a slice

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.progress import Progress

from segrl.data.volumes.case import grey_values, read_grey
from segrl.data.volumes.intensity import Intensity
from segrl.data.volumes.nifti import Volume
from segrl.data.volumes.prompts import SLICE_INSTRUCTION, build_volume_prompt
from segrl.data.volumes.slices import render_slices, shown_frame, uniform_slices
from segrl.errors import DataError
from segrl.inference.base import SegmenterBase
from segrl.predictions.parsing import parse_completion
from segrl.predictions.prediction import Prediction
from segrl.segmenters.propagated_masks import add_volume_masks
from segrl.segmenters.propagation import VolumePropagator
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, Sam2Segmenter

__all__ = ["VolumeSegmenter"]


class VolumeSegmenter(SegmenterBase):
    """A trained model that answers about volumes, and the frozen segmenter that turns its boxes into a mask.

    Args:
        model: A vision-language model.
        processor: Its processor.
        settings: How the training data was built: `slices`, `size`, `instruction`, `reasoning`, `frame_kind`,
            `max_new_tokens`, and `postprocessing` of the propagator. What is missing gets the defaults of
            `segrl.data.prepare_volumes` and 256 new tokens.
        segmenter: SAM 2; None leaves predictions without masks.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: dict[str, Any] | None = None,
        segmenter: Sam2Segmenter | None = None,
    ) -> None:
        given = dict(settings or {})
        super().__init__(model, processor, {**given, "max_new_tokens": given.get("max_new_tokens") or 256})
        self.segmenter = segmenter
        self.propagator: VolumePropagator | None = None
        if segmenter is not None:
            postprocessing = self.settings.get("postprocessing", True)
            self.propagator = VolumePropagator(segmenter, reach=None, postprocessing=postprocessing)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, segmenter: Sam2Segmenter | str | os.PathLike | None = None, **kwargs: Any
    ) -> Self:
        """Load a run.

        Args:
            folder: An output directory or one of its checkpoints.
            segmenter: SAM 2, or the path of its weights; None takes the one that was saved with the run, if any.
            kwargs: See `ReasoningSegmenter.from_pretrained`.

        Raises:
            CheckpointError: No model there, or weights that do not fit.
        """
        loaded = super().from_pretrained(folder, **kwargs)
        if segmenter is None:
            home = next((p for p in (Path(folder), Path(folder).parent) if (p / SEGMENTER_CONFIG).is_file()), None)
            segmenter = None if home is None else Sam2Segmenter.from_pretrained(home)
        elif isinstance(segmenter, str | os.PathLike):
            segmenter = Sam2Segmenter.from_pretrained(os.fspath(segmenter))
        if segmenter is not None:
            segmenter.to(loaded.model.device)
        return cls(loaded.model, loaded.processor, loaded.settings, segmenter)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model, processor, segmenter and settings; `from_pretrained` gives the same predictions."""
        super().save_pretrained(folder)
        if self.segmenter is not None:
            self.segmenter.save_pretrained(folder)

    def predict(
        self, volume: Volume | np.ndarray | str | Path, query: str, *, progress: bool = False, **settings: Any
    ) -> Prediction:
        """Answer one question about one volume; see `predict_batch`."""
        return self.predict_batch([volume], [query], progress=progress, **settings)[0]

    def predict_batch(
        self,
        volumes: Sequence[Volume | np.ndarray | str | Path],
        queries: Sequence[str],
        *,
        modalities: Sequence[str] | str = "",
        intensity: Intensity | str = "",
        progress: bool = False,
        **generation: Any,
    ) -> list[Prediction]:
        """Answer one question per volume, in one batch; greedy unless `generation` says otherwise.

        Args:
            volumes: Paths of scans, `Volume`s, or grey values (D, H, W) uint8 in the order of
                `segrl.data.volumes.intensity`. Equal objects are read and encoded once.
            queries: One question each.
            modalities: Such as "CT": decides how voxels become grey values, see `segrl.data.intensity_for`; one for
                all or one each.
            intensity: The scaling itself.
            progress: Show a progress bar of the slices that the segmenter has done.
            generation: To `model.generate`.

        Returns:
            Predictions in order: the named slice as its index in the volume, boxes in pixels of that slice, and, with a
            segmenter, the mask (D, H, W). Features are alive for slices in flight only, whatever the volume's depth.

        Raises:
            DataError: Lengths differ, a scan cannot be read, or an array is not uint8 (D, H, W).
        """
        volumes, queries = list(volumes), list(queries)  # a lazy column makes a new object at every access
        if len(volumes) != len(queries):
            raise DataError(f"{len(volumes)} volumes for {len(queries)} queries; expected one query per volume")
        kinds = [modalities] * len(volumes) if isinstance(modalities, str) else list(modalities)
        if len(kinds) != len(volumes):
            raise DataError(f"{len(kinds)} modalities for {len(volumes)} volumes; expected one per volume, or one text")
        if not volumes:
            return []
        known: dict[tuple[Any, str], np.ndarray] = {}
        greys = []
        for volume, kind in zip(volumes, kinds, strict=True):
            key = (str(volume) if isinstance(volume, str | Path) else id(volume), kind)
            if key not in known:
                known[key] = _grey(volume, kind, str(intensity))
            greys.append(known[key])
        conversations, frames = [], []
        for grey, query in zip(greys, queries, strict=True):
            conversation, frame = self._ask(grey, query)
            conversations.append(conversation)
            frames.append(frame)
        _, texts, _ = self._answer(conversations, generation)
        predictions = [
            parse_completion(
                text,
                frame,
                require_seg=False,
                require_reasoning=self.settings.get("reasoning", True),
                answer_format="json",
            )
            for text, frame in zip(texts, frames, strict=True)
        ]
        if self.propagator is None:
            return predictions
        with Progress(disable=not progress) if progress else nullcontext() as bar:
            task = None if bar is None else bar.add_task("propagate", total=None)

            def show(done: int, total: int) -> None:
                if bar is not None and task is not None:
                    bar.update(task, completed=done, total=total)

            return add_volume_masks(self.propagator, predictions, greys, [""] * len(greys), progress=show)

    def _ask(self, grey: np.ndarray, query: str) -> tuple[list[dict[str, Any]], Any]:
        """The conversation with its images, and the frame of the answer, as `prepare_volumes` builds them."""
        shown = uniform_slices(len(grey), self.settings.get("slices", 64))
        images = render_slices(grey, shown, self.settings.get("size", 256))
        instruction = self.settings.get("instruction")
        conversation = build_volume_prompt(query, len(shown), SLICE_INSTRUCTION if instruction is None else instruction)
        waiting = iter(images)
        for block in conversation[0]["content"]:
            if block["type"] == "image":
                block["image"] = next(waiting)
        kind = self.settings.get("frame_kind")
        return conversation, shown_frame(self.processor, grey.shape, shown, images[0].size, kind)


def _grey(volume: Volume | np.ndarray | str | Path, modality: str, intensity: str) -> np.ndarray:
    if isinstance(volume, np.ndarray):
        if volume.dtype != np.uint8 or volume.ndim != 3 or not volume.size:
            raise DataError(
                f"volume: {volume.dtype} array of shape {volume.shape}; expected grey values (D, H, W) uint8, as "
                "segrl.data.scale_intensity gives them, or a Volume or path"
            )
        return volume
    if isinstance(volume, Volume):
        return grey_values(volume, modality=modality, intensity=intensity)
    if not isinstance(volume, str | Path):
        raise DataError(f"volume: {type(volume).__name__}; expected a path, a Volume or grey values (D, H, W) uint8")
    return read_grey(str(volume), modality=modality, intensity=intensity)[1]
