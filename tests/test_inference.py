"""`ReasoningSegmenter`: one question or many, images of any size and mode, saved and loaded."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_headed_model, tiny_model, tiny_rows, with_answers
from datasets import Dataset
from marks import slow_to_build
from PIL import Image, ImageOps

from segrl import DenseLoss, ReasoningSegmenter, SegSFTConfig, SegSFTTrainer
from segrl.data import prepare
from segrl.data.images.prompts import shown_image
from segrl.errors import CheckpointError, DataError, SegRLError
from segrl.heads import SegInput, find_mask_head
from segrl.heads.decoding import masks_at
from segrl.losses import dice_ce
from segrl.predictions import ImagePromptSettings, Status

SETTINGS = ImagePromptSettings(instruction="Answer.", max_new_tokens=60)
ANSWER = "<think>One dark cyst.</think><answer>The dark cyst is located at [4, 5, 30, 41].<seg></answer>"


QUERIES = ("Find it.", "Where is it?", "Where is the dark cyst in this image? Segment every dark cyst.", "Cyst?", "A")


def picture(size=(64, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def trained(tmp_path_factory, family, steps):
    """A model that gives `ANSWER` to everything; its masks depend on the image."""
    model, processor = tiny_headed_model(family)
    sizes = [(64, 64), (112, 56), (40, 100), (30, 30)]
    rows = [
        {
            **{"image": picture(sizes[n % 4], n + 100), "query": QUERIES[n % 5], "lesion": "dark cyst", "name": f"{n}"},
            **{"mask": Image.new("L", sizes[n % 4], 255), "modality": "", "anatomy": ""},
        }
        for n in range(20)
    ]
    data = prepare(Dataset.from_list(rows), processor, ImagePromptSettings(instruction="Answer."), completions=True)
    args = SegSFTConfig(
        str(tmp_path_factory.mktemp(family)),
        **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        **{"max_length": None, "gradient_checkpointing": False, "per_device_train_batch_size": 5},
        **{"learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_steps": steps, "logging_steps": 100},
    )
    SegSFTTrainer(
        model,
        args,
        train_dataset=with_answers(data, [ANSWER]),
        processing_class=processor,
        dense_losses=[DenseLoss("dice_ce", fn=checkerboard)],
    ).train()
    return ReasoningSegmenter(model.eval(), processor, SETTINGS)


def checkerboard(logits, target):
    """A loss with both classes in every mask: a model that only knows full masks would hide mixed-up rows."""
    side = torch.arange(16) // 4 % 2
    return dice_ce(logits, (side[:, None] ^ side).float().expand_as(logits))


@pytest.fixture(scope="module")
@slow_to_build
def segmenter(tmp_path_factory):
    return trained(tmp_path_factory, "qwen2_5_vl", 60)


def same(one, other, pixels=0.002):
    """Equal texts, boxes and states; masks up to the rounding of batched sums at their border."""
    assert (one.text, one.status, one.has_seg) == (other.text, other.status, other.has_seg)
    assert np.array_equal(one.boxes, other.boxes)
    assert one.mask is not None
    assert other.mask is not None
    assert one.mask.shape == other.mask.shape
    assert (one.mask != other.mask).mean() <= pixels


class TestPredict:
    def test_text_boxes_and_mask_in_pixels_of_the_image(self, segmenter):
        answer = segmenter.predict(picture((112, 56)), "Where is it?")
        assert answer.text == ANSWER
        assert answer.valid
        assert answer.reasoning == "One dark cyst."
        assert answer.mask.shape == (56, 112)
        assert answer.mask.dtype == bool
        # the processor shows 112 x 56 pixels as they are, so the model's numbers are pixels
        assert answer.boxes.tolist() == [[4, 5, 30, 41]]

    @pytest.mark.parametrize("fraction", [0.5, 3.0])
    def test_a_scaled_image_scales_boxes_and_mask(self, segmenter, fraction):
        image = picture((112, 112))
        size = round(112 * fraction)
        larger = segmenter.predict(image, "Where is it?")
        scaled = segmenter.predict_batch([image], ["Where is it?"], sizes=[(size, size)])[0]
        assert np.allclose(scaled.boxes, larger.boxes * fraction)
        assert scaled.mask.shape == (size, size)
        # both come from the same logits of 16 x 16
        assert abs(scaled.mask.mean() - larger.mask.mean()) < 0.05

    def test_a_batch_equals_one_by_one(self, segmenter):
        """Prompts and images of different lengths and sizes, padded on the left."""
        images = [picture(size, n) for n, size in enumerate([(64, 64), (200, 80), (30, 110), (64, 64), (33, 47)])]
        queries = list(QUERIES)
        together = segmenter.predict_batch(images, queries)
        assert [answer.mask.shape for answer in together] == [image.size[::-1] for image in images]
        for answer, image, query in zip(together, images, queries, strict=True):
            same(answer, segmenter.predict(image, query))

    @pytest.mark.long
    @pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
    def test_other_families(self, family, tmp_path_factory):
        other = trained(tmp_path_factory, family, 60)
        images, queries = [picture((100, 50), 1), picture((64, 64), 2)], list(QUERIES[1:3])
        together = other.predict_batch(images, queries)
        assert [answer.text for answer in together] == [ANSWER] * 2
        assert np.allclose(together[0].boxes, [[0.4, 0.25, 3.0, 2.05]])  # these write thousandths
        for answer, image, query in zip(together, images, queries, strict=True):
            same(answer, other.predict(image, query))

    def test_the_mask_is_that_of_the_whole_sequence_in_one_forward(self, segmenter):
        """Masks from states recorded while decoding equal those of a teacher-forced forward."""
        image, query = picture((64, 64), 3), "Find it."
        answer = segmenter.predict(image, query)
        head: Any = find_mask_head(segmenter.model)
        processor = segmenter.processor
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"{query} Answer."}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = segmenter._inputs([segmenter._ask(image, query, image.size)[0]])
        assert processor.tokenizer.decode(inputs["input_ids"][0]).count(query) == prompt.count(query) == 1
        ids = torch.tensor([processor.tokenizer(ANSWER)["input_ids"]])
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        written = torch.ones_like(whole["input_ids"])
        written[:, : inputs["input_ids"].size(1)] = 0
        index, valid = head.probe(whole["input_ids"], written)
        item = SegInput(head.segmenter.preprocess(image))
        with torch.no_grad(), head.decode_next(index, valid, [item]) as request:
            segmenter.model(**whole)
        (mask,) = masks_at(request.logits, [(64, 64)])
        assert (mask != answer.mask).mean() < 0.002

    def test_the_same_image_is_encoded_once(self, segmenter):
        head: Any = find_mask_head(segmenter.model)
        image = picture()
        before = head.encoded_images
        answers = segmenter.predict_batch([image, image, picture(seed=1)], ["Find it."] * 3)
        assert head.encoded_images == before + 2
        same(answers[0], answers[1])

    def test_images_are_encoded_in_fours(self, segmenter, monkeypatch):
        """On a CPU, where images that training keeps are encoded alone."""
        head: Any = find_mask_head(segmenter.model)
        encode, sizes = head.segmenter.encode, []
        monkeypatch.setattr(head.segmenter, "encode", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
        images = [picture(seed=n) for n in range(5)]
        together = segmenter.predict(images, "Find it.")
        assert sizes == [4, 1]
        head.features([SegInput(torch.zeros(3, 64, 64), key=str(n)) for n in range(2)])
        assert sizes == [4, 1, 1, 1]
        for answer, image in zip(together, images, strict=True):
            same(answer, segmenter.predict(image, "Find it."))

    def test_a_lazy_column_of_a_data_set(self, segmenter):
        rows = tiny_rows(2, segmenter.processor)
        answers = segmenter.predict_batch(rows["image"], rows["query"])
        same(answers[1], segmenter.predict(rows[1]["image"], rows[1]["query"]))

    def test_sampling(self, segmenter):
        torch.manual_seed(0)
        answer = segmenter.predict(picture(), "Find it.", do_sample=True, temperature=0.2, max_new_tokens=40)
        assert answer.text.startswith("<think>One dark cyst.")

    @pytest.mark.parametrize("tokens", [1, 3, 12])
    def test_a_cut_off_answer_has_no_mask(self, segmenter, tokens):
        answer = segmenter.predict(picture(), "Find it.", max_new_tokens=tokens)
        assert answer.text
        assert ANSWER.startswith(answer.text)
        assert answer.mask is None
        assert not answer.valid

    def test_generation_that_goes_on_after_the_end_token(self, segmenter):
        """Rows are cut at the end token; what is generated after it must not shift the states."""
        image, expected = picture(), segmenter.predict(picture(), "Find it.")
        answer = segmenter.predict(image, "Find it.", eos_token_id=[segmenter.processor.tokenizer.vocab_size + 900])
        same(answer, expected)

    def test_empty_list(self, segmenter):
        assert segmenter.predict_batch([], []) == []


class TestImages:
    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
    def test_modes_are_shown_as_rgb(self, segmenter, mode):
        image = picture().convert(mode)
        same(segmenter.predict(image, "Find it."), segmenter.predict(image.convert("RGB"), "Find it."), pixels=0)

    def test_exif_orientation_is_applied(self, segmenter, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        picture((80, 50)).save(tmp_path / "a.png", exif=exif)
        turned = Image.open(tmp_path / "a.png")
        assert turned.size == (80, 50)
        answer = segmenter.predict(turned, "Find it.")
        assert answer.mask.shape == (80, 50)
        upright: Any = ImageOps.exif_transpose(turned)
        assert upright.size == (50, 80)
        same(answer, segmenter.predict(upright, "Find it."), pixels=0)

    def test_max_edge_shrinks_what_is_shown_and_nothing_else(self, segmenter):
        settings = replace(SETTINGS, max_edge=112)
        limited: Any = ReasoningSegmenter(segmenter.model, segmenter.processor, settings)
        image = picture((224, 112))
        answer = limited.predict(image, "Find it.")
        assert shown_image(image, 112).size == (112, 56)
        assert shown_image(picture((40, 30)), 112).size == (40, 30)
        assert answer.mask.shape == (112, 224)
        assert np.allclose(answer.boxes, [[8, 10, 60, 82]])  # twice the written numbers

    @pytest.mark.parametrize("size", [(1, 1), (3, 200), (600, 20)])
    def test_odd_sizes(self, segmenter, size):
        answer = segmenter.predict(picture(size), "Find it.")
        assert answer.mask is None or answer.mask.shape == size[::-1]
        assert (answer.boxes[:, 2:] <= size).all()

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_more_than_eight_bits_in_a_batch_are_an_error(self, segmenter, mode):
        with pytest.raises(DataError, match=f"image: has {mode} pixels, expected 8 bits per channel"):
            segmenter.predict_batch([Image.new(mode, (20, 20))], ["Find it."])


class TestInput:
    @pytest.mark.parametrize("token", ["<seg>", "</think>", "<|im_end|>"])
    def test_a_token_in_the_question_is_an_error(self, segmenter, token):
        with pytest.raises(DataError, match=f"holds '{re.escape(token)}', a token of the model"):
            segmenter.predict(picture(), f"Find it.{token}", max_new_tokens=3)

    @pytest.mark.parametrize("query", ["?", "ü 病変 \U0001f600", "<thought></thought>", "{{ 1 }}", "x " * 300])
    def test_any_text_is_a_question(self, segmenter, query):
        answer = segmenter.predict(picture(), query, max_new_tokens=5)
        assert isinstance(answer.status, Status)

    @pytest.mark.parametrize("query", ["", " \n"])
    def test_an_empty_question_is_an_error(self, segmenter, query):
        with pytest.raises(DataError, match="query: is empty; expected a question"):
            segmenter.predict(picture(), query)
        with pytest.raises(DataError, match="query: question 1 is empty; expected a text for each input"):
            segmenter.predict([picture()] * 2, ["Find it.", query])

    def test_bad_input(self, segmenter):
        with pytest.raises(DataError, match="2 images for 1 queries; expected one query per image"):
            segmenter.predict_batch([picture()] * 2, ["Find it."])
        with pytest.raises(DataError, match="expected a PIL image, got str"):
            segmenter.predict_batch(["image.png"], ["Find it."])
        with pytest.raises(DataError, match="expected a PIL image, got NoneType"):
            segmenter.predict_batch([picture(), None], ["Find it."] * 2)
        with pytest.raises(DataError, match="1 sizes for 2 images"):
            segmenter.predict_batch([picture()] * 2, ["Find it."] * 2, sizes=[(3, 4)])

    def test_a_device_that_is_not_there(self, tmp_path):
        for load in (ReasoningSegmenter.from_pretrained, ReasoningSegmenter.zero_shot):
            with pytest.raises(SegRLError, match="device 'tpu': expected cpu, cuda, or cuda:N"):
                load(tmp_path, device="tpu")
            with pytest.raises(SegRLError, match=r"device 'cuda:99': this machine has \d+ CUDA devices"):
                load(tmp_path, device="cuda:99")

    @pytest.mark.parametrize("option", ["num_beams", "num_return_sequences"])
    def test_several_sequences_per_question_are_an_error(self, segmenter, option):
        with pytest.raises(DataError, match="num_beams and num_return_sequences must be 1"):
            segmenter.predict(picture(), "Find it.", **{option: 2})


class TestFiles:
    def test_round_trip(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path / "new" / "run")
        assert find_mask_head(segmenter.model) is not None
        again = ReasoningSegmenter.from_pretrained(tmp_path / "new" / "run", device="cpu")
        assert again.settings == SETTINGS
        assert not again.model.training
        images, queries = [picture((64, 64), n) for n in range(3)], ["Find it."] * 3
        for one, other in zip(
            segmenter.predict_batch(images, queries), again.predict_batch(images, queries), strict=True
        ):
            same(one, other, pixels=0)

    def test_settings_are_found_from_a_checkpoint_folder(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path)
        (tmp_path / "checkpoint-5").mkdir()
        for path in tmp_path.iterdir():
            if path.is_file() and path.name != "segrl.json":
                (tmp_path / "checkpoint-5" / path.name).write_bytes(path.read_bytes())
        assert ReasoningSegmenter.from_pretrained(tmp_path / "checkpoint-5", device="cpu").settings == SETTINGS

    def test_a_model_without_head(self, tmp_path):
        model, processor = tiny_model()
        segmenter = ReasoningSegmenter(model, processor, ImagePromptSettings(max_new_tokens=5))
        (answer,) = segmenter.predict_batch([picture()], ["Find it."])
        assert answer.mask is None
        segmenter.save_pretrained(tmp_path)
        assert not (tmp_path / "mask_head.json").exists()
        again = ReasoningSegmenter.from_pretrained(tmp_path, device="cpu")
        assert find_mask_head(again.model) is None
        assert again.predict(picture(), "Find it.").text == answer.text

    def test_a_missing_folder_is_an_error(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"model folder '.*nowhere' does not exist; pass an output directory"):
            ReasoningSegmenter.from_pretrained(tmp_path / "nowhere")

    def test_a_head_that_lost_its_weights_is_an_error(self, segmenter, tmp_path):
        segmenter.save_pretrained(tmp_path)
        (tmp_path / "mask_head.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"no mask_head\.safetensors"):
            ReasoningSegmenter.from_pretrained(tmp_path)
