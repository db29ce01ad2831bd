"""Sections of a report that show answers: groups, failures by reason, groups of rows, single cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from segrl.geometry.masks import rle_to_mask
from segrl.geometry.run_lengths import rle_counts
from segrl.metrics.summary import bootstrap_ci
from segrl.predictions.frames import NOT_SHOWN
from segrl.reports.cases import CASE, choose_cases, fullest_slice
from segrl.reports.drawing import draw_overlay
from segrl.reports.groups import answer_lines, answer_overlay
from segrl.reports.page import element, section, text_table
from segrl.reports.page_pictures import Pictures
from segrl.reports.run_files import Records, RunFiles

__all__ = ["breakdown_section", "cases_section", "failures_section", "groups_section", "reason"]

_GROUPINGS = ("modality", "anatomy", "lesion")


# ---- answers ---------------------------------------------------------------------------------------------------------


def groups_section(run: RunFiles, pictures: Pictures, title: str) -> str:
    """Return the groups of answers that a run kept, one open at a time."""
    if not run.groups:
        return section(title, element("p", text="None were kept.", class_="note"))
    text = (
        "A sample spread over stage 2: the first group of every so many steps. The mask of an answer is red, the "
        "ground truth is outlined in green, boxes are yellow. The advantage is what GRPO weighs an answer by."
    )
    parts = [element("button", text=name, class_=name.split()[0]) + " " for name in ("previous", "next", "open all")]
    parts.append(element("span", text=f"{len(run.groups)} groups", class_="at"))
    parts.append(element("label", ' <input type="checkbox" class="spread"> only groups with spread in reward'))
    shown = [_group(record, image, pictures) for record, image in run.groups]
    inside = element("div", element("p", *parts), *shown, class_="groups")
    return section(title, element("p", text=text, class_="note"), inside)


def _group(record: Mapping[str, Any], image: Image.Image | None, pictures: Pictures) -> str:
    answers = record["answers"]
    rewards = [answer["reward"] for answer in answers if answer["reward"] is not None]
    ends = f"{min(rewards):.2f} to {max(rewards):.2f}" if rewards else "-"
    spread = "1" if rewards and max(rewards) - min(rewards) > 1e-6 else "0"
    where = "" if record.get("slice") is None else f", slice {record['slice'] + 1} of {record['depth']}"
    truth = pictures.add(_small(answer_overlay(record, None, image)), "ground truth")
    cells = [element("div", truth, element("p", text=f"ground truth{where}"))]
    for number, answer in enumerate(answers, 1):
        drawn = pictures.add(
            _small(answer_overlay(record, answer, image)), f"answer {number}{_named(answer.get('slice'))}"
        )
        lines = [element("div", text=line) for line in answer_lines(answer)]
        cells.append(element("div", drawn, *lines, element("pre", text=answer["text"])))
    summary = element("summary", text=f"step {record['step']}: {record.get('query', '')} (rewards {ends})")
    known = ", ".join(f"{key} {record[key]}" for key in (*_GROUPINGS, "name") if record.get(key))
    inside = [element("p", text=known, class_="note"), element("div", *cells, class_="row")]
    return element("details", summary, *inside, class_="group", **{"data-spread": spread})


def _named(index: int | None) -> str:
    if index is None:
        return ""
    return " (names a slice that was not shown)" if index == NOT_SHOWN else f" (names slice {index + 1})"


def failures_section(runs: Sequence[RunFiles], title: str) -> str:
    """Return a table of failures by what is wrong."""
    stages = [(f"{run.name}: {name}" if len(runs) > 1 else name, records) for run in runs
              for name, records in sorted(run.records.items()) if name not in ("baseline", "oracle")]  # fmt: skip
    counts = [(name, Counter(filter(None, map(reason, records))), len(records)) for name, records in stages]
    reasons = sorted({found for _, counted, _ in counts for found in counted})
    if not reasons:
        return section(title, element("p", text="None." if stages else "No answers yet.", class_="note"))
    rows = [[name, *(f"{counted[name]} of {n}" for _, counted, n in counts)] for name in reasons]
    return section(title, text_table(["", *(name for name, _, _ in counts)], rows))


def reason(record: Mapping[str, Any]) -> str | None:
    """Return why an answer fails: the rule that its text breaks, or what its mask lacks; None if it does not.

    Example:
        >>> reason({"fail": True, "status": "no_answer", "dice": 0.5}), reason({"fail": False, "status": "valid"})
        ('text: no_answer', None)
        >>> reason({"fail": True, "status": "valid", "dice": 0.0, "predicted_mask": None})
        'mask: none'
    """
    if not record.get("fail"):
        return None
    if record.get("status", "valid") != "valid":
        return f"text: {record['status']}"
    mask = record.get("predicted_mask")
    if "predicted_mask" in record and (mask is None or not rle_counts(mask)[1::2].any()):
        return "mask: none"
    return "mask: misses the target"


def breakdown_section(runs: Sequence[RunFiles], title: str) -> str:
    """Return mean Dice and failures by modality, anatomy and lesion."""
    body = []
    for key in _GROUPINGS:
        found = [_by_group(run.records.get("run", []), key) for run in runs]
        groups = sorted({name for groups in found for name in groups})
        if len(groups) < 2:
            continue
        rows = [[name, *(cell for groups in found for cell in groups.get(name, ("", "", "")))] for name in groups]
        heads = [
            part
            for run in runs
            for part in (f"{run.name + ': ' if len(runs) > 1 else ''}mDice % [95 %]", "fails %", "n")
        ]
        body.append(text_table([key, *heads], rows))
    return section(title, *(body or [element("p", text="Rows do not say.", class_="note")]))


def _by_group(records: Records, key: str) -> dict[str, tuple[str, str, str]]:
    members: dict[str, Records] = {}
    for record in records:
        if "dice" in record:
            members.setdefault(str(record.get(key) or "unspecified"), []).append(record)
    found = {}
    for name, own in members.items():
        scores = np.array([float(record["dice"]) for record in own])
        low, high = bootstrap_ci(scores)
        fails = np.mean([bool(record.get("fail")) for record in own])
        found[name] = (
            f"{100 * scores.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            f"{100 * fails:.1f}",
            str(len(own)),
        )
    return found


def cases_section(run: RunFiles, pictures: Pictures, title: str) -> str:
    """Return the worst, median and best answers, with their masks."""
    body = []
    records = run.records.get("run", [])
    parts = choose_cases(records)
    if not parts["best"]:
        return section(title, element("p", text="No answers yet.", class_="note"))
    for name, chosen in parts.items():
        cells = [_case(number, records[number], run, pictures) for number in chosen]
        body += [element("h3", text=f"{name}, by Dice"), element("div", *cells, class_="row cases")]
    return section(title, *body)


def _case(number: int, record: Mapping[str, Any], run: RunFiles, pictures: Pictures) -> str:
    drawn = _case_picture(number, record, run)
    lines = [f"Dice {record['dice']:.3f}, {reason(record) or 'valid'}", str(record.get("query") or "")]
    lines.append(", ".join(str(record[key]) for key in (*_GROUPINGS, "name") if record.get(key)))
    shown = "" if drawn is None else pictures.add(drawn, f"case {number}")
    return element(
        "div", shown, *(element("div", text=line) for line in lines), element("pre", text=str(record.get("text", "")))
    )


def _case_picture(number: int, record: Mapping[str, Any], run: RunFiles) -> Image.Image | None:
    """The masks of a record over its picture, if there is one; of a volume the slice with most of the ground truth."""
    true, found = record.get("target_mask"), record.get("predicted_mask")
    path = run.pictures.get(number)
    image = None if path is None else Image.open(path).convert("RGB")
    if true is None:
        return None if image is None else _small(image)
    target = rle_to_mask(true)
    mask = None if found is None else rle_to_mask(found)
    if target.ndim == 3:
        index = fullest_slice(target)
        target, mask = target[index], None if mask is None else mask[index]
    ground = Image.new("RGB", target.shape[::-1]) if image is None else image
    scale = CASE / max(target.shape)
    size = max(1, round(target.shape[1] * scale)), max(1, round(target.shape[0] * scale))
    boxes = record.get("boxes") or [] if len(true["size"]) == 2 else []
    pixels = (target.shape[1], target.shape[0])
    return draw_overlay(ground, size, mask=mask, target=target, boxes=boxes, pixels=pixels, line=1)


def _small(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((CASE, CASE))
    return copy
