"""Parts of all pictures: colours, masks and boxes over an image, and wrapped plain text."""

# N boxes, H/W pixels of the original image, h/w pixels of the drawn image

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from segrl.geometry.masks import resize_mask

__all__ = [
    "GROUND",
    "INK",
    "LEGEND",
    "PALE",
    "PAPER",
    "PREDICTED",
    "Colour",
    "draw_legend",
    "draw_overlay",
    "drawn_size",
    "wrap_text",
]

Colour = tuple[int, int, int]
TARGET, PREDICTED, BOX = (40, 220, 90), (230, 40, 40), (255, 220, 0)
INK, PALE, PAPER, GROUND, FILL_ALPHA = (25, 25, 25), (95, 95, 95), (255, 255, 255), (20, 20, 20), 0.4
LEGEND = ((TARGET, "ground truth"), (PREDICTED, "prediction"), (BOX, "boxes"))
DRAWN_CHARACTERS = 1000  # of the start and of the end of a text; more never fits


def drawn_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Return (w, h) of an image whose longest edge is drawn with `side` pixels; each is at least 1.

    Example:
        >>> drawn_size(Image.new("L", (400, 100)), 200), drawn_size(Image.new("L", (1, 1000)), 200)
        ((200, 50), (1, 200))
    """
    scale = side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def draw_overlay(
    image: Image.Image,
    size: tuple[int, int],
    *,
    mask: np.ndarray | None = None,
    target: np.ndarray | None = None,
    boxes: np.ndarray | Sequence[Any] = (),
    pixels: tuple[int, int] | None = None,
    line: int = 1,
) -> Image.Image:
    """Draw an image with the predicted mask in translucent red, the ground truth outlined in green and boxes in yellow.

    Args:
        image: Any mode and size, the same view as the masks.
        size: (w, h) of the drawn image, pixels.
        mask: (H, W) bool predicted mask, or None for none.
        target: (H, W) bool ground truth mask, or None if it is not known.
        boxes: (N, 4) xyxy half-open, in original pixels.
        pixels: (W, H) of the original image, the frame of the boxes; by default that of `image`.
        line: Width of outlines and boxes, drawn pixels; they are drawn inside the mask or box.

    Returns:
        An RGB image of `size`. A box without area is drawn as a dot.

    Example:
        >>> drawn = draw_overlay(Image.new("L", (4, 4)), (8, 8), mask=np.eye(4, dtype=bool), boxes=[[2, 0, 4, 2]])
        >>> drawn.getpixel((0, 0)), drawn.getpixel((4, 0)), drawn.getpixel((0, 4))
        ((92, 16, 16), (255, 220, 0), (0, 0, 0))
    """
    w, h = size
    drawn = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    if mask is not None:
        inside = resize_mask(mask, (h, w))
        drawn[inside] = (1 - FILL_ALPHA) * drawn[inside] + FILL_ALPHA * np.array(PREDICTED)
    if target is not None:
        inside = resize_mask(target, (h, w))
        drawn[np.logical_xor(inside, ndimage.binary_erosion(inside, iterations=line))] = TARGET
    picture = Image.fromarray(drawn)
    draw = ImageDraw.Draw(picture)
    across, down = np.array(size) / (pixels or image.size)
    for x1, y1, x2, y2 in np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * (across, down, across, down):
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=BOX, width=line)
    return picture


def draw_legend(
    draw: ImageDraw.ImageDraw, x: float, y: float, font_size: int, entries: Sequence[tuple[Colour, str]] = LEGEND
) -> None:
    """Draw a legend of colours from left to right, beginning at (x, y)."""
    font = ImageFont.load_default(font_size)
    for colour, label in entries:
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=colour, outline=INK)
        draw.text((x + 14, y), label, fill=INK, font=font)
        x += 28 + font.getlength(label)


def wrap_text(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """Wrap a text into lines of ASCII, all other characters escaped; a longer text loses its middle.

    Args:
        text: Any text of a model or a data set.
        font: A PIL font.
        width: Largest width of a line, pixels.
        max_lines: Largest number of lines, at least 1.

    Example:
        >>> wrap_text("one two three four five", ImageFont.load_default(11), width=40, max_lines=2)
        ['one', '...']
    """
    if len(text) > 2 * DRAWN_CHARACTERS:
        text = f"{text[:DRAWN_CHARACTERS]} ... {text[-DRAWN_CHARACTERS:]}"
    text = text.encode("unicode_escape").decode("ascii")
    characters = width // 4
    lines = textwrap.wrap(text, characters)
    while characters > 1 and any(font.getlength(line) > width for line in lines):
        characters -= 1
        lines = textwrap.wrap(text, characters)
    if len(lines) <= max_lines:
        return lines
    return [*lines[: max_lines - 3], "...", *lines[-2:]] if max_lines > 3 else [*lines[: max_lines - 1], "..."]
