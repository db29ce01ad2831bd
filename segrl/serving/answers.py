"""An uploaded file and a question in, an answer out: as JSON, as a file of the mask, as a picture, or for the page."""

# D slices, H/W pixels

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from segrl.data.dicom.series import open_dicom_series
from segrl.data.volumes.case import Case
from segrl.errors import DataError
from segrl.geometry.image_files import open_image
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.result import InferenceResult
from segrl.inference.volumes import VolumeSegmenter
from segrl.predictions.frames import shrunk_size
from segrl.reports.drawing import draw_overlay
from segrl.serving.archives import unpack
from segrl.serving.settings import ServingSettings

__all__ = ["FORMATS", "SUFFIXES", "Answer", "Upload", "answer_upload"]

FORMATS = ("json", "mask", "overlay", "page")
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm")
_ARCHIVE = ".zip"  # of a DICOM series
_VOLUMES = (".nii.gz", ".nii", _ARCHIVE)
_BYTES, _HEADERS = 4, 20_000_000  # of a voxel in DICOM files, at most; of their headers
SUFFIXES = {"images": _IMAGES, "volumes": _VOLUMES}
_SHOWN_SLICES, _SHOWN_EDGE = 256, 384  # slices of a volume on the page, and their longest edge in pixels


@dataclass(frozen=True, eq=False)
class Upload:
    """A file as it came, and what is asked about it.

    Attributes:
        name: Name of the file as the client says it; used in texts, never as a path.
        content: Its bytes.
        question: The question.
        samples: Answers to draw.
    """

    name: str
    content: bytes
    question: str
    samples: int = 1

    @property
    def shown_name(self) -> str:
        """The name without folders."""
        return PurePosixPath(self.name.replace("\\", "/")).name[:200] or "upload"


@dataclass(frozen=True)
class Answer:
    """Content of a response.

    Attributes:
        content: Bytes, or values for JSON.
        media_type: Of the bytes; "application/json" for values.
        name: Name under which a browser saves it; "" for none.
    """

    content: Any
    media_type: str = "application/json"
    name: str = ""


def answer_upload(
    segmenter: ReasoningSegmenter | VolumeSegmenter,
    upload: Upload,
    form: str,
    settings: ServingSettings,
    **generation: Any,
) -> Answer:
    """Answer one question.

    Args:
        segmenter: The model.
        upload: File and question.
        form: One of `FORMATS`.
        settings: The server's limits.
        generation: To `model.generate`.

    Raises:
        DataError: The file is no image (or volume) of a known kind, is too large, or the question cannot be asked. The
            message names the file as the client does, and no path of the server.
    """
    kinds = SUFFIXES[segmenter.settings.task]
    suffix = next((kind for kind in kinds if upload.shown_name.lower().endswith(kind)), None)
    if suffix is None:
        raise DataError(f"{upload.shown_name}: expected a file of {segmenter.settings.task}, {', '.join(kinds)}")
    names: dict[str, str] = {}
    with TemporaryDirectory(prefix="segrl-serve-") as folder:
        path = Path(folder, f"upload{suffix}")  # under a name of our own, whatever the client says
        path.write_bytes(upload.content)
        try:
            if suffix == _ARCHIVE:
                series = Path(folder, "series")
                names = unpack(path, series, _BYTES * settings.max_pixels + _HEADERS)
                path = series
            _check_size(path, suffix, settings.max_pixels)
            result: Any = segmenter.predict(str(path), upload.question, samples=upload.samples, **generation)
            return _FORMS[form](replace(result, name=upload.shown_name), folder)
        except (DataError, OSError) as error:
            said = str(error)
            for own, theirs in names.items():
                said = said.replace(f"{path}/{own}", theirs).replace(own, theirs)
            for own in (path, Path(folder, f"upload{suffix}")):
                said = said.replace(str(own), upload.shown_name)
            said = said.replace(folder, "")
            raise DataError(" ".join(said.split())) from error


