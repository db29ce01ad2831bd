"""Take boxes on a slice through a volume with a frozen SAM 2, slice by slice in both directions.

As in MedSAM2's inference, each box is an object of its own, and both directions start from the memory of the prompted
slice alone. All objects of a volume advance together, one slice each at a time, so that the features of a slice are
computed once for every answer that reaches it, and are let go when no object will come by any more.
"""

# D slices, H rows, W columns; N boxes; S input side of the segmenter, h = w = S / 4

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.caching.feature_cache import FeatureCache, encoding_batches
from segrl.caching.fingerprint import EncoderFingerprint, feature_key
from segrl.errors import SegRLError
from segrl.segmenters.base import ImageFeatures, evaluating
from segrl.segmenters.sam2 import Sam2Segmenter
from segrl.segmenters.tracking import Tracker

__all__ = ["PropagationRequest", "VolumePropagator"]

_Slice = tuple[Any, int]  # a volume's identity, and an index in it


@dataclass(frozen=True, eq=False)
class PropagationRequest:
    """One answer to be turned into a mask.

    Attributes:
        volume: (D, H, W) uint8, grey.
        key: The volume's content as text, under which features are kept; "" keeps none beyond the call.
        slice_index: The slice that the boxes are on, 0..D-1.
        boxes: (N, 4) xyxy half-open, pixels of the slice. What lies outside is cut off; a box without area inside the
            slice prompts nothing.
        mask: (H, W) bool, one more object on that slice, given by its mask; None or all False: there is none.

    Raises:
        SegRLError: A shape, dtype or index that does not fit, or a box that is not a number.

    Example:
        >>> PropagationRequest(np.zeros((3, 8, 8), np.uint8), "", 3, np.zeros((0, 4)))
        Traceback (most recent call last):
        segrl.errors.SegRLError: slice_index=3: expected 0..2; leave out answers that name no slice of the volume
    """

    volume: np.ndarray
    key: str
    slice_index: int
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        volume, boxes = self.volume, self.boxes
        if volume.ndim != 3 or 0 in volume.shape or volume.dtype != np.uint8:
            raise SegRLError(
                f"volume: expected uint8 (D, H, W), got {volume.dtype} {volume.shape}; scale it with "
                "segrl.data.scale_intensity"
            )
        if not 0 <= self.slice_index < len(volume):
            raise SegRLError(
                f"slice_index={self.slice_index}: expected 0..{len(volume) - 1}; leave out answers that name no slice "
                "of the volume"
            )
        if boxes.ndim != 2 or boxes.shape[1] != 4 or np.isnan(boxes).any():
            raise SegRLError(f"boxes: expected (N, 4) numbers, got shape {boxes.shape}: {boxes.tolist()}")
        if self.mask is not None and (self.mask.shape != volume.shape[1:] or self.mask.dtype != np.bool_):
            raise SegRLError(
                f"mask: expected bool {volume.shape[1:]}, the size of a slice, got {self.mask.dtype} {self.mask.shape}"
            )


@dataclass(frozen=True)
class _Object:
    """One box or mask: where its masks go, where it starts, and how many slices it is followed down and up."""

    row: int
    volume: Any
    start: int
    box: np.ndarray  # xyxy, fractions of the slice
    lengths: tuple[int, int]
    mask: np.ndarray | None = None  # (H, W) bool, in the place of the box

    def length(self, direction: int) -> int:
        return self.lengths[direction > 0]

    def location(self, direction: int, step: int) -> _Slice:
        return self.volume, self.start + direction * step

    def slices(self) -> Iterator[_Slice]:
        yield from ((self.volume, n) for n in range(self.start - self.lengths[0], self.start + self.lengths[1] + 1))


