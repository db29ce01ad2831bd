"""Draw results of `bench_step.py`: one pair of bars per shape and group size, a step by phase, in parts of TRL's step.

    python benchmarks/plot_step.py RESULT.json [RESULT.json ...] -o docs/assets/step.svg

The picture is an SVG without scripts and fonts of its own; its text follows the page's colours for light and dark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

# What is drawn: label, phases of the result, colour.
PARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("generation", ("preprocess", "generate"), "#4c78a8"),
    ("old and reference log-probs", ("old_ref",), "#72b7b2"),
    ("masks", ("masks",), "#e45756"),
    ("rewards and other", ("reward", "other"), "#b279a2"),
    ("loss, forward", ("forward",), "#f2a541"),
    ("loss, backward", ("backward",), "#d98a1f"),
    ("optimiser", ("optimizer",), "#9d9d9d"),
)
ARMS = (("trl", "TRL, no masks"), ("segrl", "segrl, masks"))
LEFT, RIGHT, WIDTH = 320, 90, 960
BAR, GAP, HEAD = 20, 26, 76


def draw(reports: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of all results of these reports.

    Raises:
        SystemExit: there is no result in them.
    """
    results = [result for report in reports for result in report["results"]]
    if not results:
        raise SystemExit("no results to draw; run bench_step.py with --json first")
    longest = max(_parts(result, arm)[-1][1] for result in results for arm, _ in ARMS)
    scale = (WIDTH - LEFT - RIGHT) / max(1.0, longest)
    height = HEAD + len(results) * (2 * BAR + GAP) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" '
        'font-size="13">',
        "<title>A training step with masks (segrl) and without (TRL), by phase</title>",
        "<style>text{fill:#222}.axis{stroke:#888}@media (prefers-color-scheme:dark){text{fill:#ddd}}</style>",
        f'<text x="0" y="16" font-size="15">Time of a step in parts of TRL\'s ({_where(reports)})</text>',
        *_legend(),
    ]
    top = HEAD
    for result in results:
        shape, name = result["shape"], result["shape"]["name"]
        tokens = f"{shape['prompt_tokens']:,} + {shape['completion_tokens']}"
        lines.append(f'<text x="0" y="{top + BAR - 4}">{escape(name)}, {tokens}, G = {result["generations"]}</text>')
        for arm, label in ARMS:
            lines += _bar(result, arm, label, top, scale)
            top += BAR
        top += GAP
    x = LEFT + scale
    lines.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 8}" y2="{top}" stroke-dasharray="4 3"/>')
    lines.append(f'<text x="{x:.1f}" y="{top + 16}" text-anchor="middle">TRL = 1</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _parts(result: Mapping[str, Any], arm: str) -> list[tuple[float, float, str]]:
    """(start, end, colour) of the bar's parts, in parts of TRL's step."""
    whole, start, found = result["arms"]["trl"]["seconds"]["step"], 0.0, []
    for _, phases, colour in PARTS:
        end = start + sum(result["arms"][arm]["seconds"][phase] for phase in phases) / whole
        found.append((start, end, colour))
        start = end
    return found


def _bar(result: Mapping[str, Any], arm: str, label: str, top: float, scale: float) -> list[str]:
    parts = _parts(result, arm)
    lines = [f'<text x="{LEFT - 8}" y="{top + BAR - 5}" text-anchor="end" font-size="11">{label}</text>']
    lines += [
        f'<rect x="{LEFT + start * scale:.1f}" y="{top}" width="{(end - start) * scale:.1f}" height="{BAR - 3}" '
        f'fill="{colour}"/>'
        for start, end, colour in parts
        if end > start
    ]
    seconds = result["arms"][arm]["seconds"]["step"]
    text = f"{seconds:.3g} s" if arm == "trl" else f"{parts[-1][1]:.2f}"
    return [*lines, f'<text x="{LEFT + parts[-1][1] * scale + 6:.1f}" y="{top + BAR - 5}">{text}</text>']


def _legend() -> list[str]:
    lines, x, y = [], 0, 40
    for label, _, colour in PARTS:
        width = 30 + 7 * len(label)
        if x + width > WIDTH:
            x, y = 0, y + 22
        lines.append(f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y}">{label}</text>')
        x += width
    return lines


def _where(reports: Sequence[Mapping[str, Any]]) -> str:
    return escape("; ".join(dict.fromkeys(f"{r['machine']}, {r['threads']} thread(s)" for r in reports)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that bench_step.py --json wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the SVG")
    options = parser.parse_args()
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(draw(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
