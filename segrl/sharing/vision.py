"""Compute the features of the vision tower once per image: within a pass, and across passes if the tower is frozen."""

# N images, n_i language-model tokens of image i, D language-model width

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from segrl.caching.feature_cache import FeatureCache, encoding_batches
from segrl.sharing.images import image_indices, pixels_of

__all__ = ["IMAGE_KEYS_KEYWORD", "VisionOnce", "install_vision", "select_features"]

IMAGE_KEYS_KEYWORD = "image_keys"


class VisionOnce:
    """A replacement of a backbone's `get_image_features`, which `install_vision` puts there.

    A forward with `image_keys`, one key per image in the order of its pixels, encodes each key once. If the tower is
    frozen, its features are kept in `cache` until a weight changes, and it builds no graph. Any other forward is
    unchanged.

    Attributes:
        cache: Features (n_i, D) of the language model's tokens, and of Qwen3-VL's deeper layers, by key. None keeps
            none, and every forward with images is one call of the tower: where an engine shards the weights over
            processes, all of them must gather the tower's equally often.
        encoded_images: Number of images that the tower has encoded, for reports and tests.

    Example:
        >>> from segrl.models import backbone_of, tiny_llava
        >>> model, _ = tiny_llava(layers=1, vision_layers=1)
        >>> once = install_vision(backbone_of(model.requires_grad_(False)), model.get_decoder(), FeatureCache())
        >>> with once.expecting(["0a1b"]):  # outside of a forward the keys are given here
        ...     for _ in range(3):
        ...         output = model.model.get_image_features(torch.zeros(1, 3, 112, 112))
        >>> once.encoded_images, once.frozen, once.cache.hits
        (1, True, 2)
    """

    def __init__(self, backbone: Any, decoder: nn.Module, cache: FeatureCache | None) -> None:
        self.cache, self.encoded_images = cache, 0
        self._original = backbone.get_image_features
        # `generate` reads off the signature which of its inputs the tower takes
        self.__signature__ = inspect.signature(self._original)
        self._names = list(self.__signature__.parameters)
        self._backbone, self._decoder = backbone, decoder
        self._stamp: Any = None
        self._keys: list[str] | None = None
        self._outside: list[str] | None = None
        self._form: _Form | None = None

    @property
    def frozen(self) -> bool:
        """Return whether no parameter outside the decoder is trained."""
        return not any(p.requires_grad for module in self._tower() for p in module.parameters(recurse=False))

    def _tower(self) -> Iterator[nn.Module]:
        """Yield all modules of the backbone outside the decoder; read anew each time, because adapters may be added."""
        waiting: list[nn.Module] = [self._backbone]
        while waiting:
            module = waiting.pop()
            yield module
            waiting += [child for child in module.children() if child is not self._decoder]

    def _read_stamp(self) -> Any:
        """Return values that change when a weight or the choice of adapters does.

        Buffers do not count: DDP may write them, unchanged, before every forward.
        """
        parts: list[Any] = []
        for module in self._tower():
            for parameter in module.parameters(recurse=False):
                if type(parameter.data) is not Tensor or parameter.is_inference():
                    return object()  # sharded, so its storage says nothing; equal to no other stamp
                parts.append((id(parameter), parameter.data_ptr(), parameter.dtype, parameter._version))
            if isinstance(module, BaseTunerLayer):
                parts.append((module.disable_adapters, module.merged, tuple(module.active_adapters)))
        return parts

    @contextmanager
    def expecting(self, keys: list[str]) -> Iterator[None]:
        """Inside the context, images that are encoded outside of a forward have these keys."""
        self._outside = self._keys = keys
        try:
            yield
        finally:
            self._outside = self._keys = None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the keys off the arguments of the backbone's forward; a hook."""
        self._keys = kwargs.pop(IMAGE_KEYS_KEYWORD, self._outside)
        return args, kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the keys of the forward; a hook."""
        self._keys = self._outside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        pixel_values, image_grid_thw = given.pop("pixel_values", None), given.pop("image_grid_thw", None)
        if pixel_values is None or any(isinstance(value, Tensor) for value in given.values()):
            self.encoded_images += 0 if pixel_values is None else len(pixel_values)
            return self._original(*args, **kwargs)  # tiles with their sizes or masks: not known by image
        return self._by_key(pixel_values, image_grid_thw, **given)

    def _by_key(self, pixel_values: Tensor, image_grid_thw: Tensor | None, **kwargs: Any) -> Any:
        """Encode each key once."""
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
        cache = self.cache if frozen else None
        if cache is not None:
            stamp = self._read_stamp()
            if stamp != self._stamp:  # a weight has changed, and with it all features
                self._stamp = stamp
                cache.clear()
        if cache is not None and self._form is not None:  # the form of the output is known only after a first call
            for name in dict.fromkeys(names):
                kept = cache.get(name, device=pixel_values.device)
                if kept is not None:
                    found[name] = kept
        missing = {name: names.index(name) for name in dict.fromkeys(names) if name not in found}
        if missing:
            self.encoded_images += len(missing)
            rows = list(missing.items())
            for batch in [rows] if cache is None else encoding_batches(rows, pixel_values.device.type):
                with torch.no_grad() if frozen else nullcontext():
                    shown = pixels_of([row for _, row in batch], pixel_values, image_grid_thw)
                    output = self._original(**shown, **kwargs)
                parts = _by_image(output, len(batch))
                if parts is None:  # an unknown form of output
                    self.encoded_images += images - len(missing)
                    return self._original(pixel_values, **grid, **kwargs)
                self._form = _form_of(output)
                found.update(zip((name for name, _ in batch), parts, strict=True))
            if cache is not None:
                for name in missing:
                    cache.put(name, found[name])
        assert self._form is not None
        return _assembled(self._form, [found[name] for name in names])

    def _precision(self, device: str) -> torch.dtype | None:
        """Return the precision of the tower: that of autocast or of its weights; None for weights of several.

        With adapters `generate` runs without the autocast of the other passes, which makes no difference if the weights
        have its precision: those passes can then share features.
        """
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        kinds = {p.dtype for module in self._tower() for p in module.parameters(recurse=False) if p.is_floating_point()}
        return kinds.pop() if len(kinds) == 1 else None


def install_vision(backbone: Any, decoder: nn.Module, cache: FeatureCache | None) -> VisionOnce | None:
    """Put a `VisionOnce` before the vision tower of a backbone. The class of the backbone does not change.

    Args:
        backbone: The model without its language-model head (`segrl.models.backbone_of`).
        decoder: The language model in it; everything else belongs to the tower.
        cache: Keeps features while the tower is frozen; None where the weights are sharded over processes. A backbone
            that has a `VisionOnce` keeps it, with this cache.

    Returns:
        The `VisionOnce`, or None if the backbone has no vision tower.

    Example:
        >>> from segrl.models import backbone_of, tiny_llava
        >>> model, _ = tiny_llava(layers=1, vision_layers=1)
        >>> once = install_vision(backbone_of(model), model.get_decoder(), FeatureCache())
        >>> ids = torch.full((1, 32), model.config.image_token_index)
        >>> pixels = torch.zeros(2, 3, 112, 112)  # the same image twice
        >>> _ = model.model(input_ids=ids, pixel_values=pixels, image_keys=["0a1b", "0a1b"])
        >>> once.encoded_images, once.frozen
        (1, False)
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
    """Select the features of some rows from the output of `get_image_features`; None if it has an unknown form.

    Args:
        output: Features of all images.
        rows: Rows, in the order of the result.
        num_images: Number of images of each row.
    """
    parts = _by_image(output, sum(num_images))
    if parts is None:
        return None
    chosen = [parts[n] for n in image_indices(rows, num_images)]
    return _assembled(_form_of(output), chosen)


