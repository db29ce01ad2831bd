"""Curves of a panel as SVG inside a page: lines, ends of the axes, a legend, and the last values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from segrl.reports.history import Curve
from segrl.reports.page import element

__all__ = ["svg_panel"]

WIDTH, HEIGHT, LEFT, TOP = 300, 170, 46, 8  # pixels
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
MOST_POINTS = 400  # of a curve; more are not seen


def svg_panel(title: str, runs: Sequence[tuple[str, Mapping[str, Curve]]]) -> str:
    """Return a figure with the curves of one panel; those of a second run are dashed.

    Args:
        title: Of the panel.
        runs: Name and curves of each run, see `segrl.reports.history.curve_panels`.

    Example:
        >>> panel = svg_panel("reward", [("a", {"reward": ([1, 2], [0.0, 0.5])}), ("b", {})])
        >>> panel.count("<polyline"), "stroke-dasharray" in panel
        (1, False)
    """
    curves = [(number, run, name, curve) for number, (run, found) in enumerate(runs) for name, curve in found.items()]
    if not curves:
        return ""
    steps = [step for *_, curve in curves for step in curve[0]]
    values = [value for *_, curve in curves for value in curve[1]]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    across, up = (last - first) or 1.0, (high - low) or 1.0
    names = list(dict.fromkeys(name for _, _, name, _ in curves))
    lines, legend = [], []
    for number, run, name, (at, found) in curves:
        every = max(1, len(at) // MOST_POINTS)
        points = [
            f"{LEFT + (WIDTH - LEFT - 6) * (x - first) / across:.1f},{TOP + (HEIGHT - 26) * (high - y) / up:.1f}"
            for x, y in zip(at[::every], found[::every], strict=True)
        ]
        colour = COLOURS[names.index(name) % len(COLOURS)]
        style = {"points": " ".join(points), "fill": "none", "stroke": colour}
        dashed = {"stroke-dasharray": "5 3"} if number else {}
        lines.append(element("polyline", **style, **{"stroke-width": "1.5"}, **dashed))
        if len(points) == 1:
            x, y = points[0].split(",")
            lines.append(element("circle", cx=x, cy=y, r="2.5", fill=colour))
        label = f"{name}: {found[-1]:.4g}" + (f" ({run}{', dashed' if number else ''})" if len(runs) > 1 else "")
        legend.append(element("div", element("span", text="■ ", style=f"color:{colour}"), element("span", text=label)))
    frame = [
        element("rect", x=str(LEFT), y=str(TOP), width=str(WIDTH - LEFT - 6), height=str(HEIGHT - 26), fill="none",
                stroke="#ccc"),
        _text(f"{high:.3g}", LEFT - 4, TOP + 9, "end"),
        _text(f"{low:.3g}", LEFT - 4, HEIGHT - 18, "end"),
        _text(f"step {first:g}", LEFT, HEIGHT - 4, "start"),
        _text(f"{last:g}", WIDTH - 6, HEIGHT - 4, "end"),
    ]  # fmt: skip
    drawn = element("svg", *frame, *lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", width=str(WIDTH), height=str(HEIGHT))
    return element("figure", element("figcaption", text=title), drawn, *legend)


def _text(text: str, x: int, y: int, anchor: str) -> str:
    return element("text", text=text, x=str(x), y=str(y), fill="#5f5f5f", **{"font-size": "10", "text-anchor": anchor})
