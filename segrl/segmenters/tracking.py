"""SAM 2 along a sequence of frames: one box on one frame, masks on this and on the frames that follow.

`Tracker` follows many objects in lock step, each on a sequence of its own: SAM 2's memory knows frames only by their
distance from the current one, so that objects prompted on different frames, and objects followed forwards and
backwards, fit into one batch. `track_clip` trains a SAM 2 with it, `segrl.segmenters.propagation` takes a frozen one
through volumes.

Ravi et al., "SAM 2: Segment Anything in Images and Videos", arXiv:2408.00714.
"""

# N objects, B clips, T frames, M candidate masks (1 on a frame with a box, else 3), S input side, h = w = S / 4

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.errors import SegRLError
from segrl.losses import dice, focal
from segrl.segmenters.base import ImageFeatures
from segrl.segmenters.sam2 import Sam2Segmenter

__all__ = ["FrameMasks", "Tracker", "track_clip", "tracking_loss"]


@dataclass(frozen=True)
class FrameMasks:
    """SAM 2's output for N objects on one frame each.

    Attributes:
        logits: (N, h, w), the candidate of the highest predicted IoU; -1024 everywhere where the object is not seen.
        candidates: (N, M, h, w), not blanked, so that a mask learns before its object score does.
        ious: (N, M) predicted IoU of each candidate, in 0..1.
        object_scores: (N,) logits; the object is seen where they are above 0.
    """

    logits: Tensor
    candidates: Tensor
    ious: Tensor
    object_scores: Tensor


@dataclass(frozen=True)
class _Memory:
    """Memory that a frame leaves for later ones, under the names that SAM 2 looks for."""

    maskmem_features: Tensor | None  # N C h/4 w/4; None where only the pointer can still be looked up
    maskmem_pos_enc: list[Tensor]
    obj_ptr: Tensor

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def rows(self, index: Tensor | slice) -> _Memory:
        features = self.maskmem_features
        count = len(self.obj_ptr[index])
        return _Memory(
            None if features is None else features[index],
            [position[:1].expand(count, -1, -1, -1) for position in self.maskmem_pos_enc],
            self.obj_ptr[index],
        )