def _check_size(path: Path, suffix: str, most: int) -> None:
    """Refuse a picture or volume by its header, before its pixels are in memory."""
    if suffix == _ARCHIVE:
        count = math.prod(open_dicom_series(path).shape)
    elif suffix in _VOLUMES:
        import nibabel
        from nibabel.filebasedimages import ImageFileError

        try:
            shape = nibabel.load(path).shape  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        except (ImageFileError, OSError, EOFError, ValueError) as error:
            raise DataError(f"{path}: no NIfTI file: {error}") from error
        count = int(np.prod([int(size) for size in shape], dtype=object))
    elif suffix == ".dcm":
        return  # whose size the reader bounds by the length of its pixels
    else:
        with open_image(path, str(path)) as image:
            count = image.width * image.height
    if count > most:
        raise DataError(f"{path}: {count} pixels; this server takes at most {most}")


# ---- the forms of an answer ------------------------------------------------------------------------------------------


def _json(result: InferenceResult, folder: str) -> Answer:
    return Answer(result.to_dict())


def _mask_file(result: InferenceResult, folder: str) -> Answer:
    """The mask as `InferenceResult.save` writes it: PNG on the image's pixels, NIfTI on the scan's grid."""
    if result.mask is None:
        raise DataError(f"{result.name}: the answer has no mask; its status is {result.status.value}")
    written = result.save(os.path.join(folder, "out"), "upload", overlay=False, record=False)
    kind, media = (".nii.gz", "application/gzip") if isinstance(result.source, Case) else (".png", "image/png")
    return Answer(written["mask"].read_bytes(), media, f"{_stem(result.name)}_mask{kind}")


def _overlay(result: InferenceResult, folder: str) -> Answer:
    return Answer(_encoded(result.plot(), "PNG"), "image/png", f"{_stem(result.name)}_overlay.png")


def _page(result: InferenceResult, folder: str) -> Answer:
    """Return all that the page shows and offers inside JSON: values, pictures and the file of the mask."""
    found = result.to_dict(mask=False)
    found["overlay"] = _data(_overlay(result, folder))
    found["mask_file"] = None
    if result.mask is not None:
        mask = _mask_file(result, folder)
        found["mask_file"] = {"name": mask.name, "data": _data(mask), "foreground": int(result.mask.sum())}
    found["slices"] = _slices(result, result.source) if isinstance(result.source, Case) else []
    return Answer(found)


def _slices(result: InferenceResult, case: Case) -> list[dict[str, Any]]:
    """Slices of a volume with the mask over them, by their index in it; the named one is among them."""
    depth = len(case.grey)
    chosen = set(np.linspace(0, depth - 1, min(depth, _SHOWN_SLICES)).round().astype(int).tolist())
    named = result.slice_index
    if named is not None and 0 <= named < depth:
        chosen.add(named)
    height, width = case.grey.shape[1:]
    size = shrunk_size((width, height), _SHOWN_EDGE)
    shown = []
    for index in sorted(chosen):
        boxes = result.boxes if index == named else ()
        mask = None if result.mask is None else result.mask[index]
        drawn = draw_overlay(Image.fromarray(case.grey[index]), size, mask=mask, boxes=boxes)
        picture = Answer(_encoded(drawn, "JPEG", quality=85), "image/jpeg")
        shown.append({"index": index, "picture": _data(picture)})
    return shown


def _encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **settings)
    return buffer.getvalue()


def _data(answer: Answer) -> str:
    return f"data:{answer.media_type};base64,{base64.b64encode(answer.content).decode('ascii')}"


def _stem(name: str) -> str:
    """The name of a file without its ending, of characters that stand in a header as they are."""
    base = next((name[: -len(kind)] for kind in (*_VOLUMES, *_IMAGES) if name.lower().endswith(kind)), name)
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in base)


_FORMS: dict[str, Callable[[InferenceResult, str], Answer]] = {
    "json": _json,
    "mask": _mask_file,
    "overlay": _overlay,
    "page": _page,
}
