"""Rows of a batch, of which some share a prompt, to one packed row.

Shape legend: B rows, P prompt tokens with padding, T completion tokens with padding, L packed tokens, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segrl.sharing import attention, vision
from segrl.sharing.images import image_indices, pixels_of
from segrl.sharing.layout import build_layout
from segrl.sharing.support import no_mask

IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")  # what can be shared


@dataclass(frozen=True)
class PromptKey:
    """What makes two prompts the same: their tokens, and the content of their images in order (`ImageKeys`)."""

    tokens: tuple[int, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Packed:
    """What a model with a fused language-model head takes to score completions.

    Attributes:
        inputs: keyword arguments of the model.
        labels: `shift_labels` "B T+1" of the states that the backbone returns: the completion's tokens, then -100.
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
    """One packed row for B rows `[left-padded prompt | right-padded completion]`.

    Args:
        backbone: the model without its language-model head (`backbone_of`); it knows the positions of image tokens.
        input_ids: "B P+T".
        attention_mask: "B P+T"; a completion may be masked as a whole.
        keep: completion tokens T.
        keys: rows with equal keys have the same prompt and the same images.
        rows: the rows to pack; None packs all. Everything else describes the whole batch.
        images: `pixel_values`, `image_grid_thw`, `num_images`, `mm_token_type_ids` as the model takes them for B rows.

    Returns:
        The packed row, or None if no two rows have the same prompt, or the masks have holes.
    """
    rows = range(len(keys)) if rows is None else rows
    groups: dict[PromptKey, list[int]] = {}
    for row in rows:
        groups.setdefault(keys[row], []).append(row)
    if len(groups) == len(rows):
        return None
    input_ids, attention_mask = input_ids[rows.start : rows.stop], attention_mask[rows.start : rows.stop]
    heads = [group[0] for group in groups.values()]  # rows of the batch; the members below are rows of the part
    members = [[row - rows.start for row in group] for group in groups.values()]
    prompt_ids, own_ids = input_ids[:, :-keep], input_ids[:, -keep:]
    prompt_mask, own_mask = attention_mask[:, :-keep], attention_mask[:, -keep:]
    first = torch.tensor([groups[keys[row]][0] - rows.start for row in rows], device=input_ids.device)
    same = ((prompt_ids == prompt_ids[first]) | (prompt_mask == 0)).all(1) & (prompt_mask == prompt_mask[first]).all(1)
    whole = (prompt_mask.diff(dim=1) >= 0).all(1) & (own_mask.diff(dim=1) <= 0).all(1)
    facts = torch.stack([prompt_mask.sum(1), own_mask.sum(1), same.long(), whole.long()]).tolist()  # the only sync
    prompts, completions = facts[0], facts[1]
    if not all(facts[2]) or not all(facts[3]) or min(prompts) < 1:
        return None

    layout = build_layout(members, prompts, completions, keep, input_ids.device)
    pixels = select_images(backbone, heads, keys, **images)
    types = images.get("mm_token_type_ids")
    unique = [group[0] for group in members]
    positions = _prompt_positions(
        backbone,
        prompt_ids[unique],
        prompt_mask[unique],
        pixels.get("image_grid_thw"),
        None if types is None else types[heads, :-keep],
    )
    ids: list[Tensor] = []
    where: list[Tensor] = []
    for number, group in enumerate(members):
        length = prompts[group[0]]
        own = positions[:, number, -length:]
        ids.append(prompt_ids[group[0], -length:])
        where.append(own)
        following = own.max() + 1 + torch.arange(keep, device=own.device)
        for row in group:
            ids.append(own_ids[row, : completions[row]])
            where.append(following[: completions[row]].expand(len(own), -1))
    position_ids = torch.cat(where, dim=1)
    inputs = {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": position_ids if len(position_ids) == 1 else position_ids.unsqueeze(1),
        "attention_mask": no_mask(input_ids.device),
        attention.KEYWORD: layout,
        **pixels,
    }
    labels = own_ids.masked_fill(own_mask == 0, -100)
    return Packed(inputs, torch.nn.functional.pad(labels, (0, 1), value=-100))


def select_rows(rows: range, **images: Any) -> dict[str, Any]:
    """The part of `pixel_values`, `image_grid_thw`, `num_images` and `mm_token_type_ids` that belongs to some rows."""
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
    """The images of some rows, as keyword arguments of a backbone, with their keys if it has a `VisionOnce`.

    Args:
        backbone: the model without its language-model head.
        rows: which rows.
        keys: the key of every row.
        pixel_values: all images, flattened to patches ("patches D", Qwen-VL) or one per row ("N 3 H W").
        image_grid_thw: patches of each image along time, height and width, "N 3".
        num_images: images of each row.
    """
    selected: dict[str, Any] = _pixels(rows, pixel_values, image_grid_thw, num_images)
    if selected and isinstance(getattr(backbone, "get_image_features", None), vision.VisionOnce):
        selected[vision.KEYWORD] = [key for row in rows for key in keys[row].images]
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
    """Position ids "3 U P" of prompts with images in models with M-RoPE, "1 U P" otherwise."""
    if hasattr(backbone, "get_rope_index") and image_grid_thw is not None and types is not None:
        return backbone.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=image_grid_thw, attention_mask=mask
        )[0]
    return (mask.long().cumsum(1) - 1).clamp(min=0).unsqueeze(0)
