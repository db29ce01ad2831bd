"""`VolumePropagator` against the `sam2` package's own video predictor, and what it promises about work and memory."""

import copy
import types

import numpy as np
import pytest
import sam2.sam2_video_predictor as package
import torch
from builders import NewObjects, tiny_segmenter
from hypothesis import given, settings
from hypothesis import strategies as st

from segrl.caching import FeatureCache
from segrl.errors import SegRLError
from segrl.segmenters import ImageFeatures, PropagationRequest, VolumePropagator, track_clip

BOXES = [[4.0, 6.0, 30.0, 33.0], [20.0, 10.0, 50.0, 45.0], [0.0, 0.0, 56.0, 48.0]]


def ready(seed=0, volume=None):
    """Random weights that are large enough for boxes, memories and pointers to matter; the score of an object is such
    that those on BOXES in the middle of `volume` come and go."""
    segmenter = tiny_segmenter(seed).eval()
    volume = volume_of(10) if volume is None else volume
    with torch.no_grad():
        for name, parameter in segmenter.sam.named_parameters():
            if parameter.ndim > 1 and not name.startswith("image_encoder."):
                parameter *= 2.5  # at 3 the network becomes chaotic: rounding grows from frame to frame
        images = torch.stack([segmenter.preprocess(piece) for piece in volume])[None].expand(3, -1, -1, -1, -1)
        boxes = torch.tensor(BOXES) / torch.tensor([56, 48, 56, 48])
        clip = track_clip(segmenter, images, boxes, key=len(volume) // 2)
        scores = torch.cat([masks.object_scores for masks in clip]).sort().values
        between = scores[len(scores) // 2 - 1 :][:2].mean()  # a score at 0 would be decided by rounding
        segmenter.sam.sam_mask_decoder.pred_obj_score_head.layers[-1].bias -= between
    return segmenter


def volume_of(depth, height=48, width=56, seed=0):
    """Smooth noise that changes from slice to slice."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, max(2, depth // 2), 6, 7), dtype=np.float32))
    fine = torch.nn.functional.interpolate(coarse, size=(depth, height, width), mode="trilinear")[0, 0].numpy()
    return (255 * fine + rng.integers(-9, 10, fine.shape)).clip(0, 255).astype(np.uint8)


def ask(volume, slice_index, boxes, key=""):
    return PropagationRequest(volume, key, slice_index, np.array(boxes, dtype=np.float64).reshape(-1, 4))


class Oracle:
    """The package's predictor on a segmenter's modules, one state per request and direction, memory in float32."""

    def __init__(self, segmenter, monkeypatch, postprocessing=True):
        self.segmenter = segmenter
        monkeypatch.setattr(package, "load_video_frames", lambda video_path, **_: video_path)
        # it stores memories as bfloat16
        monkeypatch.setattr(package, "torch", types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32}))
        predictor = copy.deepcopy(segmenter.sam)
        predictor.__class__ = package.SAM2VideoPredictor
        predictor.fill_hole_area, predictor.non_overlap_masks = 0, False
        predictor.clear_non_cond_mem_around_input = predictor.add_all_frames_to_correct_as_cond = False
        if postprocessing:  # the overrides of sam2.build_sam.build_sam2_video_predictor
            predictor.binarize_mask_from_pts_for_mem_enc = True
            predictor.sam_mask_decoder.dynamic_multimask_via_stability = True
            predictor.sam_mask_decoder.dynamic_multimask_stability_delta = 0.05
            predictor.sam_mask_decoder.dynamic_multimask_stability_thresh = 0.98
        self.predictor = predictor

    def __call__(self, request, reach):
        """Logits (N, D, H, W), minus infinity where nothing was propagated."""
        depth, height, width = request.volume.shape
        frames = torch.stack([self.segmenter.preprocess(piece) for piece in request.volume])
        logits = torch.full((len(request.boxes), depth, height, width), -torch.inf)
        for reverse in (False, True):
            state = self.predictor.init_state((frames, height, width))
            for number, box in enumerate(request.boxes):
                self.predictor.add_new_points_or_box(state, request.slice_index, number, box=box)
            steps = depth if reach is None else reach
            ways = self.predictor.propagate_in_video(state, request.slice_index, steps, reverse)
            for index, _, masks in ways:
                logits[:, index] = masks[:, 0]
        return logits


def assert_same(mask, logits):
    """Equal wherever the oracle's logit is not within rounding of the threshold."""
    union = logits.amax(0).numpy()
    wrong = (mask != (union > 0)) & (np.abs(union) > 1e-3)
    assert not wrong.any(), f"{wrong.sum()} of {(union > 0).sum()} voxels"


class TestAgainstThePackage:
    @pytest.mark.slow
    @pytest.mark.parametrize("postprocessing", [True, False])
    @pytest.mark.parametrize(("depth", "index"), [(18, 0), (19, 18), (20, 8), (6, 2), (1, 0)])
    def test_whole_volume(self, monkeypatch, depth, index, postprocessing):
        volume = volume_of(depth)
        segmenter, request = ready(0, volume), ask(volume, index, BOXES)
        (mask,) = VolumePropagator(segmenter, reach=None, postprocessing=postprocessing)([request])
        logits = Oracle(segmenter, monkeypatch, postprocessing)(request, None)
        assert_same(mask, logits)

    def test_the_oracle_sees_objects_come_and_go(self, monkeypatch):
        volume = volume_of(20)
        logits = Oracle(ready(0, volume), monkeypatch)(ask(volume, 8, BOXES), None)
        seen = (logits > 0).flatten(2).any(2)
        assert 0.2 < seen.float().mean() < 1
        assert 0.05 < (logits[seen] > 0).float().mean() < 0.95
        assert logits[seen].std() > 0.3

    @pytest.mark.long
    @pytest.mark.parametrize(("reach", "batch_size"), [(0, 16), (2, 2), (5, 16), (50, 3)])
    def test_several_answers_about_volumes_of_different_depth(self, monkeypatch, reach, batch_size):
        long, short = volume_of(22, seed=1), volume_of(7, 40, 40, seed=2)
        segmenter = ready(0, long)
        requests = [
            ask(long, 3, BOXES[:2]),
            ask(short, 6, [[3, 3, 30, 20]]),
            ask(long, 21, []),
            ask(long, 12, BOXES[1:]),
            ask(volume_of(18, seed=3), 9, BOXES[:1]),
            ask(short, 0, [[10, 12, 39, 31], [1, 1, 20, 20]]),
        ]
        masks = VolumePropagator(segmenter, reach=reach, batch_size=batch_size)(requests)
        oracle = Oracle(segmenter, monkeypatch)
        assert not masks[2].any()
        for request, mask in zip(requests, masks, strict=True):
            if len(request.boxes):
                assert_same(mask, oracle(request, reach))

    @pytest.mark.long
    @settings(max_examples=8)
    @given(data=st.data())
    def test_any_depth_key_and_box(self, data):
        depth = data.draw(st.integers(1, 20))
        index = data.draw(st.integers(0, depth - 1))
        reach = data.draw(st.sampled_from([None, 0, 1, 4, 17]))
        boxes = [
            (x0 := data.draw(st.integers(0, 50)), y0 := data.draw(st.integers(0, 40)),
             data.draw(st.integers(x0 + 1, 56)), data.draw(st.integers(y0 + 1, 48)))
            for _ in range(data.draw(st.integers(1, 2)))
        ]  # fmt: skip
        volume = volume_of(depth, seed=depth)
        segmenter, request = ready(1, volume), ask(volume, index, boxes)
        (mask,) = VolumePropagator(segmenter, reach=reach)([request])
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert_same(mask, Oracle(segmenter, monkeypatch)(request, reach))


class TestWork:
    def test_a_slice_is_encoded_once_for_all_answers(self):
        volume, segmenter = volume_of(30), ready()
        requests = [ask(volume, index, BOXES[:2]) for index in (10, 11, 11, 14)]
        propagator = VolumePropagator(segmenter, batch_size=4)
        propagator(requests)
        assert propagator.encoded_slices == len(range(5, 20))

    def test_equal_keys_are_one_volume(self):
        propagator = VolumePropagator(ready(), reach=2)
        propagator([ask(volume_of(9), 4, BOXES[:1], "a"), ask(volume_of(9), 4, BOXES[1:], "a")])
        assert propagator.encoded_slices == 5

    def test_a_cache_keeps_slices_of_a_key_across_calls(self, tmp_path):
        cache, volume, segmenter = FeatureCache(), volume_of(12), ready()
        propagator = VolumePropagator(segmenter, reach=2, cache=cache)
        first = propagator([ask(volume, 5, BOXES, "a")])
        assert propagator.encoded_slices == 5
        again = propagator([ask(volume, 5, BOXES, "a"), ask(volume, 7, BOXES, "a")])
        assert propagator.encoded_slices == 7
        assert np.array_equal(again[0], first[0])
        propagator([ask(volume, 5, BOXES), ask(volume, 5, BOXES, "b")])
        assert propagator.encoded_slices == 17

    def test_features_on_disk_serve_another_run(self, tmp_path):
        found = []
        for _ in range(2):
            propagator = VolumePropagator(ready(), cache=FeatureCache(0, tmp_path, 10**9))
            found.append(propagator([ask(volume_of(12), 5, BOXES, "a")])[0])
            found.append(propagator.encoded_slices)
        assert found[1::2] == [11, 0]
        assert np.array_equal(found[0], found[2])

    @pytest.mark.parametrize("part", ["image_encoder.neck.convs.0.conv.bias", "sam_mask_decoder.conv_s0.weight"])
    def test_changed_weights_are_not_answered_from_the_cache(self, part):
        segmenter, request = ready(), ask(volume_of(12), 5, BOXES, "a")
        propagator = VolumePropagator(segmenter, cache=FeatureCache())
        before = propagator([request])[0]
        with torch.no_grad():
            segmenter.sam.get_parameter(part).add_(torch.randn(segmenter.sam.get_parameter(part).shape))
        after = propagator([request])[0]
        assert propagator.encoded_slices == 22
        assert np.array_equal(after, VolumePropagator(segmenter)([request])[0])
        assert not np.array_equal(after, before)

    def test_autocast_has_features_of_its_own(self):
        propagator = VolumePropagator(ready(), reach=1, cache=FeatureCache())
        request = ask(volume_of(4), 2, BOXES, "a")
        single = propagator([request])[0]
        with torch.autocast("cpu", torch.bfloat16):
            half, again = (propagator([request])[0] for _ in range(2))
        assert propagator.encoded_slices == 6
        assert np.array_equal(half, again)
        assert np.array_equal(propagator([request])[0], single)
        assert propagator.encoded_slices == 6

    @pytest.mark.slow
    def test_only_slices_in_flight_and_what_sam_2_looks_back_at_are_alive(self):
        features, alive = [], []
        new_features, new_tensors = NewObjects(ImageFeatures), NewObjects(torch.Tensor)

        def look(*_):
            features.append(len(new_features()))
            alive.append(sum(thing.nbytes for thing in new_tensors()))

        propagator = VolumePropagator(ready(), reach=None)
        propagator([ask(volume_of(60), 30, BOXES)], progress=look)
        assert len(features) == 31
        assert propagator.encoded_slices == 60
        assert max(features) <= 2
        assert alive[1] < alive[16]
        assert max(alive[16:]) == alive[16]

    def test_progress(self):
        calls = []
        volume = volume_of(9)
        VolumePropagator(ready(), reach=3, batch_size=1)(
            [ask(volume, 4, BOXES[:1]), ask(volume, 8, BOXES[:1]), ask(volume_of(2), 0, BOXES)],
            progress=lambda *numbers: calls.append(numbers),
        )
        assert calls[-1] == (10, 10)
        assert calls == sorted(calls)


class TestCall:
    def test_nothing_asked(self):
        assert VolumePropagator(ready())([]) == []

    @pytest.mark.parametrize("boxes", [[], [[5, 5, 5, 20]], [[5, 20, 15, 10]], [[60, 0, 80, 20]], [[-9, -9, 0, 5]]])
    def test_no_box_with_an_area_inside_the_slice_gives_an_empty_mask(self, boxes):
        propagator = VolumePropagator(ready())
        (mask,) = propagator([ask(volume_of(5), 2, boxes)])
        assert mask.shape == (5, 48, 56)
        assert mask.dtype == bool
        assert not mask.any()
        assert propagator.encoded_slices == 0

    def test_boxes_are_cut_at_the_edge(self):
        propagator, volume = VolumePropagator(ready()), volume_of(5)
        inside, outside = propagator([ask(volume, 2, [[0, 0, 56, 30]]), ask(volume, 2, [[-1e9, -4, 99, 30]])])
        assert np.array_equal(inside, outside)

    def test_the_mask_is_the_union_over_boxes(self):
        propagator, volume = VolumePropagator(ready()), volume_of(8)
        together, *single = propagator([ask(volume, 3, BOXES), *(ask(volume, 3, [box]) for box in BOXES)])
        assert np.array_equal(together, np.logical_or.reduce(single))
        assert any(not np.array_equal(together, one) for one in single)

    def test_the_segmenter_stays_as_it_was(self):
        segmenter = ready().train()
        segmenter.sam.memory_attention.eval()
        segmenter.freeze(encoder=True)
        sam, decoder = segmenter.sam, segmenter.sam.sam_mask_decoder

        def state():
            flags = sam.binarize_mask_from_pts_for_mem_enc, decoder.dynamic_multimask_via_stability
            parts = [part.training for part in segmenter.modules()]
            return flags, parts, [p.requires_grad for p in segmenter.parameters()], torch.is_grad_enabled()

        before = state()
        propagator = VolumePropagator(segmenter)
        first, second = (propagator([ask(volume_of(8), 3, BOXES)])[0] for _ in range(2))
        assert np.array_equal(first, second)
        assert state() == before

        def stop(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            propagator([ask(volume_of(8), 3, BOXES)], progress=stop)
        assert state() == before
        assert all(parameter.grad is None for parameter in segmenter.parameters())

    def test_inside_inference_mode_and_out_of_it(self):
        propagator = VolumePropagator(ready(), cache=FeatureCache())
        request = ask(volume_of(8), 3, BOXES, "a")
        with torch.inference_mode():
            inside = propagator([request])[0]
        assert np.array_equal(inside, propagator([request])[0])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"volume": np.zeros((3, 4, 5))}, r"volume: expected uint8 \(D, H, W\), got float64 \(3, 4, 5\)"),
            ({"volume": np.zeros((4, 5), np.uint8)}, r"got uint8 \(4, 5\); scale it with segrl\.data"),
            ({"volume": np.zeros((0, 4, 5), np.uint8)}, r"got uint8 \(0, 4, 5\)"),
            ({"slice_index": -1}, r"slice_index=-1: expected 0\.\.2; leave out answers that name no slice"),
            ({"slice_index": 3}, r"slice_index=3: expected 0\.\.2"),
            ({"boxes": np.zeros(4)}, r"boxes: expected \(N, 4\) numbers, got shape \(4,\)"),
            ({"boxes": np.array([[0, 0, np.nan, 1]])}, r"boxes: expected \(N, 4\) numbers, got .* nan"),
        ],
    )
    def test_bad_requests(self, change, message):
        good = {"volume": np.zeros((3, 4, 5), np.uint8), "key": "", "slice_index": 1, "boxes": np.zeros((0, 4))}
        with pytest.raises(SegRLError, match=message):
            PropagationRequest(**{**good, **change})

    def test_one_key_for_two_shapes(self):
        with pytest.raises(SegRLError, match=r"request 1: key 'a' with a volume of shape \(6, 48, 56\), but .*\(5, 48"):
            VolumePropagator(ready())([ask(volume_of(5), 2, BOXES, "a"), ask(volume_of(6), 2, BOXES, "a")])

    @pytest.mark.parametrize(
        ("setting", "message"), [({"reach": -1}, "reach=-1: .* None"), ({"batch_size": 0}, "=0: .*1 or")]
    )
    def test_bad_settings(self, setting, message):
        with pytest.raises(SegRLError, match=message):
            VolumePropagator(ready(), **setting)
