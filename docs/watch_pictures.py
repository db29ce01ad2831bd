"""Pictures of `how-to/watch-a-run.md`, from a run: its curves, a group of answers, and its report in headless Chromium.

python docs/watch_pictures.py RUN [docs/assets]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from segrl.errors import SegRLError
from segrl.reports.groups import group_picture, read_groups
from segrl.reports.history import curve_panels, draw_curves
from segrl.reports.run_files import read_run
from segrl.reports.run_report import run_report

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
    spread = [pair for pair in read_groups(run) if len({answer["reward"] for answer in pair[0]["answers"]}) > 1]
    group_picture(*spread[len(spread) // 2]).quantize(128).save(home / "watch-group.png")
    with tempfile.TemporaryDirectory() as work:
        page, shot = Path(work, "page.html"), Path(work, "page.png")
        page.write_text(run_report([files]) + OPEN, encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        size = ["--window-size=1000,900", f"--screenshot={shot}"]
        subprocess.run([*command, *size, page.as_uri()], check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").quantize(128).save(home / "watch-report.png")
    for path in sorted(home.glob("watch-*.png")):
        if path.stat().st_size > MOST_BYTES:
            raise SegRLError(f"{path} has {path.stat().st_size} bytes, expected {MOST_BYTES} at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
