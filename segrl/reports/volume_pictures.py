"""A picture of one answer about a volume: its key slice, the mask on neighbouring slices, and the model's text."""

# D slices, H/W pixels of a slice, h/w pixels of the drawn slice

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segrl.errors import DataError
from segrl.geometry.masks import mask_to_box
from segrl.metrics.overlap import dice
from segrl.predictions.prediction import Prediction
from segrl.predictions.target import VolumeTarget
from segrl.reports.drawing import (
    GROUND,
    INK,
    LEGEND,
    PALE,
    PAPER,
    PREDICTED,
    Colour,
    draw_legend,
    draw_overlay,
    wrap_text,
)

__all__ = ["volume_page", "volume_picture"]

KEY, GAP, MARGIN = 480, 10, 14  # pixels: edge of the key slice, gap between slices, page margin
TITLE, TEXT, CAPTION = 17, 14, 13  # font sizes
LEADING = 6  # pixels between lines of text
TILE = (KEY - GAP - CAPTION - LEADING) // 2  # two rows of neighbours are as high as the key slice
ENLARGED = (110, 170, 255)
LINE = 2  # width of outlines, pixels
QUERY_LINES, REASONING_LINES, ANSWER_LINES = 3, 12, 5
SMALLEST_VIEW = 0.25  # share of the slice's longest edge
EMPTY = np.zeros((0, 4))


