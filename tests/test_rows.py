"""Rows to targets, frames and segmenter inputs; equal content is read and encoded once."""

from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_rows, tiny_segmenter
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image

from segrl.caching import FeatureCache
from segrl.errors import DataError, UnknownNameError
from segrl.heads import MaskHead
from segrl.heads.mask_head import SegInput
from segrl.heads.probes import SegTokenProbe
from segrl.predictions import ImagePromptSettings
from segrl.tasks import ImageTask, check_columns


def picture(seed=0, size=(40, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask_of(box, size=(40, 30), value=255):
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return Image.fromarray(mask)


def row(seed=0, box=(4, 6, 12, 16), **changes):
    return {"image": picture(seed), "mask": mask_of(box), "query": "Where?", "name": f"row {seed}", **changes}


def reader(processor, segmenter=None, frame_kind: Any = None) -> Any:
    head = None if segmenter is None else MaskHead(SegTokenProbe(5), torch.nn.Linear(4, 4), segmenter)
    return ImageTask(processor, ImagePromptSettings(frame_kind=frame_kind), head).read


@pytest.fixture(scope="module")
def segmenter():
    return tiny_segmenter()


class TestRead:
    def test_target_frame_and_input(self, segmenter):
        _, processor = tiny_model()
        (read,) = reader(processor, segmenter)([row(modality="CT", anatomy="Lung", lesion="nodule")])
        assert read.target.mask.shape == (30, 40)
        assert read.target.mask.sum() == 80
        assert read.target.boxes.tolist() == [[4, 6, 12, 16]]
        texts = (read.target.query, read.target.modality, read.target.anatomy, read.target.lesion, read.target.name)
        assert texts == ("Where?", "CT", "Lung", "nodule", "row 0")
        assert read.frame.kind == "resized_px"
        assert read.frame.original_size == (40, 30)
        assert read.seg_input.pixels.shape == (3, 64, 64)
        assert torch.equal(read.seg_input.pixels, segmenter.preprocess(picture(0)))
        assert read.seg_input.target.shape == (16, 16)
        assert read.seg_input.target.dtype == torch.uint8
        assert read.seg_input.target.float().mean().item() / 255 == pytest.approx(80 / 1200, abs=2e-3)

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
    def test_rows_of_prepare(self, family, segmenter):
        _, processor = tiny_model(family)
        reads = reader(processor, segmenter)(list(tiny_rows(3, processor)))
        assert [len(read.target.boxes) > 0 for read in reads] == [True] * 3
        assert {read.frame.kind for read in reads} == {"resized_px" if family == "qwen2_5_vl" else "relative_1000"}

    def test_image_smaller_than_the_mask(self, segmenter):
        """`max_edge` shrinks images only: boxes and masks stay in original pixels."""
        _, processor = tiny_model()
        (read,) = reader(processor, segmenter)([row(image=picture(size=(20, 15)))])
        assert (read.target.width, read.target.height) == (40, 30)
        assert read.frame.original_size == (40, 30)
        resized = read.frame.resized_size
        assert read.frame.to_original(np.array([[0, 0, *resized]], dtype=float)).tolist() == [[0, 0, 40, 30]]

    def test_frame_can_be_given(self, segmenter):
        _, processor = tiny_model()
        (read,) = reader(processor, segmenter, "original_px")([row()])
        assert read.frame.kind == "original_px"
        with pytest.raises(UnknownNameError, match="'inches'"):
            reader(processor, segmenter, "inches")

    def test_first_of_several_images(self, segmenter):
        given = row()
        given["images"] = [given.pop("image"), picture(9)]
        (read,) = reader(None, segmenter, "original_px")([given])
        assert torch.equal(read.seg_input.pixels, segmenter.preprocess(picture(0)))

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
    def test_modes_of_the_image(self, mode, segmenter):
        (read,) = reader(None, segmenter, "original_px")([row(image=picture(mode=mode))])
        assert read.seg_input.pixels.shape == (3, 64, 64)

    @pytest.mark.parametrize("value", [1, 7, 255])
    @pytest.mark.parametrize("kind", ["image", "array", "bool", "list"])
    def test_masks(self, value, kind, segmenter):
        image = mask_of((4, 6, 12, 16), value=value)
        array = np.asarray(image)
        mask = {"image": image, "array": array, "bool": array > 0, "list": array.tolist()}[kind]
        (read,) = reader(None, segmenter, "original_px")([row(mask=mask)])
        assert read.target.boxes.tolist() == [[4, 6, 12, 16]]

    def test_empty_mask(self, segmenter):
        (read,) = reader(None, segmenter, "original_px")([row(box=(0, 0, 0, 0))])
        assert read.target.empty
        assert not read.seg_input.target.any()

    def test_no_rows(self, segmenter):
        assert reader(None, segmenter)([]) == []

    def test_without_a_segmenter_no_image_is_needed(self):
        given = row()
        del given["image"]
        (read,) = reader(None)([given])
        assert read.seg_input is None
        assert read.frame.original_size == (40, 30)
        assert reader(None)([row()])[0].seg_input is None


class TestSharing:
    def test_repeats_are_one_object(self, segmenter):
        reads = reader(None, segmenter, "original_px")([row(0), row(1), row(0), row(0)])
        assert reads[0] is reads[2] is reads[3]
        assert reads[0] is not reads[1]
        assert reads[1].seg_input.same_image is None

    def test_other_mask_or_query_shares_the_image(self, segmenter):
        reads = reader(None, segmenter, "original_px")(
            [row(0), row(0, box=(1, 1, 5, 5)), row(0, query="Which?"), row(1)]
        )
        first = reads[0].seg_input
        assert len({id(read) for read in reads}) == 4
        assert [read.seg_input.same_image for read in reads] == [None, first, first, None]
        assert reads[1].seg_input.pixels is first.pixels
        assert reads[1].target.boxes.tolist() == [[1, 1, 5, 5]]
        assert not torch.equal(reads[1].seg_input.target, first.target)

    def test_the_key_says_what_the_image_holds(self, segmenter):
        """The same in another batch, whatever the file's mode; another one for other pixels or another shape."""

        def key(**changes):
            (read,) = reader(None, segmenter, "original_px")([row(**changes)])
            assert isinstance(read.seg_input.key, str)
            return read.seg_input.key

        assert key() == key(query="Which?", box=(0, 0, 3, 3)) == key(image=picture(0).convert("RGBA"))
        changed = picture(0)
        changed.putpixel((3, 3), (1, 2, 3))
        tall = Image.frombytes("RGB", (30, 40), picture(0).tobytes())
        assert len({key(), key(image=changed), key(image=tall), key(seed=1)}) == 4

    def test_an_image_whose_features_are_cached_is_not_prepared(self):
        prepared = []

        class Counting(type(tiny_segmenter())):
            def preprocess(self, image):
                prepared.append(image.size)
                return super().preprocess(image)

        segmenter = Counting(tiny_segmenter().config)
        head = MaskHead(SegTokenProbe(5), torch.nn.Linear(4, 4), segmenter, cache=FeatureCache())
        for _ in range(2):
            reads = reader(None, segmenter, "original_px")([row(0), row(0, query="Which?"), row(1), row(0)])
            head.features([read.seg_input for read in reads])
        assert len(prepared) == 2
        assert head.encoded_images == 2

    def test_shared_image_is_encoded_once(self, segmenter):
        reads = reader(None, segmenter, "original_px")([row(0, box=(1, 1, 5, 5)), row(0), row(1)])
        inputs: list[SegInput] = [read.seg_input for read in reads if read.seg_input is not None]
        head = MaskHead(SegTokenProbe(5), torch.nn.Linear(4, 4), segmenter)
        features, index = head.features([inputs[1], inputs[0], inputs[1]])
        assert (len(features), index.tolist(), head.encoded_images) == (1, [0, 0, 0], 1)
        _, index = head.features([inputs[2], inputs[1]])
        assert (index.tolist(), head.encoded_images) == ([0, 1], 2)

    def test_same_bytes_of_another_shape_differ(self, segmenter):
        wide, tall = np.zeros((2, 8, 3), dtype=np.uint8), np.zeros((8, 2, 3), dtype=np.uint8)
        reads = reader(None, segmenter, "original_px")(
            [
                row(image=Image.fromarray(wide), mask=np.eye(2, 8, dtype=bool)),
                row(image=Image.fromarray(tall), mask=np.eye(8, 2, dtype=bool)),
            ]
        )
        assert reads[0].target.mask.shape == (2, 8)
        assert reads[1].target.mask.shape == (8, 2)
        assert reads[1].seg_input.same_image is None


class TestErrors:
    @pytest.mark.parametrize("image", [None, "a.png", np.zeros((4, 4, 3))])
    def test_no_image(self, image, segmenter):
        with pytest.raises(DataError, match="row 3: no image; expected a PIL image in the column 'image'"):
            reader(None, segmenter, "original_px")([row(3, image=image)])

    def test_empty_list_of_images(self, segmenter):
        with pytest.raises(DataError, match="row 0: no image"):
            reader(None, segmenter, "original_px")([row(image=None, images=[])])

    def test_no_mask_names_the_row(self, segmenter):
        with pytest.raises(DataError, match="row 1 of the batch: no mask"):
            reader(None, segmenter, "original_px")([row(), row(1, mask=None, name=None)])

    def test_mask_of_more_than_two_values_names_the_row(self, segmenter):
        with pytest.raises(DataError, match="row 2"):
            reader(None, segmenter, "original_px")([row(2, mask=np.arange(1200, dtype=np.int64).reshape(30, 40))])


class TestColumns:
    rows = Dataset.from_dict({"prompt": ["a"], "image": [1], "mask": [1]})

    def test_complete(self):
        check_columns({"train_dataset": self.rows, "eval_dataset": None}, ("image", "mask"))
        check_columns({"train_dataset": self.rows.rename_column("image", "images")}, ("image", "mask"))

    def test_stream_without_names(self):
        check_columns({"train_dataset": IterableDataset.from_generator(lambda: iter([{"a": 1}]))}, ("mask",))

    def test_missing(self):
        with pytest.raises(DataError, match=r"train_dataset: no column \['image', 'mask'\] \(it has \['prompt'\]\)"):
            check_columns({"train_dataset": self.rows.select_columns("prompt")}, ("image", "mask"))

    def test_missing_in_one_of_several(self):
        several = DatasetDict({"near": self.rows, "far": self.rows.remove_columns("mask")})
        with pytest.raises(DataError, match=r"eval_dataset\['far'\]: no column \['mask'\]"):
            check_columns({"train_dataset": self.rows, "eval_dataset": several}, ("image", "mask"))
