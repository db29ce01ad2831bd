"""Cost of asking a trained run: 16 images in one call beside 16 calls, and several samples beside one.

    python benchmarks/predict_speed.py RUN [--images FOLDER] [--repeats 3]

Printed are medians over the repeats, of wall and of CPU time, taken in turns in one process after a first call, with
the greedy answers of both ways compared: texts and boxes must be equal, masks may differ in the rounding of batched
sums at their border.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segrl.data import make_synthetic
from segrl.inference import load
from segrl.reports import say


def seconds(repeats: int, *works: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Return the median wall time of each work, and its median CPU time, which other programs disturb less.

    They take turns, so that a slow minute of the machine is in all.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, found, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = ([statistics.median(pair[n] for pair in times) for times in found] for n in (0, 1))
    return wall, cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output_dir of a run on images")
    parser.add_argument("--images", type=Path, help="folder; default: synthetic scenes of 96 px")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    rows = make_synthetic(options.count, size=96, seed=9, hard=True)
    images: list[Any] = list(rows["image"])
    queries = list(rows["query"])
    if options.images is not None:
        images = sorted(options.images.iterdir())[: options.count]
        queries = ["Segment the lesion."] * len(images)
    segmenter: Any = load(options.run)
    single = [segmenter.predict(image, query) for image, query in zip(images, queries, strict=True)]
    together = segmenter.predict(images, queries)
    different = [n for n, (a, b) in enumerate(zip(single, together, strict=True)) if a.text != b.text]
    pixels = max(
        0.0 if a.mask is None or b.mask is None else float(np.mean(a.mask != b.mask))
        for a, b in zip(single, together, strict=True)
    )
    few, many = list(zip(images, queries, strict=True))[:4], options.samples
    (calls, batch, one, several), cpu = seconds(
        options.repeats,
        lambda: [segmenter.predict(image, query) for image, query in zip(images, queries, strict=True)],
        lambda: segmenter.predict(images, queries),
        lambda: [segmenter.predict(i, q, do_sample=True, seed=n) for n, (i, q) in enumerate(few)],
        lambda: [segmenter.predict(i, q, samples=many, seed=n) for n, (i, q) in enumerate(few)],
    )
    lengths = {
        "one": [len(segmenter.predict(i, q, do_sample=True, seed=n).text) for n, (i, q) in enumerate(few)],
        "several": [
            max(len(s.text) for s in segmenter.predict(i, q, samples=many, seed=n).samples)
            for n, (i, q) in enumerate(few)
        ],
    }
    found = {
        "images": len(images),
        "seconds_calls": calls,
        "seconds_batch": batch,
        "speedup": calls / batch,
        "cpu_seconds": dict(zip(("calls", "batch", "one_sample", "samples"), cpu, strict=True)),
        "speedup_cpu": cpu[0] / cpu[1],
        "texts_that_differ": different,
        "largest_share_of_mask_pixels_that_differ": pixels,
        "samples": many,
        "seconds_one_sample": one / len(few),
        "seconds_samples": several / len(few),
        "cost": several / one,
        "longest_text": lengths,
        "device": str(segmenter.model.device),
        "threads": torch.get_num_threads(),
    }
    say(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
