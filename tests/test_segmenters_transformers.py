"""SAM, SAM 2 and SAM 3's tracker of `transformers` against the models' own forwards, and SAM 2 against `sam2`."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from builders import tiny_model, tiny_segmenter
from PIL import Image

from segrl.errors import CheckpointError, UnknownNameError
from segrl.heads import MaskHead
from segrl.models import ensure_seg_token
from segrl.segmenters import (
    Sam2TransformersSegmenter,
    Sam3TrackerSegmenter,
    SamSegmenter,
    Segmenter,
    load_segmenter,
    save_segmenter,
)

PROMPTS = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
DECODER = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 2}


def small_config(kind: type, levels: int = 3) -> Any:
    """Sizes of `tiny_segmenter`: 64 px in, masks of 16 px, prompts 32 wide."""
    if kind is SamSegmenter:
        vision = {
            **{"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 64, "patch_size": 16, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 64},
            "num_pos_feats": 16,
        }
        return transformers.SamConfig(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    if kind is Sam2TransformersSegmenter:
        backbone = {
            **{"model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [64, 64]},
            **{"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128]},
            **{"num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 4, 2]},
            **{"global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4]},
        }
        vision = {
            **{"model_type": "sam2_vision_model", "backbone_config": backbone, "fpn_hidden_size": 32},
            **{"backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        }
        return transformers.Sam2Config(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    backbone = {
        **{"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1]},
        "pretrain_image_size": 32,
    }
    vision = {
        **{"model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": 32},
        **{"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "scale_factors": [4.0, 2.0, 1.0, 0.5][:levels]},
    }
    return transformers.Sam3TrackerConfig(
        vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER
    )


def small(kind: type, seed: int = 0, **settings: Any) -> Any:
    """A segmenter whose weights are large enough for its masks to differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(small_config(kind), **settings)
        for name, parameter in made.named_parameters():
            if "norm" not in name and "positional" not in name:
                torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5)
    return made.eval()


KINDS = [SamSegmenter, Sam2TransformersSegmenter, Sam3TrackerSegmenter]
every_kind = pytest.mark.parametrize("kind", KINDS)
BOXES = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8], [0.0, 0.0, 1.0, 1.0]])
INDEX = torch.tensor([0, 0, 1])


@every_kind
def test_masks_of_boxes_are_the_models_own(kind):
    segmenter: Any = small(kind)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert isinstance(small(kind), Segmenter)
    assert (segmenter.image_size, segmenter.mask_size, segmenter.prompt_dim) == (64, 16, 32)
    with torch.no_grad():
        found = segmenter.decode_boxes(segmenter.encode(images), BOXES, INDEX)
        boxes = (BOXES * 64)[:, None]
        theirs = segmenter.sam(pixel_values=images[INDEX], input_boxes=boxes, multimask_output=False).pred_masks
    assert found.shape == (3, 16, 16)
    torch.testing.assert_close(found, theirs[:, 0, 0], rtol=0, atol=1e-4)
    assert 0.02 < (found > 0).float().mean() < 0.98
    assert not torch.equal(found[0] > 0, found[1] > 0)


POINTS = torch.tensor([[[0.2, 0.3], [0.4, 0.5]], [[0.5, 0.5], [0.6, 0.7]], [[0.1, 0.9], [0.5, 0.2]]])


@every_kind
@pytest.mark.parametrize("boxed", [True, False], ids=["boxes and points", "points alone"])
def test_masks_of_points_are_the_models_own(kind, boxed):
    segmenter: Any = small(kind)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = BOXES if boxed else None
    with torch.no_grad():
        found = segmenter.decode_boxes(segmenter.encode(images), boxes, INDEX, points=POINTS)
        theirs = segmenter.sam(
            pixel_values=images[INDEX],
            input_boxes=(BOXES * 64)[:, None] if boxed else None,
            input_points=(POINTS * 64)[:, None],
            input_labels=torch.ones(3, 1, 2, dtype=torch.int),
            multimask_output=False,
        ).pred_masks
        without = segmenter.decode_boxes(segmenter.encode(images), BOXES, INDEX)
    torch.testing.assert_close(found, theirs[:, 0, 0], rtol=0, atol=1e-4)
    assert not torch.equal(found > 0, without > 0)


