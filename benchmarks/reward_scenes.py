"""Inputs of `bench_rewards.py`: scenes with lesions, and answers to a question about them."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np

from segrl.geometry import boxes_from_mask
from segrl.predictions import (
    SEG_TOKEN,
    Frame,
    Prediction,
    Target,
    VolumeTarget,
    format_answer,
    format_completion,
    parse_completion,
)
from segrl.rewards import Reward

ANSWERS = 4  # to one question
SLICES, KEY_SLICE = 8, 4
REASONING = "There is a round and dark spot with a sharp edge in an otherwise even area. " * 6


class Scene(NamedTuple):
    """A true mask and the masks of several answers, each a little further off."""

    size: int
    lesions: int
    true: np.ndarray
    answers: list[np.ndarray]


def scene(size: int, lesions: int, seed: int = 0) -> Scene:
    """Discs on a grid, one lesion each; together a tenth of the image or so, whatever their number."""
    rng = np.random.default_rng(seed)
    side = math.ceil(math.sqrt(lesions))
    cell = size / side
    true, answers = np.zeros((size, size), dtype=bool), [np.zeros((size, size), dtype=bool) for _ in range(ANSWERS)]
    rows, columns = np.mgrid[:size, :size] + 0.5
    for index in range(lesions):
        y, x = (index // side + 0.5) * cell, (index % side + 0.5) * cell
        radius = cell * rng.uniform(0.12, 0.25)
        true |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        for number, mask in enumerate(answers):
            off = radius * 0.1 * (number + 1)
            mask |= (rows - y - off) ** 2 + (columns - x) ** 2 < (radius + off) ** 2
    return Scene(size, lesions, true, answers)


def text_of(kind: str, boxes: np.ndarray, frame: Frame) -> str:
    """A valid completion in words, JSON, or JSON that names a slice."""
    if kind == "text":
        return format_completion(REASONING, format_answer("cyst", boxes, frame))
    places = frame.from_original(boxes).tolist()
    if kind == "slice":
        return format_completion(REASONING, json.dumps({"slice": KEY_SLICE + 1, "bbox_2d_list": places}))
    found = [
        {"bbox_2d": place, "point_2d": [(place[0] + place[2]) // 2, (place[1] + place[3]) // 2], "score": 0.9}
        for place in places
    ]
    return format_completion(REASONING, json.dumps(found) + SEG_TOKEN)


def read(kind: str, text: str, frame: Frame) -> Prediction:
    found = parse_completion(
        text, frame, require_seg=kind != "slice", answer_format="text" if kind == "text" else "json"
    )
    assert found.valid, (found.status, text)
    return found


def kind_of(reward: Reward) -> str:
    """In which form of answer a reward finds all that it looks for."""
    if reward.volume or reward.name.startswith("slice"):
        return "slice"
    needs_json = reward.completion_format.answer_format == "json" or reward.name == "json_format"
    return (
        "json"
        if needs_json or reward.name.startswith("point") or reward.name in ("box_ap", "box_confidence")
        else "text"
    )


def predictions_of(view: Scene, kind: str) -> list[Prediction]:
    frame = Frame("original_px", (view.size, view.size))
    found = []
    for mask in view.answers:
        parsed = read(kind, text_of(kind, boxes_from_mask(mask), frame), frame)
        sure = np.where(mask, np.float32(0.9), np.float32(0.05))
        found.append(parsed if kind == "slice" else parsed.with_mask(mask, sure))
    return found


def target_of(view: Scene, volume: bool) -> Target | VolumeTarget:
    """A new target, which has computed nothing yet."""
    if not volume:
        return Target(view.true, boxes_from_mask(view.true))
    stack = np.zeros((SLICES, view.size, view.size), dtype=bool)
    stack[KEY_SLICE - 1 : KEY_SLICE + 2] = view.true
    return VolumeTarget(stack)
