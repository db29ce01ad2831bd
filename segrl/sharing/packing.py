"""Pack the rows of a batch, some of which share a prompt, into one row."""

# B rows, U unique prompts, P prompt tokens with padding, T completion tokens with padding, L packed tokens, N images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segrl.sharing.attention import LAYOUT_KEYWORD
from segrl.sharing.images import image_indices, pixels_of
from segrl.sharing.layout import build_layout
from segrl.sharing.support import no_mask
from segrl.sharing.vision import IMAGE_KEYS_KEYWORD, VisionOnce

__all__ = ["IMAGE_INPUTS", "Packed", "PromptKey", "pack_rows", "select_images", "select_rows"]

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")  # inputs that can be shared


@dataclass(frozen=True)
class PromptKey:
    """The identity of a prompt: its tokens, and the content keys of its images in order (`segrl.caching.ImageKeys`).

    Example:
        >>> PromptKey((5, 6), ("0a1b",)) == PromptKey((5, 6), ("0a1b",)), PromptKey((5, 6)) == PromptKey((5, 6, 0))
        (True, False)
    """

    tokens: tuple[int, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Packed:
    """The arguments of a model with a fused language-model head that scores completions; see `pack_rows`.

    Attributes:
        inputs: Keyword arguments of the model.
        labels: `shift_labels` (B, T+1) of the states that the backbone returns: the completion's tokens, then -100.

    Example:
        >>> Packed({"input_ids": torch.tensor([[5, 6, 7]])}, labels=torch.tensor([[7, -100]])).labels.shape
        torch.Size([1, 2])
    """

    inputs: dict[str, Any]
    labels: Tensor


def pack_rows(
    backbone: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: int,
    keys: Sequence[PromptKey],
    rows: range | None = None,
    **images: Any,
) -> Packed | None:
    """Pack B rows `[left-padded prompt | right-padded completion]` into one row with each prompt once.

    Args:
        backbone: The model without its language-model head (`segrl.models.backbone_of`), which `enable_sharing`
            accepted; it computes the positions of image tokens.
        input_ids: (B, P+T).
        attention_mask: (B, P+T); a whole completion may be masked.
        keep: Number of completion tokens T.
        keys: Rows with equal keys have the same prompt and the same images.
        rows: The rows to pack; None packs all. All other arguments describe the whole batch.
        **images: `pixel_values`, `image_grid_thw`, `num_images`, `mm_token_type_ids` of the B rows.

    Returns:
        The packed row, or None if no two rows have the same prompt, or the masks have holes.

    Example:
        >>> from segrl.models import backbone_of, tiny_causal_lm
        >>> from segrl.sharing import enable_sharing
        >>> model, _ = tiny_causal_lm(layers=1)
        >>> enable_sharing(model)
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])  # one prompt of 2 tokens, completions of 2 and 1
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        >>> packed = pack_rows(backbone_of(model), ids, mask, keep=2, keys=[PromptKey((5, 6))] * 2)
        >>> packed.inputs["input_ids"].tolist(), packed.labels.tolist()
        ([[5, 6, 7, 8, 9]], [[7, 8, -100], [9, -100, -100]])
    """
    rows = range(len(keys)) if rows is None else rows
    groups: dict[PromptKey, list[int]] = {}
    for row in rows:
        groups.setdefault(keys[row], []).append(row)
    if len(groups) == len(rows):
        return None
    input_ids, attention_mask = input_ids[rows.start : rows.stop], attention_mask[rows.start : rows.stop]
    leaders = [group[0] for group in groups.values()]  # rows of the batch; `members` are rows of the part
    members = [[row - rows.start for row in group] for group in groups.values()]
    prompt_ids, own_ids = input_ids[:, :-keep], input_ids[:, -keep:]
    prompt_mask, own_mask = attention_mask[:, :-keep], attention_mask[:, -keep:]
    first = torch.tensor([groups[keys[row]][0] - rows.start for row in rows], device=input_ids.device)
    # The keys are trusted for the images only: tokens are compared with those of the first row of the group.
    same = ((prompt_ids == prompt_ids[first]) | (prompt_mask == 0)).all(1) & (prompt_mask == prompt_mask[first]).all(1)
    # Without holes, lengths describe the masks: the prompt's only rises, the completion's only falls.
    whole = (prompt_mask.diff(dim=1) >= 0).all(1) & (own_mask.diff(dim=1) <= 0).all(1)
    facts = torch.stack([prompt_mask.sum(1), own_mask.sum(1), same.long(), whole.long()]).tolist()
    prompts, completions = facts[0], facts[1]
    if not all(facts[2]) or not all(facts[3]) or min(prompts) < 1:
        return None

    layout = build_layout(members, prompts, completions, keep, input_ids.device)
    pixels = select_images(backbone, leaders, keys, **images)
    types = images.get("mm_token_type_ids")
    unique = [group[0] for group in members]
    positions = _prompt_positions(
        backbone,
        prompt_ids[unique],
        prompt_mask[unique],
        pixels.get("image_grid_thw"),
        None if types is None else types[leaders, :-keep],
    )
    ids: list[Tensor] = []
    position_parts: list[Tensor] = []
    for number, group in enumerate(members):
        length = prompts[group[0]]
        own = positions[:, number, -length:]
        ids.append(prompt_ids[group[0], -length:])
        position_parts.append(own)
        # M-RoPE: the text after an image continues behind the largest of its three coordinates.
        following = own.max() + 1 + torch.arange(keep, device=own.device)
        for row in group:
            ids.append(own_ids[row, : completions[row]])
            position_parts.append(following[: completions[row]].expand(len(own), -1))
    position_ids = torch.cat(position_parts, dim=1)
    inputs = {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": position_ids if len(position_ids) == 1 else position_ids.unsqueeze(1),
        "attention_mask": no_mask(input_ids.device),
        LAYOUT_KEYWORD: layout,
        **pixels,
    }
    labels = own_ids.masked_fill(own_mask == 0, -100)
    return Packed(inputs, torch.nn.functional.pad(labels, (0, 1), value=-100))


def select_rows(rows: range, **images: Any) -> dict[str, Any]:
    """Return the part of `pixel_values`, `image_grid_thw`, `num_images` and `mm_token_type_ids` of some rows.

    Example:
        >>> selected = select_rows(range(1, 2), pixel_values=torch.arange(3.0), num_images=[1, 2])
        >>> selected["pixel_values"].tolist(), selected["num_images"]
        ([1.0, 2.0], [2])
    """
    counts, types = images.get("num_images"), images.get("mm_token_type_ids")
    return {
        **_pixels(rows, images.get("pixel_values"), images.get("image_grid_thw"), counts),
        "num_images": None if counts is None else list(counts[rows.start : rows.stop]),
        "mm_token_type_ids": None if types is None else types[rows.start : rows.stop],
    }


def select_images(
    backbone: Any,
    rows: Sequence[int],
    keys: Sequence[PromptKey],
    *,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    num_images: Sequence[int] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return the images of some rows as keyword arguments of a backbone, with their keys if it has a `VisionOnce`.

    Args:
        backbone: The model without its language-model head.
        rows: Rows, in the order of the result.
        keys: Key of every row of the batch.
        pixel_values: All images, flattened to patches (patches, D) as in Qwen-VL, or one per row (N, 3, H, W).
        image_grid_thw: Patches of each image along time, height and width, (N, 3).
        num_images: Number of images of each row.
    """
    selected: dict[str, Any] = _pixels(rows, pixel_values, image_grid_thw, num_images)
    if selected and isinstance(getattr(backbone, "get_image_features", None), VisionOnce):
        selected[IMAGE_KEYS_KEYWORD] = [key for row in rows for key in keys[row].images]
    return selected


def _pixels(
    rows: Sequence[int], pixels: Tensor | None, grid: Tensor | None, counts: Sequence[int] | None
) -> dict[str, Tensor]:
    if pixels is None or counts is None:
        return {}
    chosen = image_indices(rows, counts)
    return pixels_of(chosen, pixels, grid) if chosen else {}  # models do not take zero images


def _prompt_positions(
    backbone: Any, ids: Tensor, mask: Tensor, image_grid_thw: Tensor | None, types: Tensor | None
) -> Tensor:
    """Compute the position ids (3, U, P) of prompts with images in models with M-RoPE, (1, U, P) otherwise."""
    if hasattr(backbone, "get_rope_index") and image_grid_thw is not None and types is not None:
        return backbone.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=image_grid_thw, attention_mask=mask
        )[0]
    return (mask.long().cumsum(1) - 1).clamp(min=0).unsqueeze(0)
