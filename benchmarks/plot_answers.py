"""Draw the figures of docs/how-to/ask-a-trained-model.md: answers of a trained run, and what their confidence is worth.

    python benchmarks/plot_answers.py RUN --evaluation FOLDER --output_dir docs/assets

RUN is a run of `examples/core_seg/train_grpo.py`, FOLDER the output of `segrl eval --model RUN --samples 8`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from segrl.data import make_synthetic
from segrl.inference import load
from segrl.metrics import dice
from segrl.reports import calibration_chart, say

SEED = 127  # the test scenes of the run whose seed is 42


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/assets"))
    options = parser.parse_args()
    rows = make_synthetic(40, size=96, seed=SEED, hard=True)
    segmenter: Any = load(options.run)
    results = segmenter.predict(list(rows["image"]), list(rows["query"]), samples=8, seed=0)
    ordered = sorted(range(len(results)), key=lambda n: -results[n].confidence.value)
    chosen = [ordered[0], ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3], ordered[-1]]
    figure = Figure(figsize=(11, 3.6))
    for axes, number in zip(figure.subplots(1, 4), chosen, strict=True):
        result, row = results[number], rows[number]
        axes.imshow(result.plot())
        axes.axis("off")
        query = row["query"].split(" in this ")
        axes.set_title("\n".join([query[0], f"in this {query[1]}"]), fontsize=8)
        found = dice(result.mask, np.asarray(row["mask"]) > 0)
        axes.text(0.5, -0.04, f"confidence {result.confidence.value:.2f}, agreement {result.confidence.agreement:.2f}\n"
                  f"Dice {found:.2f}", transform=axes.transAxes, ha="center", va="top", fontsize=8)  # fmt: skip
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "answers.png"
    figure.savefig(path, dpi=100, bbox_inches="tight")
    found = json.loads((options.evaluation / "results.json").read_text(encoding="utf-8"))["model"]["calibration"]
    other = calibration_chart(found, options.output_dir / "calibration.png", score="Dice")
    for written in (path, other):
        say(f"{written}: {written.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