@dataclass(frozen=True)
class _Scan:
    """The drawn volume: grey values, masks (None if there is none) and the size of a pixel."""

    volume: np.ndarray
    mask: np.ndarray | None
    target: np.ndarray | None
    spacing_yx: tuple[float, float]  # only their ratio counts

    def marked(self, index: int) -> np.ndarray:
        """Return where the slice has a predicted or a ground truth mask, (H, W) bool."""
        inside = np.zeros(self.volume.shape[1:], dtype=bool)
        for mask in (self.mask, self.target):
            if mask is not None:
                inside |= mask[index]
        return inside

    def draw(self, index: int, boxes: np.ndarray, view: tuple[slice, slice], edge: int) -> Image.Image:
        """Draw the part of a slice that `view` (rows, columns) selects, in true proportions, in a square of `edge`."""
        image = Image.fromarray(self.volume[index][view])
        millimetres = np.array((image.width * self.spacing_yx[1], image.height * self.spacing_yx[0]))
        w, h = np.maximum(1, np.rint(edge * millimetres / millimetres.max())).astype(int).tolist()
        left, top = view[1].start, view[0].start
        drawn = draw_overlay(
            image,
            (w, h),
            mask=None if self.mask is None else self.mask[index][view],
            target=None if self.target is None else self.target[index][view],
            boxes=boxes - (left, top, left, top),
            line=LINE,
        )
        square = Image.new("RGB", (edge, edge), GROUND)
        square.paste(drawn, ((edge - w) // 2, (edge - h) // 2))
        return square


def volume_picture(
    volume: np.ndarray,
    prediction: Prediction,
    target: VolumeTarget | None,
    path: str | os.PathLike[str],
    *,
    spacing_mm: Sequence[float] | None,
    query: str = "",
    name: str = "",
    edges: Sequence[str] | None = None,
    intensity: str = "",
    neighbours: int = 2,
    reach: int | None = None,
) -> Path:
    """Draw one answer about a volume into one picture.

    On the left is the key slice with the predicted boxes in yellow, the predicted mask in translucent red and the
    ground truth outlined in green; beside it are slices below and above, enlarged to the blue frame on the key slice.
    Below them are the reasoning and the answer, or the whole text if it lacks one of them.

    Neighbours are spread evenly over the slices where the predicted or the ground truth mask has foreground, including
    the farthest ones; if one side has too few, the other side gets more. If the answer names no slice of the volume,
    the slice with most of the ground truth is drawn without boxes, else the one with most of the predicted mask, else
    the middle one.

    Args:
        volume: (D, H, W) uint8 grey values.
        prediction: Its slice, boxes, mask and texts are drawn; the mask may be None.
        target: The ground truth, or None if it is not known.
        path: Path of the picture; its suffix sets the format, missing folders are created.
        spacing_mm: Size of a voxel along D, H and W, millimetres; slices keep their true proportions. None where it is
            not known: pixels are square, and distances are in slices only.
        query: The query; by default that of the target.
        name: Name of the scan, the title; by default that of the target.
        edges: Sides of the patient at the left, right, top and bottom edge, written on the key slice; see
            `segrl.data.Volume.edges`. None where they are not known.
        intensity: Text form of the scaling to grey values, such as "window:-160:240".
        neighbours: Largest number of slices on either side.
        reach: Largest distance of a neighbour in slices, such as the reach of the propagation; None for any.

    Returns:
        The path.

    Raises:
        DataError: A volume that is not (D, H, W) uint8, masks of another size, a spacing that is not three positive
            numbers, or numbers of slices below 0.

    Example:
        >>> import tempfile
        >>> from segrl.predictions import Frame, parse_completion
        >>> volume = np.zeros((3, 8, 8), dtype=np.uint8)
        >>> prediction = parse_completion("No cyst.", Frame("original_px", (8, 8)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = volume_picture(volume, prediction, None, Path(folder, "answer.png"), spacing_mm=(3, 1, 1))
        ...     with Image.open(path) as picture:
        ...         picture.size
        (508, 665)
    """
    page = volume_page(
        volume,
        prediction,
        target,
        spacing_mm=spacing_mm,
        query=query,
        name=name,
        edges=edges,
        intensity=intensity,
        neighbours=neighbours,
        reach=reach,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def volume_page(
    volume: np.ndarray,
    prediction: Prediction,
    target: VolumeTarget | None,
    *,
    spacing_mm: Sequence[float] | None,
    query: str = "",
    name: str = "",
    edges: Sequence[str] | None = None,
    intensity: str = "",
    neighbours: int = 2,
    reach: int | None = None,
) -> Image.Image:
    """Draw what `volume_picture` writes, and return it as an RGB image."""
    name = name or (target.name if target is not None else "") or "volume"
    scan = _scan(volume, prediction, target, spacing_mm, name)
    if edges is not None and len(edges) != 4:
        raise DataError(f"{name}: edges={edges!r:.100}; expected four texts: left, right, top, bottom")
    if neighbours < 0 or (reach is not None and reach < 0):
        raise DataError(f"neighbours={neighbours}, reach={reach}; expected 0 or more slices")
    key, caption = _key_slice(scan, prediction)
    named = prediction.slice_index == key
    boxes = prediction.boxes if named else EMPTY
    others = [n for n in range(len(volume)) if n != key and (reach is None or abs(n - key) <= reach)]
    around = _spread([n for n in others if scan.marked(n).any()], key, neighbours)
    whole = slice(0, volume.shape[1]), slice(0, volume.shape[2])
    view = _view(scan, [key, *around], boxes) if around else whole

    legend = [entry for entry in LEGEND if target is not None or entry[1] != "ground truth"]
    picture = scan.draw(key, boxes, whole, KEY)
    if view != whole:
        _frame(picture, view, scan)
        legend.append((ENLARGED, "enlarged on the right"))
    _letter(picture, edges or ())
    tiles = [(picture, caption, INK if named else PREDICTED)]
    step = None if spacing_mm is None else float(spacing_mm[0])
    tiles += [(scan.draw(n, EMPTY, view, TILE), _offset(n - key, n, step), INK) for n in around]
    page = _Page(_grid_size(len(around))[0])
    page.write(name, TITLE, INK, 2)
    page.write(query or (target.query if target is not None else ""), TEXT, INK, QUERY_LINES)
    page.write(_known(spacing_mm, edges, intensity), CAPTION, PALE, 1)
    page.legend(legend)
    page.paste(_grid(tiles))
    page.space()
    scored = f"Dice {dice(_mask(scan), target.mask):.2f}   " if target is not None else ""
    page.write(f"{scored}{prediction.status.value}", TEXT, INK if prediction.valid else PREDICTED, 1)
    if prediction.reasoning is None or prediction.answer is None:
        page.section("Text", prediction.text, REASONING_LINES)
    else:
        page.section("Reasoning", prediction.reasoning, REASONING_LINES)
        page.section("Answer", prediction.answer, ANSWER_LINES)
    return page.image()


def _scan(
    volume: Any, prediction: Prediction, target: VolumeTarget | None, spacing_mm: Sequence[float] | None, name: str
) -> _Scan:
    if not isinstance(volume, np.ndarray) or volume.dtype != np.uint8 or volume.ndim != 3 or volume.size == 0:
        found = f"{volume.dtype} {volume.shape}" if isinstance(volume, np.ndarray) else type(volume).__name__
        raise DataError(f"{name}: expected grey values, uint8 of shape (D, H, W), got {found}")
    spacing = (1.0, 1.0, 1.0) if spacing_mm is None else tuple(map(float, spacing_mm))
    if len(spacing) != 3 or not all(0 < step < math.inf for step in spacing):
        raise DataError(f"{name}: spacing_mm={spacing_mm}; expected three positive millimetres (z, y, x)")
    for kind, mask in (("predicted", prediction.mask), ("true", target.mask if target is not None else None)):
        if mask is not None and mask.shape != volume.shape:
            raise DataError(
                f"{name}: the {kind} mask has shape {mask.shape}, the volume {volume.shape}; expected the same grid"
            )
    return _Scan(volume, prediction.mask, None if target is None else target.mask, spacing[1:])


def _mask(scan: _Scan) -> np.ndarray:
    return np.zeros(scan.volume.shape, dtype=bool) if scan.mask is None else scan.mask


def _key_slice(scan: _Scan, prediction: Prediction) -> tuple[int, str]:
    """Return the slice to draw large, and its caption."""
    depth, named = len(scan.volume), prediction.slice_index
    if named is not None and 0 <= named < depth:
        return named, f"key slice {named} of 0-{depth - 1}"
    problem = "no slice named" if named is None else "named a slice that was not shown"
    for mask, name in ((scan.target, "ground truth"), (scan.mask, "mask")):
        if mask is not None and mask.any():
            best = int(np.count_nonzero(mask, axis=(1, 2)).argmax())
            return best, f"{problem}: here {best} of 0-{depth - 1}, most {name}"
    return depth // 2, f"{problem}: here {depth // 2} of 0-{depth - 1}"


def _spread(candidates: Sequence[int], key: int, per_side: int) -> list[int]:
    """Choose up to `2 * per_side` candidates around the key slice, evenly spread, in order."""
    below, above = [n for n in candidates if n < key][::-1], [n for n in candidates if n > key]
    up = min(len(above), 2 * per_side - min(per_side, len(below)))
    down = min(len(below), 2 * per_side - up)
    sides = ((below, down), (above, up))
    return sorted(side[(i + 1) * len(side) // count - 1] for side, count in sides for i in range(count))


def _view(scan: _Scan, shown: Sequence[int], boxes: np.ndarray) -> tuple[slice, slice]:
    """Return rows and columns of a square, in millimetres, around all masks and boxes on the shown slices."""
    marked = np.any([scan.marked(n) for n in shown], axis=0)
    for left, top, right, bottom in boxes:
        marked[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
    box = mask_to_box(marked)
    assert box is not None  # neighbours have a mask
    sizes = np.array(marked.shape)
    start, end = box[[1, 0]], box[[3, 2]]
    edges = sizes * scan.spacing_yx
    edge = max(2 * ((end - start) * scan.spacing_yx).max(), SMALLEST_VIEW * edges.max())
    lengths = np.minimum(sizes, np.ceil(edge / np.array(scan.spacing_yx))).astype(int)
    first = np.clip(np.rint((start + end - lengths) / 2).astype(int), 0, sizes - lengths)
    rows, columns = (slice(int(a), int(a + n)) for a, n in zip(first, lengths, strict=True))
    return rows, columns


def _frame(picture: Image.Image, view: tuple[slice, slice], scan: _Scan) -> None:
    """Frame on the drawn key slice the view of its neighbours."""
    height, width = scan.volume.shape[1:]
    step = KEY / max(height * scan.spacing_yx[0], width * scan.spacing_yx[1])  # drawn pixels per millimetre
    y, x = (step * spacing for spacing in scan.spacing_yx)
    left, top = (picture.width - round(width * x)) / 2, (picture.height - round(height * y)) / 2
    rows, columns = view
    corners = (left + columns.start * x, top + rows.start * y, left + columns.stop * x - 1, top + rows.stop * y - 1)
    ImageDraw.Draw(picture).rectangle(corners, outline=ENLARGED)


def _offset(offset: int, index: int, spacing: float | None) -> str:
    return f"slice {index}  ({offset:+d}{'' if spacing is None else f', {offset * spacing:+.1f} mm'})"


def _known(spacing_mm: Sequence[float] | None, edges: Sequence[str] | None, intensity: str) -> str:
    """Return the scaling and the grid in words, with what nobody knows of them."""
    sizes = (
        "unknown" if spacing_mm is None else " x ".join(f"{float(edge):.3g}" for edge in spacing_mm) + " mm (z, y, x)"
    )
    sides = "unknown" if edges is None else "from the file"
    return f"grey values: {intensity or 'as given'}   voxel: {sizes}   orientation: {sides}"


def _letter(picture: Image.Image, edges: Sequence[str]) -> None:
    """Write the sides of the patient at the left, right, top and bottom edge of the key slice."""
    middle, last, font = KEY // 2, KEY - LEADING // 2, ImageFont.load_default(TEXT)
    at = ((LEADING // 2, middle, "lm"), (last, middle, "rm"), (middle, LEADING // 2, "mt"), (middle, last, "mb"))
    for letters, (x, y, anchor) in zip(edges, at, strict=False):
        outline = {"stroke_width": 1, "stroke_fill": GROUND}
        ImageDraw.Draw(picture).text((x, y), letters, fill=PAPER, font=font, anchor=anchor, **outline)


def _grid_size(neighbours: int) -> tuple[int, int]:
    columns = -(-neighbours // 2)
    return KEY + columns * (GAP + TILE), KEY + LEADING + CAPTION


def _grid(tiles: Sequence[tuple[Image.Image, str, Colour]]) -> Image.Image:
    """Arrange the first tile large on the left, the others in two rows beside it, each with its caption below."""
    columns = len(tiles) // 2
    grid = Image.new("RGB", _grid_size(len(tiles) - 1), PAPER)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(CAPTION)
    for index, (picture, caption, colour) in enumerate(tiles):
        x, y = 0, 0
        if index > 0:
            row, column = divmod(index - 1, columns)
            x, y = KEY + GAP + column * (TILE + GAP), row * (TILE + LEADING + CAPTION + GAP)
        grid.paste(picture, (x, y))
        draw.text((x, y + picture.height + LEADING // 2), caption, fill=colour, font=font)
    return grid


class _Page:
    """A page that grows: pictures and lines of text from top to bottom."""

    def __init__(self, width: int) -> None:
        self.width, self.parts = width, []

    def paste(self, picture: Image.Image) -> None:
        self.parts.append(picture)

    def write(self, text: str, size: int, colour: Colour, max_lines: int) -> None:
        font = ImageFont.load_default(size)
        for line in wrap_text(text, font, self.width, max_lines):
            strip = Image.new("RGB", (self.width, size + LEADING), PAPER)
            ImageDraw.Draw(strip).text((0, 0), line, fill=colour, font=font)
            self.paste(strip)

    def space(self) -> None:
        self.paste(Image.new("RGB", (self.width, LEADING), PAPER))

    def section(self, heading: str, text: str, max_lines: int) -> None:
        self.space()
        self.write(heading, CAPTION, PALE, 1)
        self.write(text, TEXT, INK, max_lines)

    def legend(self, entries: Sequence[tuple[Colour, str]]) -> None:
        strip = Image.new("RGB", (self.width, CAPTION + 2 * LEADING), PAPER)
        draw_legend(ImageDraw.Draw(strip), 0, LEADING // 2, CAPTION, entries)
        self.paste(strip)

    def image(self) -> Image.Image:
        page = Image.new("RGB", (self.width + 2 * MARGIN, sum(part.height for part in self.parts) + 2 * MARGIN), PAPER)
        y = MARGIN
        for part in self.parts:
            page.paste(part, (MARGIN, y))
            y += part.height
        return page