class VolumePropagator:
    """A frozen SAM 2 that takes boxes through volumes.

    Every call leaves the segmenter as it was: mode, gradients and settings. Results do not depend on what else is in a
    call, up to rounding. Gradients do not reach the segmenter.

    Args:
        segmenter: Single precision; use autocast for less.
        reach: How many slices an object is followed in each direction; None goes to the ends of the volume.
        batch_size: Boxes that are followed at once, and slices that are encoded at once.
        cache: Keeps features of slices across calls, for requests with a key. They take 4.2 MB a slice for a SAM 2 at
            512 px in single precision. With changed weights they are computed again.
        postprocessing: As the `sam2` package builds its predictor: where the mask of a box is unstable, the best of the
            three other candidates replaces it, and the prompted slice is remembered by its binary mask. Small holes are
            not filled: that needs a CUDA extension. False for a model that was not trained for it.

    Attributes:
        encoded_slices: How many slices went through the image encoder, for reports and tests.

    Raises:
        SegRLError: A `reach` below 0 or a `batch_size` below 1.

    Example:
        >>> propagator = VolumePropagator(Sam2Segmenter(), reach=1)
        >>> volume, box = np.zeros((4, 64, 64), np.uint8), np.array([[8, 8, 40, 40]])
        >>> (mask,) = propagator([PropagationRequest(volume, "", 3, box)])
        >>> mask.shape, propagator.encoded_slices, bool(mask[:2].any())
        ((4, 64, 64), 2, False)
    """

    def __init__(
        self,
        segmenter: Sam2Segmenter,
        *,
        reach: int | None = 5,
        batch_size: int = 16,
        cache: FeatureCache | None = None,
        postprocessing: bool = True,
    ) -> None:
        if reach is not None and reach < 0:
            raise SegRLError(f"reach={reach}: expected a number of slices, 0 or more, or None for the whole volume")
        if batch_size < 1:
            raise SegRLError(f"batch_size={batch_size}: expected 1 or more")
        self.segmenter, self.reach, self.batch_size, self.cache = segmenter, reach, batch_size, cache
        self.postprocessing = postprocessing
        self.encoded_slices = 0
        self._fingerprint = EncoderFingerprint(whole=True)

    def __call__(
        self, requests: Sequence[PropagationRequest], *, progress: Callable[[int, int], None] | None = None
    ) -> list[np.ndarray]:
        """Compute the masks of all requests.

        Args:
            requests: Answers about one or several volumes; equal keys, or the same array, are the same volume.
            progress: Called after each step with the numbers of slices that are done with and of slices in all.

        Returns:
            For each request a bool mask (D, H, W), the union over its boxes, False beyond `reach`; empty without boxes.

        Raises:
            SegRLError: Two requests with the same key and volumes of different shape.
        """
        masks = [np.zeros(request.volume.shape, dtype=bool) for request in requests]
        objects = [item for row, request in enumerate(requests) for item in self._objects(row, request)]
        volumes = _volumes(requests)
        total = len({location for item in objects for location in item.slices()})
        with self._frozen():
            encoder = self._fingerprint(self.segmenter) if self.cache is not None else None
            done = 0
            for batch in self._batches(objects, volumes):
                slices = _Slices(self, volumes, encoder, batch)
                for _ in self._follow(batch, slices, volumes, masks):
                    if progress is not None:
                        progress(done + slices.done, total)
                done += slices.done
        return masks

    def _objects(self, row: int, request: PropagationRequest) -> Iterator[_Object]:
        depth, height, width = request.volume.shape
        reach = depth if self.reach is None else self.reach
        lengths = min(reach, request.slice_index), min(reach, depth - 1 - request.slice_index)
        size = np.array([width, height, width, height])
        for box in np.clip(np.asarray(request.boxes, dtype=np.float64), 0, size):
            if (box[2:] > box[:2]).all():
                yield _Object(row, _identity(request), request.slice_index, box / size, lengths)
        if request.mask is not None and request.mask.any():
            yield _Object(row, _identity(request), request.slice_index, np.zeros(4), lengths, request.mask)

    def _batches(self, objects: list[_Object], volumes: dict[Any, PropagationRequest]) -> Iterator[list[_Object]]:
        """Yield objects that advance together: of whole volumes, about `batch_size`, alike in SAM 2's scale of time."""
        scale = self.segmenter.sam.max_obj_ptrs_in_encoder
        groups: dict[Any, list[_Object]] = {}
        for item in objects:
            groups.setdefault(item.volume, []).append(item)
        batch: list[_Object] = []
        last = 0
        for name in sorted(
            groups, key=lambda name: min(scale, len(volumes[name].volume))
        ):  # stable: in order of requests
            now = min(scale, len(volumes[name].volume))
            if batch and (now != last or len(batch) + len(groups[name]) > self.batch_size):
                yield batch
                batch = []
            batch, last = batch + groups[name], now
        if batch:
            yield batch

    def _follow(
        self, batch: list[_Object], slices: _Slices, volumes: dict[Any, PropagationRequest], masks: list[np.ndarray]
    ) -> Iterator[None]:
        """Take the objects of a batch slice by slice; masks are written as they come."""
        device = slices.device
        num_frames = max(len(volumes[item.volume].volume) for item in batch)
        chunks: list[tuple[Tracker, list[tuple[_Object, int]]]] = []
        slices.need([item.location(1, 0) for item in batch])
        for part in _parts(batch, self.batch_size):
            features = slices.take([item.location(1, 0) for item in part])
            tracker = Tracker(self.segmenter, num_frames)
            found = tracker.start(features, **self._prompts(part, device))
            _write(masks, [(item.row, item.start) for item in part], found.logits)
            tracks = [(row, direction) for row, item in enumerate(part) for direction in (-1, 1)]
            tracks = [(row, direction) for row, direction in tracks if part[row].length(direction)]
            tracks.sort(key=lambda track: -part[track[0]].length(track[1]))  # `keep` drops from the end
            rows = torch.tensor([row for row, _ in tracks], device=device, dtype=torch.long)
            chunks.append((tracker.branch(rows), [(part[row], direction) for row, direction in tracks]))
        yield
        for step in range(1, 1 + max(max(item.lengths) for item in batch)):
            for _, tracks in chunks:
                tracks[:] = [(item, direction) for item, direction in tracks if item.length(direction) >= step]
            slices.need([item.location(direction, step) for _, tracks in chunks for item, direction in tracks])
            for tracker, tracks in chunks:
                if not tracks:
                    continue
                tracker.keep(len(tracks))
                locations = [item.location(direction, step) for item, direction in tracks]
                found = tracker.step(slices.take(locations))
                rows_and_slices = zip(tracks, locations, strict=True)
                _write(masks, [(item.row, index) for (item, _), (_, index) in rows_and_slices], found.logits)
            yield

    def _prompts(self, part: Sequence[_Object], device: torch.device) -> dict[str, Tensor]:
        """Arguments of `Tracker.start`: boxes (N, 4), or masks (N, S, S) where the objects are given by masks."""
        if part[0].mask is None:
            return {"boxes": torch.tensor(np.stack([item.box for item in part]), dtype=torch.float32, device=device)}
        side = self.segmenter.image_size
        given = [torch.from_numpy(item.mask)[None, None].float() for item in part if item.mask is not None]
        resized = [F.interpolate(mask, size=(side, side), mode="bilinear", antialias=True) for mask in given]
        return {"masks": (torch.cat(resized)[:, 0] > 0.5).to(device)}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        sam = self.segmenter.sam
        settings = [
            (sam, "binarize_mask_from_pts_for_mem_enc", True),
            (sam.sam_mask_decoder, "dynamic_multimask_via_stability", True),
            (sam.sam_mask_decoder, "dynamic_multimask_stability_delta", 0.05),
            (sam.sam_mask_decoder, "dynamic_multimask_stability_thresh", 0.98),
        ]
        before = [(part, name, getattr(part, name)) for part, name, _ in settings]
        with evaluating(self.segmenter), torch.inference_mode(False), torch.no_grad():
            try:
                for part, name, value in settings if self.postprocessing else ():
                    setattr(part, name, value)
                yield
            finally:
                for part, name, value in before:
                    setattr(part, name, value)


