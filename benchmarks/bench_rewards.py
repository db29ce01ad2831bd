"""Cost of rewards: every built-in reward per completion, and segrl's measures beside those of other libraries.

    python benchmarks/bench_rewards.py [--step] [--json result.json]

1. Time per completion of every built-in reward, in groups of 4 answers to one question, at several image sizes and
   numbers of lesions. Texts are parsed beforehand (a line of its own); what a target computes once is counted.
2. The same measure by segrl and by torchvision, torchmetrics, MONAI and others, on the same inputs, in turn (A B A B
   ...), with the ratio of the medians and the largest difference of the values. Tensors are made beforehand.
3. The three rewards of CORE-Seg for 64 completions at 512 px; with `--step` also as a share of a step of the tiny
   preset, which has 16 completions.

Peers come with `pip install segrl[bench]`; one that is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from reward_peers import compare, pairs, peer_versions, print_pairs, seconds
from reward_scenes import ANSWERS, kind_of, predictions_of, read, scene, target_of, text_of

from segrl.geometry import boxes_from_mask
from segrl.predictions import Frame
from segrl.reports import versions
from segrl.rewards import Reward, list_rewards, make_reward, reward_info

CORE_SEG = ("format", "box_f1", "dual_granularity_mask")


def built_in_rewards() -> Iterator[Reward]:
    for name in list_rewards():
        info = reward_info(name)
        if info.origin.startswith("segrl "):
            yield make_reward(name)


def time_rewards(sizes: Sequence[int], lesions: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per completion of each reward, by image size and number of lesions."""
    found: dict[str, dict[str, float]] = {"(parsing, words)": {}, "(parsing, JSON)": {}}
    rewards = list(built_in_rewards())
    for size in sizes:
        for count in lesions:
            view, place = scene(size, count), f"{size} px, {count}"
            frame = Frame("original_px", (size, size))
            for kind, line in (("text", "(parsing, words)"), ("json", "(parsing, JSON)")):
                text = text_of(kind, boxes_from_mask(view.true), frame)
                times = [seconds(lambda k=kind, t=text, f=frame: read(k, t, f)) for _ in range(rounds)]
                found[line][place] = statistics.median(times) * 1e6
            answers = {kind: predictions_of(view, kind) for kind in ("text", "json", "slice")}
            for reward in rewards:
                given, times = answers[kind_of(reward)], []
                for _ in range(rounds):
                    targets = [target_of(view, reward.volume)] * ANSWERS
                    times.append(seconds(lambda r=reward, g=given, t=targets: r.score_batch(g, t)))
                found.setdefault(reward.name, {})[place] = statistics.median(times) * 1e6 / ANSWERS
    return found


def time_core_seg(rounds: int, completions: int = 64, size: int = 512) -> dict[str, float]:
    """Milliseconds of CORE-Seg's three rewards, for a usual mix of masks and where every mask misses its lesion."""
    rewards, found = [make_reward(name) for name in CORE_SEG], {}
    views = [scene(size, 1 + seed % 5, seed) for seed in range(completions // ANSWERS)]
    for case, misses in (("one mask in four misses", 1), ("every mask misses", ANSWERS)):
        answers = []
        for view in views:
            for number, given in enumerate(predictions_of(view, "text")):
                moved = np.zeros_like(view.true)
                moved[:20, :30] = True
                answers.append(given.with_mask(moved) if number < misses else given)
        times = []
        for _ in range(rounds):
            targets = [target for view in views for target in [target_of(view, False)] * ANSWERS]
            times.append(seconds(lambda a=answers, t=targets: [reward.score_batch(a, t) for reward in rewards]))
        found[case] = statistics.median(times) * 1e3
    return found


def time_step(rounds: int = 4, steps: int = 4) -> float:
    """Seconds of a step with masks of the size of the tiny preset: 16 completions of 64 tokens."""
    from step_arms import Settings, take_turn
    from step_shapes import ModelSize, Shape

    model = ModelSize(128, 2, 4, 2, 384, 1056, 128, 4, 4, 256, (1, 3))
    shape = Shape("tiny", 80, 64, 1, 112, prompts=4, model=model, sam="tiny", goals={})
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(rounds):
            turn = take_turn("segrl", shape, 4, Settings(), warmup=1, steps=steps - 1, seed=seed, folder=folder)
            times += [sum(step.values()) for step in turn.steps]
    return statistics.median(times)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    places = list(next(iter(rows.values())))
    print(f"{'us per completion; px, lesions':34}" + "".join(f"{place.replace(' px, ', '/'):>9}" for place in places))
    for name, times in sorted(rows.items()):
        print(f"{name:34}" + "".join(f"{times[place]:9.0f}" for place in places))


def machine() -> str:
    """Kind of processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of which the median counts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="edges of the images in pixels")
    parser.add_argument("--lesions", type=int, nargs="+", default=[1, 5, 30], help="lesions (and boxes) in an image")
    parser.add_argument("--step", action="store_true", help="measure a step of the tiny preset, too (a minute)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if min(options.rounds, *options.sizes, *options.lesions) < 1:
        parser.error("--rounds, --sizes and --lesions must be at least 1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rewards = time_rewards(options.sizes, options.lesions, options.rounds)
    print_table(rewards)
    compared = [
        {"px": size, "lesions": count, **compare(pair, size, options.rounds)}
        for size in options.sizes
        for count in options.lesions
        for pair in pairs(scene(size, count))
    ]
    compared.sort(key=lambda row: (row["measure"], row["peer"]))
    print_pairs(compared)
    core_seg = time_core_seg(options.rounds)
    step = time_step() if options.step else None
    print("\nformat, box_f1 and dual_granularity_mask, 64 completions at 512 px")
    for case, milliseconds in core_seg.items():
        share = "" if step is None else f", {milliseconds / step / 10:.2f} % of a step of {step:.3f} s"
        print(f"  {case:26}{milliseconds:6.2f} ms{share}")
    result = {
        "command": "benchmarks/bench_rewards.py", "date": datetime.date.today().isoformat(), "machine": machine(),
        "threads": torch.get_num_threads(), "rounds": options.rounds, "versions": {**versions(), **peer_versions()},
        "reward_us_per_completion": rewards, "peers": compared, "core_seg_ms_64_completions_512_px": core_seg,
        "step_s_16_completions": step,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
