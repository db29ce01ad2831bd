"""Boxes on a slice of a volume to a mask of the volume, by a frozen SAM 2 that goes on slice by slice, both ways.

As in MedSAM2's inference, each box is an object of its own, and both ways start from the memory of the prompted slice
alone. All objects of a volume advance together, one slice each at a time, so that the features of a slice are computed
once for every answer that reaches it, and are let go when no object will come by any more.
"""

# D slices, H rows, W columns; N boxes; S input side of the segmenter, h = w = S / 4

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segrl.caching.feature_cache import FeatureCache
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
        key: the volume's content as text, under which features are kept; "" keeps none beyond the call.
        slice_index: the slice that the boxes are on, 0..D-1.
        boxes: (N, 4) xyxy half-open, pixels of the slice. What lies outside is cut off; a box without area inside the
            slice prompts nothing.

    Raises:
        SegRLError: a shape, dtype or index that does not fit, or a box that is not a number.
    """

    volume: np.ndarray
    key: str
    slice_index: int
    boxes: np.ndarray

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


@dataclass(frozen=True)
class _Object:
    """One box: where its masks go, where it starts, and how many slices it is followed down and up."""

    row: int
    volume: Any
    start: int
    box: np.ndarray  # xyxy, fractions of the slice
    lengths: tuple[int, int]

    def slices(self) -> Iterator[_Slice]:
        yield from ((self.volume, n) for n in range(self.start - self.lengths[0], self.start + self.lengths[1] + 1))


class VolumePropagator:
    """A frozen SAM 2 that takes boxes through volumes.

    Every call leaves the segmenter as it was: mode, gradients and settings. Results do not depend on what else is in a
    call, up to rounding. Gradients do not reach the segmenter.

    Args:
        segmenter: single precision; use autocast for less.
        reach: how many slices an object is followed from its box on, each way; None goes to the ends of the volume.
        batch_size: boxes that are followed at once, and slices that are encoded at once.
        cache: keeps features of slices across calls, for requests with a key. They take 4.2 MB a slice for a SAM 2 at
            512 px in single precision. With changed weights they are computed again.
        postprocessing: as the `sam2` package builds its predictor: where the mask of a box is unstable, the best of the
            three other candidates takes its place, and the prompted slice is remembered by its binary mask. Small holes
            are not filled: that needs a CUDA extension. False for a model that was not trained for it.

    Attributes:
        encoded_slices: how many slices went through the image encoder, for reports and tests.

    Raises:
        SegRLError: a `reach` below 0 or a `batch_size` below 1.
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
        """Masks of all requests.

        Args:
            requests: answers about one or several volumes; equal keys, or the same array, are the same volume.
            progress: is called after each step with the numbers of slices that are done with and of slices in all.

        Returns:
            For each request a bool mask (D, H, W), the union over its boxes, False beyond `reach`; empty without boxes.

        Raises:
            SegRLError: two requests with the same key and volumes of different shape.
        """
        masks = [np.zeros(request.volume.shape, dtype=bool) for request in requests]
        objects = [thing for row, request in enumerate(requests) for thing in self._objects(row, request)]
        volumes = _volumes(requests)
        total = len({place for thing in objects for place in thing.slices()})
        with self._frozen():
            encoder = self._fingerprint(self.segmenter) if self.cache is not None else None
            done = 0
            for wave in self._waves(objects, volumes):
                slices = _Slices(self, volumes, encoder, wave)
                for _ in self._follow(wave, slices, volumes, masks):
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

    def _waves(self, objects: list[_Object], volumes: dict[Any, PropagationRequest]) -> Iterator[list[_Object]]:
        """Objects that advance together: those of whole volumes, about `batch_size`, alike in SAM 2's scale of time."""
        scale = self.segmenter.sam.max_obj_ptrs_in_encoder
        groups: dict[Any, list[_Object]] = {}
        for thing in objects:
            groups.setdefault(thing.volume, []).append(thing)
        wave: list[_Object] = []
        last = 0
        for name in sorted(
            groups, key=lambda name: min(scale, len(volumes[name].volume))
        ):  # stable: in order of requests
            now = min(scale, len(volumes[name].volume))
            if wave and (now != last or len(wave) + len(groups[name]) > self.batch_size):
                yield wave
                wave = []
            wave, last = wave + groups[name], now
        if wave:
            yield wave

    def _follow(
        self, wave: list[_Object], slices: _Slices, volumes: dict[Any, PropagationRequest], masks: list[np.ndarray]
    ) -> Iterator[None]:
        """Take the objects of a wave slice by slice; masks are written as they come."""
        device = slices.device
        num_frames = max(len(volumes[thing.volume].volume) for thing in wave)
        chunks: list[tuple[Tracker, list[tuple[_Object, int]]]] = []
        slices.need([(thing.volume, thing.start) for thing in wave])
        for at in range(0, len(wave), self.batch_size):
            part = wave[at : at + self.batch_size]
            boxes = torch.tensor(np.stack([thing.box for thing in part]), dtype=torch.float32, device=device)
            places = [(thing.volume, thing.start) for thing in part]
            tracker = Tracker(self.segmenter, num_frames)
            _write(
                masks, [(thing.row, thing.start) for thing in part], tracker.start(slices.take(places), boxes).logits
            )
            ways = [(row, way) for row, thing in enumerate(part) for way in (-1, 1) if thing.lengths[way > 0]]
            ways.sort(key=lambda item: -part[item[0]].lengths[item[1] > 0])
            rows = torch.tensor([row for row, _ in ways], device=device, dtype=torch.long)
            chunks.append((tracker.branch(rows), [(part[row], way) for row, way in ways]))
        yield
        for step in range(1, 1 + max(max(thing.lengths) for thing in wave)):
            for _, lanes in chunks:
                lanes[:] = [(thing, way) for thing, way in lanes if thing.lengths[way > 0] >= step]
            slices.need([(thing.volume, thing.start + way * step) for _, lanes in chunks for thing, way in lanes])
            for tracker, lanes in chunks:
                if not lanes:
                    continue
                tracker.keep(len(lanes))
                features = slices.take([(thing.volume, thing.start + way * step) for thing, way in lanes])
                _write(
                    masks,
                    [(thing.row, thing.start + way * step) for thing, way in lanes],
                    tracker.step(features).logits,
                )
            yield

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
    """Features of the slices of a wave, from the first object that needs them to the last."""

    def __init__(
        self,
        owner: VolumePropagator,
        volumes: dict[Any, PropagationRequest],
        encoder: str | None,
        wave: Sequence[_Object],
    ) -> None:
        self._owner, self._volumes, self._encoder = owner, volumes, encoder
        parameter = next(owner.segmenter.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self._uses = Counter(place for thing in wave for place in thing.slices())
        self._features: dict[_Slice, ImageFeatures] = {}
        self.done = 0

    def need(self, places: Sequence[_Slice]) -> None:
        """Look up or compute what is not here yet."""
        missing = []
        for place in dict.fromkeys(places):
            if place in self._features:
                continue
            key, cache = self._key(place), self._owner.cache
            found = cache.get(key, self.device) if cache is not None and key is not None else None
            if found is None:
                missing.append((place, key))
            else:
                self._features[place] = ImageFeatures(found)
        size = self._owner.batch_size
        for at in range(0, len(missing), size):
            self._encode(missing[at : at + size])

    def take(self, places: Sequence[_Slice]) -> ImageFeatures:
        """Features of these slices, one row each; every place counts as one visit."""
        features = ImageFeatures.cat([self._features[place] for place in places])
        for place in places:
            self._uses[place] -= 1
            if not self._uses[place]:
                del self._features[place]
                self.done += 1
        return features

    def _key(self, place: _Slice) -> str | None:
        name = self._volumes[place[0]].key
        return feature_key(self._encoder, f"frame {name} {place[1]}" if name else None, self.device.type)

    def _encode(self, missing: Sequence[tuple[_Slice, str | None]]) -> None:
        segmenter, cache = self._owner.segmenter, self._owner.cache
        pixels = [segmenter.preprocess(self._volumes[name].volume[index]) for (name, index), _ in missing]
        encoded = segmenter.encode_frames(torch.stack(pixels).to(self.device, self._dtype))
        self._owner.encoded_slices += len(missing)
        for n, (place, key) in enumerate(missing):
            # a copy, since a slice would keep the whole batch alive; contiguous, as it comes back from disk
            own = tuple(t[n : n + 1].clone(memory_format=torch.contiguous_format) for t in encoded.tensors)
            self._features[place] = ImageFeatures(own)
            if cache is not None and key is not None:
                cache.put(key, own)


def _identity(request: PropagationRequest) -> Any:
    return request.key or id(request.volume)


def _volumes(requests: Sequence[PropagationRequest]) -> dict[Any, PropagationRequest]:
    """The first request of every volume, by identity."""
    first: dict[Any, PropagationRequest] = {}
    for row, request in enumerate(requests):
        known = first.setdefault(_identity(request), request)
        if known.volume.shape != request.volume.shape:
            raise SegRLError(
                f"request {row}: key {request.key!r} with a volume of shape {request.volume.shape}, but an earlier one "
                f"has {known.volume.shape}; a key stands for one volume"
            )
    return first


def _write(masks: list[np.ndarray], places: Sequence[tuple[int, int]], logits: Tensor) -> None:
    """Add the masks (logits "N h w") to slice `place[1]` of mask `place[0]`, resized to its size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for n, (row, _) in enumerate(places):
        by_size.setdefault(masks[row].shape[1:], []).append(n)
    for size, rows in by_size.items():
        resized = F.interpolate(logits[rows, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
        for n, mask in zip(rows, (resized > 0).cpu().numpy(), strict=True):
            row, index = places[n]
            masks[row][index] |= mask
