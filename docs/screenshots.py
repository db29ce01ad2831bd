"""Pictures of the documentation that show pages and files; pages are drawn by headless Chromium.

python docs/screenshots.py runs/core_seg [NAME ...]      # into docs/assets; all of them, or those that are named

The run is one of `examples/core_seg/train_grpo.py`, with its evaluation. The other pictures are made by
`docs/watch_pictures.py`, `benchmarks/plot_answers.py` and `benchmarks/plot_step.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from segrl.data import make_synthetic, make_synthetic_volumes, read_case
from segrl.errors import SegRLError
from segrl.geometry import boxes_from_mask
from segrl.inference import load
from segrl.predictions import Frame, format_completion, parse_completion
from segrl.reports import draw_overlay, say, volume_picture
from segrl.reports.run_files import read_run
from segrl.reports.run_report import run_report
from segrl.serving import ServingSettings, find_examples, running_server

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from browser import browser  # noqa: E402  # pyright: ignore[reportMissingImports]

MOST_BYTES = 300_000
SEED = 127  # of the test scenes of a run whose seed is 42
ONLY = """<script>
document.querySelectorAll("section:not(#cases)").forEach(section => section.remove());
document.querySelectorAll("ul, ol").forEach(list => list.remove());
</script>"""


# ---- pages -----------------------------------------------------------------------------------------------------------


def shoot_page(page: Path, path: Path, width: int = 1000, height: int = 760) -> None:
    """Take a picture of the top of a page."""
    with browser() as made:
        made.page(page.as_uri(), width=width, height=height).screenshot(path)


def serve(run: str, path: Path) -> None:
    """Ask about the second sample of a run, four answers."""
    segmenter = load(run, device="cpu")
    examples = find_examples(segmenter.settings.task, None, run)
    limits = ServingSettings(port=0)
    with running_server(segmenter, limits, name="core_seg", examples=examples) as address, browser() as made:
        page = made.page(address, width=1000, height=760)
        page.wait(f"document.querySelectorAll('#examples button').length === {len(examples)}")
        page.click("#examples button:nth-child(2)")
        page.run("document.querySelector('#samples').value = '4'")
        page.click("#ask")
        page.wait("!document.querySelector('#answer').hidden")
        page.screenshot(path)


def cases(run: str, path: Path) -> None:
    """The worst answers in a run's report; without its other parts, which take a browser long."""
    page_of = run_report([replace(read_run(run), groups=[], histories={}, notes=())])
    with tempfile.TemporaryDirectory() as work:
        page = Path(work, "page.html")
        page.write_text(page_of + ONLY, encoding="utf-8")
        shoot_page(page, path)


# ---- figures ---------------------------------------------------------------------------------------------------------


def scenes(run: str, path: Path) -> None:
    """Synthetic scenes with what is asked for, outlined."""
    rows: Any = make_synthetic(8, size=96, seed=SEED, hard=True)
    figure = Figure(figsize=(12, 6))
    for axes, row in zip(figure.subplots(2, 4).ravel(), rows, strict=True):
        axes.imshow(draw_overlay(row["image"], (288, 288), target=np.asarray(row["mask"]) > 0))
        axes.set_title(row["query"].replace(" in this ", "\nin this "), fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def sheet(run: str, path: Path) -> None:
    """The first answers of a run, as its evaluation draws them."""
    with Image.open(Path(run, "predictions.png")) as image:
        image.crop((0, 0, image.width, image.height // 2)).save(path)


def samples(run: str, path: Path) -> None:
    """One question answered eight times: three of the masks, the mean of all probabilities, the combined mask."""
    rows = make_synthetic(6, size=96, seed=SEED, hard=True)
    results: Any = load(run, device="cpu").predict(list(rows["image"]), list(rows["query"]), samples=8, seed=0)
    found = [result for result in results if result.mask is not None and result.probability is not None]
    chosen = sorted(found, key=lambda result: result.confidence.agreement)[len(found) // 4]
    shown = [draw_overlay(chosen.source, (288, 288), mask=one.mask, boxes=one.boxes, pixels=chosen.source.size)
             for one in chosen.samples[:3]]  # fmt: skip
    figure = Figure(figsize=(12, 3.1))
    axes = figure.subplots(1, 5)
    for number, image in enumerate(shown):
        axes[number].imshow(image)
        axes[number].set_title(f"answer {number + 1} of 8", fontsize=9)
    axes[3].imshow(chosen.probability, vmin=0, vmax=1, cmap="magma")
    axes[3].set_title("mean probability", fontsize=9)
    axes[4].imshow(chosen.plot())
    sure = chosen.confidence
    axes[4].set_title(f"combined: confidence {sure.value:.2f},\nagreement {sure.agreement:.2f}", fontsize=9)
    for one in axes:
        one.axis("off")
    figure.suptitle(chosen.query, fontsize=10)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def volume(run: str, path: Path) -> None:
    """A picture of a volume's answer; the answer is made of the ground truth."""
    with tempfile.TemporaryDirectory() as work:
        row = make_synthetic_volumes(1, work, depth=24, size=96, seed=4)[0]
        case = read_case(row)
        target = case.target(row)
        index = int(target.mask.sum(axis=(1, 2)).argmax())
        boxes = boxes_from_mask(target.mask[index]).astype(int).tolist()
        frame = Frame("original_px", target.mask.shape[:0:-1], slices=tuple(range(len(target.mask))))
        answer = f'{{"slice": {index + 1}, "bbox_2d_list": {boxes}}}'
        text = format_completion(f"Slice {index + 1} shows most of the {row['lesion']}.", answer)
        prediction = parse_completion(text, frame, require_seg=False, answer_format="json").with_mask(target.mask)
        volume_picture(case.grey, prediction, target, path, spacing_mm=target.spacing_mm, query=row["query"],
                       edges=case.scan.edges, intensity=case.intensity, name="synthetic volume")  # fmt: skip


PICTURES: dict[str, Callable[[str, Path], None]] = {
    "serve": serve,
    "report-cases": cases,
    "scenes": scenes,
    "samples": samples,
    "sheet": sheet,
    "volume": volume,
}


def main(run: str, *names: str) -> None:
    """Make the pictures that are named."""
    for name in names or PICTURES:
        path = HERE / "assets" / f"{name}.png"
        PICTURES[name](run, path)
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(128)  # a page has few colours
        small.save(path, optimize=True)
        if path.stat().st_size > MOST_BYTES:
            raise SegRLError(f"{path} has {path.stat().st_size} bytes, expected {MOST_BYTES} at most")
        say(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
