"""The report of a build: one HTML page about errors, thresholds, texts and what the data set holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segrl.curation.case import Case, read_cases
from segrl.curation.difficulty import FOLDER, SCORED, SELECTED, THRESHOLDS
from segrl.curation.json_lines import read_json_lines
from segrl.curation.publish import DATASET, FinalText, read_final_texts
from segrl.curation.statistics import case_statistics, statistics_figure
from segrl.curation.suspects import LIST, SHEET, read_rejected
from segrl.errors import DataError
from segrl.files.whole import write_whole
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file
from segrl.models.saved_files import read_object
from segrl.reports.drawing import draw_overlay, drawn_size
from segrl.reports.page import element, figure_picture, html_page, link_list, picture, section, text_table

__all__ = ["errors_figure", "threshold_rows", "write_build_report"]

REPORT = "report.html"
HEADER = ("set", "cases", "hard", "Dice", "Dice, hard half", "Dice, others", "knee", "x_min", "alpha",
          "alpha, bounded", "against lognormal", "against exponential", "threshold", "selected by")  # fmt: skip
_SAMPLES, _SIDE = 12, 260


def threshold_rows(sets: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """Return a row for each set under `HEADER`: both thresholds, the fits, and what selected.

    Args:
        sets: As in `difficulty/thresholds.json`.

    Example:
        >>> threshold_rows([])
        []
    """
    rows: list[list[object]] = []
    for found in sets:
        tail = found["tail"]
        compared = {each["other"]: each for each in tail["comparisons"]}
        rows.append(
            [
                *(found["source"], found["cases"], found["selected"]),
                *(_number(found[name]) for name in ("mean_dice", "hard_dice", "easy_dice")),
                *(_number(tail[name]) for name in ("knee", "x_min", "alpha", "bounded_alpha")),
                *(_compared(compared.get(other)) for other in ("lognormal", "exponential")),
                *(_number(tail["threshold"]), tail["selected_by"]),
            ]
        )
    return rows


def write_build_report(build: str | Path) -> Path:
    """Write `report.html` into the folder of a build; what has not run yet is left out, and said.

    Args:
        build: The folder, in which the stage difficulty has run.

    Returns:
        The page.

    Raises:
        DataError: The stage has not run, or its files are damaged.

    Example:
        >>> write_build_report("no/build")
        Traceback (most recent call last):
        segrl.errors.DataError: no/build: no difficulty/thresholds.json; run the stage difficulty first
    """
    home = Path(build)
    if not (home / FOLDER / THRESHOLDS).is_file():
        raise DataError(f"{home}: no {FOLDER}/{THRESHOLDS}; run the stage difficulty first")
    sets = read_object(home / FOLDER / THRESHOLDS)["sets"]
    scored, selected = read_cases(home / SCORED), read_cases(home / SELECTED)
    texts = read_final_texts(home)
    sections = {
        "Errors and thresholds": [_errors(sets, scored)],
        "Masks to look at": _suspects(home),
        "Texts": _texts(selected, texts),
        "Selected cases": [
            element("p", text=f"{len(selected)} of {len(scored)} cases are hard."),
            figure_picture(statistics_figure(case_statistics(selected)), "numbers of selected cases"),
        ],
        "All cases": [figure_picture(statistics_figure(case_statistics(scored)), "numbers of all cases")],
        "Left out": _left_out(home),
    }
    published = f"Published in {DATASET}." if (home / DATASET).is_dir() else "Not published yet."
    body = [element("p", text=published), link_list(sections)]
    body += [section(title, *content) for title, content in sections.items()]
    write_whole(home / REPORT, html_page("A built data set", body))
    return home / REPORT


def errors_figure(sets: Sequence[Mapping[str, Any]], votes: Mapping[str, np.ndarray]) -> Any:
    """Draw for each set how many cases have at least an error, the fitted curve, and both thresholds.

    Args:
        sets: As in `difficulty/thresholds.json`.
        votes: (n,) errors by the name of a set.

    Example:
        >>> len(errors_figure([], {}).axes)
        0
    """
    from matplotlib.figure import Figure  # slow to import, and no window is opened without pyplot

    down = (len(sets) + 1) // 2
    figure = Figure(figsize=(11, max(2.0, 3.1 * down)), layout="constrained")
    for number, found in enumerate(sets, 1):
        axes, tail = figure.add_subplot(down, 2, number), found["tail"]
        errors = np.sort(votes[found["source"]])
        axes.hist(errors, bins=np.linspace(0, 1, 26).tolist(), color="#c9d6e8")
        axes.set_title(
            f"{found['source']}: {found['selected']} of {found['cases']}", fontsize="medium", parse_math=False
        )
        axes.set_xlabel("error, 1 - Dice")
        axes.set_ylabel("cases")
        if tail["start"] is not None and tail["start_alpha"] is not None:
            grid = np.linspace(tail["start"], 1, 200)
            beyond = float(((errors >= tail["start"]) & (errors < 1)).sum())  # as in the fit
            density = (grid / tail["start"]) ** -tail["start_alpha"]
            area = float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(grid)))
            label = f"fit, exponent {tail['start_alpha']:.2f}"
            axes.plot(grid, density / area * beyond * 0.04, color="#22558c", label=label)
        for name, style in (("knee", "-"), ("x_min", "--")):
            if tail[name] is not None:
                label = f"{name} {tail[name]:.2f}"
                axes.axvline(tail[name], color="#b3261e", linestyle=style, label=label)
        axes.axvline(tail["threshold"], color="black", linewidth=0.8, linestyle=":", label=f"by {tail['selected_by']}")
        axes.legend(fontsize="x-small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _errors(sets: Sequence[Mapping[str, Any]], scored: Sequence[Case]) -> str:
    votes = {
        found["source"]: np.array([case.difficulty for case in scored if case.source == found["source"]], dtype=float)
        for found in sets
    }
    notes = [element("li", text=f"{found['source']}: {note}") for found in sets for note in found["tail"]["notes"]]
    said = (
        "Errors are those of networks that have not seen the case, its patient or near-duplicates. Two thresholds are "
        "shown, the knee of the fitted curve and the x_min of a power law; cases from the one on that selected are "
        "hard. Ratios compare the power law with another distribution; negative ones with a small p reject it."
    )
    drawn = figure_picture(errors_figure(sets, votes), "errors of every set, with the thresholds")
    return element(
        "div", element("p", text=said), drawn, text_table(HEADER, threshold_rows(sets)), element("ul", *notes)
    )


def _suspects(home: Path) -> list[str]:
    path = home / FOLDER / LIST

    def read(row: Any) -> list[str]:
        return [str(row["id"]), _number(row["agreement"]), _number(row["error"])]

    rows = read_json_lines(path, read, "difficulty") if path.is_file() else []
    if not rows:
        return [element("p", text="The committee contradicts no mask while it agrees with itself.")]
    said = (
        f"On {len(rows)} cases the committee agrees with itself and not with the mask. Open {FOLDER}/{SHEET}, answer, "
        f"and save the answers as {FOLDER}/answers.csv: rejected cases are not published. Rejected so far: "
        f"{len(read_rejected(home / FOLDER))}."
    )
    return [element("p", text=said), text_table(("case", "agreement", "error"), rows)]


def _texts(selected: Sequence[Case], texts: Mapping[str, FinalText] | None) -> list[str]:
    if texts is None:
        return [element("p", text="No texts were written yet.")]
    chosen = [case for case in selected if case.id in texts]
    said = element("p", text=f"{len(chosen)} of {len(selected)} selected cases have an accepted text. Some of them:")
    step = max(1, len(chosen) // _SAMPLES)
    return [said, *(_sample(case, texts[case.id]) for case in chosen[::step][:_SAMPLES])]


def _sample(case: Case, text: FinalText) -> str:
    image = read_image(case.image, str(case.image))
    drawn = draw_overlay(image, drawn_size(image, _SIDE), target=read_mask_file(case.mask, str(case.mask)))
    scores = ", ".join(f"{name} {value}" for name, value in (text.scores or {}).items())
    words = [
        element("p", element("b", text=text.query)),
        element("p", text=text.reasoning),
        element("p", text=text.answer),
        element("p", text=f"{case.source}, {case.modality}; {scores}", class_="note"),
    ]
    return element("div", element("div", picture(drawn, case.lesion)), element("div", *words), class_="row")


def _left_out(home: Path) -> list[str]:
    path = home / "left_out.json"
    found = read_object(path) if path.is_file() else {}
    if not found:
        return [element("p", text="No row of a source was left out.")]
    return [text_table(("reason", "rows", "such as"), [[k, len(v), ", ".join(v[:3])] for k, v in found.items()])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _compared(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['ratio']:+.2f} (p {'-' if found['p'] is None else format(found['p'], '.2g')})"
