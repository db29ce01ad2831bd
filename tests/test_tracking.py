"""`Tracker`, `track_clip` and `tracking_loss`: memory, gradients, and SAM 2's objective written out slowly."""

import pytest
import torch
from builders import tiny_segmenter
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from segrl.errors import SegRLError
from segrl.segmenters import FrameMasks, track_clip, tracking_loss
from segrl.segmenters.tracking import Tracker

BOXES = torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.0, 0.9, 1.0]])


def clips(frames, count=2, seed=0):
    return torch.randn(count, frames, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


class Unpruned(Tracker):
    """Forgets nothing."""

    def _forget(self):
        pass


class TestTracker:
    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}, {"num_maskmem": 2}])
    def test_what_is_forgotten_was_not_looked_up_any_more(self, changes):
        segmenter = tiny_segmenter(**changes).eval()
        with torch.no_grad():
            features = segmenter.encode_frames(clips(24, 1)[0])
            trackers = [kind(segmenter, 24) for kind in (Tracker, Unpruned)]
            for tracker in trackers:
                tracker.start(features[:1], BOXES[:1])
            for frame in range(1, 24):
                one, other = (tracker.step(features[frame : frame + 1]) for tracker in trackers)
                assert torch.equal(one.candidates, other.candidates)
                assert torch.equal(one.object_scores, other.object_scores)
        kept = trackers[0]._followed
        assert len(trackers[1]._followed) == 23
        assert list(kept) == list(range(9, 24))
        whole = [frame for frame, memory in kept.items() if memory.maskmem_features is not None]
        assert whole == list(range(25 - segmenter.config.num_maskmem, 24))

    def test_memories_of_frames_further_back_matter(self):
        """Or the test above would hold for any pruning."""
        segmenter = tiny_segmenter().eval()
        features = segmenter.encode_frames(clips(24, 1)[0])
        found = []
        for dropped in (None, 2, 12):
            tracker = Unpruned(segmenter, 24)
            with torch.no_grad():
                tracker.start(features[:1], BOXES[:1])
                for frame in range(1, 16):
                    tracker.step(features[frame : frame + 1])
                tracker._followed.pop(16 - dropped if dropped else -1, None)
                found.append(tracker.step(features[16:17]).candidates)
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_branches_and_a_shrinking_batch_equal_single_objects(self):
        segmenter = tiny_segmenter().eval()
        with torch.no_grad():
            features = segmenter.encode_frames(clips(8, 1)[0])
            start = Tracker(segmenter, 8)
            start.start(features[[3, 4]], BOXES)
            lanes = [(1, 4, 1), (0, 3, 1), (0, 3, -1)]  # object, frame of its box, way
            tracker = start.branch(torch.tensor([row for row, _, _ in lanes]))
            for step, count in ((1, 3), (2, 3), (3, 2)):
                tracker.keep(count)
                together = tracker.step(features[[frame + way * step for _, frame, way in lanes[:count]]])
                for n, (row, frame, way) in enumerate(lanes[:count]):
                    single = Tracker(segmenter, 8)
                    single.start(features[[frame]], BOXES[[row]])
                    alone = [single.step(features[[frame + way * s]]) for s in range(1, step + 1)][-1]
                    assert torch.allclose(together.candidates[n], alone.candidates[0], atol=1e-5)
                    assert torch.allclose(together.ious[n], alone.ious[0], atol=1e-5)


class TestClip:
    def test_shapes_and_the_chosen_mask(self):
        segmenter = tiny_segmenter().eval()
        clip = track_clip(segmenter, clips(4), BOXES, key=1)
        assert [tuple(masks.candidates.shape) for masks in clip] == [
            (2, 3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 16), (2, 3, 16, 16)
        ]  # fmt: skip
        for masks in clip:
            best = masks.candidates[torch.arange(2), masks.ious.argmax(1)]
            seen = masks.object_scores > 0
            assert masks.object_scores.shape == (2,)
            assert torch.equal(masks.logits, torch.where(seen[:, None, None], best, torch.tensor(-1024.0)))

    def test_before_the_key_is_the_mirror_of_after(self):
        segmenter = tiny_segmenter().eval()
        images = clips(5)
        forwards = track_clip(segmenter, images, BOXES, key=2)
        backwards = track_clip(segmenter, images.flip(1), BOXES, key=2)[::-1]
        for one, other in zip(forwards, backwards, strict=True):
            assert torch.allclose(one.candidates, other.candidates, atol=1e-5)

    def test_a_part_of_a_long_sequence_keeps_its_scale_of_time(self):
        segmenter = tiny_segmenter().eval()
        with torch.no_grad():
            whole = track_clip(segmenter, clips(9), BOXES)
            part = track_clip(segmenter, clips(9)[:, :4], BOXES, num_frames=9)
            other = track_clip(segmenter, clips(9)[:, :4], BOXES)
        for one, same, different in zip(whole[1:4], part[1:], other[1:], strict=True):
            assert torch.allclose(one.candidates, same.candidates, atol=1e-5)
            assert not torch.allclose(one.candidates, different.candidates, atol=1e-5)

    def test_one_frame(self):
        (masks,) = track_clip(tiny_segmenter().eval(), clips(1), BOXES)
        assert masks.logits.shape == (2, 16, 16)

    def test_gradients_reach_everything_that_a_clip_uses(self):
        segmenter = tiny_segmenter().requires_grad_(True).train()
        target = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
        tracking_loss(track_clip(segmenter, clips(3), BOXES), target).sum().backward()
        without = {name.split(".")[1] for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.any()}
        used = {"memory_attention", "memory_encoder", "obj_ptr_proj", "obj_ptr_tpos_proj", "maskmem_tpos_enc"}
        parts = {name.split(".")[1] for name, p in segmenter.named_parameters() if p.grad is not None and p.grad.any()}
        assert used | {"image_encoder", "sam_mask_decoder", "sam_prompt_encoder", "no_mem_embed"} <= parts
        assert without <= {"mask_downsample", "no_mem_pos_enc", "sam_prompt_encoder", "no_obj_ptr",
                           "no_obj_embed_spatial", "image_encoder", "sam_mask_decoder", "maskmem_tpos_enc",
                           "memory_attention"}  # fmt: skip

    def test_a_clip_longer_than_its_sequence(self):
        with pytest.raises(SegRLError, match=r"num_frames=2: expected at least the 3 frames of the clip, or None"):
            track_clip(tiny_segmenter(), clips(3), BOXES, num_frames=2)

    @pytest.mark.parametrize(
        ("images", "boxes", "key", "message"),
        [
            ((2, 3, 32, 32), (2, 4), 0, r"images: expected \(B, T, 3, 64, 64\) with T >= 1, got \(2, 3, 32, 32\)"),
            ((2, 0, 3, 64, 64), (2, 4), 0, r"with T >= 1, got \(2, 0, 3, 64, 64\)"),
            ((2, 3, 3, 64, 64), (3, 4), 0, r"boxes: expected \(2, 4\), one per clip, got \(3, 4\)"),
            ((2, 3, 3, 64, 64), (2, 4), 3, r"key=3: expected a frame of the clip, 0\.\.2"),
        ],
    )
    def test_bad_arguments(self, images, boxes, key, message):
        with pytest.raises(SegRLError, match=message):
            track_clip(tiny_segmenter(), torch.zeros(images), torch.zeros(boxes), key=key)


