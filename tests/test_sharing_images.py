"""Pictures by content: preprocessed once, through the vision tower once, and never taken for one another."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from builders import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from sharing_checks import (
    Answer,
    Prompt,
    batch_of,
    build,
    dense,
    encoded,
    loss_and_gradients,
    make_trainer,
    picture,
    same_step,
    scores,
    seen_by,
    tower_of,
)

from segrl.caching import FeatureCache, ImageKeys
from segrl.models import backbone_of
from segrl.sharing import images_of, install_vision, preprocess_once

PICTURES = [Prompt(3, (0, 1)), Prompt(6, (1,)), Prompt(2, (4, 0, 0))]  # 3 different ones; 0 and 4 have one size
ROWS = [Answer(0, 3), Answer(1, 2), Answer(0, 4), Answer(2, 3), Answer(1, 5), Answer(2, 1)]


class Counted:
    """The calls of a real image processor, by the pictures in each."""

    def __init__(self, processor: Any) -> None:
        self.calls: list[int] = []
        inner = processor.image_processor

        class Counting(type(inner)):
            def __call__(self, images=None, *args, **kwargs):
                self.seen.append(len(list(flat(images))))
                return super().__call__(images, *args, **kwargs)

        inner.seen = self.calls
        inner.__class__ = Counting


def flat(images):
    for image in images if isinstance(images, (list, tuple)) else [images]:
        yield from flat(image) if isinstance(image, (list, tuple)) else [image]


def same_inputs(one: Any, other: Any) -> bool:
    assert set(one) == set(other)
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def test_pictures_of_a_conversation():
    one, other = picture(0), picture(1)
    parts = [{"type": "image", "image": one}, {"type": "text", "text": "a"}, {"type": "image", "image": other}]
    prompt = [{"role": "system", "content": "b"}, {"role": "user", "content": parts}]
    assert images_of(prompt) == [one, other]
    assert images_of("text") == images_of([]) == images_of([{"role": "user", "content": "text"}]) == []


@pytest.mark.parametrize("family", FAMILIES)
class TestPreprocessing:
    @settings(max_examples=10)
    @given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=4))
    def test_outputs_are_the_processors(self, family, rows):
        _, processor = build(family)
        images = [[picture(number).copy() for number in row] for row in rows]
        texts = [processor.image_token * len(row) + " where?" for row in rows]
        plain = processor(images=images, text=texts, padding=True, return_tensors="pt")
        count = Counted(processor)
        with preprocess_once(processor, ImageKeys()):
            for _ in range(2):
                assert same_inputs(plain, processor(images=images, text=texts, padding=True, return_tensors="pt"))
        assert sum(count.calls) == len({number for row in rows for number in row})

    @pytest.mark.parametrize("forms", [(None, "pt"), ("pt", None)])
    def test_without_and_with_tensors(self, family, forms):
        """As TRL calls it: pictures that were prepared for one form are there for the other."""
        _, processor = build(family)
        images = [picture(0), picture(1), picture(0)]
        plain = [processor.image_processor(images=images, return_tensors=form) for form in forms]
        count = Counted(processor)
        with preprocess_once(processor, ImageKeys()):
            found = [processor.image_processor(images=images, return_tensors=form) for form in forms]
        assert count.calls == [2]
        for one, other in zip(found, plain, strict=True):
            assert {name: type(value) for name, value in one.items()} == {n: type(value) for n, value in other.items()}
            for name, values in other.items():
                assert all(torch.equal(mine, yours) for mine, yours in zip(one[name], values, strict=True))

    @pytest.mark.parametrize("form", [None, "np"])
    def test_other_forms(self, family, form):
        _, processor = build(family)
        plain = processor.image_processor(images=[picture(0)], return_tensors=form)
        with preprocess_once(processor, ImageKeys()):
            for _ in range(2):
                processor.image_processor(images=[picture(0)], return_tensors="pt")
                found = processor.image_processor(images=[picture(0)], return_tensors=form)
        for name, values in plain.items():
            assert type(found[name]) is type(values)
            assert np.array_equal(np.asarray(found[name][0]), np.asarray(values[0]))

    def test_no_picture(self, family):
        _, processor = build(family)
        with preprocess_once(processor, ImageKeys()):
            assert "pixel_values" not in processor(text=["a"], return_tensors="pt")
            with pytest.raises(Exception, match="single or a list"):
                processor.image_processor(images=None)

    def test_one_picture_alone_is_remembered(self, family):
        _, processor = build(family)
        plain = encoded(processor, Prompt(3, (0,)))
        count = Counted(processor)
        with preprocess_once(processor, ImageKeys()):
            assert same_inputs(plain, encoded(processor, Prompt(3, (0,))))
            assert same_inputs(plain, encoded(processor, Prompt(3, (0,))))
        assert count.calls == [1]

    def test_settings_tell_calls_apart(self, family):
        _, processor = build(family)
        inner, images = processor.image_processor, [picture(0), picture(1)]
        expected = [inner(images=images, do_rescale=rescale, return_tensors="pt") for rescale in (True, False)]
        with preprocess_once(processor, ImageKeys()):
            for _ in range(2):
                for rescale, wanted in zip((True, False), expected, strict=True):
                    found = processor.image_processor(images=images, do_rescale=rescale, return_tensors="pt")
                    assert same_inputs(wanted, found)

    def test_it_is_the_same_processor_again(self, family):
        _, processor = build(family)
        inner = processor.image_processor
        with preprocess_once(processor, ImageKeys()):
            assert processor.image_processor is not inner
            assert processor.image_processor.size == inner.size
        assert processor.image_processor is inner
        with pytest.raises(KeyError), preprocess_once(processor, ImageKeys()):
            raise KeyError
        assert processor.image_processor is inner

    def test_may_be_copied_inside(self, family):
        _, processor = build(family)
        with preprocess_once(processor, ImageKeys()):
            other = copy.deepcopy(processor)
            assert same_inputs(encoded(other, Prompt(3, (0, 1))), encoded(processor, Prompt(3, (0, 1))))


def test_preprocessing_without_an_image_processor():
    _, tokenizer = build("text")
    with preprocess_once(tokenizer, ImageKeys()):
        assert tokenizer("a")["input_ids"]


# ---- the vision tower ------------------------------------------------------------------------------------------------


def frozen_trainer(family: str, folder: Any, **settings_: Any) -> tuple[Any, Any]:
    """A trainer whose model's vision tower (and projector) is not trained."""
    model, processor = build(family)
    decoder = {id(p) for p in model.get_decoder().parameters()} | {id(p) for p in model.lm_head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in decoder)
    return make_trainer(model, processor, folder, settings=settings_), processor


