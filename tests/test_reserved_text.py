"""Text of the data that holds a token with a meaning for the processor, at every door."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import grpo_args, sft_args, tiny_headed_model, tiny_model, tiny_rows
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken
from volume_builders import blocks, row_of

from segrl import DenseLoss, ReasoningSegmenter, SegGRPOTrainer, SegSFTTrainer
from segrl.data import load_folder, load_volumes, make_synthetic, prepare, prepare_volumes
from segrl.errors import DataError
from segrl.evaluation import evaluate, evaluate_volumes
from segrl.inference import VolumeSegmenter
from segrl.models import tiny_tokenizer
from segrl.predictions import ImagePromptSettings, VolumePromptSettings, check_reserved

SHARED = Path(__file__).parents[2] / "shared" / "data"
TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<seg>")
IMAGES = ImagePromptSettings(instruction="Answer.", max_new_tokens=2)
VOLUMES = VolumePromptSettings(slices=2, size=32, instruction="Answer.", max_new_tokens=2)


def images(**texts: str) -> Dataset:
    """Two rows, of which the second has other texts."""
    rows: Any = list(make_synthetic(2, size=56))
    return Dataset.from_list([{**rows[0], "reasoning": ""}, {**rows[1], "reasoning": "", "name": "b.png", **texts}])


def volumes(folder: Path, **texts: str) -> Dataset:
    mask = blocks([0, 9, 9, 0])
    rows = [row_of(folder, mask, "a", reasoning=""), row_of(folder, mask, "b.png", **{"reasoning": "", **texts})]
    return Dataset.from_list(rows)


def with_token(cell: str, token: str) -> dict[str, str]:
    return {cell: f"Find it {token} here"}


@pytest.mark.parametrize("token", TOKENS)
class TestEveryToken:
    def test_images(self, token):
        _, processor = tiny_model()
        with pytest.raises(DataError, match=r"b\.png, query 'Find it .*holds '" + token.replace("|", r"\|")):
            prepare(images(**with_token("query", token)), processor, IMAGES, completions=False)

    def test_volumes(self, token, tmp_path):
        _, processor = tiny_model("qwen3_vl")
        with pytest.raises(DataError, match=r"b\.png, query 'Find it .*holds '" + token.replace("|", r"\|")):
            prepare_volumes(volumes(tmp_path, **with_token("query", token)), processor, VOLUMES, completions=False)

    def test_questions_about_images(self, token):
        segmenter = ReasoningSegmenter(*tiny_model(), IMAGES)
        image = make_synthetic(1, size=56)[0]["image"]
        with pytest.raises(DataError, match=r"question 1, query 'Where\? .*holds '" + token.replace("|", r"\|")):
            segmenter.predict_batch([image, image], ["Where?", f"Where? {token}"])

    def test_questions_about_volumes(self, token):
        segmenter = VolumeSegmenter(*tiny_model("qwen3_vl"), VOLUMES)
        with pytest.raises(DataError, match=r"question 0, query 'Where\? .*holds '" + token.replace("|", r"\|")):
            segmenter.predict(np.zeros((3, 8, 8), np.uint8), f"Where? {token}")


@pytest.mark.parametrize("cell", ["query", "modality", "anatomy", "lesion", "reasoning"])
def test_every_cell_that_enters_a_completion(cell, tmp_path):
    _, processor = tiny_model()
    data = images(**with_token(cell, "<|im_end|>"))
    with pytest.raises(DataError, match=rf"b\.png, {cell} 'Find it .*holds '<\|im_end\|>'"):
        prepare(data, processor, IMAGES, completions=True)
    with pytest.raises(DataError, match=rf"b\.png, {cell} 'Find it .*holds '<\|im_end\|>'"):
        prepare(data, processor, IMAGES, completions=False)
    with pytest.raises(DataError, match=rf"b\.png, {cell} 'Find it .*holds '<\|im_end\|>'"):
        prepare_volumes(volumes(tmp_path, **with_token(cell, "<|im_end|>")), processor, VOLUMES, completions=True)


def test_evaluation_names_the_row(tmp_path):
    segmenter = ReasoningSegmenter(*tiny_model(), IMAGES)
    with pytest.raises(DataError, match=r"b\.png, query 'Find it <\|image_pad\|> here'"):
        evaluate(segmenter, images(**with_token("query", "<|image_pad|>")), progress=False)
    asked = VolumeSegmenter(*tiny_model("qwen3_vl"), VOLUMES)
    with pytest.raises(DataError, match=r"b\.png, query 'Find it <\|image_pad\|> here'"):
        evaluate_volumes(asked, volumes(tmp_path, **with_token("query", "<|image_pad|>")), progress=False)


def test_an_instruction_may_name_the_segmentation_token_but_no_placeholder():
    _, processor = tiny_model()
    named = ImagePromptSettings(instruction="End with <seg>.")
    assert prepare(images(), processor, named, completions=False)[0]["prompt"][0]["content"].endswith("with <seg>.")
    with pytest.raises(DataError, match=r"prompt settings, instruction .*holds '<\|image_pad\|>'"):
        prepare(images(), processor, ImagePromptSettings(instruction="See <|image_pad|>"), completions=False)


class TestTrainers:
    """Rows that were made for another model, or by hand."""

    def rows(self, processor: Any, where: str, token: str) -> Any:
        rows = list(tiny_rows(2, processor))
        bad = dict(rows[1], name="b.png")
        if where == "query":
            bad["query"] += token
        else:
            bad[where] = [{**bad[where][0], "content": bad[where][0]["content"] + token}]
        return Dataset.from_list([rows[0], bad])

    def grpo(self, tmp_path, model, processor, **data: Any) -> SegGRPOTrainer:
        args = grpo_args(tmp_path, max_steps=1, per_device_train_batch_size=8)
        return SegGRPOTrainer(model, ["format"], args, processing_class=processor, **data)

    def sft(self, tmp_path, model, processor, dense: bool = True, **data: Any) -> SegSFTTrainer:
        losses = [DenseLoss("dice")] if dense else None
        args = sft_args(tmp_path, max_steps=1, per_device_train_batch_size=2)
        return SegSFTTrainer(model, args, processing_class=processor, dense_losses=losses, **data)

    @pytest.mark.parametrize("where", ["prompt", "completion", "query"])
    @pytest.mark.parametrize("dense", [True, False])
    def test_sft(self, where, dense, tmp_path):
        model, processor = tiny_headed_model()
        rows = self.rows(processor, where, "<|image_pad|>")
        with pytest.raises(DataError, match=rf"train_dataset b\.png, {where} .*holds '<\|image_pad\|>'"):
            self.sft(tmp_path, model, processor, dense, train_dataset=rows)
        good = tiny_rows(2, processor)
        with pytest.raises(DataError, match=rf"eval_dataset\['val'\] b\.png, {where} .*holds"):
            self.sft(tmp_path, model, processor, dense, train_dataset=good, eval_dataset={"val": rows})

    @pytest.mark.parametrize("where", ["prompt", "query"])
    def test_grpo(self, where, tmp_path):
        model, processor = tiny_model()
        rows = self.rows(processor, where, "<|vision_start|>")
        with pytest.raises(DataError, match=rf"train_dataset b\.png, {where} .*holds '<\|vision_start\|>'"):
            self.grpo(tmp_path, model, processor, train_dataset=rows)

    def test_streams_are_checked_by_the_batch(self, tmp_path):
        model, processor = tiny_headed_model()
        stream = self.rows(processor, "prompt", "<|image_pad|>").to_iterable_dataset()
        with pytest.raises(DataError, match=r"b\.png, prompt .*holds '<\|image_pad\|>'"):
            self.sft(tmp_path, model, processor, train_dataset=stream).train()

    def test_streams_of_grpo(self, tmp_path):
        model, processor = tiny_model()
        stream = self.rows(processor, "query", "<seg>").to_iterable_dataset()
        with pytest.raises(DataError, match=r"b\.png, query .*holds '<seg>'"):
            self.grpo(tmp_path, model, processor, train_dataset=stream).train()

    def test_a_written_prompt_may_use_the_tokens_that_the_model_knows(self, tmp_path):
        """`<seg>` in a prompt is no mask; tests of the head see to that."""
        model, processor = tiny_headed_model()
        processor.tokenizer.add_tokens([AddedToken("<|box_start|>", special=True)])
        model.resize_token_embeddings(len(processor.tokenizer))
        rows = self.rows(processor, "prompt", "<|box_start|> <seg>")
        self.sft(tmp_path, model, processor, train_dataset=rows)


# ---- the check itself ------------------------------------------------------------------------------------------------


def test_the_first_rows_are_named_and_the_others_counted():
    rows = [(f"{n}.png", "query", f"{n} <seg>") for n in range(9)]
    with pytest.raises(DataError, match=r"0\.png, query '0 <seg>'.*4\.png, query .*, a token .* \(9 in all\)"):
        check_reserved(rows, None)


def test_without_a_processor_only_the_segmentation_token_is_known():
    check_reserved([("a", "query", "<|image_pad|>")], None)
    with pytest.raises(DataError, match=r"holds '\[SEG\]'"):
        check_reserved([("a", "query", "the [SEG]")], None, seg_token="[SEG]")


def test_what_the_tokenizer_normalises_to_a_token_is_one():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|café|>", special=True, normalized=True)])
    with pytest.raises(DataError, match=r"holds '<\|café\|>'"):
        check_reserved([("a", "query", "the <|cafe\u0301|>")], tokenizer)


def test_plain_words_and_brackets_are_text():
    _, processor = tiny_model()
    processor.tokenizer.add_tokens(["cyst", "  ", "<td>"])  # some models have such tokens
    rows = prepare(images(query="<1 cm, [dark] | left  cyst <td>"), processor, IMAGES, completions=False)
    assert "[dark]" in rows[1]["prompt"][0]["content"]


def test_tags_are_tokens_of_some_models_only():
    asked = [("a", "query", "Think in <think></think>.")]
    check_reserved(asked, tiny_tokenizer(tag_tokens=()))
    check_reserved(asked, tiny_tokenizer(), messages=True)
    with pytest.raises(DataError, match="holds '<think>'"):
        check_reserved(asked, tiny_tokenizer())


def test_padding_that_is_plain_text_is_no_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"
    check_reserved([("a", "query", "Find it!")], tokenizer)


PIECES = ("<|", "image", "_pad", "|>", "<", ">", "seg", "/think", "think", " ", "<|im_", "end|>", "é", "\u200b", "1")


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_a_text_is_refused_exactly_if_its_prompt_has_another_token(text):
    """The oracle: the tokens of the whole prompt, beside those of the prompt without the text."""
    processor = _model()
    special = {id_ for id_, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(processor.tokenizer.convert_tokens_to_ids(["<seg>", "<think>", "</think>"]))

    def count(content: str) -> Counter:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return Counter(token for token in processor.tokenizer(prompt)["input_ids"] if token in special)

    refused = False
    try:
        check_reserved([("a", "query", text)], processor)
    except DataError:
        refused = True
    assert refused == (count(f"See {text} here") != count("See here"))


@functools.cache
def _model() -> Any:
    return tiny_model()[1]


@pytest.mark.parametrize("unit", ["<|image_pad|", "<", "<|im_end", "a", "<|"])
def test_work_grows_with_the_text(unit):
    check_reserved([("a", "query", unit * (200_000 // len(unit)))], tiny_tokenizer())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(("folder", "load"), [("lesions2d", load_folder), ("volumes3d", load_volumes)])
def test_no_false_alarm_on_the_shared_data(folder, load):
    rows = load(SHARED / folder, validate=False)
    for cell in ("query", "modality", "anatomy", "lesion"):
        check_reserved(((name, cell, text) for name, text in zip(rows["name"], rows[cell], strict=True)), _model())
