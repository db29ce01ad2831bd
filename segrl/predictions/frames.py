"""Coordinate frames: the four numbers of a box mean something only together with the frame they are written in.

Everything inside segrl is in original pixels (xyxy, half-open). Models write boxes in other frames; only the parser
and the prompt builder convert, with the functions here. Sizes are (width, height) unless a name says otherwise.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike

from segrl.errors import FrameError
from segrl.geometry.boxes import validate_boxes

__all__ = ["NOT_SHOWN", "Frame", "FrameKind", "frame_for", "shrunk_size"]

FrameKind = Literal["original_px", "resized_px", "relative_1000"]
Size = tuple[int, int]

# Processors of models trained on absolute pixels of the resized image; all others write thousandths of the image.
_RESIZED_PX_PROCESSORS = frozenset({"Qwen2_5_VLProcessor"})
_seen: WeakKeyDictionary[Any, dict[Any, Size]] = WeakKeyDictionary()  # of image processors, by size and settings
NOT_SHOWN = -1  # replaces the index of a slice that was not shown


@dataclass(frozen=True)
class Frame:
    """The coordinate frame of boxes on one image.

    Attributes:
        kind: `original_px` (pixels of the original image), `resized_px` (pixels of the image that the vision encoder
            saw) or `relative_1000` (thousandths of width and height).
        original_size: (width, height) of the original image.
        resized_size: (width, height) that the encoder saw; required for `resized_px`, unused otherwise.
        slices: For a volume: the index in the volume of every slice that is shown; the model numbers them from 1 in
            this order. None for an image, or where the model sees all slices.

    Raises:
        FrameError: For an unknown kind, a size that is not two positive integers, a missing `resized_size`, or slices
            that are not increasing indices.

    Example:
        >>> frame = Frame("relative_1000", original_size=(200, 100))
        >>> frame.to_original([[500, 500, 1000, 1000]]).tolist()
        [[100.0, 50.0, 200.0, 100.0]]
    """

    kind: FrameKind
    original_size: Size
    resized_size: Size | None = None
    slices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        object.__setattr__(self, "original_size", _check_size(self.original_size, "original_size"))
        if self.resized_size is not None:
            object.__setattr__(self, "resized_size", _check_size(self.resized_size, "resized_size"))
        elif self.kind == "resized_px":
            raise FrameError(
                "frame 'resized_px' needs resized_size=(width, height); build it with frame_for(processor)."
            )
        if self.slices is not None:
            object.__setattr__(self, "slices", _check_slices(self.slices))

    @property
    def size(self) -> Size:
        """Return (width, height) of the frame in its own unit: the largest coordinates that a box can have.

        Example:
            >>> Frame("relative_1000", original_size=(200, 100)).size
            (1000, 1000)
        """
        if self.kind == "relative_1000":
            return (1000, 1000)
        if self.kind == "resized_px":
            assert self.resized_size is not None
            return self.resized_size
        return self.original_size

    def to_original(self, boxes: ArrayLike) -> np.ndarray:
        """Convert boxes of this frame to original pixels, without rounding or clipping.

        Args:
            boxes: (N, 4) xyxy in this frame; N = 0 gives (0, 4).

        Returns:
            (N, 4) float64 in original pixels.

        Raises:
            SegRLError: If the boxes are not valid (see `segrl.geometry.validate_boxes`).

        Example:
            >>> Frame("resized_px", (200, 100), (100, 50)).to_original([[1, 2, 3, 4]]).tolist()
            [[2.0, 4.0, 6.0, 8.0]]
        """
        return validate_boxes(boxes, "boxes") * self._scale(self.original_size, self.size)

    def from_original(self, boxes: ArrayLike, rounding: bool = True) -> np.ndarray:
        """Convert boxes in original pixels to this frame.

        Args:
            boxes: (N, 4) xyxy in original pixels; N = 0 gives (0, 4).
            rounding: Round to the nearest integers inside the frame. A box that has an area stays at least one unit
                wide and high. Without rounding the exact values are returned, unclipped.

        Returns:
            (N, 4) int64 with rounding, float64 without.

        Raises:
            SegRLError: If the boxes are not valid.

        Example:
            >>> Frame("relative_1000", (200, 100)).from_original([[0, 50, 200, 50.04]]).tolist()
            [[0, 500, 1000, 501]]
        """
        exact = validate_boxes(boxes, "boxes") * self._scale(self.size, self.original_size)
        if not rounding:
            return exact
        limit = np.array(self.size, dtype=np.int64)
        low = np.clip(np.rint(exact[:, :2]), 0, limit).astype(np.int64)
        high = np.clip(np.rint(exact[:, 2:]), 0, limit).astype(np.int64)
        vanished = (exact[:, 2:] > exact[:, :2]) & (high <= low)
        start = np.clip(np.floor(exact[:, :2]), 0, limit - 1).astype(np.int64)
        return np.concatenate([np.where(vanished, start, low), np.where(vanished, start + 1, high)], axis=1)

    def original_slice(self, position: int) -> int:
        """Return the index in the volume of a slice that the model names.

        Args:
            position: Its position among the slices that are shown, counted from 0: the written number minus 1.

        Returns:
            The index, or -1 (`NOT_SHOWN`) if no slice has that position. Without `slices` the position itself, which
            is not compared with the depth of the volume.

        Example:
            >>> frame = Frame("original_px", (8, 8), slices=(0, 3, 7))
            >>> frame.original_slice(2), frame.original_slice(3)
            (7, -1)
        """
        if self.slices is None:
            return position
        return self.slices[position] if 0 <= position < len(self.slices) else NOT_SHOWN

    @staticmethod
    def _scale(to: Size, source: Size) -> np.ndarray:
        return np.array([to[0] / source[0], to[1] / source[1]] * 2, dtype=np.float64)


def shrunk_size(size: Size, max_edge: int | None) -> Size:
    """Compute the size of an image that is shown with at most `max_edge` pixels on its longest edge.

    Training and inference must agree on it, so both call this function.

    Args:
        size: (width, height), pixels.
        max_edge: Longest edge allowed, pixels; `None` allows any.

    Returns:
        (width, height), the aspect kept up to rounding and no edge below 1; `size` itself if it fits.

    Example:
        >>> shrunk_size((1024, 512), 512)
        (512, 256)
    """
    if not max_edge or max(size) <= max_edge:
        return size
    scale = max_edge / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def frame_for(
    processor: Any, image_size: Size, original_size: Size | None = None, *, kind: FrameKind | None = None
) -> Frame:
    """Return the frame in which a model writes boxes on an image.

    Qwen2.5-VL writes absolute pixels of the resized image; Qwen2-VL, Qwen3-VL and all others are taken to write
    thousandths of the image.

    Args:
        processor: The model's processor, as it is now: what its image processor does with an image of this size counts,
            whatever its settings are called.
        image_size: (width, height) of the image that is given to the processor.
        original_size: (width, height) of the original image, if it was downscaled before; same as `image_size` if None.
        kind: The frame kind, for models that do not write in the frame that their processor's class implies.

    Raises:
        FrameError: A size is wrong; or `kind` is `resized_px`, and the processor refuses the image (an edge more than
            200 times the other) or does not say to which size it resizes.

    Example:
        >>> frame_for(None, image_size=(100, 50), original_size=(200, 100))
        Frame(kind='relative_1000', original_size=(200, 100), resized_size=None, slices=None)
    """
    if kind is None:
        classes = {base.__name__ for base in type(processor).__mro__}
        kind = "resized_px" if classes & _RESIZED_PX_PROCESSORS else "relative_1000"
    width, height = _check_size(image_size, "image_size")
    original = (width, height) if original_size is None else original_size
    if _check_kind(kind) != "resized_px":
        return Frame(kind, original)
    images = getattr(processor, "image_processor", processor)
    if getattr(images, "do_resize", True) is False:
        return Frame(kind, original, (width, height))
    return Frame(kind, original, _seen_size(images, (width, height)))


def _seen_size(images: Any, size: Size) -> Size:
    """Return the (width, height) to which an image processor resizes an image of `size`.

    It is read off the patches that the processor makes of a black image, since its settings have several names:
    `max_pixels`, set afterwards, counts although `size` still holds another number.
    """
    if not hasattr(images, "patch_size"):
        raise FrameError(
            f"{type(images).__name__} has no patch_size and makes no patches, so its resized size is not known; pass "
            "kind='original_px' or 'relative_1000', or build Frame yourself."
        )
    known = _seen.setdefault(images, {})
    # tensors that the processor keeps beside its settings say nothing of sizes, and take milliseconds to print
    settings = ((name, value) for name, value in vars(images).items() if not hasattr(value, "dtype"))
    key = (size, *sorted((name, str(value)) for name, value in settings))
    if key not in known:
        black = np.broadcast_to(np.uint8(0), (size[1], size[0], 3))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those come with the images themselves
                made = images(images=[black], return_tensors="pt", input_data_format="channels_last")
                _, rows, columns = made["image_grid_thw"][0].tolist()
        except (KeyError, TypeError) as error:
            raise FrameError(
                f"{type(images).__name__} returns no image_grid_thw, so its resized size is not known; pass "
                "kind='original_px' or 'relative_1000', or build Frame yourself."
            ) from error
        except ValueError as error:
            raise FrameError(
                f"image of {size[0]} x {size[1]} px: {type(images).__name__} refuses it: {error}; crop or pad it."
            ) from error
        known[key] = (columns * int(images.patch_size), rows * int(images.patch_size))
    return known[key]


def _check_kind(kind: str) -> str:
    if kind not in get_args(FrameKind):
        raise FrameError(f"frame kind {kind!r}; expected one of {', '.join(get_args(FrameKind))}.")
    return kind


def _check_slices(slices: Any) -> tuple[int, ...]:
    try:
        found = tuple(int(index) for index in slices)
        exact = found == tuple(slices)
    except (TypeError, ValueError):
        found, exact = (), False
    if not exact or not found or min(found) < 0 or any(a >= b for a, b in itertools.pairwise(found)):
        raise FrameError(f"slices={slices!r:.100}; expected increasing indices of slices, 0 or more.")
    return found


def _check_size(size: Any, name: str) -> Size:
    try:
        width, height = (int(edge) for edge in size)
        exact = (width, height) == tuple(size)
    except (TypeError, ValueError):
        exact, width, height = False, 0, 0
    if not exact or min(width, height) < 1:
        raise FrameError(f"{name}={size!r}; expected (width, height) as two positive integers.")
    return width, height
