"""Stand-ins for pretraining: targets of tokens, what is trained and what is left alone, and that it is learned."""

import numpy as np
import pytest
import torch
from PIL import Image

from segrl.data import make_scene
from segrl.models import Finding, Picture, list_findings, pretrain_captions, pretrain_vision, tiny_qwen3_vl
from segrl.models.tiny_pretraining import BINS, _cells
from segrl.segmenters import Sam2Segmenter, pretrain_segmenter, sam2_config

SIDE = 64


def rectangle(left, top, right, bottom, kind="dark cyst", size=(64, 64)):
    mask = np.zeros(size[::-1], dtype=bool)
    mask[top:bottom, left:right] = True
    return Finding(kind, mask)


@pytest.fixture(scope="module")
def pictures():
    return [make_scene(n, size=SIDE, seed=5, hard=True).picture() for n in range(60)]


def tiny(**settings):
    corpus = ["dark cyst 0123, bright nodule 4567, ring abscess 89."] * 20
    sizes = {"hidden_size": 64, "layers": 1, "vision_hidden_size": 32, "vision_layers": 2, "patch_size": 8}
    area = {"min_pixels": SIDE**2, "max_pixels": SIDE**2}
    return tiny_qwen3_vl(corpus=corpus, rope_theta=1e4, **{"position_std": 0.5, **sizes, **area, **settings})


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_tokens_show_what_covers_them_and_what_lies_in_their_middle():
    picture = Picture(Image.new("RGB", (64, 64)), [rectangle(0, 0, 32, 16), rectangle(40, 40, 42, 42, "ring abscess")])
    truth, own = _cells(picture, (4, 4), ["dark cyst", "ring abscess"])
    assert np.flatnonzero(truth[:, 0, 0]).tolist() == [0, 1]  # two cells of 16 px in the first row
    assert truth[1, 0].tolist() == [1, 0, 0, BINS // 2, BINS // 4]
    assert np.flatnonzero(truth[:, 1, 0]).tolist() == [10]  # 4 of 256 px, but its middle is there
    assert own[5].tolist() == [int(1.5 / 4 * BINS)] * 4


def test_a_cell_shows_the_lesion_that_covers_more_of_it():
    picture = Picture(Image.new("RGB", (64, 64)), [rectangle(11, 0, 30, 16), rectangle(0, 0, 11, 40)])
    truth, _ = _cells(picture, (4, 4), ["dark cyst"])
    assert truth[0, 0].tolist() == [1, 0, 0, 11 * BINS // 64, 40 * BINS // 64]
    assert truth[1, 0].tolist() == [1, 11 * BINS // 64, 0, 30 * BINS // 64, BINS // 4]


def test_a_row_teaches_about_its_own_kind_only():
    mask = rectangle(0, 0, 16, 16).mask
    truth, _ = _cells(Picture.from_mask(Image.new("RGB", (64, 64)), mask, "cyst"), (4, 4), ["abscess", "cyst"])
    assert truth[..., 0].tolist() == [[-1, 1]] + [[-1, 0]] * 15


def test_the_largest_components_of_a_mask_are_findings():
    mask = np.zeros((20, 60), dtype=bool)
    for number in range(6):
        mask[: 3 + number, 10 * number : 10 * number + 5] = True
    picture = Picture.from_mask(Image.new("RGB", (60, 20)), mask, "cyst")
    assert [finding.box for finding in picture.findings] == [(10 * n, 0, 10 * n + 5, 3 + n) for n in range(2, 6)]
    assert Picture.from_mask(Image.new("RGB", (60, 20)), np.zeros((20, 60), dtype=bool), "cyst").findings == []


def test_findings_are_listed_by_kind_from_top_to_bottom_and_left_to_right():
    findings = [rectangle(40, 40, 60, 60), rectangle(30, 2, 40, 14, "ring abscess"), rectangle(2, 4, 14, 16)]
    image = Image.new("RGB", (64, 64))
    assert list_findings(Picture(image, findings)) == "dark cyst 0022 6699, ring abscess 4062."
    known = frozenset(["bright nodule", "dark cyst", "ring abscess"])
    assert (
        list_findings(Picture(image, findings, known)) == "bright nodule none, dark cyst 0022 6699, ring abscess 4062."
    )
    assert (
        list_findings(Picture(image, findings[:0], known)) == "bright nodule none, dark cyst none, ring abscess none."
    )


def test_only_the_tower_learns_to_see_and_only_the_rest_to_speak(pictures):
    model, processor = tiny()
    state = torch.get_rng_state()
    before = weights(model)
    assert 0 <= pretrain_vision(model, processor, pictures, steps=2, batch_size=4) <= 1
    assert {name.split(".")[1] for name in changed(before, model)} == {"visual"}
    before = weights(model)
    model.model.visual.requires_grad_(False)
    assert 0 <= pretrain_captions(model, processor, pictures, steps=2, batch_size=4) <= 1
    assert not any(".visual." in name for name in changed(before, model))
    assert {"language_model", "weight"} == {name.split(".")[1] for name in changed(before, model)}
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    assert not model.training


def test_equal_seeds_give_equal_weights(pictures):
    def trained():
        torch.manual_seed(torch.seed() % 2**31)  # whatever the global state is
        model, processor = tiny()
        pretrain_vision(model, processor, pictures, steps=2, batch_size=4, seed=3)
        pretrain_captions(model, processor, pictures, steps=2, batch_size=4, seed=3)
        torch.manual_seed(0)
        segmenter = Sam2Segmenter(sam2_config("tiny", image_size=64))
        pretrain_segmenter(segmenter, pictures, encoder_steps=1, decoder_steps=1, encoder_batch_size=2, seed=3)
        return {**weights(model), **weights(segmenter)}

    one, two = trained(), trained()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pictures_without_findings_and_a_single_one():
    empty = Picture(Image.new("RGB", (SIDE, SIDE)), [])
    model, processor = tiny()
    single = [Picture(empty.image, [rectangle(0, 0, 32, 32)])]
    for some in (single, [*single, empty, empty]):
        pretrain_vision(model, processor, some, steps=1, batch_size=2)
        pretrain_captions(model, processor, some, steps=1, batch_size=2)
        segmenter = Sam2Segmenter(sam2_config("tiny", image_size=64))
        pretrain_segmenter(segmenter, some, encoder_steps=1, decoder_steps=1)


def test_nothing_is_measured_where_there_is_no_finding():
    empty = [Picture(Image.new("RGB", (SIDE, SIDE)), [])] * 2
    segmenter = Sam2Segmenter(sam2_config("tiny", image_size=64))
    assert np.isnan(pretrain_segmenter(segmenter, empty, encoder_steps=1, decoder_steps=1))


def test_position_embeddings_have_the_deviation_asked_for():
    wide, own = (tiny(position_std=value)[0].model.visual.pos_embed.weight.detach().std() for value in (0.5, None))
    assert float(wide) == pytest.approx(0.5)
    assert float(own) < 0.05


def test_the_segmenter_is_as_trainable_as_before(pictures):
    segmenter = Sam2Segmenter(sam2_config("tiny", image_size=64))
    segmenter.freeze(encoder=True)
    before, flags = weights(segmenter), [p.requires_grad for p in segmenter.parameters()]
    loss = pretrain_segmenter(segmenter, pictures, encoder_steps=2, decoder_steps=2, encoder_batch_size=2)
    parts = {name.split(".")[1] for name in changed(before, segmenter)}
    assert {"image_encoder", "sam_mask_decoder", "sam_prompt_encoder"} <= parts
    assert loss > 0
    assert flags == [p.requires_grad for p in segmenter.parameters()]
    assert not segmenter.training


@pytest.mark.slow
def test_a_tiny_model_learns_to_see_and_says_it():
    """Lesions of one contrast: two of five are seen after 250 steps, and most words are right."""
    easy = [make_scene(n, size=SIDE, seed=6).picture() for n in range(400)]
    model, processor = tiny(vision_hidden_size=64, layers=2)
    assert pretrain_vision(model, processor, easy, steps=250, batch_size=24) > 0.4
    assert pretrain_captions(model, processor, easy, steps=150) > 0.5
