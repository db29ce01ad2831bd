"""The blinded sheet of `segrl compare --review`, in a browser, and what is read of its answers; pages in general."""

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segrl.cli.main import main
from segrl.data import make_synthetic, write_folder
from segrl.errors import DataError
from segrl.geometry import mask_to_rle
from segrl.metrics import count_hedges
from segrl.reports.charts import bar_chart
from segrl.reports.page import data_script, element, figure_picture, html_page, link_list, section, text_table
from segrl.reports.review import read_review, write_review

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


def browse(page: Path, script: str) -> str:
    """The text of the page's title after a script has run in it."""
    shown = page.with_name(f"shown_{page.name}")
    shown.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, shown.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None
    return html.unescape(found.group(1))


def records(seed: int, count: int = 6) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            **{"name": f"row {n}", "query": f"Where is <b>lesion</b> & {n}?", "dice": 0.5},
            "predicted_mask": mask_to_rle(rng.random((12, 16)) < 0.5),
        }
        for n in range(count)
    ]


def images(count: int = 6) -> dict[int, Any]:
    return {n: lambda n=n: Image.new("RGB", (16, 12), (40 * n, 0, 0)) for n in range(count)}


def sheet(folder: Path, **settings: Any) -> tuple[list[int], dict[str, Any]]:
    chosen = write_review(records(0), records(1), images(), folder, names=("A", "B"), **settings)
    return chosen, json.loads((folder / "key.json").read_text())


def answers(folder: Path, name: str, given: dict[int, str], identity: str) -> Path:
    path = folder / name
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "sample", "answer", "remark"])
        rows.writerows([[identity, sample, answer, 'says "so", and so'] for sample, answer in given.items()])
    return path


def test_a_sheet_does_not_say_whose_masks_they_are(tmp_path):
    chosen, key = sheet(tmp_path / "one", count=4)
    page = (tmp_path / "one" / "sheet.html").read_text()
    assert len(set(chosen)) == 4
    assert [sample["record"] for sample in key["samples"]] == chosen
    assert {sample["left"] for sample in key["samples"]} == {"A", "B"}  # sides are drawn
    assert all({sample["left"], sample["right"]} == {"A", "B"} for sample in key["samples"])
    assert page.count("<img ") == 3 * 4
    assert "Where is &lt;b&gt;lesion&lt;/b&gt; &amp;" in page
    assert "http" not in page.replace('"http-equiv"', "")
    for hidden in ("row 0", ">A<", ">B<", "0.5"):
        assert hidden not in page
    again, other = sheet(tmp_path / "two", count=4, seed=1), sheet(tmp_path / "three", count=4)
    assert other[0] == chosen
    assert again[0] != chosen


def test_what_cannot_be_compared(tmp_path):
    same = records(0)
    with pytest.raises(DataError, match="no sample with an image and two different masks"):
        write_review(same, same, images(), tmp_path / "a")
    with pytest.raises(DataError, match="no sample with an image"):
        write_review(same, records(1), {}, tmp_path / "a")
    volumes = [{**record, "predicted_mask": {"size": [1, 2, 2], "counts": [4]}} for record in records(1)]
    with pytest.raises(DataError, match="A: its records are of volumes, and a review shows images"):
        write_review(volumes, volumes, {}, tmp_path / "volumes", names=("A", "B"))
    with pytest.raises(DataError, match="B: its records hold no masks"):
        write_review(same, [{"name": "x"}] * 6, images(), tmp_path / "a", names=("A", "B"))
    assert not (tmp_path / "a").exists()
    (tmp_path / "x").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        sheet(tmp_path)
    with pytest.raises(DataError, match="x is a file; pass a new folder as --output_dir"):
        sheet(tmp_path / "x")
    without = [{**record, "predicted_mask": None} for record in records(1)]
    assert len(write_review(same, without, images(), tmp_path / "b")) == 6  # an answer without a mask


@in_a_browser
def test_answers_of_a_browser(tmp_path):
    _, key = sheet(tmp_path / "r", count=3)
    script = """
    const pick = (sample, answer) => {
      const input = document.querySelector(`input[data-sample="${sample}"][value="${answer}"]`);
      input.checked = true; input.dispatchEvent(new Event("input"));
    };
    pick(1, "left"); pick(2, "right"); pick(1, "equal");
    const remark = document.querySelector('input[type="text"][data-sample="2"]');
    remark.value = 'a "b", c'; remark.dispatchEvent(new Event("input"));
    document.title = table() + document.getElementById("done").textContent;
    """
    found = browse(tmp_path / "r" / "sheet.html", script)
    text, _, status = found.rpartition("\n")
    assert status == "2 of 3 answered"
    path = tmp_path / "answers.csv"
    path.write_text(text + "\n", encoding="utf-8", newline="")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sample"], row["answer"], row["remark"]) for row in rows] == [
        ("1", "equal", ""), ("2", "right", 'a "b", c'), ("3", "", "")
    ]  # fmt: skip
    read = read_review(tmp_path / "r", [path])
    better = key["samples"][1]["right"]
    assert read["answers"] == {"first": int(better == "A"), "equal": 1, "second": int(better == "B")}
    assert read["unanswered"] == 1


@in_a_browser
def test_no_text_of_data_ends_a_script(tmp_path):
    hostile = "</script><script>document.title = 'taken over'</script>"
    body = [element("p", text=hostile, title='" onload="'), data_script("found", {"text": hostile})]
    (tmp_path / "page.html").write_text(html_page(hostile, body, script="document.title = found.text.length;"))
    assert browse(tmp_path / "page.html", "") == str(len(hostile))