class Tracker:
    """N objects, each prompted by a box on its frame 0 and then followed frame by frame.

    Call `start` once, `branch` where an object goes more than one way, and `step` for every further frame. What is
    kept does not grow with the number of frames: memories that SAM 2 cannot look up any more are dropped.

    Args:
        segmenter: Its `.sam` runs, in the mode (training or evaluation) and with the gradients that the caller set.
        num_frames: Length of the longest sequence. SAM 2 scales the distances of object pointers by it where it is
            below 16: objects of one tracker must agree in `min(length, 16)`.
    """

    def __init__(self, segmenter: Sam2Segmenter, num_frames: int) -> None:
        self._sam, self._num_frames = segmenter.sam, num_frames
        self._prompted: _Memory | None = None
        self._followed: dict[int, _Memory] = {}
        self._frame = 0

    def start(self, features: ImageFeatures, boxes: Tensor | None = None, masks: Tensor | None = None) -> FrameMasks:
        """Return the masks of the prompted frames.

        Args:
            features: Of N frames (`Sam2Segmenter.encode_frames`).
            boxes: (N, 4) xyxy, fractions of width and height in 0..1.
            masks: (N, S, S) bool in the place of boxes; SAM 2 remembers them as they are.
        """
        if masks is not None:
            found, self._prompted = self._run(features, None, masks[:, None].float())
            return found
        assert boxes is not None
        corners = boxes.reshape(-1, 2, 2) * self._sam.image_size
        labels = torch.tensor([[2, 3]], dtype=torch.int32, device=boxes.device).expand(len(corners), -1)
        found, self._prompted = self._run(features, {"point_coords": corners, "point_labels": labels})
        return found

    def branch(self, rows: Tensor) -> Tracker:
        """Return a tracker that goes on from frame 0 with the objects of these rows, in this order; rows may repeat."""
        assert self._prompted is not None
        assert not self._frame, "both directions start from the frame with the box"
        other = object.__new__(Tracker)
        other._sam, other._num_frames, other._followed, other._frame = self._sam, self._num_frames, {}, 0
        other._prompted = self._prompted.rows(rows)
        return other

    def keep(self, count: int) -> None:
        """Go on with the first `count` objects only."""
        assert self._prompted is not None
        if count == len(self._prompted.obj_ptr):
            return
        self._prompted = self._prompted.rows(slice(count))
        self._followed = {frame: memory.rows(slice(count)) for frame, memory in self._followed.items()}

    def step(self, features: ImageFeatures) -> FrameMasks:
        """Return the masks of every object's next frame."""
        self._frame += 1
        masks, self._followed[self._frame] = self._run(features, None)
        self._forget()
        return masks

    def _run(
        self, features: ImageFeatures, points: dict[str, Tensor] | None, masks: Tensor | None = None
    ) -> tuple[FrameMasks, _Memory]:
        """Run one frame; a model that was cast to half precision takes what SAM 2 computes in float32 on the way."""
        dtype, device = features.tensors[0].dtype, features.tensors[0].device.type
        if dtype == torch.float32:
            return self._track(features, points, masks)
        with torch.autocast(device, dtype=dtype):
            return self._track(features, points, masks)

    def _track(
        self, features: ImageFeatures, points: dict[str, Tensor] | None, masks: Tensor | None
    ) -> tuple[FrameMasks, _Memory]:
        sam = self._sam
        as_output, sam.use_mask_input_as_output_without_sam = sam.use_mask_input_as_output_without_sam, True
        stride16, stride8, stride4 = features.tensors
        levels = [stride4, stride8, stride16]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        flat = [level.flatten(2).permute(2, 0, 1) for level in levels]
        position = sam.image_encoder.neck.position_encoding(stride16).to(stride16.dtype)
        raw: list[Tensor] = []
        hook = sam.sam_mask_decoder.register_forward_hook(lambda *call: raw.append(call[-1][0]))
        _, outputs, _, _ = sam._track_step(
            frame_idx=self._frame,
            is_init_cond_frame=points is not None or masks is not None,
            current_vision_feats=flat,
            current_vision_pos_embeds=[position.flatten(2).permute(2, 0, 1)],
            feat_sizes=sizes,
            point_inputs=points,
            mask_inputs=masks,
            output_dict={"cond_frame_outputs": {0: self._prompted}, "non_cond_frame_outputs": self._followed},
            num_frames=self._num_frames,
            track_in_reverse=False,  # backwards is the same computation: only distances from the current frame enter
            prev_sam_mask_logits=None,
        )
        hook.remove()
        sam.use_mask_input_as_output_without_sam = as_output
        _, _, ious, chosen, chosen_high, pointer, scores = outputs
        memory, positions = sam._encode_new_memory(
            current_vision_feats=flat,
            feat_sizes=sizes,
            pred_masks_high_res=chosen_high,
            object_score_logits=scores,
            is_mask_from_pts=points is not None,
        )
        count = len(pointer)
        positions = [level[:1].expand(count, -1, -1, -1) for level in positions]  # the same for every object
        if masks is not None:  # a mask that is given is the only candidate
            raw = [chosen]
        return FrameMasks(chosen[:, 0], raw[0], ious, scores[:, 0]), _Memory(memory, positions, pointer)

    def _forget(self) -> None:
        """Keep what the next frame can look up: whole memories of the last frames, pointers of some more."""
        sam = self._sam
        oldest_pointer = self._frame + 1 - (min(self._num_frames, sam.max_obj_ptrs_in_encoder) - 1)
        oldest_memory = self._frame + 1 - (sam.num_maskmem - 1)
        for frame in list(self._followed):
            memory = self._followed[frame]
            if frame < min(oldest_pointer, oldest_memory):
                del self._followed[frame]
            elif frame < oldest_memory and memory.maskmem_features is not None:
                self._followed[frame] = _Memory(None, [], memory.obj_ptr)


