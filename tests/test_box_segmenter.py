"""The cascade on images: a frozen segmenter turns the boxes that answers name into masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_headed_model, tiny_model, tiny_rows, tiny_segmenter
from datasets import Dataset
from PIL import Image
from torch import nn

from segrl import SegGRPOConfig, SegGRPOTrainer, make_reward
from segrl.errors import SegRLError
from segrl.evaluation import evaluate
from segrl.heads.decoding import masks_at
from segrl.inference import ReasoningSegmenter, load
from segrl.predictions import Frame, ImagePromptSettings, VolumePromptSettings, parse_completion
from segrl.segmenters import BoxSegmenter, ImageFeatures
from segrl.tasks import ImageTask, make_task


class Filled(nn.Module):
    """A segmenter of somebody's own whose mask of a box is the box, where the image is not black."""

    image_size = mask_size = 64
    prompt_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Parameter(torch.zeros(1))

    def preprocess(self, image: Any) -> torch.Tensor:
        shown = image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(shown)).permute(2, 0, 1).float()

    def encode(self, images: torch.Tensor) -> ImageFeatures:
        return ImageFeatures((images.amax(1),))

    def decode(self, features: ImageFeatures, prompts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def decode_boxes(self, features: ImageFeatures, boxes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        middle = (torch.arange(64) + 0.5) / 64
        x1, y1, x2, y2 = boxes.T[:, :, None, None]
        inside = (middle > x1) & (middle < x2) & (middle[:, None] > y1) & (middle[:, None] < y2)
        return torch.where(inside & (features.tensors[0][index] > 0), 9.0, -9.0)

    def freeze(self, *, encoder: bool) -> None:
        self.requires_grad_(True)


def picture(size: tuple[int, int] = (60, 40), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def alone(segmenter: Any, image: Image.Image, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The mask of one box by the segmenter itself."""
    width, height = size[1], size[0]
    with torch.no_grad():
        features = segmenter.encode(segmenter.preprocess(image)[None])
        fraction = (torch.tensor([box]) / torch.tensor([width, height, width, height])).float()
        return masks_at(segmenter.decode_boxes(features, fraction, torch.tensor([0])), [size])[0]


def test_a_mask_is_the_union_of_the_boxes_on_the_image_that_was_asked_about():
    """Images of 64 x 64, so that every cell of a mask is a pixel."""
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    half = white.copy()
    half.paste((0, 0, 0), (0, 0, 64, 32))
    segmenter = Filled()
    boxes = BoxSegmenter(segmenter)
    pixels = [segmenter.preprocess(white), segmenter.preprocess(half)]
    named = [[[4, 8, 20, 40], [30, 0, 64, 10]], [[4, 8, 20, 40]], [[0, 0, 64, 64]], [[30, 30, 31, 31]]]
    order = [0, 1, 1, 0]
    masks = boxes([pixels[n] for n in order], [np.array(found) for found in named], [(64, 64)] * 4)
    for mask, found, image in zip(masks, named, order, strict=True):
        expected = np.zeros((64, 64), dtype=bool)
        for x1, y1, x2, y2 in found:
            expected[y1:y2, x1:x2] = True
        expected[:32] &= image == 0
        assert np.array_equal(mask, expected)
    assert boxes.encoded_images == 2


class Pointed(Filled):
    """Its mask of an object is the box, or else the image, with a hole of 4 x 4 px around each point."""

    def decode_boxes(self, features: Any, boxes: Any, index: Any, points: Any = None) -> torch.Tensor:  # type: ignore[override]
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(index), -1)
        masks = super().decode_boxes(features, whole if boxes is None else boxes, index)
        for mask, places in zip(masks, [] if points is None else points, strict=points is not None):
            for x, y in (places * 64).int().tolist():
                mask[y - 2 : y + 2, x - 2 : x + 2] = -9
        return masks


def holes(box: Sequence[int], *points: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((64, 64), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    for x, y in points:
        mask[y - 2 : y + 2, x - 2 : x + 2] = False
    return mask


@pytest.mark.parametrize(
    ("boxes", "points", "expected"),
    [
        ([[0, 0, 20, 20], [30, 30, 60, 60]], [[10, 10], [40, 40]],
         holes([0, 0, 20, 20], (10, 10)) | holes([30, 30, 60, 60], (40, 40))),
        ([[0, 0, 20, 20]], [[5, 5], [12, 12]], holes([0, 0, 20, 20], (5, 5), (12, 12))),  # Seg-Zero: two of one box
        ([[0, 0, 20, 20], [30, 30, 60, 60]], [[10, 10]], holes([0, 0, 20, 20]) | holes([30, 30, 60, 60])),
        ([[0, 0, 20, 20], [9, 9, 9, 30]], [[10, 10], [9, 20]], holes([0, 0, 20, 20], (10, 10))),  # no area
        ([], [[10, 10], [40, 40]], holes([0, 0, 64, 64])),  # two objects, each with a hole where the other is not
        ([], [[10, 10]], holes([0, 0, 64, 64], (10, 10))),
        ([], [], np.zeros((64, 64), dtype=bool)),
    ],
    ids=["one each", "two of one box", "not for each", "a box without area", "points alone", "one point", "nothing"],
)  # fmt: skip
def test_points_prompt_too(boxes, points, expected):
    segmenter = Pointed()
    pixels = segmenter.preprocess(Image.new("RGB", (64, 64), (255, 255, 255)))
    arrays = [np.array(boxes, dtype=float).reshape(-1, 4)], [(64, 64)], [np.array(points, dtype=float).reshape(-1, 2)]
    (mask,) = BoxSegmenter(segmenter, points=True)([pixels], arrays[0], arrays[1], arrays[2])
    assert np.array_equal(mask, expected)
    (without,) = BoxSegmenter(segmenter)([pixels], arrays[0], arrays[1], arrays[2])
    assert np.array_equal(without, np.any([holes(box) for box in boxes] or [np.zeros((64, 64))], axis=0))


def test_a_segmenter_that_takes_no_points():
    with pytest.raises(SegRLError, match="decode_boxes takes no points"):
        BoxSegmenter(Filled(), points=True)


def test_sam2_alone_gives_the_same_masks():
    segmenter, (one, other) = tiny_segmenter().eval(), (picture(), picture(seed=1))
    boxes = BoxSegmenter(segmenter)
    pixels = [segmenter.preprocess(image) for image in (one, other)]
    named = [[[5, 5, 30, 20], [20, 10, 60, 40]], [[0, 0, 60, 40]], [[40, 20, 55, 35]]]
    masks = boxes([pixels[0], pixels[1], pixels[0]], [np.array(box) for box in named], [(40, 60)] * 3)
    for mask, image, given in zip(masks, (one, other, one), named, strict=True):
        expected = np.any([alone(segmenter, image, box, (40, 60)) for box in given], axis=0)
        assert mask.dtype == bool
        assert (mask == expected).mean() > 0.999  # in one batch sums are rounded in another order
    assert boxes.encoded_images == 2
    assert not any(parameter.requires_grad for parameter in segmenter.parameters())


def test_many_boxes_and_images_of_many_sizes_are_not_mixed_up():
    segmenter = tiny_segmenter().eval()
    rng = np.random.default_rng(0)
    images = [picture((int(w), int(h)), seed=n) for n, (w, h) in enumerate(rng.integers(20, 90, (5, 2)))]
    pixels = [segmenter.preprocess(image) for image in images]
    picked = rng.integers(5, size=40)
    named, sizes = [], []
    for n in picked:
        width, height = images[n].size
        corners = np.sort(rng.random((int(rng.integers(0, 6)), 2, 2)), axis=1).reshape(-1, 4)
        named.append(corners * [width, height, width, height])
        sizes.append((height, width))
    masks = BoxSegmenter(segmenter)([pixels[n] for n in picked], named, sizes)
    for n, boxes, size, mask in zip(picked, named, sizes, masks, strict=True):
        assert mask.shape == size
        each = [alone(segmenter, images[n], box.tolist(), size) for box in boxes]
        expected = np.any(each, axis=0) if each else np.zeros(size, dtype=bool)
        assert (mask == expected).mean() > 0.999


@pytest.mark.parametrize("box", [[10, 10, 10, 20], [70, 0, 80, 20], [-9, -9, -1, -1], [30, 20, 10, 5]])
def test_boxes_without_an_area_in_the_image_give_nothing(box):
    boxes = BoxSegmenter(Filled())
    (mask,) = boxes([torch.zeros(3, 64, 64)], [np.array([box])], [(40, 60)])
    assert mask.shape == (40, 60)
    assert not mask.any()
    assert boxes.encoded_images == 0
    assert boxes([], [], []) == []


def test_a_box_is_cut_off_at_the_edges_of_the_image():
    boxes, pixels = BoxSegmenter(Filled()), [torch.randn(3, 64, 64)] * 2
    pixels = [pixels[0].abs()] * 2
    one, other = boxes(pixels, [np.array([[-50, 10, 30, 99]]), np.array([[0, 10, 30, 40]])], [(40, 60)] * 2)
    assert np.array_equal(one, other)
    assert one.any()


def answer(boxes: str) -> str:
    return f"<think>a</think><answer>The cyst is located at {boxes}.<seg></answer>"


def test_answers_get_masks_and_those_without_boxes_an_empty_one():
    task = ImageTask(None, ImagePromptSettings(frame_kind="original_px"), box_segmenter=BoxSegmenter(Filled()))
    image = Image.new("RGB", (60, 40), (255, 255, 255))
    (row,) = task.read([{"image": image, "mask": np.eye(40, 60, dtype=bool), "name": "a"}])
    frame = Frame("original_px", (60, 40))
    texts = [answer("[5, 5, 30, 20]"), "<answer>No cyst is visible.<seg></answer>", "nonsense"]
    said = [parse_completion(text, frame) for text in texts]
    found: list[Any] = task.add_masks(said, [row] * 3, None, task.seg_inputs([row] * 3))
    assert [prediction.mask.shape for prediction in found] == [(40, 60)] * 3
    assert [bool(prediction.mask.any()) for prediction in found] == [True, False, False]
    assert [prediction.status for prediction in found] == [prediction.status for prediction in said]
    assert task.log() == {"encoded_images": 1.0}
    assert task.log() == {"encoded_images": 0.0}
    assert (task.makes_masks, task.needed) == (True, ("image", "mask"))


def test_one_way_to_a_mask():
    model, processor = tiny_headed_model()
    boxes = BoxSegmenter(tiny_segmenter())
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 2}
    with pytest.raises(SegRLError, match="box_segmenter: the model has a mask head, which makes the masks; drop one"):
        SegGRPOTrainer(
            model,
            ["format"],
            SegGRPOConfig("run", **settings),
            train_dataset=tiny_rows(2, processor, completions=False),
            processing_class=processor,
            box_segmenter=boxes,
        )
    with pytest.raises(SegRLError, match=r"box_segmenter is for images; pass propagator=VolumePropagator\(segmenter\)"):
        make_task(None, VolumePromptSettings(), box_segmenter=boxes)
    with pytest.raises(SegRLError, match=r"segmenter=Linear: not a segrl\.segmenters\.Segmenter"):
        BoxSegmenter(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_training_by_rewards_on_masks_of_written_boxes(tmp_path):
    """Two steps of GRPO without a head: every answer is scored by its mask, and the segmenter stays as it was."""
    model, processor = tiny_model()
    segmenter = Filled()
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    seen: list[Any] = []

    def watch(prediction: Any, target: Any) -> float:
        seen.append(prediction)
        return float(len(prediction.text) % 7)

    trainer = SegGRPOTrainer(
        model,
        [watch, make_reward("dual_granularity_mask")],
        SegGRPOConfig(
            str(tmp_path / "run"),
            **{"use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 2, "max_steps": 2},
            **{"per_device_train_batch_size": 4, "max_completion_length": 8, "logging_steps": 1, "disable_tqdm": True},
        ),
        train_dataset=tiny_rows(4, processor, completions=False),
        processing_class=processor,
        box_segmenter=BoxSegmenter(segmenter),
    )
    trainer.train()
    assert len(seen) == 8
    assert all(prediction.mask is not None for prediction in seen)
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [set(entry) >= {"rollout/dice", "rollout/encoded_images"} for entry in steps] == [True, True], steps
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_inference_evaluation_and_a_saved_run(tmp_path):
    model, processor = tiny_model()
    settings = ImagePromptSettings(instruction="", max_new_tokens=4, frame_kind="original_px")
    segmenter: Any = ReasoningSegmenter(model, processor, settings, tiny_segmenter())
    rows: Dataset = tiny_rows(2, processor)
    records = evaluate(segmenter, rows, progress=False)
    assert all(record["fail"] for record in records)  # four random tokens name no box
    image = picture()
    assert segmenter.predict(image, "Where is the cyst?").mask.shape == (40, 60)
    segmenter.save_pretrained(tmp_path / "run")
    again = load(tmp_path / "run", device="cpu")
    assert again.segmenter is not None
    for name, value in segmenter.segmenter.state_dict().items():
        assert torch.equal(again.segmenter.state_dict()[name], value)
    assert ReasoningSegmenter(model, processor, settings).predict(image, "Where?").mask is None
    headed, other = tiny_headed_model()
    assert ReasoningSegmenter(headed, other, settings, tiny_segmenter()).task.box_segmenter is None