@pytest.mark.parametrize("family", FAMILIES)
class TestTower:
    def test_trained_tower_sees_each_picture_once_a_pass(self, family, tmp_path):
        model, processor = build(family)
        trainer = make_trainer(model, processor, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        with seen_by(tower_of(model)) as pictures:
            _, found, _ = loss_and_gradients(trainer, batch)
            scores(trainer, batch, shared=True)
        assert pictures == [3, 3]
        assert any(gradient.any() for name, gradient in found.items() if "vis" in name)
        same_step(trainer, batch)
        with seen_by(tower_of(model)) as pictures:
            loss_and_gradients(trainer, dense(batch))
        assert sum(pictures) == 12

    def test_frozen_tower_sees_each_picture_once(self, family, tmp_path):
        trainer, processor = frozen_trainer(family, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        with seen_by(tower_of(trainer.model)) as pictures:
            first = loss_and_gradients(trainer, batch)
            scores(trainer, batch, shared=True, batch_size=3)
            again = loss_and_gradients(trainer, batch)
            loss_and_gradients(trainer, batch_of(processor, [Prompt(5, (1, 3))], [Answer(0, 2), Answer(0, 2)]))
        assert pictures == [1] * 4  # of the last batch, picture 3 is new
        assert trainer.model.model.get_image_features.encoded_images == 4
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(again[1][name], gradient) for name, gradient in first[1].items())
        same_step(trainer, batch)

    def test_without_room_it_is_once_a_pass(self, family, tmp_path):
        trainer, processor = frozen_trainer(family, tmp_path, feature_cache_memory=0)
        batch = batch_of(processor, PICTURES, ROWS)
        with seen_by(tower_of(trainer.model)) as pictures:
            loss_and_gradients(trainer, batch)
            loss_and_gradients(trainer, batch)
        assert pictures == [1] * 6
        same_step(trainer, batch)

    def test_other_weights_have_other_features(self, family, tmp_path):
        """A frozen tower may be given weights: a checkpoint, the best model, an update by the user."""
        trainer, processor = frozen_trainer(family, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        before = scores(trainer, batch, shared=True)[0]
        state = {name: value + 0.1 * value.abs().mean() for name, value in tower_of(trainer.model).state_dict().items()}
        tower_of(trainer.model).load_state_dict(state)
        same_step(trainer, batch)
        assert not torch.allclose(scores(trainer, batch, shared=True)[0], before, atol=1e-4)

    def test_buffers_written_by_ddp_change_nothing(self, family, tmp_path):
        trainer, processor = frozen_trainer(family, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        with seen_by(tower_of(trainer.model)) as pictures:
            scores(trainer, batch, shared=True)
            for buffer in trainer.model.model.buffers():
                buffer.copy_(buffer.clone())
            scores(trainer, batch, shared=True)
        assert pictures == [1] * 3

    def test_trained_for_a_while(self, family, tmp_path):
        """Frozen, then trained, then frozen: what was kept belongs to weights of the past."""
        trainer, processor = frozen_trainer(family, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        same_step(trainer, batch)
        parameters = list(tower_of(trainer.model).parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss_and_gradients(trainer, batch)
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        same_step(trainer, batch)

    def test_half_precision_has_features_of_its_own(self, family, tmp_path):
        trainer, processor = frozen_trainer(family, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        full = scores(trainer, batch, shared=True)[0]
        with torch.autocast("cpu", torch.bfloat16):
            with seen_by(tower_of(trainer.model)) as pictures:
                half = scores(trainer, batch, shared=True)[0]
            assert pictures == [1] * 3
            expected = scores(trainer, batch, shared=False)[0]
        assert not torch.allclose(half, full, atol=1e-4)
        torch.testing.assert_close(half, expected, rtol=5e-2, atol=5e-2)
        assert torch.equal(scores(trainer, batch, shared=True)[0], full)

    def test_weights_in_half_precision_need_no_second_look(self, family, tmp_path):
        """With LoRA on bfloat16 weights `generate` runs without autocast and the loss with it: the same arithmetic."""
        trainer, processor = frozen_trainer(family, tmp_path)
        tower = tower_of(trainer.model)
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.bfloat16()
        batch = batch_of(processor, PICTURES, ROWS)
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        with seen_by(tower) as pictures:
            scores(trainer, batch, shared=True)
            with torch.autocast("cpu", torch.bfloat16):
                found = scores(trainer, batch, shared=True)[0]
        assert pictures == [1] * 3
        trainer.model.model.get_image_features.cache.clear()
        with torch.autocast("cpu", torch.bfloat16), seen_by(tower) as pictures:
            expected = scores(trainer, batch, shared=True)[0]
        assert pictures == [1] * 3
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("way", ["again", "copy"])
    def test_second_trainer_of_a_model(self, family, way, tmp_path):
        """A model that has a `VisionOnce` keeps it, with nothing in it; so has a copy, which is independent."""
        trainer, processor = frozen_trainer(family, tmp_path)
        model, batch = trainer.model, batch_of(processor, PICTURES, ROWS)
        expected = scores(trainer, batch, shared=True)[0]
        if way == "copy":
            model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tower_of(model).parameters():
                parameter.mul_(1.1)
        hooks = len(model.model._forward_hooks)
        second = make_trainer(model, processor, tmp_path)
        assert len(model.model._forward_hooks) == hooks
        with seen_by(tower_of(model)) as pictures:
            found = scores(second, batch, shared=True)[0]
        assert pictures == [1] * 3
        assert model.model.get_image_features.encoded_images == 3
        torch.testing.assert_close(found, scores(second, batch, shared=False)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, expected, atol=1e-4)
        if way != "again":
            old = trainer.model.model.get_image_features
            assert old is not model.model.get_image_features
            assert old.encoded_images == 3

    def test_lora_on_the_tower(self, family, tmp_path):
        """Trained adapters in the tower: no features are kept, with adapters on or off."""
        model, processor = build(family)
        torch.manual_seed(1)
        targets = ["q_proj", "fc1", "qkv", "linear_fc1", "gate_proj"]
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        trainer = make_trainer(wrapped, processor, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        for _ in range(2):
            found = same_step(trainer, batch)
            assert any("vis" in name and "lora_A" in name and gradient.any() for name, gradient in found.items())
            with trainer.model.disable_adapter():
                off = [scores(trainer, batch, shared=shared)[0] for shared in (False, True)]
            torch.testing.assert_close(off[1], off[0], rtol=1e-5, atol=1e-5)

    def test_two_frozen_adapters_on_the_tower(self, family, tmp_path):
        """As TRL's `ref` adapter: one after the other is active, and neither is trained."""
        model, processor = build(family)
        torch.manual_seed(1)
        targets = ["q_proj", "fc1", "qkv", "linear_fc1"]
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        wrapped = get_peft_model(model, config)
        wrapped.add_adapter("ref", config)
        trainer = make_trainer(wrapped, processor, tmp_path)
        batch = batch_of(processor, PICTURES, ROWS)
        seen = []
        for name in ("default", "ref", "default"):
            trainer.model.set_adapter(name)
            trainer.model.requires_grad_(False)
            found = scores(trainer, batch, shared=True)[0]
            torch.testing.assert_close(found, scores(trainer, batch, shared=False)[0], rtol=1e-5, atol=1e-5)
            seen.append(found)
        assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_models_without_a_tower():
    model, _ = build("text")
    assert install_vision(backbone_of(model), model.get_decoder(), FeatureCache()) is None
