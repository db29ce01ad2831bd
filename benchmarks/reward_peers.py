"""The measures that segrl and another library both have, timed in turn on the same inputs, for `bench_rewards.py`."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from reward_scenes import Scene, predictions_of, target_of
from scipy import ndimage

from segrl.geometry import boxes_from_mask, pairwise_giou, pairwise_iou
from segrl.metrics import boundary_iou, dice, hausdorff, iou, s_measure, surface_dice
from segrl.rewards import make_reward

PEERS = ("torchvision", "torchmetrics", "monai", "pysodmetrics", "pycocotools")


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Pair(NamedTuple):
    """The same measure by segrl and by a peer."""

    measure: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None  # None: not installed
    tolerance: float = 1e-5
    max_px: int = 10**6  # larger images are not tried


def peer(module: str, function: str, *arguments: Any, **settings: Any) -> Callable[[], Any] | None:
    """A call of another library, or None if it is not installed."""
    try:
        return partial(getattr(importlib.import_module(module), function), *arguments, **settings)
    except ImportError:
        return None


def pairs(view: Scene) -> Iterator[Pair]:
    """Everything that segrl and a peer both measure, on the first answer."""
    import torch

    masks = pred, true = view.answers[0], view.true
    boxes = boxes_from_mask(pred), boxes_from_mask(true)
    floats = [torch.from_numpy(mask)[None, None].float() for mask in masks]
    whole: dict[str, Any] = {"include_background": True}

    def monai(measure: str, ours: Callable[..., Any], function: str, *more: Any, **settings: Any) -> Pair:
        return Pair(
            measure, "MONAI", partial(ours, *masks), peer("monai.metrics", function, *floats, *more, **settings)
        )

    def torchmetrics(measure: str, ours: Callable[..., Any], function: str, **limits: Any) -> Pair:
        module, integers = "torchmetrics.functional.segmentation", [mask.int() for mask in floats]
        theirs = peer(module, function, *integers, num_classes=1, input_format="one-hot", **whole)
        return Pair(measure, "torchmetrics", partial(ours, *masks), theirs, **limits)

    tensors = [torch.from_numpy(given).float() for given in boxes]
    yield Pair("box IoU", "torchvision", partial(pairwise_iou, *boxes), peer("torchvision.ops", "box_iou", *tensors))
    theirs = peer("torchvision.ops", "generalized_box_iou", *tensors)
    yield Pair("box GIoU", "torchvision", partial(pairwise_giou, *boxes), theirs)
    yield monai("Dice", dice, "compute_dice", **whole)
    yield torchmetrics("Dice", dice, "dice_score")
    yield monai("IoU", iou, "compute_iou", **whole)
    yield torchmetrics("IoU", iou, "mean_iou")
    yield monai("HD95", hausdorff, "compute_hausdorff_distance", percentile=95, **whole)
    # It takes 22 s at 512 px, and 20 GB of memory at 1024 px.
    yield torchmetrics("HD", partial(hausdorff, percentile=100), "hausdorff_distance", max_px=256)
    yield monai("NSD", partial(surface_dice, tolerance=2.0), "compute_surface_dice", [2.0], **whole)
    measure = peer("py_sod_metrics", "Smeasure")
    theirs = measure and partial(measure().cal_sm, pred.astype(np.float64), true)
    yield Pair("S-measure", "PySODMetrics", partial(s_measure, *masks), theirs)
    theirs = partial(boundary_iou_by_erosions, *masks)
    yield Pair("boundary IoU", "erosion by erosion", partial(boundary_iou, *masks), theirs)
    reward = make_reward("box_ap", count_penalty=False)
    ours = partial(reward.score, predictions_of(view, "json")[0], target_of(view, False))
    # COCO samples the curve at 101 recalls.
    yield Pair("AP", "torchmetrics", ours, coco_ap(*tensors), tolerance=0.011)


def coco_ap(pred: Any, true: Any) -> Callable[[], float] | None:
    """Average precision by torchmetrics, every box with the same confidence; it needs pycocotools."""
    import torch

    metric = peer("torchmetrics.detection", "MeanAveragePrecision")
    if metric is None or importlib.util.find_spec("pycocotools") is None:
        return None
    said = {"boxes": pred, "scores": torch.full((len(pred),), 0.9), "labels": torch.zeros(len(pred)).long()}
    truth = {"boxes": true, "labels": torch.zeros(len(true)).long()}

    def score() -> float:
        mean = metric()
        mean.update([said], [truth])
        return float(mean.compute()["map"])

    return score


def boundary_iou_by_erosions(pred: np.ndarray, true: np.ndarray) -> float:
    """As the original code has it: one erosion for each pixel of the rim's width."""
    width = max(1, round(0.02 * math.hypot(*pred.shape)))
    a, b = (mask & (ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=width) == 0) for mask in (pred, true))
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


def compare(pair: Pair, px: int, rounds: int) -> dict[str, Any]:
    """Median times of both in turn, their ratio, and the largest difference of the values."""
    result: dict[str, Any] = {"measure": pair.measure, "peer": pair.peer}
    if pair.theirs is None:
        return {**result, "left_out": "not installed"}
    if px > pair.max_px:
        return {**result, "left_out": f"takes too long above {pair.max_px} px"}
    difference = float(np.abs(np.asarray(pair.ours()) - np.asarray(pair.theirs())).max())
    once = [seconds(run) for run in (pair.ours, pair.theirs)]
    repeats = [max(1, int(2e-3 / needed)) for needed in once]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds if max(once) < 0.5 else min(rounds, 3)):
        for run, repeat, kept in zip((pair.ours, pair.theirs), repeats, times, strict=True):
            kept.append(seconds(lambda r=run, n=repeat: [r() for _ in range(n)]) / repeat)
    ours, theirs = map(statistics.median, times)
    return {
        **result, "segrl_us": ours * 1e6, "peer_us": theirs * 1e6, "segrl / peer": ours / theirs,
        "difference": difference, "equal": difference <= pair.tolerance,
    }  # fmt: skip


def print_pairs(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'measure':14}{'px':>6}{'lesions':>9}  {'peer':20}{'segrl us':>10}{'peer us':>11}{'ratio':>8}  values")
    for row in rows:
        line = f"{row['measure']:14}{row['px']:6}{row['lesions']:9}  {row['peer']:20}"
        if "left_out" in row:
            print(f"{line}  {row['left_out']}")
            continue
        same = "equal" if row["equal"] else "DIFFER"
        line += f"{row['segrl_us']:10.1f}{row['peer_us']:11.1f}{row['segrl / peer']:8.3f}"
        print(f"{line}  {same} (max {row['difference']:.1e})")


def peer_versions() -> dict[str, str]:
    found = {}
    for package in ("numpy", "scipy", *PEERS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
