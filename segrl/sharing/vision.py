"""Features of the vision tower once per image: within a pass, and across passes while the tower is frozen.

Shape legend: N images, n_i language-model tokens of image i, D language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from segrl.caching.feature_cache import FeatureCache
from segrl.sharing.images import image_indices, pixels_of

KEYWORD = "image_keys"


class VisionOnce:
    """Stands before a backbone's `get_image_features` once `install_vision` has put it there.

    A forward that is given `image_keys`, one key per image in the order of its pixels, encodes each key once. With a
    frozen tower the features are kept (`cache`) until a weight changes, and no graph is built for it. Any other forward
    is left alone.

    Attributes:
        cache: features "n_i D" of the language model's tokens, and of Qwen3-VL's deeper layers, by key.
        encoded_images: images that really went through the tower, for reports and tests.
    """

    def __init__(self, backbone: Any, decoder: nn.Module, cache: FeatureCache) -> None:
        self.cache, self.encoded_images = cache, 0
        self._original = backbone.get_image_features
        self._backbone, self._decoder = backbone, decoder
        self._stamp: Any = None
        self._keys: list[str] | None = None
        self._outside: list[str] | None = None
        self._kind: Any = None
        self._joined = False

    @property
    def frozen(self) -> bool:
        """Whether no parameter outside the decoder is trained."""
        return not any(p.requires_grad for module in self._tower() for p in module.parameters(recurse=False))

    def _tower(self) -> Iterator[nn.Module]:
        """All modules of the backbone outside the decoder, as they are now: adapters may have come."""
        waiting: list[nn.Module] = [self._backbone]
        while waiting:
            module = waiting.pop()
            yield module
            waiting += [child for child in module.children() if child is not self._decoder]

    def _read_stamp(self) -> Any:
        """What changes when a weight or the choice of adapters does.

        Buffers do not count: DDP may write them, unchanged, before every forward.
        """
        parts: list[Any] = []
        for module in self._tower():
            for parameter in module.parameters(recurse=False):
                if type(parameter.data) is not Tensor or parameter.is_inference():
                    return object()  # sharded or of another kind: nothing is known of its storage
                parts.append((id(parameter), parameter.data_ptr(), parameter.dtype, parameter._version))
            if isinstance(module, BaseTunerLayer):
                parts.append((module.disable_adapters, module.merged, tuple(module.active_adapters)))
        return parts

    @contextmanager
    def expecting(self, keys: list[str]) -> Iterator[None]:
        """Inside the context, images that are encoded outside a forward have these keys."""
        self._outside = self._keys = keys
        try:
            yield
        finally:
            self._outside = self._keys = None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._keys = kwargs.pop(KEYWORD, self._outside)
        return args, kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._keys = self._outside

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        keys = self._keys
        images = len(pixel_values) if image_grid_thw is None else len(image_grid_thw)
        grid: dict[str, Tensor] = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw}
        if keys is None or len(keys) != images:
            self.encoded_images += images
            return self._original(pixel_values, **grid, **kwargs)
        frozen = self.frozen
        precision = self._precision(pixel_values.device.type)
        names = [f"{key} {precision}" for key in keys]
        found: dict[str, tuple[Tensor, ...]] = {}
        if frozen:
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self.cache.clear()
        if frozen and self._kind is not None:
            for name in dict.fromkeys(names):
                kept = self.cache.get(name, device=pixel_values.device)
                if kept is not None:
                    found[name] = kept
        missing = {name: names.index(name) for name in dict.fromkeys(names) if name not in found}
        if missing:
            self.encoded_images += len(missing)
            with torch.no_grad() if frozen else nullcontext():
                output = self._original(**pixels_of(list(missing.values()), pixel_values, image_grid_thw), **kwargs)
            parts = _by_image(output, len(missing))
            if parts is None:  # of a form that is not known here
                self.encoded_images += images - len(missing)
                return self._original(pixel_values, **grid, **kwargs)
            self._kind = type(output)
            self._joined = _is_joined(output)
            found.update(zip(missing, parts, strict=True))
            if frozen:
                for name in missing:
                    self.cache.put(name, found[name])
        pieces = [found[name] for name in names]
        return _assembled(self._kind, pieces, self._joined)

    def _precision(self, device: str) -> torch.dtype | None:
        """What the tower computes in: autocast's precision or that of its weights; None for weights of several.

        With adapters `generate` runs without the autocast of the passes around it, which changes nothing where the
        weights have its precision.
        """
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        kinds = {p.dtype for module in self._tower() for p in module.parameters(recurse=False) if p.is_floating_point()}
        return kinds.pop() if len(kinds) == 1 else None


def install_vision(backbone: Any, decoder: nn.Module, cache: FeatureCache) -> VisionOnce | None:
    """Put a `VisionOnce` before the backbone's vision tower; None if it has none. The class stays what it is.

    A backbone that has one already keeps it, with this cache.
    """
    if not hasattr(backbone, "get_image_features"):
        return None
    if isinstance(backbone.get_image_features, VisionOnce):
        backbone.get_image_features.cache = cache
        backbone.get_image_features.encoded_images = 0
        return backbone.get_image_features
    once = VisionOnce(backbone, decoder, cache)
    backbone.get_image_features = once
    backbone.register_forward_pre_hook(once.before, with_kwargs=True)
    backbone.register_forward_hook(once.after, always_call=True)
    return once


def select_features(output: Any, rows: Sequence[int], num_images: Sequence[int]) -> Any:
    """What `get_image_features` returned for all rows, for some of them; None if it is of an unknown form.

    Args:
        output: features of all images.
        rows: which rows.
        num_images: images of each row.
    """
    parts = _by_image(output, sum(num_images))
    if parts is None:
        return None
    chosen = [parts[n] for n in image_indices(rows, num_images)]
    return _assembled(type(output), chosen, _is_joined(output))


def _is_joined(output: Any) -> bool:
    """Whether deeper layers come as one tensor (transformers before 5.20) or by image."""
    return any(isinstance(level, Tensor) for level in getattr(output, "deepstack_features", None) or [])


def _assembled(kind: Any, pieces: Sequence[tuple[Tensor, ...]], joined: bool) -> Any:
    deeper = [list(level) for level in zip(*(piece[1:] for piece in pieces), strict=True)]
    extra = {"deepstack_features": [torch.cat(d) if joined else d for d in deeper]} if deeper else {}
    return kind(pooler_output=tuple(piece[0] for piece in pieces), **extra)


def _by_image(output: Any, images: int) -> list[tuple[Tensor, ...]] | None:
    """Features of each image, then those of deeper layers; None if `output` is of another form."""
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, (list, tuple)) or len(pooled) != images:
        return None
    sizes = [len(part) for part in pooled]
    levels = getattr(output, "deepstack_features", None) or []
    split = [level.split(sizes) if isinstance(level, Tensor) else level for level in levels]
    if any(len(level) != images for level in split):
        return None
    return [(part, *(level[n] for level in split)) for n, part in enumerate(pooled)]