def test_a_fourth_level_of_sam3_is_not_read():
    """Its coarsest level is dropped, as in the published code; the others are those of a pyramid of three."""
    torch.manual_seed(0)
    three, four = small(Sam3TrackerSegmenter), Sam3TrackerSegmenter(small_config(Sam3TrackerSegmenter, 4)).eval()
    four.sam.load_state_dict(three.sam.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        one, other = three.encode(images).tensors, four.encode(images).tensors
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sam2_has_equal_masks_through_both_packages():
    ours, theirs = tiny_segmenter(seed=3).eval(), small(Sam2TransformersSegmenter)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    missing, unexpected = theirs.sam.load_state_dict(renamed(ours.sam.state_dict()), strict=False)
    assert unexpected == []
    assert missing == []
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = ours.encode(images), theirs.encode(images)
        for one, other in zip(features[0].tensors, features[1].tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for masks in (
            [
                segmenter.decode_boxes(found, BOXES, INDEX)
                for segmenter, found in zip((ours, theirs), features, strict=True)
            ],
            *[
                [
                    segmenter.decode_boxes(found, boxes, INDEX, points=POINTS)
                    for segmenter, found in zip((ours, theirs), features, strict=True)
                ]
                for boxes in (BOXES, None)
            ],
            [
                segmenter.decode(found, prompts, INDEX)
                for segmenter, found in zip((ours, theirs), features, strict=True)
            ],
        ):
            torch.testing.assert_close(masks[0], masks[1], rtol=1e-3, atol=1e-4)
            assert torch.equal(masks[0] > 0, masks[1] > 0)
            assert (masks[0] > 0).any()


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """Weights of the `sam2` package under the names of `transformers`, those of the memory left out."""
    places = "shared_image_embedding.positional_embedding"
    rules = [
        (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", places),
        *[
            (rf"^sam_prompt_encoder\.mask_downscaling\.{number}\.", f"prompt_encoder.mask_embed.{name}.")
            for number, name in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))
        ],
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        *[
            (rf"\.output_upscaling\.{number}\.", f".{name}.")
            for number, name in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))
        ],
        (r"\.out_proj\.", ".o_proj."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head)\.layers\.2\.", r"\1.proj_out."),
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        (r"^no_mem_embed$", "no_memory_embedding"),
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        found[new] = value
    points = [found.pop(f"prompt_encoder.point_embeddings.{n}.weight") for n in range(4)]
    found["prompt_encoder.point_embed.weight"] = torch.cat(points)
    found["prompt_encoder.shared_embedding.positional_embedding"] = found[places]
    memory = ("memory", "mask_downsample", "obj_ptr", "no_obj", "maskmem", "no_mem_pos")
    return {name: value for name, value in found.items() if not name.startswith(memory)}


# ---- files of SAM's own code -----------------------------------------------------------------------------------------