class _Slices:
    """Features of the slices of a batch, from the first object that needs them to the last."""

    def __init__(
        self,
        owner: VolumePropagator,
        volumes: dict[Any, PropagationRequest],
        encoder: str | None,
        batch: Sequence[_Object],
    ) -> None:
        self._owner, self._volumes, self._encoder = owner, volumes, encoder
        parameter = next(owner.segmenter.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self._uses = Counter(location for item in batch for location in item.slices())
        self._features: dict[_Slice, ImageFeatures] = {}
        self.done = 0

    def need(self, locations: Sequence[_Slice]) -> None:
        """Look up or compute what is not here yet."""
        missing = []
        for location in dict.fromkeys(locations):
            if location in self._features:
                continue
            key, cache = self._key(location), self._owner.cache
            found = cache.get(key, self.device) if cache is not None and key is not None else None
            if found is None:
                missing.append((location, key))
            else:
                self._features[location] = ImageFeatures(found)
        for batch in encoding_batches(missing, self.device.type, self._owner.batch_size):
            self._encode(batch)

    def take(self, locations: Sequence[_Slice]) -> ImageFeatures:
        """Return features of these slices, one row each; every location counts as one visit."""
        features = ImageFeatures.cat([self._features[location] for location in locations])
        for location in locations:
            self._uses[location] -= 1
            if not self._uses[location]:
                del self._features[location]
                self.done += 1
        return features

    def _key(self, location: _Slice) -> str | None:
        name = self._volumes[location[0]].key
        return feature_key(self._encoder, f"frame {name} {location[1]}" if name else None, self.device.type)

    def _encode(self, missing: Sequence[tuple[_Slice, str | None]]) -> None:
        segmenter, cache = self._owner.segmenter, self._owner.cache
        pixels = [segmenter.preprocess(self._volumes[name].volume[index]) for (name, index), _ in missing]
        encoded = segmenter.encode_frames(torch.stack(pixels).to(self.device, self._dtype))
        self._owner.encoded_slices += len(missing)
        for n, (location, key) in enumerate(missing):
            # a copy, since a slice would keep the whole batch alive; contiguous, as it comes back from disk
            own = tuple(t[n : n + 1].clone(memory_format=torch.contiguous_format) for t in encoded.tensors)
            self._features[location] = ImageFeatures(own)
            if cache is not None and key is not None:
                cache.put(key, own)


def _parts(objects: Sequence[_Object], size: int) -> Iterator[list[_Object]]:
    """The objects in groups of at most `size`, those given by boxes apart from those given by masks."""
    for masks in (False, True):
        alike = [item for item in objects if (item.mask is not None) == masks]
        for at in range(0, len(alike), size):
            yield alike[at : at + size]


def _identity(request: PropagationRequest) -> Any:
    return request.key or id(request.volume)


def _volumes(requests: Sequence[PropagationRequest]) -> dict[Any, PropagationRequest]:
    """Return the first request of every volume, by identity."""
    first: dict[Any, PropagationRequest] = {}
    for row, request in enumerate(requests):
        known = first.setdefault(_identity(request), request)
        if known.volume.shape != request.volume.shape:
            raise SegRLError(
                f"request {row}: key {request.key!r} with a volume of shape {request.volume.shape}, but an earlier one "
                f"has {known.volume.shape}; a key stands for one volume"
            )
    return first


def _write(masks: list[np.ndarray], locations: Sequence[tuple[int, int]], logits: Tensor) -> None:
    """Add masks (logits (N, h, w)), resized, to the slices `locations`: index of the mask, index of its slice."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for n, (row, _) in enumerate(locations):
        by_size.setdefault(masks[row].shape[1:], []).append(n)
    for size, rows in by_size.items():
        resized = F.interpolate(logits[rows, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
        for n, mask in zip(rows, (resized > 0).cpu().numpy(), strict=True):
            row, index = locations[n]
            masks[row][index] |= mask