def track_clip(
    segmenter: Sam2Segmenter, images: Tensor, boxes: Tensor, *, key: int = 0, num_frames: int | None = None
) -> list[FrameMasks]:
    """Compute masks of one object per clip on every frame, from a box on frame `key`, with gradients.

    Frames after `key` are reached forwards, frames before it backwards, both from the memory of frame `key` alone, as
    `VolumePropagator` does.

    Args:
        segmenter: A SAM 2; its mode decides about dropout, `requires_grad` about what learns. Note that
            `Sam2Segmenter.freeze` leaves the memory frozen: `segmenter.requires_grad_(True)` trains all of it.
        images: (B, T, 3, S, S), from `segmenter.preprocess`.
        boxes: (B, 4) xyxy on frame `key`, fractions of width and height in 0..1.
        key: Index of the frame with the box.
        num_frames: Length of the whole sequence that clips are cut from, None where they are all of it. It sets the
            scale of time up to 16 (see `Tracker`): a model trained on clips of 6 frames at the scale of 6 takes objects
            in longer volumes to end too early or late.

    Returns:
        T results of B objects each, in the order of the frames.

    Raises:
        SegRLError: A shape that does not fit, `key` is no frame of the clip, or `num_frames` is less than T.

    Example:
        >>> from segrl.segmenters import Sam2Config
        >>> segmenter = Sam2Segmenter(Sam2Config(image_size=64))
        >>> clip = track_clip(segmenter, torch.zeros(2, 3, 3, 64, 64), torch.tensor([[0.2, 0.2, 0.8, 0.8]] * 2), key=1)
        >>> len(clip), clip[1].candidates.shape, clip[0].candidates.shape  # one candidate on the frame with the box
        (3, torch.Size([2, 1, 16, 16]), torch.Size([2, 3, 16, 16]))
    """
    side = segmenter.image_size
    if images.ndim != 5 or not images.size(1) or tuple(images.shape[2:]) != (3, side, side):
        raise SegRLError(f"images: expected (B, T, 3, {side}, {side}) with T >= 1, got {tuple(images.shape)}")
    count, frames = images.shape[:2]
    if tuple(boxes.shape) != (count, 4):
        raise SegRLError(f"boxes: expected ({count}, 4), one per clip, got {tuple(boxes.shape)}")
    if not 0 <= key < frames:
        raise SegRLError(f"key={key}: expected a frame of the clip, 0..{frames - 1}")
    if num_frames is not None and num_frames < frames:
        raise SegRLError(f"num_frames={num_frames}: expected at least the {frames} frames of the clip, or None")
    levels = [level.unflatten(0, (count, frames)) for level in segmenter.encode_frames(images.flatten(0, 1)).tensors]
    features = [ImageFeatures(tuple(level[:, frame] for level in levels)) for frame in range(frames)]
    start = Tracker(segmenter, num_frames or frames)
    found = {key: start.start(features[key], boxes)}
    for direction in (range(key + 1, frames), range(key - 1, -1, -1)):
        tracker = start.branch(torch.arange(count, device=boxes.device))
        found |= {frame: tracker.step(features[frame]) for frame in direction}
    return [found[frame] for frame in range(frames)]


def tracking_loss(
    clip: list[FrameMasks],
    target: Tensor,
    *,
    mask_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
    object_weight: float = 1.0,
) -> Tensor:
    """Compute SAM 2's training objective, averaged over frames (Ravi et al. 2024, appendix on training).

    On a frame with the object: focal and Dice loss of the candidate for which their weighted sum is lowest, and the
    mean absolute error of every candidate's predicted IoU. On every frame: cross-entropy of the object score. The
    paper does not state the size at which masks are compared: here candidates are enlarged to that of the target.

    Args:
        clip: T results of `track_clip` for B clips.
        target: (B, T, H, W) bool; an empty frame has no object.
        mask_weight: Weight of the focal loss (alpha 0.25, gamma 2).
        dice_weight: Weight of the Dice loss.
        iou_weight: Weight of the error of the predicted IoU.
        object_weight: Weight of the cross-entropy.

    Returns:
        (B,), at least 0.

    Raises:
        SegRLError: `target` does not have the clip's numbers of objects and frames, or is not bool.

    Example:
        >>> seen = torch.full((1,), 30.0)  # a sure object, on a frame without one: cross-entropy 30
        >>> masks = FrameMasks(torch.zeros(1, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3), seen)
        >>> tracking_loss([masks], torch.zeros(1, 1, 4, 4, dtype=torch.bool))
        tensor([30.])
    """
    shape = (len(clip[0].logits), len(clip)) if clip else (0, 0)
    if target.ndim != 4 or tuple(target.shape[:2]) != shape or target.dtype != torch.bool:
        raise SegRLError(
            f"target: expected bool of shape {shape} + (H, W) for this clip, got {target.dtype} {tuple(target.shape)}"
        )
    total = target.new_zeros(shape[0], dtype=torch.float32)
    for masks, true in zip(clip, target.unbind(1), strict=True):
        size = true.shape[-2:]
        candidates = F.interpolate(masks.candidates.float(), size=size, mode="bilinear", align_corners=False)
        targets = true[:, None].expand_as(candidates)
        flat, flat_targets = candidates.flatten(0, 1), targets.flatten(0, 1)
        each = mask_weight * focal(flat, flat_targets) + dice_weight * dice(flat, flat_targets)
        predicted = candidates > 0
        overlap, union = (predicted & targets).sum((2, 3)), (predicted | targets).sum((2, 3))
        error = (masks.ious.float() - overlap / union.clamp(min=1)).abs().mean(1)
        present = true.flatten(1).any(1).float()
        seen = F.binary_cross_entropy_with_logits(masks.object_scores.float(), present, reduction="none")
        best = each.unflatten(0, candidates.shape[:2]).amin(1)
        total = total + present * (best + iou_weight * error) + object_weight * seen
    return total / max(1, len(clip))
