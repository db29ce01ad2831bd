"""DICOM files with one grey frame: checked by their header, decoded by pydicom, rescaled to values with a unit."""

# H/W pixels of a frame

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from segrl.errors import DataError, SegRLError

__all__ = [
    "DicomImage",
    "decoded",
    "is_dicom",
    "pydicom_module",
    "quiet_pydicom",
    "read_dataset",
    "read_dicom_image",
    "shown_inverted",
]

_ENDINGS = (".dcm", ".dicom", ".ima")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_NO_DECODER = ("missing dependencies", "plugins are available", "does not support")  # in pydicom's messages
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, IndexError)


@dataclass(frozen=True, eq=False)
class DicomImage:
    """One grey frame of a DICOM file.

    Attributes:
        pixels: (H, W) float32, rescaled by slope and intercept or by the modality's look-up table: Hounsfield units of
            a CT.
        window: Lower and upper end of the first window of the file, in these values; None without one.
        inverted: Whether low values are shown white (MONOCHROME1).
        modality: Code of the file, such as "CT", "MR" or "DX".
        note: What the file says about its display and is not followed; "" if there is nothing.

    Example:
        >>> DicomImage(np.zeros((2, 3), dtype=np.float32), (-160.0, 240.0), False, "CT").note
        ''
    """

    pixels: np.ndarray
    window: tuple[float, float] | None
    inverted: bool
    modality: str
    note: str = ""


def is_dicom(path: str | os.PathLike) -> bool:
    """Return whether a file is DICOM by its content, or by its ending; a folder is not.

    Example:
        >>> _ = Path("a").write_bytes(bytes(128) + b"DICM")
        >>> is_dicom("a"), is_dicom("no.dcm")
        (True, False)
    """
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() in _ENDINGS:
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom_image(path: str | os.PathLike) -> DicomImage:
    """Read a DICOM file that holds one grey image.

    Raises:
        DataError: No DICOM file, no pixels, several frames, colour, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`,
            pixels that are damaged or compressed in a way that no installed decoder reads; names the file and the fix.
        SegRLError: pydicom is not installed.

    Example:
        >>> read_dicom_image("no.dcm")
        Traceback (most recent call last):
        segrl.errors.DataError: no.dcm: no such file; give the path of a DICOM file
    """
    path = Path(path)
    dataset = read_dataset(path, pixels=True)
    pixels = decoded(dataset, path)
    window, note = _window(dataset, path)
    return DicomImage(pixels, window, shown_inverted(dataset), str(dataset.get("Modality", "") or ""), note)


def read_dataset(path: Path, *, pixels: bool) -> Any:
    """Read a DICOM file and refuse, by its header, what holds no single grey frame.

    Args:
        path: The file.
        pixels: Whether the pixels are read, too; they are not yet decoded.

    Raises:
        DataError: See `read_dicom_image`.
    """
    pydicom = pydicom_module()
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a DICOM file")
    try:
        with quiet_pydicom():
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, force=path.suffix.lower() in _ENDINGS)
    except (pydicom.errors.InvalidDicomError, *_UNREADABLE) as error:
        raise DataError(f"{path}: cannot be read as DICOM ({_line(error)}); copy the file again") from error
    if "SOPClassUID" not in dataset:
        raise DataError(f"{path}: cannot be read as DICOM (it has no SOP class); copy the file again")
    _check_header(dataset, path, pixels)
    return dataset


def decoded(dataset: Any, path: Path) -> np.ndarray:
    """Decode the frame of a dataset with pixels, rescaled to values with a unit, (H, W) float32.

    Raises:
        DataError: Damaged pixels, or a compression without a decoder.
    """
    from pydicom.pixels.processing import apply_modality_lut

    try:
        with quiet_pydicom():
            stored = dataset.pixel_array
    except RuntimeError as error:  # pydicom's word for a missing decoder, and for damage that a decoder finds
        if not any(word in str(error) for word in _NO_DECODER):
            raise DataError(f"{path}: the pixels cannot be decoded ({_line(error)}); copy the file again") from error
        raise DataError(
            f"{path}: is compressed as {dataset.file_meta.TransferSyntaxUID.name}, and no decoder for it is installed; "
            "decompress it, as with `gdcmconv --raw` or `dcmdjpeg`, or install a plugin of pydicom: `pip install "
            "python-gdcm`"
        ) from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: the pixels cannot be decoded ({_line(error)}); copy the file again") from error
    return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)


def shown_inverted(dataset: Any) -> bool:
    """Return whether low values are shown white."""
    return str(dataset.PhotometricInterpretation) == "MONOCHROME1"


def pydicom_module() -> ModuleType:
    """Import pydicom.

    Raises:
        SegRLError: It is not installed.
    """
    try:
        import pydicom
        import pydicom.errors
    except ImportError as error:
        raise SegRLError(
            f'DICOM needs pydicom, which cannot be imported ({error}): pip install "segrl[dicom]"'
        ) from error
    return pydicom


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Inside the context pydicom does not warn of values that break the standard: what matters here is checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom)")
        yield


def _check_header(dataset: Any, path: Path, pixels: bool) -> None:
    has = any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
    if not dataset.get("Rows") or not dataset.get("Columns") or (pixels and not has):
        kind = dataset.SOPClassUID.name
        raise DataError(f"{path}: holds no pixels ({kind}); give the file of an image, or leave it out")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise DataError(
            f"{path}: has {frames} frames, expected one image; save the frame as a file of its own, or convert the "
            "file to NIfTI (dcm2niix)"
        )
    colour = str(dataset.get("PhotometricInterpretation", ""))
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or colour not in _GREY:
        raise DataError(f"{path}: is a colour image ({colour}), expected grey values; save it as PNG and give that")
    size, most = int(dataset.Rows) * int(dataset.Columns), Image.MAX_IMAGE_PIXELS
    if most is not None and size > most:
        raise DataError(
            f"{path}: declares {dataset.Columns} x {dataset.Rows} px, expected at most {most} pixels; scale the image "
            "down, or set PIL.Image.MAX_IMAGE_PIXELS"
        )


def _window(dataset: Any, path: Path) -> tuple[tuple[float, float] | None, str]:
    """Return the first window of a file, and what of its display is not followed."""
    centre, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        if "VOILUTSequence" in dataset:
            return None, "its look-up table of grey values is not followed; pass intensity= to choose a window"
        plain = int(dataset.BitsStored) == 8 and not int(dataset.get("PixelRepresentation") or 0)
        rescaled = float(dataset.get("RescaleSlope") or 1) != 1 or float(dataset.get("RescaleIntercept") or 0) != 0
        return ((0.0, 255.0) if plain and not rescaled and "ModalityLUTSequence" not in dataset else None), ""
    function = str(dataset.get("VOILUTFunction", "LINEAR") or "LINEAR")
    note = "its sigmoid window is shown as a linear one" if function == "SIGMOID" else ""
    if not np.isfinite([centre, width]).all() or width <= 0:
        raise DataError(f"{path}: has a window of centre {centre} and width {width}; pass intensity= to choose one")
    if function == "LINEAR":  # C.11.2.1.2.1: bounds at whole values, so that a width of 1 is a threshold
        low = centre - 0.5 - (width - 1) / 2
        return (low, low + max(width - 1, 1e-3)), note
    return (centre - width / 2, centre + width / 2), note


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    many = not isinstance(value, str) and hasattr(value, "__len__")
    return float(value[0] if many and len(value) else value) if not (many and not len(value)) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
