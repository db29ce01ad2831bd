"""A sheet of questions for people, with answers to choose from: a page that saves them as CSV, and its reading."""

from __future__ import annotations

import csv
from collections.abc import Container, Sequence
from pathlib import Path

from segrl.errors import DataError
from segrl.reports.page import data_script, element, html_page

__all__ = ["read_sheet", "sheet_page"]

_SCRIPT = """
const store = "segrl-review-" + review.id;
const answers = JSON.parse(localStorage.getItem(store) || "{}");
function table() {
  const quoted = value => '"' + String(value).replaceAll('"', '""') + '"';
  const rows = review.samples.map(sample => {
    const found = answers[sample] || {};
    return [review.id, sample, found.answer || "", found.remark || ""].map(quoted).join(",");
  });
  return "review,sample,answer,remark\\r\\n" + rows.join("\\r\\n") + "\\r\\n";
}
function show() {
  const done = review.samples.filter(sample => (answers[sample] || {}).answer).length;
  document.getElementById("done").textContent = done + " of " + review.samples.length + " answered";
  try { localStorage.setItem(store, JSON.stringify(answers)); } catch (error) { /* private windows keep nothing */ }
}
document.querySelectorAll("input").forEach(input => {
  const sample = input.dataset.sample, found = answers[sample] || {};
  if (input.type === "radio") input.checked = found.answer === input.value;
  else input.value = found.remark || "";
  input.addEventListener("input", () => {
    answers[sample] = {...answers[sample], [input.type === "radio" ? "answer" : "remark"]: input.value};
    show();
  });
});
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], {type: "text/csv"}));
  link.download = "answers.csv";
  link.click();
});
show();
"""


def sheet_page(
    title: str, intro: str, questions: Sequence[tuple[str, str]], answers: Sequence[str], identity: str
) -> str:
    """Build the page.

    Args:
        title: Of the page.
        intro: What is asked, as text.
        questions: A heading as text, and HTML below it, such as pictures; numbered from 1.
        answers: To choose from, for every question; beside them is a field for a remark.
        identity: Of the sheet, written into what it saves.

    Example:
        >>> page = sheet_page("Masks", "Is it right?", [("cyst", element("p", text="a picture"))], ["yes", "no"], "1f")
        >>> page.count('type="radio"')
        2
    """
    body = []
    for number, (heading, content) in enumerate(questions, 1):
        radios = [
            element(
                "label", f'<input type="radio" name="sample{number}" value="{answer}" data-sample="{number}"> {answer} '
            )
            for answer in answers
        ]
        remark = element("label", f'remark <input type="text" size="40" data-sample="{number}">')
        body += [element("h2", text=f"{number}. {heading}"), content, element("p", *radios, remark)]
    end = element("p", element("button", text="Save answers as CSV", id="save"), " ", element("span", id="done"))
    data = {"id": identity, "samples": list(range(1, len(questions) + 1))}
    intro = f"{intro} Answers stay in this browser until they are saved as a CSV file."
    return html_page(title, [element("p", text=intro), *body, end, data_script("review", data)], script=_SCRIPT)


def read_sheet(
    path: str | Path, home: str | Path, identity: str, samples: Container[str], answers: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Read what a sheet saved.

    Args:
        path: The CSV file.
        home: Where the sheet is, for messages.
        identity: Of the sheet.
        samples: Numbers on it, as texts.
        answers: That can be chosen.

    Returns:
        Sample, answer ("" where none was chosen) and remark of each row.

    Raises:
        DataError: No such file or no such table, a row of another sheet, with an unknown answer or sample, or a sample
            twice; names file and row.

    Example:
        >>> _ = Path("answers.csv").write_text("review,sample,answer,remark\\n1f,1,yes,\\n")
        >>> read_sheet("answers.csv", "sheets", "1f", {"1"}, ["yes", "no"])
        [('1', 'yes', '')]
    """
    found, seen = [], set()
    for line, row in _rows(Path(path)):
        where = f"{path}, line {line}"
        sample, answer = (row.get("sample") or "").strip(), (row.get("answer") or "").strip().lower()
        if (row.get("review") or "").strip() != identity:
            raise DataError(f"{where}: review {row.get('review')!r}, expected {identity!r}, that of {home}")
        if sample not in samples or sample in seen:
            wrong = "twice" if sample in seen else "not on the sheet"
            raise DataError(f"{where}: sample {sample!r} is {wrong}; restore the file")
        seen.add(sample)
        if answer and answer not in answers:
            raise DataError(f"{where}: answer {answer!r}; expected one of {', '.join(answers)}, or nothing")
        found.append((sample, answer, (row.get("remark") or "").strip()))
    return found


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("review", "sample", "answer") if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}; pass a file that the sheet saved")
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
