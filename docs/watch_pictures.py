"""Pictures of `how-to/watch-a-run.md`, from a run: its curves, a group of answers, and its report in headless Chromium.

python docs/watch_pictures.py RUN [docs/assets]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from segrl.errors import SegRLError
from segrl.reports.groups import group_picture
from segrl.reports.history import curve_panels, draw_curves
from segrl.reports.run_files import read_run
from segrl.reports.run_report import run_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import browser  # pyright: ignore[reportMissingImports]

MOST_BYTES = 300_000
SHOWN = ("reward", "components of the reward", "Dice", "valid and failed answers", "KL and entropy", "loss")
OPEN = """<script>
document.querySelectorAll("section:not(#groups-of-answers)").forEach(section => section.remove());
document.querySelector("details.group").open = true;
</script>"""


def main(run: str, folder: str = "docs/assets") -> None:
    """Write `watch-curves.png`, `watch-group.png` and `watch-report.png`."""
    home, files = Path(folder), read_run(run)
    panels = curve_panels(files.histories["stage 2"])
    draw_curves({title: panels[title] for title in SHOWN if title in panels}, home / "watch-curves.png")
    spread = [pair for pair in files.groups if len({answer["reward"] for answer in pair[0]["answers"]}) > 1]
    group_picture(*spread[len(spread) // 2]).quantize(128).save(home / "watch-group.png")
    with tempfile.TemporaryDirectory() as work:
        page, shot = Path(work, "page.html"), Path(work, "page.png")
        page.write_text(run_report([files]) + OPEN, encoding="utf-8")
        with browser() as made:
            made.page(page.as_uri(), width=1000, height=900).screenshot(shot)
        Image.open(shot).convert("RGB").quantize(128).save(home / "watch-report.png")
    for path in sorted(home.glob("watch-*.png")):
        if path.stat().st_size > MOST_BYTES:
            raise SegRLError(f"{path} has {path.stat().st_size} bytes, expected {MOST_BYTES} at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
