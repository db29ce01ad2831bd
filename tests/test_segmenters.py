"""`Sam2Segmenter` against the `sam2` package's own configs and predictor, and the loading of its checkpoints."""

import inspect
import json
import os
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sam2
import torch
from builders import tiny_sam2_config, tiny_segmenter
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sam2.modeling.backbones.hieradet import Hiera
from sam2.sam2_image_predictor import SAM2ImagePredictor

from segrl.errors import CheckpointError, SegRLError, UnknownNameError
from segrl.segmenters import ImageFeatures, Sam2Config, Sam2Segmenter, Segmenter
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, SEGMENTER_WEIGHTS, sam2_config


def picture(size=(64, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def published(file, image_size):
    """The `sam2` package's own model of one of its YAML files."""
    config: Any = OmegaConf.load(Path(str(sam2.__file__)).parent / "configs" / "sam2.1" / file)
    config.model.image_size = image_size
    side = image_size // 16
    for name in ("self_attention", "cross_attention"):
        config.model.memory_attention.layer[name].feat_sizes = [side, side]
    return config


def own_predictor(segmenter):
    """SAM 2's image predictor on the segmenter's weights; it states the sizes of its features for 1024 px only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # in the package
        predictor = SAM2ImagePredictor(segmenter.sam)
    side = segmenter.image_size
    predictor._bb_feat_sizes = [(side // stride, side // stride) for stride in (4, 8, 16)]
    return predictor


@pytest.fixture(scope="module")
def segmenter():
    return tiny_segmenter().eval()


class TestAgainstThePackage:
    def test_names_and_shapes_of_sam2_1_hiera_tiny_at_512(self):
        theirs = instantiate(published("sam2.1_hiera_t.yaml", 512).model, _recursive_=True).state_dict()
        ours = Sam2Segmenter(sam2_config("sam2.1_hiera_tiny", image_size=512)).sam.state_dict()
        assert list(ours) == list(theirs)
        assert {name: tuple(value.shape) for name, value in ours.items()} == {
            name: tuple(value.shape) for name, value in theirs.items()
        }
        assert 38e6 < sum(value.numel() for value in ours.values()) < 40e6

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("sam2.1_hiera_tiny", "sam2.1_hiera_t.yaml"),
            ("sam2.1_hiera_small", "sam2.1_hiera_s.yaml"),
            ("sam2.1_hiera_base_plus", "sam2.1_hiera_b+.yaml"),
            ("sam2.1_hiera_large", "sam2.1_hiera_l.yaml"),
        ],
    )
    def test_every_named_size_states_the_numbers_of_its_yaml(self, name, file):
        defaults = {name: value.default for name, value in inspect.signature(Hiera).parameters.items()}
        trunk = {**defaults, **OmegaConf.to_container(published(file, 512).model.image_encoder.trunk)}  # type: ignore
        config = sam2_config(name)
        assert config.embed_dim == trunk["embed_dim"]
        assert config.num_heads == trunk["num_heads"]
        assert list(config.stages) == list(trunk["stages"])
        assert list(config.global_att_blocks) == list(trunk["global_att_blocks"])
        assert list(config.window_spec) == list(trunk["window_spec"])
        assert list(config.pos_embed_size) == list(trunk["window_pos_embed_bkg_spatial_size"])
        assert asdict(sam2_config(name, image_size=1024)) == {**asdict(config), "image_size": 1024}

    def test_settings_beside_the_weights_equal_the_yaml(self):
        """Flags that leave no trace in parameter names still change the video predictor."""
        model = published("sam2.1_hiera_t.yaml", 64).model
        built = tiny_segmenter().sam
        flags = {name: value for name, value in model.items() if isinstance(value, bool | int | float)}
        compared = [name for name in flags if isinstance(getattr(built, name, None), bool | int | float)]
        assert len(compared) > 15
        assert {name: getattr(built, name) for name in compared} == {name: flags[name] for name in compared}

    @pytest.mark.parametrize("box", [(5, 7, 40, 33), (0, 0, 64, 64), (20, 20, 20, 20)])
    def test_a_box_gives_the_masks_of_the_image_predictor(self, segmenter, box):
        image = picture()
        predictor = own_predictor(segmenter)
        predictor.set_image(image)
        _, _, expected = predictor.predict(box=np.array(box), multimask_output=False)
        with torch.no_grad():
            features = segmenter.encode(segmenter.preprocess(image)[None])
            boxes = torch.tensor([box], dtype=torch.float32) / 64
            logits = segmenter.decode_boxes(features, boxes, torch.zeros(1, dtype=torch.long))
        assert np.allclose(logits.numpy(), expected, atol=1e-5)

    def test_several_boxes_on_an_image_of_another_size(self, segmenter):
        smooth = picture((8, 6)).resize((100, 80), Image.Resampling.BICUBIC)
        predictor = own_predictor(segmenter)
        predictor.set_image(smooth)
        boxes = np.array([[10, 20, 60, 70], [0, 0, 50, 30], [70, 5, 99, 79]], dtype=np.float32)
        _, _, expected = predictor.predict(box=boxes, multimask_output=False)
        with torch.no_grad():
            features = segmenter.encode(segmenter.preprocess(smooth)[None])
            fractions = torch.from_numpy(boxes) / torch.tensor([100, 80, 100, 80])
            logits = segmenter.decode_boxes(features, fractions, torch.zeros(3, dtype=torch.long))
        # the package resizes in floating point, PIL rounds to 8 bits: 0.5 / 255 on an input of unit variance
        assert np.abs(logits.numpy() - expected[:, 0]).max() < 0.02 * np.abs(expected).max()

    def test_features_equal_the_image_predictors(self, segmenter):
        predictor = own_predictor(segmenter)
        predictor.set_image(picture())
        assert predictor._features is not None
        expected = [predictor._features["image_embed"], *reversed(predictor._features["high_res_feats"])]
        with torch.no_grad():
            embedding, stride8, stride4 = segmenter.encode(segmenter.preprocess(picture())[None]).tensors
            decoder = segmenter.sam.sam_mask_decoder
            found = [embedding, decoder.conv_s1(stride8), decoder.conv_s0(stride4)]
        assert [tuple(value.shape) for value in found] == [(1, 32, 4, 4), (1, 8, 8, 8), (1, 4, 16, 16)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


class TestSegmenter:
    def test_follows_the_protocol(self, segmenter):
        assert isinstance(segmenter, Segmenter)
        assert (segmenter.image_size, segmenter.mask_size, segmenter.prompt_dim) == (64, 16, 32)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "array"])
    def test_preprocess(self, segmenter, mode):
        image = picture((30, 50))
        if mode == "array":
            given: Any = np.asarray(image)
        else:
            given = image.convert(mode)
        pixels = segmenter.preprocess(given)
        assert pixels.shape == (3, 64, 64)
        reference = image if mode == "array" else given.convert("RGB")
        resized = np.asarray(reference.resize((64, 64), Image.Resampling.BILINEAR)) / 255
        expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert np.allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)

    def test_masks_of_a_batch_equal_those_one_by_one(self, segmenter):
        pixels = torch.stack([segmenter.preprocess(picture(seed=n)) for n in range(3)])
        prompts = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0))
        index = torch.tensor([2, 0, 0, 1, 2])
        with torch.no_grad():
            joined = segmenter.decode(segmenter.encode(pixels), prompts, index)
            for n, image in enumerate(index.tolist()):
                features = segmenter.encode(pixels[image : image + 1])
                one = segmenter.decode(features, prompts[n : n + 1], torch.zeros(1, dtype=torch.long))
                assert torch.allclose(joined[n], one[0], atol=1e-4)

    def test_a_first_guess_goes_where_sam2_puts_it(self, segmenter):
        """As SAM 2's own prompt encoder and decoder take a mask prompt beside points, called directly."""
        features = segmenter.encode(torch.stack([segmenter.preprocess(picture(seed=n)) for n in range(2)]))
        generator = torch.Generator().manual_seed(0)
        guess = torch.randn(3, 1, 16, 16, generator=generator, requires_grad=True)
        prompts, index = torch.randn(3, 2, 32, generator=generator), torch.tensor([1, 0, 1])
        logits = segmenter.decode(features, prompts, index, mask_prompt=guess)
        encoder, decoder = segmenter.sam.sam_prompt_encoder, segmenter.sam.sam_mask_decoder
        _, dense = encoder(points=None, boxes=None, masks=guess)
        embedding, stride8, stride4 = features.tensors
        expected, *_ = decoder(
            image_embeddings=embedding[index],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=prompts,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=[decoder.conv_s0(stride4[index]), decoder.conv_s1(stride8[index])],
        )
        torch.testing.assert_close(logits, expected[:, 0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, segmenter.decode(features, prompts, index), atol=1e-4)
        assert torch.autograd.grad(logits.sum(), guess)[0].any()
        none = segmenter.decode(features, prompts[:0], index[:0], mask_prompt=guess[:0])
        assert none.shape == (0, 16, 16)
        with pytest.raises(SegRLError, match=r"mask_prompt: expected .* \(3, 1, 16, 16\), got \(3, 16, 16\)"):
            segmenter.decode(features, prompts, index, mask_prompt=guess[:, 0])

    def test_no_masks(self, segmenter):
        features = segmenter.encode(segmenter.preprocess(picture())[None])
        nothing = torch.zeros(0, dtype=torch.long)
        assert segmenter.decode(features, torch.zeros(0, 1, 32), nothing).shape == (0, 16, 16)
        assert segmenter.decode_boxes(features, torch.zeros(0, 4), nothing).shape == (0, 16, 16)

    def test_features_are_split_joined_and_moved(self, segmenter):
        features = segmenter.encode(torch.stack([segmenter.preprocess(picture(seed=n)) for n in range(3)]))
        assert len(features) == 3
        joined = ImageFeatures.cat([features[2:3], features[[0, 1]]])
        for one, three in zip(joined.tensors, features.tensors, strict=True):
            assert torch.equal(one, three[[2, 0, 1]])
        assert {tensor.dtype for tensor in features.to(torch.float64).tensors} == {torch.float64}

    @pytest.mark.parametrize("encoder", [True, False])
    def test_freeze(self, encoder):
        segmenter = tiny_segmenter()
        segmenter.freeze(encoder=encoder)
        logits = segmenter.decode(
            segmenter.encode(segmenter.preprocess(picture())[None]),
            torch.randn(1, 1, 32, requires_grad=True),
            torch.zeros(1, dtype=torch.long),
        )
        logits.square().sum().backward()
        trains = {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}
        for part in (
            "prompt_encoder",
            "memory_",
            "obj_ptr",
            "no_mem",
            "maskmem",
            "iou_prediction_head",
            "pred_obj_score_head",
        ):
            assert not any(part in name for name in trains), part
        assert any("mask_decoder" in name for name in trains)
        assert any("image_encoder" in name for name in trains) is not encoder
        without = [n for n, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
        # SAM 2's decoder has further mask tokens and their networks, which one mask per prompt does not use
        assert all("output_hypernetworks_mlps" in name or "neck" in name for name in without), without

    def test_the_config_rebuilds_the_architecture(self, segmenter):
        config = json.loads(json.dumps(segmenter.to_config()))
        again = Sam2Segmenter.from_config(config, tokenizer=None)
        assert again.config == segmenter.config
        again.load_state_dict(segmenter.state_dict())

    def test_unknown_size(self):
        with pytest.raises(
            UnknownNameError, match=r"unknown SAM 2 size 'sam2\.1_hiera_t'; did you mean 'sam2\.1_hiera_tiny'"
        ):
            sam2_config("sam2.1_hiera_t")

    @pytest.mark.parametrize("size", [0, -32, 500])
    def test_bad_image_size(self, size):
        with pytest.raises(SegRLError, match=f"image_size={size}: .* positive multiple of 32 pixels"):
            Sam2Config(image_size=size)

    def test_bad_width(self):
        with pytest.raises(SegRLError, match="hidden_dim=60: must be a multiple of 8"):
            Sam2Config(hidden_dim=60)


class _Code:
    """Unpickling this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestCheckpoint:
    def write(self, path, state):
        torch.save({"model": state}, path)
        return path

    def test_a_published_layout_loads_with_identical_weights(self, tmp_path):
        source = tiny_segmenter(seed=3)
        path = self.write(tmp_path / "MedSAM2_latest.pt", source.sam.state_dict())
        for given in (path, str(path)):
            loaded = Sam2Segmenter.from_pretrained(given, tiny_sam2_config())
            expected = source.state_dict()
            assert loaded.state_dict().keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())

    def test_a_bare_state_dict_loads(self, tmp_path):
        source = tiny_segmenter(seed=3)
        torch.save(source.sam.state_dict(), tmp_path / "a.pt")
        loaded = Sam2Segmenter.from_pretrained(tmp_path / "a.pt", tiny_sam2_config())
        assert torch.equal(loaded.sam.no_mem_embed, source.sam.no_mem_embed)

    @pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
    def test_what_does_not_fit_is_named(self, problem, tmp_path):
        state = tiny_segmenter().sam.state_dict()
        if problem == "missing":
            del state["sam_mask_decoder.iou_token.weight"]
            message = r"\(1 parameters\): missing sam_mask_decoder\.iou_token\.weight\. Pass the config"
        elif problem == "unexpected":
            state["image_encoder.extra"] = torch.ones(2)
            message = r"\(1 parameters\): unexpected image_encoder\.extra\. Pass the config"
        else:
            state["no_mem_embed"] = torch.ones(1, 1, 5)
            message = r"no_mem_embed has shape \(1, 1, 5\), expected \(1, 1, 32\)"
        path = self.write(tmp_path / "a.pt", state)
        with pytest.raises(CheckpointError, match=message):
            Sam2Segmenter.from_pretrained(path, tiny_sam2_config())

    def test_weights_of_another_size_are_an_error_that_counts_them(self, tmp_path):
        path = self.write(tmp_path / "a.pt", tiny_segmenter().sam.state_dict())
        with pytest.raises(
            CheckpointError, match=r"does not fit Sam2Config\(image_size=64, embed_dim=24.*parameters\)"
        ):
            Sam2Segmenter.from_pretrained(path, tiny_sam2_config(embed_dim=24))

    @pytest.mark.parametrize("form", ["torch", "plain pickle"])
    def test_a_pickle_with_code_is_refused_and_not_run(self, form, tmp_path):
        path, made = tmp_path / "a.pt", tmp_path / "made by the checkpoint"
        content = {"model": {"no_mem_embed": _Code(made)}}
        if form == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError, match=r"a\.pt: refused, since it is not a plain weights file"):
            Sam2Segmenter.from_pretrained(path, tiny_sam2_config())
        assert not made.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "a.pt: "),
            (b"<html>not found</html>", "a.pt: "),
            ([1, 2], "expected a dict of tensors, or one under the key 'model'"),
            ({"model": {"a": 1}}, "expected a dict of tensors, or one under the key 'model'"),
            ({"model": 3}, "expected a dict of tensors, or one under the key 'model'"),
        ],
    )
    def test_what_is_no_checkpoint_is_an_error(self, content, message, tmp_path):
        path = tmp_path / "a.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            Sam2Segmenter.from_pretrained(path, tiny_sam2_config())

    def test_a_truncated_file_is_an_error(self, tmp_path):
        path = self.write(tmp_path / "a.pt", tiny_segmenter().sam.state_dict())
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(CheckpointError, match=r"a\.pt: "):
            Sam2Segmenter.from_pretrained(path, tiny_sam2_config())

    @pytest.mark.parametrize("name", ["nowhere.pt", "."])
    def test_a_missing_file_is_an_error(self, name, tmp_path):
        with pytest.raises(CheckpointError, match=r"SAM 2 checkpoint .* does not exist\. Pass the path of a \.pt file"):
            Sam2Segmenter.from_pretrained(tmp_path / name, tiny_sam2_config())


class TestFolder:
    def test_weights_and_config_come_back(self, tmp_path):
        made = tiny_segmenter(seed=3, num_maskmem=5)
        made.save_pretrained(str(tmp_path / "new" / "folder"))
        loaded = Sam2Segmenter.from_pretrained(tmp_path / "new" / "folder")
        assert loaded.config == made.config
        expected = made.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, parameter in made.named_parameters() if not parameter.requires_grad}

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", "not JSON"),
            ("[1]", "holds a list, expected a JSON object"),
            ('{"image_size": 65}', "positive multiple of 32"),
            ('{"image_sizes": 64}', "image_sizes"),
            ('{"image_size": "64"}', "image_size='64': expected whole numbers"),
            ('{"embed_dim": 1000000000}', "embed_dim: 1000000000 is more than segmenter.safetensors can hold"),
        ],
    )
    def test_a_config_that_is_none(self, config, message, tmp_path):
        tiny_segmenter().save_pretrained(tmp_path)
        (tmp_path / SEGMENTER_CONFIG).write_text(config)
        with pytest.raises(CheckpointError, match=message) as error:
            Sam2Segmenter.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)

    def test_weights_of_another_config(self, tmp_path):
        tiny_segmenter().save_pretrained(tmp_path)
        config = json.loads((tmp_path / SEGMENTER_CONFIG).read_text())
        (tmp_path / SEGMENTER_CONFIG).write_text(json.dumps({**config, "embed_dim": 24}))
        with pytest.raises(CheckpointError, match=r"segmenter\.safetensors: does not fit .* instead of"):
            Sam2Segmenter.from_pretrained(tmp_path)

    def test_weights_are_missing(self, tmp_path):
        tiny_segmenter().save_pretrained(tmp_path)
        (tmp_path / SEGMENTER_WEIGHTS).unlink()
        with pytest.raises(CheckpointError, match=r"segmenter\.safetensors: cannot be read"):
            Sam2Segmenter.from_pretrained(tmp_path)

    def test_the_folder_brings_its_own_config(self, tmp_path):
        made = tiny_segmenter()
        made.save_pretrained(tmp_path)
        assert Sam2Segmenter.from_pretrained(tmp_path, tiny_sam2_config(embed_dim=24)).config == made.config

    def test_it_can_be_saved_over_another(self, tmp_path):
        for seed in (1, 2):
            tiny_segmenter(seed).save_pretrained(tmp_path)
        loaded = Sam2Segmenter.from_pretrained(tmp_path).sam
        assert torch.equal(loaded.no_mem_embed, tiny_segmenter(2).sam.no_mem_embed)
        assert {path.name for path in tmp_path.iterdir()} == {SEGMENTER_CONFIG, SEGMENTER_WEIGHTS}
