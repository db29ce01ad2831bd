"""One HTML page about a run, or about two beside each other: curves, groups of answers, failures, cases.

Everything is inside the page: nothing is loaded from elsewhere, and every text of data or model is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from segrl.reports.history import curve_panels
from segrl.reports.page import element, html_page, link_list, section, text_table
from segrl.reports.page_pictures import Pictures
from segrl.reports.report_answers import breakdown_section, cases_section, failures_section, groups_section
from segrl.reports.run_files import RunFiles
from segrl.reports.svg_curves import svg_panel

__all__ = ["MOST_BYTES", "run_report"]

MOST_BYTES = 20 * 10**6
_FOR_PICTURES = 15 * 10**6  # of them
_SCRIPT = """
for (const section of document.querySelectorAll("div.groups")) {
  const groups = [...section.querySelectorAll("details.group")], find = name => section.querySelector(name);
  let at = -1;
  const shown = () => groups.filter(group => !group.hidden);
  const show = number => {
    const left = shown();
    if (!left.length) return;
    at = (number + left.length) % left.length;
    groups.forEach(group => { group.open = group === left[at]; });
    find(".at").textContent = (at + 1) + " of " + left.length;
    left[at].scrollIntoView({block: "nearest"});
  };
  find(".previous").addEventListener("click", () => show(at < 0 ? -1 : at - 1));
  find(".next").addEventListener("click", () => show(at + 1));
  find(".open").addEventListener("click", () => shown().forEach(group => { group.open = true; }));
  find(".spread").addEventListener("input", event => {
    groups.forEach(group => { group.hidden = event.target.checked && group.dataset.spread === "0"; });
    at = -1;
    find(".at").textContent = shown().length + " groups";
  });
}
"""


def run_report(runs: Sequence[RunFiles], comparison: Mapping[str, Any] | None = None) -> str:
    """Return the page.

    Args:
        runs: One run, or two.
        comparison: What `segrl.evaluation.compare_records` found for two runs that were asked the same.

    Returns:
        HTML of less than 20 MB; pictures that would exceed it are left out, and the page says so.

    Example:
        >>> page = run_report([RunFiles(name="runs/<a>", notes=("stage 2 was interrupted after step 3",))])
        >>> "<h1>runs/&lt;a&gt;</h1>" in page, "interrupted after step 3" in page, "http" in page
        (True, True, False)
    """
    pictures = Pictures(_FOR_PICTURES)
    of = {run.name: f": {run.name}" if len(runs) > 1 else "" for run in runs}
    found = {"Setup": _setup(runs), "Results": _results(runs, comparison), "Curves": _curves(runs)}
    body = [section(title, *content) for title, content in found.items()]
    groups = {f"Groups of answers{of[run.name]}": run for run in runs}
    body += [groups_section(run, pictures, title) for title, run in groups.items()]
    body += [failures_section(runs, "Failures by reason"), breakdown_section(runs, "By modality and anatomy")]
    cases = {f"Cases{of[run.name]}": run for run in runs}
    body += [cases_section(run, pictures, title) for title, run in cases.items()]
    titles = [*found, *groups, "Failures by reason", "By modality and anatomy", *cases]
    body = [_notes(runs), link_list(titles), *body]
    if pictures.left_out:
        body.append(element("p", text=f"{pictures.left_out} pictures were left out.", class_="note"))
    return html_page(" beside ".join(run.name for run in runs), body, script=_SCRIPT)


# ---- what was run ----------------------------------------------------------------------------------------------------


def _notes(runs: Sequence[RunFiles]) -> str:
    found = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    return "".join(element("p", text=f"{note[0].upper()}{note[1:]}.", class_="note") for note in found)


def _setup(runs: Sequence[RunFiles]) -> list[str]:
    found = [_settings(run) for run in runs]
    names = list(dict.fromkeys(name for settings in found for name in settings))
    rows = [[name, *(settings.get(name, "") for settings in found)] for name in names]
    body = [text_table(["", *(run.name for run in runs)], rows)]
    for run in runs:
        if run.config:
            body.append(element("details", element("summary", text=f"config.yaml of {run.name}"),
                                element("pre", text=run.config)))  # fmt: skip
    return body


def _settings(run: RunFiles) -> dict[str, str]:
    asked = run.asked.get("arguments") or {}
    shown = ("preset", "data", "model", "segmenter", "rewards", "reasoning", "val_fraction", "val_split", "train_limit",
             "folds", "fold", "hold_out_source")  # fmt: skip
    found = {"task": run.task} | {name: _plain(asked[name]) for name in shown if asked.get(name) not in (None, False)}
    for stage, history in run.histories.items():
        last = history[-1] if history else {}
        steps = max((int(entry["step"]) for entry in history if "step" in entry), default=0)
        runtime = next((entry["train_runtime"] for entry in history[::-1] if "train_runtime" in entry), None)
        found[stage] = f"{steps} steps" + ("" if runtime is None else f", {float(runtime):.0f} s")
        if "parameters" in last:
            found["parameters"] = f"{last['parameters']:,}, {last['trainable_parameters']:,} trained"
    versions = run.asked.get("versions") or {}
    return found | {f"{name} (version)": str(version) for name, version in versions.items() if version}


def _results(runs: Sequence[RunFiles], comparison: Mapping[str, Any] | None) -> list[str]:
    columns = [
        (f"{run.name}: {stage}" if len(runs) > 1 else stage, run.results[stage])
        for run in runs
        for stage in ("baseline", "oracle", "stage1", "stage2", "control", "model")
        if isinstance(run.results.get(stage), dict)
    ]
    if not columns:
        return [element("p", text="None yet.", class_="note")]
    scores = [
        name
        for name in dict.fromkeys(name for _, found in columns for name, value in found.items() if _is_number(value))
        if name != "n"
    ]
    rows = [[name, *(_score(found, name) for _, found in columns)] for name in scores]
    rows.append(["rows", *(str(found.get("n", "")) for _, found in columns)])
    body = [text_table(["mean [95 % interval]", *(name for name, _ in columns)], rows)]
    for run in runs:
        for key, what in (("gain", "stage 2 - stage 1"), ("gain_over_control", "stage 2 - stage 1 continued")):
            for name, gain in (run.results.get(key) or {}).items():
                body.append(element("p", text=f"{run.name}: {what}, {name}: {_interval(name, gain)} points, paired"))
    if comparison is not None:
        rows = [
            [
                name,
                *(_shown(name, row[side]) for side in ("first", "second")),
                _interval(name, [row["difference"], *row["ci95"]]),
            ]
            for name, row in comparison["scores"].items()
            if row["n"]
        ]
        title = f"{runs[1].name} - {runs[0].name}, the same {comparison['n']} samples"
        body += [element("h3", text=title), text_table(["score", "first", "second", "difference [95 %], paired"], rows)]
    return body


def _curves(runs: Sequence[RunFiles]) -> list[str]:
    body: list[str] = []
    stages = list(dict.fromkeys(stage for run in runs for stage in run.histories))
    for stage in stages:
        panels = [curve_panels(run.histories.get(stage, [])) for run in runs]
        titles = list(dict.fromkeys(title for found in panels for title in found))
        drawn = [
            svg_panel(title, [(run.name, found.get(title, {})) for run, found in zip(runs, panels, strict=True)])
            for title in titles
        ]
        body += [element("h3", text=stage), element("div", *drawn, class_="row curves")]
    if not stages:
        body.append(element("p", text="No stage has logged anything.", class_="note"))
    return body


def _plain(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else json.dumps(value)
    )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _score(found: Mapping[str, Any], name: str) -> str:
    value, ends = found.get(name), (found.get("ci95") or {}).get(name)
    if not _is_number(value):
        return ""
    return _shown(name, value) + ("" if ends is None else f" [{_shown(name, ends[0])}, {_shown(name, ends[1])}]")


def _shown(name: str, value: float, sign: str = "") -> str:
    """Format a score: a distance in millimetres, all others, which are fractions, in percent."""
    return f"{value:{sign}.2f}" if name.endswith("_mm") else f"{100 * value:{sign}.1f}"


def _interval(name: str, values: Sequence[float]) -> str:
    mean, low, high = (_shown(name, value, "+") for value in values)
    return f"{mean} [{low}, {high}]"
