"""The picture of an answer about a volume, pixel by pixel where it counts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segrl.errors import DataError
from segrl.predictions import Prediction, Status, VolumeTarget
from segrl.reports import drawing, volume_picture
from segrl.reports import volume_pictures as module
from segrl.reports.volume_pictures import KEY, MARGIN, TILE

GREY, CUBE = 77, (1.0, 1.0, 1.0)
LESION = VolumeTarget.from_mask(np.pad(np.ones((3, 4, 4), dtype=np.uint8), ((3, 4), (8, 8), (4, 12))), name="scan_3")


def answer(index=None, boxes=(), mask=None, **texts) -> Prediction:
    fields = {"text": "said", "reasoning": "because", "answer": "so", "status": Status.VALID, **texts}
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Prediction(**fields, boxes=boxes, has_seg=False, mask=mask, slice_index=index)


def draw(folder, prediction, target=None, *, shape=(10, 20, 20), spacing_mm=CUBE, **settings) -> np.ndarray:
    """The picture of a uniform grey volume, (h, w, 3)."""
    volume = np.full(shape, GREY, dtype=np.uint8)
    path = volume_picture(volume, prediction, target, folder / "new" / "one.png", spacing_mm=spacing_mm, **settings)
    return np.array(Image.open(path).convert("RGB"))


def key_top(picture: np.ndarray) -> int:
    """The first row of the key slice: above it, its middle column is paper."""
    column = picture[:, MARGIN + KEY // 2].astype(int)
    dark = (np.abs(column - GREY).max(axis=1) == 0) | (column == drawing.GROUND).all(axis=1)
    return int(np.flatnonzero(dark)[0])


def key_slice(picture: np.ndarray) -> np.ndarray:
    """The square of the key slice with what is drawn over it."""
    top = key_top(picture)
    return picture[top : top + KEY, MARGIN : MARGIN + KEY]


def red_letters(picture: np.ndarray) -> int:
    """Number of pixels of red letters below the key slice."""
    below = picture[key_top(picture) + KEY :, : MARGIN + KEY].astype(int)
    return int(((below[:, :, 0] > 200) & (below[:, :, 1] < 120)).sum())


def box_of(picture: np.ndarray, colour: tuple[int, int, int]) -> list[int] | None:
    """x1, y1, x2, y2 around all pixels of a colour."""
    rows, columns = np.nonzero((picture == colour).all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((9.0, 1.0, 1.0), [0, 120, 480, 360]),  # 20 columns of 24 pixels, 10 rows of 24
        ((9.0, 2.0, 1.0), [0, 0, 480, 480]),  # rows are twice as high
        ((9.0, 4.0, 1.0), [120, 0, 360, 480]),
    ],
)
def test_a_slice_keeps_its_true_proportions(tmp_path, spacing_mm, expected):
    key = key_slice(draw(tmp_path, answer(0), shape=(1, 10, 20), spacing_mm=spacing_mm))
    assert box_of(key, (GREY, GREY, GREY)) == expected
    assert box_of(key, drawing.BOX) is None


def test_key_slice_has_boxes_mask_and_truth(tmp_path):
    mask = np.zeros((10, 20, 20), dtype=bool)
    mask[4, 8:14, 6:12] = True
    mask[5] = True
    key = key_slice(draw(tmp_path, answer(4, [[5, 15, 10, 18]], mask), LESION, neighbours=0))
    step = KEY // 20
    assert box_of(key, drawing.BOX) == [5 * step, 15 * step, 10 * step, 18 * step]
    assert box_of(key, drawing.TARGET) == [4 * step, 8 * step, 8 * step, 12 * step]
    red = np.abs(key.astype(int) - (138, 62, 62)).max(axis=2) <= 1  # 0.6 * 77 + 0.4 * (230, 40, 40)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (6 * step, 8 * step, 12 * step, 14 * step)


def test_boxes_stretch_with_the_spacing(tmp_path):
    key = key_slice(draw(tmp_path, answer(0, [[2, 1, 4, 3]]), shape=(1, 10, 20), spacing_mm=(1.0, 2.0, 1.0)))
    assert box_of(key, drawing.BOX) == [48, 48, 96, 144]


@pytest.mark.parametrize("index", [None, -1, 10])
def test_without_a_slice_that_is_there_the_boxes_are_not_drawn(tmp_path, index):
    picture = draw(tmp_path, answer(index, [[5, 15, 10, 18]]), LESION)
    key = key_slice(picture)
    assert box_of(key, drawing.BOX) is None
    assert box_of(key, drawing.TARGET) == [96, 192, 192, 288]
    assert red_letters(picture) > 20  # the caption warns
    assert red_letters(draw(tmp_path, answer(4), LESION)) == 0
    assert red_letters(draw(tmp_path, answer(4, status=Status.NO_ANSWER), LESION)) > 20


def test_the_slice_that_stands_in_for_the_key_slice():
    mask, truth = np.zeros((9, 4, 4), dtype=bool), np.zeros((9, 4, 4), dtype=bool)
    volume = np.zeros((9, 4, 4), dtype=np.uint8)

    def chosen(mask, truth, index):
        return module._key_slice(module._Scan(volume, mask, truth, (1.0, 1.0)), answer(index))

    assert chosen(mask, truth, 7) == (7, "key slice 7 of 0-8")
    assert chosen(mask, truth, None) == (4, "no slice named: here 4 of 0-8")
    mask[2] = True
    assert chosen(mask, None, -1) == (2, "named a slice that was not shown: here 2 of 0-8, most mask")
    truth[6:8, 0], truth[6, 1] = True, True
    assert chosen(mask, truth, None) == (6, "no slice named: here 6 of 0-8, most ground truth")
    assert module._offset(-5, 11, 6.5) == "slice 11  (-5, -32.5 mm)"


@given(st.sets(st.integers(0, 30)), st.integers(0, 30), st.integers(0, 5))
def test_neighbours_are_spread_over_both_sides(candidates, key, most):
    candidates = sorted(candidates - {key})
    chosen = module._spread(candidates, key, most)
    assert chosen == sorted(set(chosen) & set(candidates))
    assert len(chosen) == min(len(candidates), 2 * most)
    for side in ([n for n in candidates if n < key][::-1], [n for n in candidates if n > key]):
        places = [side.index(n) + 1 for n in chosen if n in side]
        if most and side:
            assert len(side) in places  # the farthest
            steps = np.diff([0, *sorted(places)])
            assert steps.max() - steps.min() <= 1


def test_neighbours_in_the_middle_and_at_an_end():
    assert module._spread(range(30), 10, 2) == [0, 5, 19, 29]
    assert module._spread([0, 1, 2, 3, 4, 5], 0, 2) == [1, 2, 3, 5]
    assert module._spread([4], 4, 2) == []


@given(
    st.tuples(*[st.integers(1, 40)] * 2).flatmap(
        lambda size: st.tuples(st.just(size), *[st.integers(0, edge - 1) for edge in size * 2])
    ),
    st.tuples(*[st.floats(0.2, 5)] * 2),
)
def test_what_is_enlarged_lies_inside_and_holds_all_marks(case, spacing):
    (height, width), *places = case
    mask = np.zeros((1, height, width), dtype=bool)
    mask[0, [places[0], places[2]], [places[1], places[3]]] = True
    rows, columns = module._view(module._Scan(mask.astype(np.uint8), mask, None, spacing), [0], np.zeros((0, 4)))
    assert mask[0][rows, columns].sum() == mask.sum()
    assert 0 <= rows.start < rows.stop <= height
    assert 0 <= columns.start < columns.stop <= width
    down, across = (rows.stop - rows.start) * spacing[0], (columns.stop - columns.start) * spacing[1]
    if rows.stop - rows.start < height and columns.stop - columns.start < width:
        assert abs(down - across) <= max(spacing)


def test_neighbours_show_the_mask_enlarged_around_what_is_marked(tmp_path):
    mask = np.zeros((10, 20, 20), dtype=bool)
    mask[2:7, 8:12, 4:8] = True
    picture = draw(tmp_path, answer(4, mask=mask), LESION, reach=2)
    assert picture.shape[1] == 2 * MARGIN + KEY + 2 * (module.GAP + TILE)
    key = key_slice(picture)
    step = KEY // 20
    assert box_of(key, module.ENLARGED) == [2 * step, 6 * step, 10 * step, 14 * step]  # twice the lesion
    for left in (MARGIN + KEY + module.GAP, MARGIN + KEY + 2 * module.GAP + TILE):
        column = (picture[:, left + TILE // 2 - 20 : left + TILE // 2 + 20] == drawing.TARGET).all(axis=2).any(axis=1)
        assert column.any()  # slices 3 and 5 have truth, 2 and 6 only the mask
    tinted = (np.abs(picture.astype(int) - (138, 62, 62)).max(axis=2) <= 1)[:, MARGIN + KEY :]
    assert tinted.sum() > 4 * (0.45 * TILE) ** 2  # half the edge of each of four tiles


def test_only_slices_with_a_mask_within_reach_are_neighbours(tmp_path):
    widths = {
        reach: draw(tmp_path, answer(0), LESION, reach=reach).shape[1] - 2 * MARGIN for reach in (None, 4, 3, 2, 0)
    }
    columns = {reach: (width - KEY) // (module.GAP + TILE) for reach, width in widths.items()}
    assert columns == {None: 2, 4: 1, 3: 1, 2: 0, 0: 0}  # the truth is on slices 3, 4 and 5: two rows


def test_a_truth_that_is_not_known_is_not_named(tmp_path):
    mask = np.zeros((1, 20, 20), dtype=bool)
    mask[0, 3:9, 3:9] = True
    assert box_of(draw(tmp_path, answer(0, mask=mask), shape=(1, 20, 20)), drawing.TARGET) is None
    truth = VolumeTarget.from_mask(mask)
    assert box_of(draw(tmp_path, answer(0), truth, shape=(1, 20, 20)), drawing.TARGET) is not None


SIDES = ("R", "L", "A", "P")


def test_the_sides_of_the_patient_are_at_the_edges_of_the_key_slice(tmp_path):
    plain, lettered = (key_slice(draw(tmp_path, answer(4), LESION, edges=edges)) for edges in (None, SIDES))
    changed = (plain != lettered).any(axis=2)
    middle, near = slice(KEY // 2 - 20, KEY // 2 + 20), 40
    parts = (changed[middle, :near], changed[middle, -near:], changed[:near, middle], changed[-near:, middle])
    assert all(part.any() for part in parts)
    assert changed.sum() == sum(part.sum() for part in parts)  # and nothing else
    swapped = key_slice(draw(tmp_path, answer(4), LESION, edges=("L", "R", "A", "P")))
    differs = (swapped != lettered).any(axis=2)
    assert differs[middle, :near].any()
    assert differs[middle, -near:].any()
    assert not differs[:near, middle].any()


def test_what_is_known_is_said_and_what_is_not_is_not_claimed(tmp_path):
    known = module._known((5.0, 0.78125, 1), SIDES, "window:-160:240")
    assert known == "grey values: window:-160:240   voxel: 5 x 0.781 x 1 mm (z, y, x)   orientation: from the file"
    assert module._known(None, None, "") == "grey values: as given   voxel: unknown   orientation: unknown"
    assert module._offset(-5, 11, None) == "slice 11  (-5)"
    unknown = draw(tmp_path, answer(0), shape=(1, 10, 20), spacing_mm=None)
    assert box_of(key_slice(unknown), (GREY, GREY, GREY)) == [0, 120, 480, 360]  # square pixels
    one, other = (draw(tmp_path, answer(4), LESION, **{"name": name}) for name in ("", "another scan.nii.gz"))
    top = slice(MARGIN, MARGIN + module.TITLE)
    assert (one[top] != other[top]).any()  # the title is the name of the scan
    assert (one[MARGIN + module.TITLE + module.LEADING :] == other[MARGIN + module.TITLE + module.LEADING :]).all()


def test_query_and_texts_make_the_picture_longer(tmp_path):
    height = draw(tmp_path, answer(4), LESION).shape[0]
    assert draw(tmp_path, answer(4), LESION, query="Where?").shape[0] == height + module.TEXT + module.LEADING
    long = draw(tmp_path, answer(4, reasoning="word " * 120), LESION).shape[0]
    assert long > height + module.TEXT
    raw = answer(4, reasoning=None, answer=None, text="word " * 120, status=Status.NO_ANSWER)
    assert draw(tmp_path, raw, LESION).shape[0] < long  # one heading instead of two


def test_hostile_texts_are_drawn_in_bounded_space(tmp_path):
    hostile = "\x1b[31m</think>\x00\ud800é漢 {0}%s\n" * 40_000
    target = VolumeTarget.from_mask(LESION.mask, name="\u202e" * 500, query="x" * 10**6)
    picture = draw(tmp_path, answer(4, reasoning=hostile, answer="]" * 10**6), target)
    raw = draw(tmp_path, answer(4, reasoning=None, answer=None, text=hostile), target)
    lines = module.QUERY_LINES + module.REASONING_LINES + module.ANSWER_LINES
    assert max(picture.shape[0], raw.shape[0]) < KEY + 250 + lines * (module.TEXT + module.LEADING)


def test_errors_name_the_scan_and_write_nothing(tmp_path):
    path, volume = tmp_path / "one.png", np.zeros((10, 20, 20), dtype=np.uint8)

    def refused(match: str, volume: Any = volume, prediction=None, target: Any = LESION, spacing_mm=CUBE, **more):
        with pytest.raises(DataError, match=match):
            volume_picture(volume, prediction or answer(4), target, path, spacing_mm=spacing_mm, **more)

    refused(r"scan_3: expected grey values, uint8 of shape \(D, H, W\), got float32", volume.astype(np.float32))
    refused(r"volume: expected grey values.* got uint8 \(20, 20\)", volume[0], target=None)
    refused("volume: expected grey values.* got list", [[[1]]], target=None)
    refused(r"scan_3: the true mask has shape \(10, 20, 20\), the volume \(9, 20, 20\)", volume[1:])
    refused(r"scan_3: the predicted mask has shape \(1, 20, 20\)", prediction=answer(4, mask=LESION.mask[:1]))
    for spacing in ((1.0, 1.0), (1.0, 0.0, 1.0), (1.0, float("nan"), 1.0)):
        refused("scan_3: spacing_mm=.* three positive millimetres", spacing_mm=spacing)
    refused(r"scan_3: edges=\('R', 'L'\); expected four texts", edges=("R", "L"))
    refused("neighbours=-1, reach=None; expected 0 or more", neighbours=-1)
    refused("neighbours=2, reach=-1; expected 0 or more", reach=-1)
    assert not path.exists()
