"""Generation with one prefill per prompt: its keys and values are computed once and repeated for its G answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from segrl.sharing.images import image_indices
from segrl.sharing.packing import PromptKey, select_images
from segrl.sharing.vision import VisionOnce, select_features

_BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "mm_token_type_ids")
_IMAGES = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")
_KNOWN = {*_BY_ROW, *_IMAGES, "position_ids", "past_key_values"}


@contextmanager
def prefill_once(backbone: Any, keys: Sequence[PromptKey], num_images: Sequence[int] | None) -> Iterator[None]:
    """Inside the context the first forward of `backbone`, which is `generate`'s prefill, runs on the unique prompts.

    Its cache and the state of the last token are then repeated for all rows, so that `generate` notices nothing. A
    forward that is not understood (another kind of cache, another number of rows, unknown inputs) runs as it comes, and
    so does everything if no two keys are equal.

    Args:
        backbone: a backbone that `enable_sharing` accepted.
        keys: rows with equal keys have the same prompt and the same images; all keep their place.
        num_images: images of each row, or None without images.
    """
    once = getattr(backbone, "get_image_features", None)
    shown = [image for key in keys for image in key.images]
    known = once.expecting(shown) if isinstance(once, VisionOnce) else nullcontext()  # `generate` may encode first
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
        place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.rows = [keys.index(key) for key in place]  # of each unique prompt
        self.repeat = [place[key] for key in keys]
        self.done = self.reduced = False

    def before(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.done:
            return None
        self.done = True
        if args or not self._understood(kwargs):
            return None
        self.reduced = True
        reduced = {name: value for name, value in kwargs.items() if name not in _IMAGES}
        for name in _BY_ROW:
            if isinstance(kwargs.get(name), Tensor):
                reduced[name] = kwargs[name][self.rows]
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
        if not self.reduced:
            return
        self.reduced = False
        device = output.last_hidden_state.device
        repeat = torch.tensor(self.repeat, device=device)
        output.past_key_values.batch_select_indices(repeat)
        output["last_hidden_state"] = output.last_hidden_state[:, -1:][repeat]

    def _understood(self, kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
        encoded = kwargs.get("mm_encoder_outputs") or {}
        others = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _KNOWN]
        return (
            isinstance(ids, Tensor)
            and len(ids) == len(self.keys)
            and type(cache) is DynamicCache
            and cache.get_seq_length() == 0
            and not [name for name in others if kwargs[name].ndim > 1]  # one-dimensional ones are about tokens
            and (not encoded or self.num_images is not None)
            and self._countable(kwargs.get("pixel_values"), kwargs.get("image_grid_thw"))
            and set(encoded) <= {"image"}
            and (not encoded or self._features(kwargs) is not None)
            and (positions is None or positions.size(-2) == len(ids))
        )

    def _countable(self, pixels: Tensor | None, grid: Tensor | None) -> bool:
        """Whether the pixels are those of `num_images`: some models cut images to tiles, and one cannot tell whose."""
        if pixels is None:
            return True
        return self.num_images is not None and len(pixels if grid is None else grid) == sum(self.num_images)
