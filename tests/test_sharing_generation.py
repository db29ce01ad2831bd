"""Generation with one prefill per prompt writes what generation with a prompt for every row writes."""

import copy
from typing import Any

import pytest
import torch
from builders import FAMILIES, seg_bias
from peft import LoraConfig, get_peft_model
from sharing_checks import CACHE, KINDS, Prompt, build, encoded, left, make_trainer, picture, seen_by, tower_of
from transformers import DynamicCache, GenerationConfig, StaticCache

from segrl.caching import FeatureCache, ImageKeys
from segrl.models import backbone_of, base_instance
from segrl.sharing import PromptKey, enable_sharing, install_vision, prefill_once

ROWS = [0, 0, 1, 2, 1, 0, 2]


def prompts_of(kind: str) -> list[Prompt]:
    """Three prompts of different lengths."""
    return [Prompt(n, () if kind == "text" else shown) for n, shown in [(3, (0, 1)), (7, (1,)), (1, (4, 3, 3))]]


def inputs_of(processor: Any, prompts: list[Prompt], rows: list[int]) -> tuple[Any, Any, Any]:
    """Arguments of `generate`, the keys of its rows, and how many pictures each has."""
    known, read = [encoded(processor, prompt) for prompt in prompts], ImageKeys()
    ids = [known[row]["input_ids"][0] for row in rows]
    inputs = {
        "input_ids": left(ids, int(getattr(processor, "tokenizer", processor).pad_token_id)),
        "attention_mask": left([torch.ones_like(row) for row in ids]),
    }
    for name in ("pixel_values", "image_grid_thw"):
        parts = [known[row][name] for row in rows if name in known[row]]
        if parts:
            inputs[name] = torch.cat(parts)
    if "pixel_values" in inputs and "mm_token_type_ids" in known[0]:
        inputs["mm_token_type_ids"] = left([known[row]["mm_token_type_ids"][0] for row in rows])
    keys = [
        PromptKey(tuple(one.tolist()), tuple(read(picture(n)) for n in prompts[row].pictures))
        for one, row in zip(ids, rows, strict=True)
    ]
    counts = [len(prompts[row].pictures) for row in rows] if "pixel_values" in inputs else None
    return inputs, keys, counts


