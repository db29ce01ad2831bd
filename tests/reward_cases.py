"""A scene of two lesions, what a model could say about it, and TRL's way of calling a reward."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from segrl.predictions import Frame, Target, format_answer, format_completion, parse_completion
from segrl.rewards import dump_reward, list_rewards, load_reward, reward_info

HEIGHT, WIDTH = 32, 40
FRAME = Frame("original_px", (WIDTH, HEIGHT))
TRUE_BOXES = [[4, 4, 16, 14], [22, 18, 34, 28]]
WHOLE = [0, 0, WIDTH, HEIGHT]
GOOD = "<think>Two dark spots.</think><answer>The cyst is located at [4, 4, 16, 14], [22, 18, 34, 28].<seg></answer>"


def mask_of(*boxes):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


TARGET = Target.from_mask(mask_of(*TRUE_BOXES), name="scan_7.png")
EMPTY = Target.from_mask(mask_of())


def reloaded(reward):
    """The reward, written as YAML and read again."""
    with tempfile.TemporaryDirectory() as folder:
        dump_reward(reward, Path(folder, "reward.yaml"))
        return load_reward(Path(folder, "reward.yaml"))


def says(*boxes, mask=None, reasoning="Dark."):
    text = format_completion(reasoning, format_answer("cyst", boxes, FRAME))
    return read(text) if mask is None else read(text).with_mask(mask)


def read(text, **options):
    return parse_completion(text, FRAME, **options)


def as_trl_calls(reward, completions, **columns):
    """The keywords with which TRL's GRPO trainer calls a reward function."""
    logged = {}
    result = reward(
        prompts=[[{"role": "user", "content": "Where is the cyst? Answer with <seg>."}]] * len(completions),
        completions=completions,
        completion_ids=[[1, 2]] * len(completions),
        trainer_state=object(),
        log_extra=lambda column, values: None,
        log_metric=logged.__setitem__,
        **columns,
    )
    return result, logged


def built_in() -> list[str]:
    """The names of the rewards that segrl brings; other tests register more."""
    return [name for name in list_rewards() if reward_info(name).origin.startswith("segrl ")]