def slow_loss(clip, target):
    """Pixel by pixel in float64, one object and frame at a time."""
    totals = []
    for b in range(len(target)):
        terms = []
        for masks, truth in zip(clip, target[b], strict=True):
            present = bool(truth.any())
            term = binary_cross_entropy_with_logits(masks.object_scores[b], torch.tensor(float(present)))
            if present:
                losses, errors = [], []
                for candidate, iou in zip(masks.candidates[b], masks.ious[b], strict=True):
                    size = tuple(truth.shape)
                    logits = interpolate(candidate[None, None], size, mode="bilinear", align_corners=False)[
                        0, 0
                    ].double()
                    p = 1 / (1 + torch.exp(-logits))
                    focal = torch.where(truth, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).mean()
                    dice = 1 - (2 * p[truth].sum() + 1) / (p.sum() + truth.sum() + 1)
                    losses.append(20 * focal + dice)
                    errors.append(abs(iou - ((logits > 0) & truth).sum() / ((logits > 0) | truth).sum()))
                term = term + min(losses) + sum(errors) / len(errors)
            terms.append(float(term))
        totals.append(sum(terms) / len(terms))
    return totals


class TestLoss:
    def clip(self, seed=0):
        g = torch.Generator().manual_seed(seed)

        def masks(m):
            candidates = 3 * torch.randn(2, m, 6, 6, generator=g)
            return FrameMasks(candidates[:, 0], candidates, torch.rand(2, m, generator=g), torch.randn(2, generator=g))

        return [masks(1), masks(3), masks(3)]

    def test_equals_the_sum_written_out(self):
        clip = self.clip()
        target = torch.rand(2, 3, 12, 9, generator=torch.Generator().manual_seed(1)) > 0.6
        target[0, 2] = False
        found = tracking_loss(clip, target)
        assert found.shape == (2,)
        assert found.tolist() == pytest.approx(slow_loss(clip, target), rel=1e-5)

    def test_perfect_masks_cost_nothing(self):
        target = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
        target[0, 0, 1:3, 1:3] = True
        logits = torch.where(target[:, 0], 60.0, -60.0)
        seen = FrameMasks(logits, logits[:, None], torch.ones(1, 1), torch.tensor([60.0]))
        away = FrameMasks(logits, logits[:, None], torch.ones(1, 1), torch.tensor([-60.0]))
        assert tracking_loss([seen, away], target).item() == pytest.approx(0, abs=1e-6)
        assert tracking_loss([away, away], target).item() == pytest.approx(30)

    def test_only_the_best_candidate_gets_a_gradient_and_none_without_an_object(self):
        clip = self.clip()
        for masks in clip:
            masks.candidates.requires_grad_(True)
        target = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.6
        target[1] = False
        tracking_loss(clip, target).sum().backward()
        for masks in clip:
            assert masks.candidates.grad is not None
            moved = masks.candidates.grad.flatten(2).any(2)
            assert moved.sum(1).tolist() == [1, 0]

    def test_no_clips(self):
        empty = FrameMasks(torch.zeros(0, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), torch.zeros(0))
        assert tracking_loss([empty], torch.zeros(0, 1, 8, 8, dtype=torch.bool)).shape == (0,)

    @pytest.mark.parametrize(
        "target", [torch.zeros(2, 2, 6, 6, dtype=torch.bool), torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6).bool()]
    )
    def test_bad_target(self, target):
        with pytest.raises(SegRLError, match=r"target: expected bool of shape \(2, 3\) \+ \(H, W\) for this clip, got"):
            tracking_loss(self.clip(), target)