class Prefill:
    """What the language model was given in each forward: rows and columns."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        base_instance(model).get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        self.shapes.append(tuple((kwargs["inputs_embeds"] if ids is None else ids).shape[:2]))


def settings_of(processor: Any, **changes: Any) -> GenerationConfig:
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GenerationConfig(**{"max_new_tokens": 16, "do_sample": False, **ends, **changes})


@torch.no_grad()
def generated(model: Any, inputs: Any, settings_: Any, shared: Any = None, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    given = {name: value.clone() for name, value in inputs.items()}
    if shared is None:
        return model.generate(**given, generation_config=copy.deepcopy(settings_))
    with prefill_once(backbone_of(base_instance(model)), *shared):
        return model.generate(**given, generation_config=copy.deepcopy(settings_))


def ready(kind: str, way: str = "plain") -> tuple[Any, Any]:
    model, processor = build(kind)
    if way == "lora":
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    assert enable_sharing(model) is None
    base = base_instance(model)
    install_vision(backbone_of(base), base.get_decoder(), FeatureCache(2**24))
    return model, processor


@pytest.mark.parametrize("kind", KINDS)
class TestGenerate:
    @pytest.mark.parametrize("way", ["plain", "lora", "static"])
    @pytest.mark.parametrize("sample", [False, True])
    def test_the_same_tokens(self, kind, way, sample):
        """Greedy, and sampled with one seed; prompts and answers of different lengths, several pictures."""
        model, processor = ready(kind, way)
        inputs, *shared = inputs_of(processor, prompts_of(kind), ROWS)
        # random models write the same token for ever, unless they are made to choose, and never end
        changes: dict[str, Any] = (
            {"sequence_bias": seg_bias(processor)["sequence_bias"]} if sample else {"repetition_penalty": 5.0}
        )
        if way == "static":
            changes["cache_implementation"] = "static"
        settings_ = settings_of(processor, do_sample=sample, **changes)
        expected = generated(model, inputs, settings_)
        prefill = Prefill(model)
        found = generated(model, inputs, settings_, shared)
        assert torch.equal(found, expected)
        width = inputs["input_ids"].size(1)
        assert prefill.shapes == [(3, width), *[(7, 1)] * (found.size(1) - width - 1)]
        written = found[:, width:]
        assert len({tuple(row) for row in written.tolist()}) >= (5 if sample else 2)
        if sample:
            ends = (written == settings_.eos_token_id).int().argmax(1)
            assert len(set(ends.tolist())) > 2
        prefill.shapes.clear()
        assert torch.equal(generated(model, inputs, settings_), expected)  # and afterwards it is as before
        assert prefill.shapes[0] == (7, width)

    def test_a_prompt_after_another(self, kind):
        """Nothing is left behind from one batch for the next, with pictures or without."""
        model, processor = ready(kind)
        settings_ = settings_of(processor, repetition_penalty=5.0)
        batches = [
            inputs_of(processor, prompts_of(kind), ROWS),
            inputs_of(processor, [Prompt(8), Prompt(2)], [0, 1, 1]),
            inputs_of(processor, prompts_of(kind)[1:], [0, 0, 1, 1]),
        ]
        for inputs, *shared in batches:
            expected = generated(copy.deepcopy(model), inputs, settings_)
            assert torch.equal(generated(model, inputs, settings_, shared), expected)

    def test_no_two_rows_alike(self, kind):
        model, processor = ready(kind)
        inputs, *shared = inputs_of(processor, prompts_of(kind), [2, 0, 1])
        settings_ = settings_of(processor, repetition_penalty=5.0)
        expected = generated(model, inputs, settings_)
        prefill = Prefill(model)
        assert torch.equal(generated(model, inputs, settings_, shared), expected)
        assert prefill.shapes[0][0] == 3

    @pytest.mark.parametrize(
        "changes",
        [
            {"cache_implementation": "static", "prefill_chunk_size": 4},
            {"use_cache": False},
            {"num_beams": 2},
            {"num_return_sequences": 2, "do_sample": True},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_cannot_be_served_is_generated_as_always(self, kind, changes):
        model, processor = ready(kind)
        inputs, *shared = inputs_of(processor, prompts_of(kind), ROWS)
        settings_ = settings_of(processor, max_new_tokens=5, **changes)
        assert torch.equal(generated(model, inputs, settings_, shared), generated(model, inputs, settings_))

    def test_another_cache_by_hand(self, kind):
        model, processor = ready(kind)
        inputs, *shared = inputs_of(processor, prompts_of(kind), ROWS)
        settings_ = settings_of(processor, max_new_tokens=4)

        def cache():
            return StaticCache(config=base_instance(model).config.get_text_config(), max_cache_len=200)

        expected = model.generate(**inputs, generation_config=settings_, **{CACHE: cache()})
        prefill = Prefill(model)
        with torch.no_grad(), prefill_once(backbone_of(model), *shared):
            found = model.generate(**inputs, generation_config=settings_, **{CACHE: cache()})
        assert torch.equal(found, expected)
        assert prefill.shapes[0][0] == 3

    def test_a_static_cache_without_padding(self, kind):
        """Then there may be no mask."""
        model, processor = ready(kind)
        inputs, *shared = inputs_of(processor, prompts_of(kind)[:1], [0, 0, 0])
        settings_ = settings_of(processor, max_new_tokens=4, cache_implementation="static")
        expected = generated(model, inputs, settings_)
        prefill = Prefill(model)
        assert torch.equal(generated(model, inputs, settings_, shared), expected)
        assert prefill.shapes[0][0] == 1

    def test_other_rows_than_the_keys(self, kind):
        model, processor = ready(kind)
        inputs, keys, counts = inputs_of(processor, prompts_of(kind), ROWS)
        settings_ = settings_of(processor, max_new_tokens=4)
        shared = (keys[:5], None if counts is None else counts[:5])
        assert torch.equal(generated(model, inputs, settings_, shared), generated(model, inputs, settings_))

    def test_the_model_is_as_before_after_an_error(self, kind):
        model, processor = ready(kind)
        inputs, *shared = inputs_of(processor, prompts_of(kind), ROWS)
        settings_ = settings_of(processor)
        expected, backbone = generated(model, inputs, settings_), backbone_of(model)
        hooks = len(backbone._forward_hooks), len(backbone._forward_pre_hooks)
        with pytest.raises(KeyError), prefill_once(backbone, *shared):
            raise KeyError
        assert (len(backbone._forward_hooks), len(backbone._forward_pre_hooks)) == hooks
        assert torch.equal(generated(model, inputs, settings_), expected)


@pytest.mark.parametrize("family", FAMILIES)
class TestPictures:
    def test_each_goes_through_the_tower_once(self, family):
        model, processor = ready(family)
        inputs, *shared = inputs_of(processor, prompts_of(family), ROWS)
        with seen_by(tower_of(model)) as pictures:
            generated(model, inputs, settings_of(processor, max_new_tokens=3), shared)
        assert sum(pictures) == 4

    def test_the_same_words_about_other_pictures(self, family):
        model, processor = ready(family)
        inputs, *shared = inputs_of(processor, [Prompt(3, (0,)), Prompt(3, (4,))], [0, 1, 0, 1])
        settings_ = settings_of(processor, do_sample=True)
        prefill = Prefill(model)
        found = generated(model, inputs, settings_, shared)
        assert prefill.shapes[0][0] == 2
        assert torch.equal(found, generated(model, inputs, settings_))

    @pytest.mark.parametrize("counts", [None, [2, 2, 1], "tiles"])
    def test_pictures_that_cannot_be_told_apart(self, family, counts):
        """Without the number of pictures of each row, or with pixels that are not one part per picture."""
        model, processor = ready(family)
        inputs, keys, own = inputs_of(processor, prompts_of(family), [0, 0, 1])
        settings_ = settings_of(processor, max_new_tokens=4)
        expected = generated(model, inputs, settings_)
        wrong = [1, 1, 1] if counts == "tiles" else counts
        assert own == [2, 2, 1]
        prefill = Prefill(model)
        assert torch.equal(generated(model, inputs, settings_, (keys, wrong)), expected)
        assert prefill.shapes[0][0] == (2 if wrong == own else 3)
        with torch.no_grad(), prefill_once(backbone_of(model), keys, wrong):  # pixels in the forward itself
            output = backbone_of(model)(**inputs, **{CACHE: DynamicCache()}, use_cache=True)
        assert prefill.shapes[-1][0] == prefill.shapes[0][0]
        assert len(output.last_hidden_state) == output[CACHE].layers[0].keys.size(0) == 3

    def test_some_rows_without_pictures(self, family):
        model, processor = ready(family)
        inputs, *shared = inputs_of(processor, [Prompt(4), Prompt(3, (0, 1)), Prompt(9)], ROWS)
        settings_ = settings_of(processor, repetition_penalty=5.0)
        expected = generated(copy.deepcopy(model), inputs, settings_)
        assert torch.equal(generated(model, inputs, settings_, shared), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings_", [{}, {"pad_to_multiple_of": 8}, {"activation_checkpointing": True}], ids=str)
def test_a_turn_of_the_trainer(kind, settings_, tmp_path):
    """TRL's `_generate_single_turn`, with its padding and its end of sequences, with and without sharing."""
    written = []
    for share in (True, False):
        model, processor = build(kind)
        own = {"share_prompt": share, "generation_kwargs": seg_bias(processor), **settings_}
        trainer = make_trainer(model, processor, tmp_path, settings=own)
        prompts = [encoded(processor, prompt) for prompt in prompts_of(kind)]
        ids = [prompts[row]["input_ids"][0].tolist() for row in ROWS]
        images, fields = None, {}
        if kind != "text":
            images = [[picture(n).copy() for n in prompts_of(kind)[row].pictures] for row in ROWS]
            inputs, _, _ = inputs_of(processor, prompts_of(kind), ROWS)
            fields = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
            if "mm_token_type_ids" in inputs:
                fields["mm_token_type_ids"] = [prompts[row]["mm_token_type_ids"][0].tolist() for row in ROWS]
        prefill = Prefill(model)
        torch.manual_seed(5)
        written.append(trainer._generate_single_turn(ids, images, fields, 3))
        assert prefill.shapes[0][0] == (3 if share else 7)
    assert written[0] == written[1]
    assert len({len(row) for row in written[0][0]}) > 1
