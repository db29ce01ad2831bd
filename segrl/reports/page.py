"""One HTML page that needs no other file: texts escaped, pictures inside, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

__all__ = ["data_script", "element", "figure_picture", "html_page", "link_list", "picture", "section", "text_table"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #191919; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; image-rendering: auto; border: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > * { flex: 1 1 12rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.note { color: #5f5f5f; } button { font: inherit; padding: .4rem 1rem; }
"""


def element(tag: str, *content: str, text: str | None = None, **attributes: str) -> str:
    """Return an HTML element.

    Args:
        tag: Its name.
        content: HTML inside, which is not escaped: the results of this module's functions.
        text: Text inside, escaped.
        attributes: Values are escaped; an underscore at the end of a name is dropped, as in `class_`.

    Example:
        >>> element("p", element("b", text="a < b"), class_="note")
        '<p class="note"><b>a &lt; b</b></p>'
    """
    given = "".join(f' {name.rstrip("_")}="{html.escape(value, quote=True)}"' for name, value in attributes.items())
    inside = "" if text is None else html.escape(text)
    return f"<{tag}{given}>{inside}{''.join(content)}</{tag}>"


def picture(image: Image.Image, alt: str = "") -> str:
    """Return an image as an element that holds its pixels as PNG.

    Example:
        >>> picture(Image.new("L", (2, 2)), "a black square")[:32]
        '<img src="data:image/png;base64,'
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _embedded(buffer, alt)


def figure_picture(figure: Any, alt: str = "") -> str:
    """Return a matplotlib figure as an element that holds its pixels; the same figure gives the same text.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure_picture(Figure(figsize=(1, 1)), "nothing")[:32]
        '<img src="data:image/png;base64,'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    return _embedded(buffer, alt)


def section(title: str, *content: str) -> str:
    """Return a heading with what belongs to it, which `link_list` can lead to.

    Args:
        title: Escaped.
        content: HTML, the results of this module's functions.

    Example:
        >>> section("Errors by source", element("p", text="none"))
        '<section id="errors-by-source"><h2>Errors by source</h2><p>none</p></section>'
    """
    return element("section", element("h2", text=title), *content, id=_anchor(title))


def link_list(titles: Iterable[str]) -> str:
    """Return links to sections, by their titles.

    Example:
        >>> link_list(["Errors by source"])
        '<p class="note"><a href="#errors-by-source">Errors by source</a></p>'
    """
    links = [element("a", text=title, href=f"#{_anchor(title)}") for title in titles]
    return element("p", " · ".join(links), class_="note")


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of texts and numbers, which are written as they are, escaped; None is an empty cell.

    Args:
        header: Names of the columns.
        rows: One value a column; numbers are set to the right.

    Example:
        >>> text_table(["set", "cases"], [["a < b", 3]])[-80:]
        '<tbody><tr><td>a &lt; b</td><td class="number">3</td></tr></tbody></table></div>'
    """
    head = element("tr", *(element("th", text=name) for name in header))
    body = [element("tr", *map(_cell, row)) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="wide")


def _embedded(file: io.BytesIO, alt: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return f'<img src="{source}" alt="{html.escape(alt, quote=True)}">'


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return element("td", text="" if value is None else str(value), **({"class_": "number"} if number else {}))


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def data_script(name: str, value: Mapping[str, Any] | list[Any]) -> str:
    """Return a script that gives a page a constant; no text in it can end the script.

    Example:
        >>> data_script("data", {"query": "</script>"})
        '<script>const data = {"query": "\\\\u003c/script>"};</script>'
    """
    text = json.dumps(value).replace("<", "\\u003c")
    return f"<script>const {name} = {text};</script>"


def html_page(title: str, body: Iterable[str], *, script: str = "") -> str:
    """Return a whole page.

    Args:
        title: Of the page, escaped.
        body: Elements, in order.
        script: JavaScript of our own that runs at the end; data goes into `data_script`.

    Example:
        >>> html_page("A & B", [element("p", text="text")]).splitlines()[3]
        '<title>A &amp; B</title>'
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        element("h1", text=title),
        *body,
        *([f"<script>{script}</script>"] if script else []),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"