def original(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the original code gave for given weights, and these weights, which are drawn from their names.

    The files were written with facebookresearch/segment-anything at dca509f and OpenGVLab/SAM-Med2D at bfd2b93.
    """
    fixture = json.loads((Path(__file__).parent / "fixtures" / f"{name}_original.json").read_text())
    return fixture, {key: weight(key, tuple(shape)) for key, shape in fixture["shapes"].items()}


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
    values = rng.standard_normal(shape)
    if "norm" in name.lower() and len(shape) == 1 and name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.3 * values if len(shape) < 2 else values * 2.0 / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(values).float()


@pytest.mark.parametrize(("name", "layout"), [("sam", "plain"), ("med2d", "model"), ("med2d", "plain")])
def test_files_of_sams_own_code(tmp_path, name, layout):
    fixture, state = original(name)
    path = tmp_path / f"{name}.pth"
    torch.save(state if layout == "plain" else {"model": state, "epoch": 3}, path)
    segmenter = SamSegmenter.from_pretrained(path)
    assert (segmenter.image_size, segmenter.mask_size, segmenter.prompt_dim) == (64, 16, 16)
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 64, 64))).float()
    with torch.no_grad():
        found = segmenter.decode_boxes(
            segmenter.encode(images), torch.tensor(fixture["boxes"]), torch.tensor(fixture["index"])
        )
    torch.testing.assert_close(found, torch.tensor(fixture["masks"]), rtol=0, atol=1e-4)
    assert found.std() > 0.5
    again = SamSegmenter.from_config(json.loads(json.dumps(segmenter.to_config())))
    again.load_state_dict(segmenter.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval().encode(images).tensors[0], segmenter.encode(images).tensors[0])


def test_files_that_do_not_fit_are_refused(tmp_path):
    _, state = original("sam")
    path = tmp_path / "sam.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no weights of SAM's own code, image_encoder\.pos_embed is missing"):
        SamSegmenter.from_pretrained(path)
    torch.save({key: value for key, value in state.items() if key != "mask_decoder.mask_tokens.weight"}, path)
    with pytest.raises(CheckpointError, match=r"weights are missing \['mask_decoder\.mask_tokens\.weight'\]"):
        SamSegmenter.from_pretrained(path)
    torch.save({**state, "more": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"or left over \['more'\]"):
        SamSegmenter.from_pretrained(path)
    torch.save(Path, path)
    with pytest.raises(CheckpointError, match=r"sam\.pth: refused, since it is not a plain weights file"):
        SamSegmenter.from_pretrained(path)


@every_kind
def test_no_masks_of_no_prompts(kind):
    segmenter = small(kind)
    features = segmenter.encode(torch.zeros(1, 3, 64, 64))
    nothing = torch.zeros(0, dtype=torch.long)
    assert segmenter.decode(features, torch.zeros(0, 2, 32), nothing).shape == (0, 16, 16)
    assert segmenter.decode_boxes(features, torch.zeros(0, 4), nothing).shape == (0, 16, 16)


@every_kind
@pytest.mark.parametrize("encoder", [True, False])
def test_what_a_mask_loss_trains(kind, encoder):
    segmenter = small(kind)
    segmenter.freeze(encoder=encoder)
    features = segmenter.encode(torch.randn(1, 3, 64, 64))
    segmenter.decode(features, torch.randn(2, 1, 32), torch.tensor([0, 0])).sum().backward()
    trained = {name.split(".")[1] for name, p in segmenter.named_parameters() if p.requires_grad}
    assert trained == ({"mask_decoder"} if encoder else {"mask_decoder", "vision_encoder"})
    without = {name for name, p in segmenter.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()


@every_kind
def test_a_run_of_a_head_with_it_is_saved_and_loaded(kind, tmp_path):
    model, processor = tiny_model()
    token = ensure_seg_token(model, processor)
    head = MaskHead.build(model, small(kind), token_id=token, tokenizer=processor.tokenizer).eval()
    head.save_pretrained(tmp_path)
    again = MaskHead.from_pretrained(tmp_path, tokenizer=processor.tokenizer).eval()
    assert type(again.segmenter) is kind
    state = again.state_dict()
    assert state.keys() == head.state_dict().keys()
    for name, value in head.state_dict().items():
        assert torch.equal(state[name], value), name
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        masks = [h.segmenter.decode_boxes(h.segmenter.encode(images), BOXES[:1], INDEX[:1]) for h in (head, again)]
    assert torch.equal(*masks)


@every_kind
def test_weights_of_transformers_are_loaded(kind, tmp_path):
    segmenter = small(kind)
    segmenter.sam.save_pretrained(tmp_path / "weights")
    again = kind.from_pretrained(tmp_path / "weights").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        masks = [s.decode_boxes(s.encode(images), BOXES[:1], INDEX[:1]) for s in (segmenter, again)]
    for name, value in segmenter.sam.state_dict().items():
        assert torch.equal(again.sam.state_dict()[name], value), name
    torch.testing.assert_close(*masks, rtol=1e-4, atol=1e-4)
    other = KINDS[KINDS.index(kind) - 1]
    with pytest.raises(CheckpointError, match=rf"'.*weights' is of {type(small_config(kind)).__name__}, expected"):
        other.from_pretrained(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"segmenter '.*none'"):
        kind.from_pretrained(tmp_path / "none")


def test_weights_that_are_missing_are_named(tmp_path):
    segmenter = small(SamSegmenter)
    state = {name: value for name, value in segmenter.sam.state_dict().items() if "mask_decoder.iou_token" not in name}
    segmenter.sam.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"weights are missing: \['mask_decoder.iou_token.weight'\]"):
        SamSegmenter.from_pretrained(tmp_path)


def test_pixels_are_scaled_as_each_model_was_trained():
    grey = Image.fromarray(np.full((4, 8, 3), 51, dtype=np.uint8))
    grey.paste((204, 204, 204), (4, 0, 8, 4))
    found = {kind: small(kind).preprocess(grey) for kind in KINDS}
    assert all(pixels.shape == (3, 64, 64) for pixels in found.values())
    assert found[SamSegmenter][0, 0, 0] == pytest.approx((0.2 - 0.485) / 0.229)
    assert found[Sam3TrackerSegmenter][:, 0, 0].tolist() == pytest.approx([-0.6] * 3)
    medsam = small(SamSegmenter, scaling="minmax")
    assert [medsam.preprocess(grey)[0, 0, n].item() for n in (0, 63)] == [0, 1]
    assert medsam.preprocess(Image.new("RGB", (4, 4), (9, 9, 9))).abs().max() == 0
    assert SamSegmenter.from_config(medsam.to_config()).scaling == "minmax"
    with pytest.raises(UnknownNameError, match="scaling of pixels 'mean'"):
        small(SamSegmenter, scaling="mean")


def test_processors_of_transformers_scale_alike():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    theirs = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    made = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(small(SamSegmenter).preprocess(pixels), made, rtol=0, atol=1e-5)


@every_kind
def test_any_segmenter_is_kept_in_a_folder(kind, tmp_path):
    made: Any = small(kind, scaling="half")
    save_segmenter(made, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"segmenter.json", "segmenter.safetensors"}
    again = load_segmenter(tmp_path / "kept")
    assert type(again) is kind
    assert again.scaling == "half"
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_segmenters_by_name(tmp_path):
    made: Any = small(SamSegmenter)
    made.sam.save_pretrained(tmp_path / "sam")
    assert isinstance(load_segmenter(f"sam:{tmp_path / 'sam'}"), SamSegmenter)
    tiny_segmenter().save_pretrained(tmp_path / "sam2")
    for name in (f"sam2:{tmp_path / 'sam2'}", tmp_path / "sam2"):
        assert load_segmenter(name).image_size == 64
    with pytest.raises(CheckpointError, match="expected Sam2Config for Sam2TransformersSegmenter"):
        load_segmenter(f"sam2_transformers:{tmp_path / 'sam'}")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_segmenter("nowhere.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "sam9"}, "sam9"),
        ({"scaling": "mean"}, "unknown scaling of pixels 'mean'"),
        ({"adapters": True}, "missing"),
        ({"scaling": None}, "no scaling|scaling"),
    ],
)
def test_a_damaged_segmenter_file(change, message, tmp_path):
    save_segmenter(small(SamSegmenter), tmp_path)
    path = tmp_path / "segmenter.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        load_segmenter(tmp_path)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_keep_their_precision(kind, dtype):
    exact: Any = small(kind)
    cast: Any = torch.nn.Sequential(small(kind)).to(dtype)[0]
    places: Any = [segmenter.sam.get_image_wide_positional_embeddings() for segmenter in (exact, cast)]
    assert torch.equal(*places)
    boxes = (BOXES * 64)[:, None]
    sparse = [
        segmenter.sam.prompt_encoder(input_points=None, input_labels=None, input_boxes=boxes, input_masks=None)[0]
        for segmenter in (exact, cast)
    ]
    # what is learned of corners is rounded; a rounded matrix would move the sines by up to 2
    torch.testing.assert_close(*sparse, atol=0.05, rtol=0.02)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        assert cast.decode_boxes(cast.encode(images), BOXES, INDEX, points=POINTS).dtype == dtype
