"""An answer about one input: its question, its confidence, and the ways out: plain values, pictures, files."""

# H/W pixels of the input, D slices of a volume

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segrl.data.dicom.segmentation import write_dicom_seg
from segrl.data.dicom.series import holds_dicom, open_dicom_series
from segrl.data.volumes.case import Case
from segrl.data.volumes.grids import to_file
from segrl.data.volumes.nifti import write_mask
from segrl.errors import DataError
from segrl.files.whole import whole_file, write_whole
from segrl.geometry.mask_images import write_mask_image
from segrl.geometry.masks import mask_to_rle
from segrl.inference.asking import Asked
from segrl.inference.confidence import Confidence, combine_answers
from segrl.predictions.frames import Frame
from segrl.predictions.prediction import Prediction
from segrl.reports.drawing import draw_overlay
from segrl.reports.volume_pictures import volume_page

__all__ = ["InferenceResult", "result_of", "result_stem"]

_SHORTEST = 256  # px, of the longer side of an overlay


@dataclass(frozen=True, eq=False)
class InferenceResult(Prediction):
    """A `Prediction` of inference, with its question, its input and its confidence.

    Attributes:
        query: The question.
        source: What was shown, as a PIL image, upright and in RGB, or as a `Case`, the grey values of a volume.
        name: Path of the input; "" for one in memory.
        intensity: Text form of the scaling that made grey values of the input; "" for one that has 8 bits.
        frame: Of the boxes that the model wrote, and of a volume the slices that were shown.
        confidence: None unless several answers were drawn or probabilities were asked for.
        abstained: Whether the confidence is below what the caller asked for; then `save` writes no mask.
        samples: The answers that were drawn, each with its own mask; empty for one answer.

    Example:
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.inference import ReasoningSegmenter
        >>> from segrl.predictions import ImagePromptSettings
        >>> segmenter = ReasoningSegmenter(*tiny_qwen2_5_vl(), ImagePromptSettings(max_new_tokens=3))
        >>> result = segmenter.predict(Image.new("L", (300, 200)), "Where is the cyst?")
        >>> result.to_dict()["status"], result.plot().size
        ('no_answer', (300, 200))
    """

    query: str = ""
    source: Image.Image | Case | None = None
    name: str = ""
    intensity: str = ""
    frame: Frame | None = None
    confidence: Confidence | None = None
    abstained: bool = False
    samples: tuple[Prediction, ...] = field(default=(), repr=False)

    def to_dict(self, *, mask: bool = True) -> dict[str, Any]:
        """Return plain values for JSON.

        Args:
            mask: Whether the mask is among them, as run lengths that `segrl.geometry.rle_to_mask` reads.

        Returns:
            - "name", "query", "status", "reasoning", "answer", "text", "abstained", "intensity",
            - "boxes": of an image in its pixels, of a volume in those of the named slice, as segrl reads it,
            - "confidence": see `Confidence.to_dict`, or None,
            - "foreground": pixels or voxels of the mask, or None,
            - "size": [width, height] of an image, [depth, height, width] of a volume,
            - of a volume "slice" (index as segrl reads it, from the lowest slice, counted from 0), "shown_slice" (its
            number among the slices that were shown, from 1), "file_slice" and "file_axis" (index and axis in the file,
            from 0) and "z_mm" (height in the file's world), each None if no shown slice is named or it is not known,
            - "mask", None without one.
        """
        return {
            "name": self.name,
            "query": self.query,
            "status": self.status.value,
            "reasoning": self.reasoning,
            "answer": self.answer,
            "text": self.text,
            "boxes": self.boxes.tolist(),
            **self._slice(),
            "size": self._size(),
            "intensity": self.intensity,
            "confidence": None if self.confidence is None else self.confidence.to_dict(),
            "abstained": self.abstained,
            "foreground": None if self.mask is None else int(self.mask.sum()),
            **({"mask": None if self.mask is None else mask_to_rle(self.mask)} if mask else {}),
        }

    def _size(self) -> list[int] | None:
        if isinstance(self.source, Case):
            return list(map(int, self.source.grey.shape))
        if self.mask is not None:
            return [int(self.mask.shape[1]), int(self.mask.shape[0])]
        return None if self.source is None else list(self.source.size)

    def _slice(self) -> dict[str, Any]:
        if not isinstance(self.source, Case):
            return {}
        found = dict.fromkeys(("slice", "shown_slice", "file_slice", "file_axis", "z_mm"))
        shown = [] if self.frame is None or self.frame.slices is None else list(self.frame.slices)
        index = self.slice_index
        if index is None or index not in shown:
            return {**found, "slice": index}
        axis, in_file = self.source.scan.file_slice(index)
        numbers = {"slice": index, "shown_slice": shown.index(index) + 1, "file_slice": in_file, "file_axis": axis}
        return {**numbers, "z_mm": self.source.scan.z_mm(index)}

    def plot(self) -> Image.Image:
        """Draw the input with the mask in translucent red and the boxes in yellow.

        Returns:
            Of an image a picture of its size, or larger, so that the longer side has 256 px or more. Of a volume a page
            with the named slice, its neighbours, reasoning and answer, see `segrl.reports.volume_picture`.

        Raises:
            DataError: The result has no input to draw on.
        """
        if isinstance(self.source, Case):
            scan = self.source.scan
            known = {"spacing_mm": scan.spacing_mm, "edges": scan.edges, "intensity": self.source.intensity}
            name = Path(self.name).name
            return volume_page(self.source.grey, self, None, **known, query=self.query, name=name)
        if self.source is None:
            raise DataError(f"{self.name or 'result'}: holds no image; plot what predict returned, or draw_overlay")
        factor = max(1.0, _SHORTEST / max(self.source.size))
        width, height = (max(1, round(edge * factor)) for edge in self.source.size)
        pixels = None if self.mask is None else (self.mask.shape[1], self.mask.shape[0])
        line = max(1, round(max(width, height) / 400))
        return draw_overlay(self.source, (width, height), mask=self.mask, boxes=self.boxes, pixels=pixels, line=line)

    def save(
        self, folder: str | os.PathLike, stem: str = "", *, overlay: bool = True, record: bool = True
    ) -> dict[str, Path]:
        """Write mask, overlay and plain values into a folder, which is created; existing files are replaced at once.

        Args:
            folder: Where to write.
            stem: Start of the names; the input's own name without its ending when "", or "answer".
            overlay: Whether `plot` is written.
            record: Whether `to_dict` is written, too.

        Returns:
            "mask": `<stem>_mask.png`, 0 and 255 on the pixels of the image, or `<stem>_mask.nii.gz` on the grid of the
            scan; missing if there is no mask, or the answer abstained. "overlay": `<stem>_overlay.png`. "record":
            `<stem>.json`.

        Raises:
            DataError: A name would be that of the input, or the result has no input.
        """
        path = Path(folder)
        stem = stem or result_stem(self.name)
        ending = ".nii.gz" if isinstance(self.source, Case) else ".png"
        names = {"mask": f"{stem}_mask{ending}", "overlay": f"{stem}_overlay.png", "record": f"{stem}.json"}
        wanted = {"mask": self.mask is not None and not self.abstained, "overlay": overlay, "record": record}
        files = {kind: path / name for kind, name in names.items() if wanted[kind]}
        for file in files.values():
            if self.name and file.exists() and os.path.exists(self.name) and file.samefile(self.name):
                raise DataError(f"{file} is the input itself; pass another folder or stem, nothing replaces an input")
        path.mkdir(parents=True, exist_ok=True)
        if "mask" in files:
            assert self.mask is not None
            if isinstance(self.source, Case):
                write_mask(files["mask"], self.mask, self.source.scan)
            else:
                with whole_file(files["mask"], suffix=".png") as unfinished:
                    write_mask_image(unfinished, self.mask)
        if overlay:
            with whole_file(files["overlay"], suffix=".png") as unfinished:
                self.plot().save(unfinished)
        if record:
            write_whole(files["record"], json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False) + "\n")
        return files

    def save_dicom_seg(self, path: str | os.PathLike) -> None:
        """Write the mask as a DICOM Segmentation object that refers to the input, whose label is the question.

        Raises:
            DataError: No mask, or an input that is no DICOM; and as `segrl.data.dicom.write_dicom_seg`.
            SegRLError: highdicom is not installed.
        """
        if self.mask is None or not self.name or not holds_dicom(self.name):
            what = "no mask" if self.mask is None else "no DICOM input"
            raise DataError(f"{os.fspath(path)}: the result has {what}, to which a DICOM-SEG could refer; use save")
        mask, sources = _sources(self)
        write_dicom_seg(path, mask, sources, label=self.query)


