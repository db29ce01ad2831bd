"""Generate with one prefill per prompt: its keys and values are computed once and repeated for its G completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from segrl.sharing.images import image_indices
from segrl.sharing.packing import PromptKey, select_images
from segrl.sharing.vision import VisionOnce, select_features

__all__ = ["prefill_once"]

_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "mm_token_type_ids")
_IMAGES = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")
_CACHES = ("cache", "past_key_values")  # the name of the key-value cache since transformers 5.24, and before
_KNOWN = {*_BY_ROW, *_IMAGES, *_CACHES, "position_ids"}


@contextmanager
def prefill_once(backbone: Any, keys: Sequence[PromptKey], num_images: Sequence[int] | None) -> Iterator[None]:
    """Inside the context, the first forward of `backbone`, the prefill of `generate`, runs on the unique prompts.

    Its cache (dynamic or static) and the state of the last token are then repeated for all rows, so `generate`
    continues as usual. A forward with another kind of cache, another number of rows or unknown inputs is not changed,
    and neither is any if all keys differ.

    Args:
        backbone: A backbone that `enable_sharing` accepted.
        keys: Key of each row; rows with equal keys have the same prompt and the same images.
        num_images: Number of images of each row, or None without images.

    Example:
        >>> from segrl.models import backbone_of, tiny_causal_lm
        >>> model, tokenizer = tiny_causal_lm(layers=1)
        >>> inputs, rows = tokenizer(["Where is it?"] * 4, return_tensors="pt"), []
        >>> _ = model.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        >>> with prefill_once(backbone_of(model), [PromptKey((1,))] * 4, None):
        ...     output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        >>> rows, len(output)
        ([1, 4, 4], 4)
    """
    once = getattr(backbone, "get_image_features", None)
    shown = [image for key in keys for image in key.images]
    known = once.expecting(shown) if isinstance(once, VisionOnce) else nullcontext()  # `generate` may encode images
    if len(set(keys)) == len(keys):
        with known:
            yield
        return
    prefill = _Prefill(keys, num_images)
    handles = [
        backbone.register_forward_pre_hook(prefill.before, with_kwargs=True, prepend=True),
        backbone.register_forward_hook(prefill.after, prepend=True),
    ]
    try:
        with known:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Prefill:
    """Hooks around one forward: rows of unique prompts go in, all rows come out."""

    def __init__(self, keys: Sequence[PromptKey], num_images: Sequence[int] | None) -> None:
        self.keys, self.num_images = keys, num_images
        position = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.rows = [keys.index(key) for key in position]  # the first row of each unique prompt
        self.repeat = [position[key] for key in keys]
        self.done = self.reduced = False

    def before(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Reduce the arguments of the prefill to the unique prompts."""
        if self.done:
            return None
        self.done = True
        if args or not self._supported(kwargs):
            return None
        self.reduced = True
        reduced = {name: value for name, value in kwargs.items() if name not in _IMAGES}
        for name in _BY_ROW:
            if name in kwargs:
                reduced[name] = _select(kwargs[name], self.rows)
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor):
            reduced["position_ids"] = positions[self.rows] if positions.ndim == 2 else positions[:, self.rows]
        pixels, grid = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        reduced |= select_images(
            backbone, self.rows, self.keys, pixel_values=pixels, image_grid_thw=grid, num_images=self.num_images
        )
        if kwargs.get("mm_encoder_outputs"):  # `generate` has encoded all images already
            reduced["mm_encoder_outputs"] = {"image": self._features(kwargs)}
            if grid is not None:
                reduced["image_grid_thw"] = grid[image_indices(self.rows, self.num_images or [])]
        return args, reduced

    def _features(self, kwargs: dict[str, Any]) -> Any:
        return select_features(kwargs["mm_encoder_outputs"]["image"], self.rows, self.num_images or [])

    def after(self, backbone: Any, args: Any, output: Any) -> None:
        """Repeat cache and last state for all rows."""
        if not self.reduced:
            return
        self.reduced = False
        device = output.last_hidden_state.device
        repeat = torch.tensor(self.repeat, device=device)
        _repeat(_cache_of(output), repeat)
        output["last_hidden_state"] = output.last_hidden_state[:, -1:][repeat]

    def _supported(self, kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        cache, positions = _cache_of(kwargs), kwargs.get("position_ids")
        encoded, mask = kwargs.get("mm_encoder_outputs") or {}, kwargs.get("attention_mask")
        masks = mask.values() if isinstance(mask, dict) else [mask]
        others = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _KNOWN]
        return (
            isinstance(ids, Tensor)
            and len(ids) == len(self.keys)
            and _repeatable(cache)
            and all(one is None or (isinstance(one, Tensor) and len(one) == len(ids)) for one in masks)
            and not [name for name in others if kwargs[name].ndim > 1]  # one-dimensional ones have no rows
            and (not encoded or self.num_images is not None)
            and self._countable(kwargs.get("pixel_values"), kwargs.get("image_grid_thw"))
            and set(encoded) <= {"image"}
            and (not encoded or self._features(kwargs) is not None)
            and (positions is None or positions.size(-2) == len(ids))
        )

    def _countable(self, pixels: Tensor | None, grid: Tensor | None) -> bool:
        """Return whether the pixels are those of `num_images`; tiles, for example, cannot be assigned to rows."""
        if pixels is None:
            return True
        return self.num_images is not None and len(pixels if grid is None else grid) == sum(self.num_images)


def _select(values: Any, rows: Sequence[int]) -> Any:
    """Return rows of a tensor, or of each in a dict: masks by kind of layer, as `generate` makes for a static cache."""
    if isinstance(values, dict):
        return {name: _select(value, rows) for name, value in values.items()}
    return None if values is None else values[rows]


def _repeatable(cache: Any) -> bool:
    """Whether `_repeat` takes a cache, and nothing is in it."""
    if type(cache) is StaticCache:
        layers = cache.layers
        return not cache.offloading and all(type(one) is StaticLayer and not one.is_initialized for one in layers)
    return type(cache) is DynamicCache and cache.get_seq_length() == 0


def _repeat(cache: Any, rows: Tensor) -> None:
    """Make the cache that of these rows; a static one gets tensors anew, as it makes them itself for a first batch."""
    if type(cache) is DynamicCache:
        cache.batch_select_indices(rows)
        return
    for layer in cache.layers:
        keys, values = layer.keys[rows], layer.values[rows]
        layer.lazy_initialization(keys, values)
        layer.keys.copy_(keys)
        layer.values.copy_(values)


def _cache_of(values: Any) -> Any:
    """Return the key-value cache in the arguments or the output of a forward, or None."""
    return next((values[name] for name in _CACHES if values.get(name) is not None), None)
