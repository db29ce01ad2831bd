"""Cost of `segrl eval` beside the generation alone, with the main job's tiny model or any other run on images.

    python benchmarks/eval_cost.py RUN [--sizes 96 512] [--images 1000] [--repeats 3] [--pictures 16]

A is what cannot be left out: the run loaded, every image decoded and answered in the batches of `segrl eval`. B is the
command itself, in the same process: the data checked and read, answers, scores, pictures and files. A and B take turns.
Printed are medians of wall and CPU time and of B / A in each round, with and without loading; and, of what B does
outside of the answers, milliseconds an image. Seconds say nothing on a busy machine; ratios of rounds say more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from segrl.cli.main import main as segrl
from segrl.data import load_folder, make_synthetic, write_folder
from segrl.inference import ReasoningSegmenter, load
from segrl.reports import say

BATCH = 16


def spent(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and CPU seconds of a call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


class Answering:
    """Adds up the time inside `predict_batch`, and counts the tokens of answers."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.answers: list[str] = []
        self._answer = ReasoningSegmenter.predict_batch

    def __enter__(self) -> Answering:
        def timed(segmenter: Any, *args: Any, **settings: Any) -> Any:
            wall, cpu, found = spent(lambda: self._answer(segmenter, *args, **settings))
            self.wall, self.cpu = self.wall + wall, self.cpu + cpu
            self.answers += [answer.text for answer in found]
            return found

        ReasoningSegmenter.predict_batch = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        ReasoningSegmenter.predict_batch = self._answer  # type: ignore[method-assign]


def generation(run: str, folder: Path, device: str) -> None:
    """Load the run and answer every row, a batch at a time, and keep nothing."""
    segmenter: Any = load(run, device=device)
    rows = load_folder(folder, "test", validate=False)
    names, queries = rows["name"], rows["query"]
    files = [folder / "images" / f"{name}.png" for name in names]
    for start in range(0, len(files), BATCH):
        images = []
        for path in files[start : start + BATCH]:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        segmenter.predict_batch(images, queries[start : start + BATCH])


def measure(run: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians over the rounds for images of one size."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "data", Path(place) / "out"
        write_folder(make_synthetic(options.images, size=size, seed=9, hard=True), folder, split="test")
        argv = ["eval", "--model", run, "--data", str(folder), "--output_dir", str(out), "--overwrite", "--device",
                options.device, "--batch_size", str(BATCH), "--pictures", str(options.pictures)]  # fmt: skip
        generation(run, folder, options.device)  # imports and caches
        rounds: list[dict[str, float]] = []
        tokenizer: Any = load(run, device="cpu").processor.tokenizer
        tokens = 0.0
        for _ in range(options.repeats):
            with Answering() as alone:
                a_wall, a_cpu, _ = spent(lambda: generation(run, folder, options.device))
            with Answering() as inside:
                b_wall, b_cpu, code = spent(lambda: segrl(argv))
            if code:
                raise SystemExit(code)
            if inside.answers != alone.answers:
                raise SystemExit("the answers of the two differ")
            tokens = statistics.mean(len(tokenizer(text)["input_ids"]) for text in inside.answers)
            rounds.append({
                "a_wall": a_wall, "b_wall": b_wall, "a_cpu": a_cpu, "b_cpu": b_cpu,
                "wall_ratio": b_wall / a_wall, "cpu_ratio": b_cpu / a_cpu,
                "wall_ratio_to_answers": b_wall / alone.wall, "cpu_ratio_to_answers": b_cpu / alone.cpu,
                "answer_cpu_ms": 1000 * alone.cpu / options.images,
                "outside_cpu_ms": 1000 * (b_cpu - inside.cpu) / options.images,
            })  # fmt: skip
        return {
            "size": size,
            "images": options.images,
            "tokens_an_answer": round(tokens, 1),
            **{name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]},
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output_dir of a run on images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 512], help="edges of the images, pixels")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for size in options.sizes:
        say(json.dumps(measure(options.run, size, options)))


if __name__ == "__main__":
    main()
