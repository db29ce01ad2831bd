import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from segrl.errors import DataError, FrameError
from segrl.predictions import NOT_SHOWN, Frame, frame_for, parse_completion

EDGE = st.integers(1, 3000)
KINDS = ["original_px", "resized_px", "relative_1000"]


def processor(cls, video_cls: type = Qwen2VLVideoProcessor, **images):
    return cls(Qwen2VLImageProcessor(**images), Qwen2Tokenizer(), video_cls())


@st.composite
def frames(draw):
    return Frame(draw(st.sampled_from(KINDS)), (draw(EDGE), draw(EDGE)), (draw(EDGE), draw(EDGE)))


@st.composite
def frames_with_boxes(draw):
    frame = draw(frames())
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x1, y1 = (draw(st.integers(0, edge - 1)) for edge in frame.original_size)
        x2, y2 = draw(st.integers(x1 + 1, frame.original_size[0])), draw(st.integers(y1 + 1, frame.original_size[1]))
        boxes.append([x1, y1, x2, y2])
    return frame, np.array(boxes, dtype=np.float64).reshape(-1, 4)


def test_known_values():
    box = [[10, 20, 50, 100]]
    assert Frame("original_px", (100, 200)).to_original(box).tolist() == box
    assert Frame("relative_1000", (100, 200)).from_original(box).tolist() == [[100, 100, 500, 500]]
    assert Frame("resized_px", (100, 200), (25, 50)).from_original(box, rounding=False).tolist() == [[2.5, 5, 12.5, 25]]
    assert Frame("resized_px", (100, 200), (50, 400)).to_original([[5, 40, 25, 200]]).tolist() == box


@given(frames_with_boxes())
def test_exact_conversion_round_trips(case):
    frame, boxes = case
    assert np.allclose(frame.to_original(frame.from_original(boxes, rounding=False)), boxes)


@given(frames_with_boxes())
def test_rounded_boxes_are_integers_inside_the_frame_that_keep_an_area(case):
    frame, boxes = case
    written = frame.from_original(boxes)
    assert written.dtype == np.int64
    assert written.shape == boxes.shape
    assert (written >= 0).all()
    assert (written <= [*frame.size, *frame.size]).all()
    assert (written[:, 2:] > written[:, :2]).all()
    assert (np.abs(written - frame.from_original(boxes, rounding=False)) <= 1).all()


def test_no_boxes():
    frame = Frame("relative_1000", (9, 9))
    assert frame.to_original([]).shape == (0, 4)
    assert frame.from_original([]).shape == (0, 4)


def test_one_pixel_of_a_huge_image_survives_rounding():
    frame = Frame("relative_1000", (4000, 4000))
    assert frame.from_original([[3999, 0, 4000, 1]]).tolist() == [[999, 0, 1000, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pixels", (4, 4)), r"frame kind 'pixels'; expected one of original_px, resized_px, relative_1000"),
        (("resized_px", (4, 4)), r"needs resized_size=\(width, height\)"),
        (("original_px", (0, 4)), r"original_size=\(0, 4\); expected \(width, height\) as two positive integers"),
        (("original_px", (4, 4, 3)), r"original_size=\(4, 4, 3\)"),
        (("original_px", (4.5, 4)), r"original_size=\(4\.5, 4\)"),
        (("original_px", None), r"original_size=None"),
        (("resized_px", (4, 4), (4, -1)), r"resized_size=\(4, -1\)"),
    ],
)
def test_bad_frames_are_refused(arguments, message):
    with pytest.raises(FrameError, match=message):
        Frame(*arguments)


def test_bad_boxes_are_refused():
    with pytest.raises(DataError, match=r"boxes\[0\]"):
        Frame("original_px", (4, 4)).to_original([[2, 0, 1, 1]])


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 10_000), st.integers(10_000, 400_000))
@settings(max_examples=30)
def test_the_size_is_that_of_smart_resize(height, width, min_pixels, max_pixels):
    qwen = processor(Qwen2_5_VLProcessor, min_pixels=min_pixels, max_pixels=max_pixels)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(FrameError, match="Qwen2VLImageProcessor refuses it: absolute aspect ratio"):
            frame_for(qwen, (width, height))
        return
    expected = smart_resize(height, width, 28, min_pixels, max_pixels)
    assert frame_for(qwen, (width, height)).resized_size == expected[::-1]


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("size", [(100, 75), (640, 480), (30, 500)])
def test_qwen2_5_frame_is_the_grid_that_the_processor_makes(patch_size, size):
    images = {"patch_size": patch_size, "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}}
    qwen = processor(Qwen2_5_VLProcessor, **images)
    grid = qwen.image_processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0].tolist()
    frame = frame_for(qwen, size, original_size=(1000, 800))
    assert frame == Frame("resized_px", (1000, 800), (grid[2] * patch_size, grid[1] * patch_size))


