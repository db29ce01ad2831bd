"""Pictures of the documentation that show pages in a browser, made by headless Chromium.

python docs/screenshots.py serve runs/core_seg      # docs/assets/serve.png

The run is one of `examples/core_seg`, evaluated, so that it holds samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from segrl.inference import load
from segrl.reports import say
from segrl.serving import ServingSettings, find_examples, running_server

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from browser import browser  # noqa: E402  # pyright: ignore[reportMissingImports]


def shoot_serve(run: str) -> Path:
    """Ask about the second sample of a run, four answers, and take the page's picture."""
    segmenter = load(run, device="cpu")
    path = HERE / "assets" / "serve.png"
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
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a page has few colours
    return path


if __name__ == "__main__":
    what, run = sys.argv[1:]
    written = {"serve": shoot_serve}[what](run)
    say(f"{written}: {written.stat().st_size / 1000:.0f} kB")
