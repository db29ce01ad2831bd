"""What pictures share: overlays and wrapped text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from segrl.reports import drawing

GREY = Image.new("L", (12, 8), 100)
FONT = ImageFont.load_default(11)


def coloured(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.array(picture) == colour).all(axis=2)


def square() -> np.ndarray:
    mask = np.zeros((8, 12), dtype=bool)
    mask[2:6, 3:9] = True
    return mask


def test_nothing_is_drawn_over_an_image_without_masks_and_boxes():
    picture = np.array(drawing.draw_overlay(GREY, (24, 32)))
    assert picture.shape == (32, 24, 3)
    assert (picture == 100).all()


@pytest.mark.parametrize("line", [1, 2])
def test_lines_lie_inside_of_what_they_surround(line):
    expected = np.zeros((32, 24), dtype=bool)
    expected[8:24, 6:18] = True  # 4 drawn pixels to a row, 2 to a column
    expected[8 + line : 24 - line, 6 + line : 18 - line] = False
    outlined = drawing.draw_overlay(GREY, (24, 32), target=square(), line=line)
    assert np.array_equal(coloured(outlined, drawing.TARGET), expected)
    framed = drawing.draw_overlay(GREY, (24, 32), boxes=[[3, 2, 9, 6]], line=line)
    assert np.array_equal(coloured(framed, drawing.BOX), expected)


def test_a_mask_is_translucent_and_boxes_are_in_original_pixels():
    picture = np.array(drawing.draw_overlay(GREY, (12, 8), mask=square(), boxes=[[0, 0, 20, 20]], pixels=(120, 80)))
    assert np.abs(picture[3, 4].astype(int) - (152, 76, 76)).max() <= 1  # 0.6 * 100 + 0.4 * (230, 40, 40)
    assert (picture[7, 11] == 100).all()
    framed = np.argwhere(coloured(Image.fromarray(picture), drawing.BOX))
    assert framed.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]  # a tenth of 20 pixels


@given(st.text(), st.integers(1, 9), st.integers(64, 400))
def test_wrapped_text_is_plain_ascii_that_fits(text, most, width):
    font = ImageFont.load_default(11)
    lines = drawing.wrap_text(text, font, width, most)
    assert len(lines) <= most
    assert all(line.isascii() and line.isprintable() and font.getlength(line) <= width for line in lines)


def test_wrapped_text_keeps_both_ends():
    font = ImageFont.load_default(11)
    lines = drawing.wrap_text("start " + "word " * 10_000 + "[1, 2, 3, 4].", font, 192, 6)
    assert lines[0].startswith("start")
    assert lines[3] == "..."
    assert lines[-1].endswith("[1, 2, 3, 4].")
    assert drawing.wrap_text("", font, 192, 6) == []
    assert drawing.wrap_text("a\nb é", font, 192, 6) == [r"a\nb \xe9"]