@dataclass(frozen=True)
class _Form:
    """Form in which an output of `get_image_features` holds its images.

    Attributes:
        kind: Type of the output.
        stacked: Features are one tensor (N, n, D), as InternVL's, not a list by image.
        joined: Deeper layers are one tensor (transformers before 5.20), not a list by image.
    """

    kind: Any
    stacked: bool
    joined: bool


def _form_of(output: Any) -> _Form:
    levels = getattr(output, "deepstack_features", None) or []
    stacked = isinstance(output.pooler_output, Tensor)
    return _Form(type(output), stacked, any(isinstance(level, Tensor) for level in levels))


def _assembled(form: _Form, pieces: Sequence[tuple[Tensor, ...]]) -> Any:
    deeper = [list(level) for level in zip(*(piece[1:] for piece in pieces), strict=True)]
    extra = {"deepstack_features": [torch.cat(d) if form.joined else d for d in deeper]} if deeper else {}
    pooled = tuple(piece[0] for piece in pieces)
    return form.kind(pooler_output=torch.stack(pooled) if form.stacked else pooled, **extra)


def _by_image(output: Any, images: int) -> list[tuple[Tensor, ...]] | None:
    """Split features by image, each with those of deeper layers; None if `output` has another form."""
    pooled = getattr(output, "pooler_output", None)
    pooled = list(pooled) if isinstance(pooled, Tensor) and pooled.ndim == 3 else pooled
    if not isinstance(pooled, (list, tuple)) or len(pooled) != images:
        return None
    sizes = [len(part) for part in pooled]
    levels = getattr(output, "deepstack_features", None) or []
    split = [level.split(sizes) if isinstance(level, Tensor) else level for level in levels]
    if any(len(level) != images for level in split):
        return None
    return [(part, *(level[n] for level in split)) for n, part in enumerate(pooled)]