def _sources(result: InferenceResult) -> tuple[np.ndarray, Sequence[Path]]:
    """Return the mask on the grid of the DICOM files of a result, and these files."""
    assert result.mask is not None
    if not isinstance(result.source, Case):
        return result.mask, [Path(result.name)]
    scan = result.source.scan
    assert scan.affine is not None
    return to_file(result.mask, scan.affine).transpose(2, 1, 0), open_dicom_series(result.name).files


def result_of(
    answers: Sequence[Prediction], asked: Asked, query: str, source: Image.Image | Case, frame: Frame
) -> InferenceResult:
    """Return one result of the answers to a question; with a confidence where one is asked for."""
    answer, confidence = answers[0], None
    if asked.confident:
        answer, confidence = combine_answers(answers)
    kept = {item.name: getattr(answer, item.name) for item in fields(Prediction)}
    return InferenceResult(
        **kept,
        query=query,
        source=source,
        frame=frame,
        confidence=confidence,
        abstained=confidence is not None and asked.abstains(confidence.value),
        samples=() if len(answers) == 1 else tuple(replace(one, probability=None) for one in answers),
    )


def result_stem(name: str) -> str:
    """Return the name of a file or folder without folders and endings; "answer" for ""."""
    base = Path(name).name
    for ending in (".nii.gz", ".img.gz", ".hdr.gz"):
        if base.lower().endswith(ending):
            return base[: -len(ending)]
    return (Path(base).stem if Path(base).suffix.lower() in _ENDINGS else base) or "answer"


_ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm"),
    *(".dcm", ".dicom", ".ima", ".nii", ".hdr", ".img", ".npy"),
}