def test_what_answers_say(tmp_path):
    _, key = sheet(tmp_path / "r", count=6)
    better = {n: "left" if sample["left"] == "B" else "right" for n, sample in enumerate(key["samples"], 1)}
    worse = {n: "right" if side == "left" else "left" for n, side in better.items()}
    one = answers(tmp_path, "one.csv", {**better, 6: "equal"}, key["id"])
    two = answers(tmp_path, "two.csv", {**better, 1: worse[1], 2: ""}, key["id"])
    found = read_review(tmp_path / "r", [one, two])
    assert found["answers"] == {"first": 1, "equal": 1, "second": 9}
    assert (found["systems"], found["people"], found["unanswered"]) == (["A", "B"], 2, 1)
    assert found["preferred"] == pytest.approx(0.9)
    low, high = found["ci95"]
    assert 0.5 < low < 0.9 < high < 1
    assert found["p"] == pytest.approx(2 * 11 / 1024)  # 0 or 1 of 10, either way
    assert found["agreement"] == pytest.approx(3 / 5)  # samples 3 to 5 of 1 and 3 to 6
    nobody = read_review(tmp_path / "r", [])
    assert (nobody["preferred"], nobody["agreement"], nobody["people"]) == (None, None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("1,left", "1,both"), r"line 2: answer 'both'; expected one of left, equal, right"),
        (lambda text: text.replace(",1,", ",9,"), r"line 2: sample '9' is not on the sheet"),
        (lambda text: text + text.splitlines()[1] + "\n", r"line 4: sample '1' is twice"),
        (lambda text: re.sub(r"(?m)^\w{8},", "12345678,", text), r"line 2: review '12345678', expected"),
        (lambda text: text.replace("answer", "verdict", 1), "no column answer"),
    ],
)
def test_damaged_answers(change, message, tmp_path):
    _, key = sheet(tmp_path / "r", count=2)
    path = answers(tmp_path, "one.csv", {1: "left", 2: "right"}, key["id"])
    path.write_text(change(path.read_text()), newline="")
    with pytest.raises(DataError, match=message):
        read_review(tmp_path / "r", [path])


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_synthetic(4, size=48)
    write_folder(rows, "data", split="test")
    from segrl.data.splits import load_split

    asked = load_split("data", "test")
    for number, run in enumerate(("a", "b")):
        found = [
            {**record, "name": row["name"], "query": row["query"]}
            for record, row in zip(records(number, 4), map(dict, asked), strict=True)
        ]
        Path(run).mkdir()
        Path(run, "predictions.json").write_text(json.dumps(found if number else found[::-1]))
    assert main(["compare", "a", "b", "--review", "3"]) == 2
    assert "the runs kept no images; pass --data" in capsys.readouterr().err
    assert main(["compare", "a", "b", "--review", "9", "--data", "data", "--output_dir", "r"]) == 0
    assert "sheet.html with 4 samples, fewer than 9" in capsys.readouterr().out
    key = json.loads(Path("r/key.json").read_text())
    path = answers(tmp_path, "one.csv", {n: "left" for n in range(1, 5)}, key["id"])
    assert main(["compare", "r", "--answers", str(path)]) == 0
    assert "1 people:" in capsys.readouterr().out
    assert main(["compare", "r", "--answers", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["people"] == 1
    assert main(["compare", "a", "b", "--review", "2", "--data", "data", "--output_dir", "r"]) == 2
    Path("a", "samples").mkdir()
    Image.new("RGB", (48, 48)).save("a/samples/000.png")
    assert main(["compare", "a", "b", "--review", "2"]) == 0
    assert "sheet.html with 1 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The spot is dark. It may be a cyst.", (1, 2)),
        ("Possibly two lesions; likely cysts.", (1, 1)),
        ("It cannot be excluded. It cannot be ruled out.", (2, 2)),
        ("The mayor of 0.5 mm.", (0, 1)),
        ("MAYBE!\nSeems so?", (2, 2)),
        ("1 2 3. ...", (0, 0)),
    ],
)
def test_hedges(text, expected):
    assert count_hedges(text) == expected


def test_a_chart_has_a_bar_for_each_group_that_a_system_has(tmp_path):
    score = {"mean": 0.5, "ci95": [0.4, 0.7]}
    path = bar_chart({"full": {"CT": score, "MRI": score}, "boxes only": {"MRI": score}}, tmp_path / "new" / "c.svg")
    drawn = path.read_text()
    assert all(drawn.count(f"<!-- {text} -->") == 1 for text in ("CT", "MRI", "full", "boxes only"))
    assert len(re.findall(r'<g id="patch_\d+">', drawn)) >= 3 + 2  # bars, the background and the frame
    with pytest.raises(DataError, match="at least one group"):
        bar_chart({"full": {}}, tmp_path / "c.png")


def test_parts_of_a_page():
    from matplotlib.figure import Figure

    def drawn() -> str:
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1])
        return figure_picture(figure, 'a "b"')

    assert drawn() == drawn()
    assert 'alt="a &quot;b&quot;"' in drawn()
    assert 'id="a-b"' in section("A & <b>")
    assert section("A & <b>").count("<b>") == 0
    assert link_list(["A & <b>"]) == '<p class="note"><a href="#a-b">A &amp; &lt;b&gt;</a></p>'
    assert "<td>True</td><td></td>" in text_table(["x", "y"], [[True, None]])