LATE = {  # ways in which users bound the area after the processor is made
    "max_pixels": lambda images: setattr(images, "max_pixels", 200_000),
    "size": lambda images: setattr(images.size, "longest_edge", 200_000),
    "a new size": lambda images: setattr(images, "size", {"shortest_edge": 56 * 56, "longest_edge": 200_000}),
}


def test_tensors_that_a_processor_keeps_are_not_printed(monkeypatch):
    """transformers keeps the fused mean and deviation in the processor; printing them took a tenth of a GRPO step."""
    qwen = processor(Qwen2_5_VLProcessor)
    expected = frame_for(qwen, (640, 480))
    qwen.image_processor(images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    qwen.image_processor._kept = torch.zeros(3)
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda self: pytest.fail("printed"))
    assert frame_for(qwen, (640, 480)) == expected


@pytest.mark.parametrize("change", LATE)
@pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")
def test_settings_that_are_changed_later_count_if_the_processor_obeys_them(change):
    """The model saw 504 x 364, the boxes were written for 812 x 588."""
    qwen = processor(Qwen2_5_VLProcessor)
    assert frame_for(qwen, (800, 600)).resized_size == (812, 588)
    LATE[change](qwen.image_processor)
    image = Image.new("RGB", (800, 600))
    _, rows, columns = qwen.image_processor(image, return_tensors="pt")["image_grid_thw"][0].tolist()
    assert (columns * 14, rows * 14) == (504, 364)
    frame = frame_for(qwen, (800, 600))
    assert frame.resized_size == (504, 364)
    assert frame.from_original([[200, 150, 400, 300]]).tolist() == [[126, 91, 252, 182]]


def test_other_models_write_thousandths():
    for model in (processor(Qwen2VLProcessor), processor(Qwen3VLProcessor, Qwen3VLVideoProcessor), Qwen2Tokenizer()):
        assert frame_for(model, (640, 480)) == Frame("relative_1000", (640, 480))


def test_a_subclass_of_a_processor_keeps_its_frame_and_kind_overrides():
    class Custom(Qwen2_5_VLProcessor):
        pass

    custom = processor(Custom)
    assert frame_for(custom, (56, 56)).kind == "resized_px"
    assert frame_for(custom, (56, 56), kind="original_px") == Frame("original_px", (56, 56))


def test_an_image_processor_that_does_not_resize():
    frame = frame_for(processor(Qwen2_5_VLProcessor, do_resize=False), (50, 40), (100, 80))
    assert frame == Frame("resized_px", (100, 80), (50, 40))


def test_frame_for_says_what_it_cannot_know():
    with pytest.raises(FrameError, match=r"Qwen2Tokenizer has no patch_size and makes no patches.*kind='original_px'"):
        frame_for(Qwen2Tokenizer(), (50, 40), kind="resized_px")
    with pytest.raises(FrameError, match=r"frame kind 'px'"):
        frame_for(None, (50, 40), kind="px")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FrameError, match=r"image_size=\(50, 0\)"):
        frame_for(None, (50, 0))


class TestSlices:
    def test_a_position_is_the_number_minus_one(self):
        frame = Frame("original_px", (8, 8), slices=(0, 3, 7))
        assert [frame.original_slice(position) for position in (-1, 0, 1, 2, 3)] == [NOT_SHOWN, 0, 3, 7, NOT_SHOWN]

    def test_without_slices_a_position_is_the_index(self):
        assert Frame("original_px", (8, 8)).original_slice(12) == 12

    def test_the_parser_gives_the_index_in_the_volume(self):
        frame = Frame("relative_1000", (8, 8), slices=(0, 3, 7))
        for number, index in ((1, 0), (3, 7), (4, NOT_SHOWN)):
            text = f'<think>.</think><answer>{{"slice": {number}, "bbox_2d_list": []}}</answer>'
            read = parse_completion(text, frame, require_seg=False, answer_format="json")
            assert (read.slice_index, read.valid) == (index, True)

    @given(st.lists(st.integers(0, 500), min_size=1, unique=True).map(sorted))
    def test_every_shown_slice_has_one_number(self, slices):
        frame = Frame("original_px", (8, 8), slices=tuple(slices))
        assert [frame.original_slice(position) for position in range(len(slices))] == slices

    @pytest.mark.parametrize("slices", [(), (1, 1), (2, 1), (-1, 0), (0.5,), "ab", 3])
    def test_anything_else_is_refused(self, slices):
        with pytest.raises(FrameError, match=r"slices=.*expected increasing indices of slices"):
            Frame("original_px", (8, 8), slices=slices)
