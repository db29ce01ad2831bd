"""`segrl report`: what it says of runs that are whole, interrupted or none, and the page in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from test_kept_groups import HOSTILE, record
from test_review import browse, in_a_browser

from segrl.cli.main import main
from segrl.data import make_synthetic, make_synthetic_volumes
from segrl.errors import DataError
from segrl.evaluation import StoredMasks
from segrl.geometry import mask_to_rle
from segrl.geometry.mask_images import write_mask_image
from segrl.predictions import NOT_SHOWN
from segrl.reports.groups import write_group
from segrl.reports.history import write_curves
from segrl.reports.report_answers import reason
from segrl.reports.run_files import RunFiles, read_run
from segrl.reports.run_report import MOST_BYTES, run_report
from segrl.reports.svg_curves import svg_panel
from segrl.scripts.results import results_for


def answers(count: int, *, volumes: bool = False, shift: float = 0.0) -> list[dict[str, Any]]:
    """Records of which the first has no mask, the second a text that cannot be read."""
    target = np.zeros((3, 16, 16) if volumes else (16, 16), dtype=bool)
    target[..., :8, :8] = True
    found = []
    for n in range(count):
        mask = None if n == 0 else mask_to_rle(np.roll(target, n % 8, -1))
        texts = {"name": f"row {n}", "query": f"Where? {HOSTILE}", "text": HOSTILE, "modality": ("CT", "MRI")[n % 2]}
        status = "no_answer" if n == 1 else "valid"
        scores = {"dice": 0.0 if n == 0 else 0.1 * n, "fail": n < 2, "status": status, "boxes": []}
        if volumes:
            scores["hd95_mm"] = 2.0 + shift
        found.append({**texts, **scores, "predicted_mask": mask, "target_mask": mask_to_rle(target)})
    return found


def make_run(folder: Path, *, finished: bool = True, groups: int = 3, side: int = 600, count: int = 9,
             volumes: bool = False, steps: int = 20) -> Path:  # fmt: skip
    """Files of a run, as its training and its evaluation write them."""
    folder.mkdir()
    asked = {
        "arguments": {"preset": "tiny", "rewards": ["format", "box_f1"], "model": HOSTILE},
        "versions": {"trl": "1"},
    }
    (folder / "segrl_run.json").write_text(json.dumps(asked))
    (folder / "segrl.json").write_text(json.dumps({"task": "volumes" if volumes else "images"}))
    (folder / "config.yaml").write_text(f"# {HOSTILE}\n")
    log = [
        {"step": n, "reward": 0.1 * n, "rewards/box_f1/mean": 0.5, "rollout/dice": 0.02 * n, "kl": 0.001 * n}
        for n in range(1, steps + 1)
    ]
    write_curves(log, folder)
    if finished:
        (folder / "log_history.json").write_text(json.dumps([*log, {"step": steps, "train_runtime": 7.0}]))
        scores = {"mdice": 0.5, "fail": 0.25, "n": count, "ci95": {"mdice": [0.4, 0.6]}}
        (folder / "results.json").write_text(json.dumps({"stage2": scores, "gain": {"dice": [0.1, 0.0, 0.2]}}))
        (folder / "predictions.json").write_text(json.dumps(answers(count, volumes=volumes)))
        (folder / "samples").mkdir()
        Image.new("RGB", (16, 16), (9, 9, 90)).save(folder / "samples" / "000.png")
    for n in range(groups):
        found = record(step=5 * n, side=side)
        if n == 0:
            for answer in found["answers"]:
                answer["reward"] = 0.5  # no spread
        rng = np.random.default_rng(n)
        noise = Image.fromarray(rng.integers(0, 255, (side, side // 2, 3), dtype=np.uint8))
        write_group(folder / "groups", f"{5 * n:05d}", found, noise)
    return folder


def test_failures_by_reason():
    found = [reason(record) for record in answers(4)]
    assert found == ["mask: none", "text: no_answer", None, None]
    assert reason({"fail": True, "status": "valid", "dice": 0.0}) == "mask: misses the target"


@pytest.mark.parametrize("volumes", [False, True])
def test_a_report_says_what_a_run_found(volumes, tmp_path, capsys):
    run = make_run(tmp_path / "run", volumes=volumes)
    assert main(["report", str(run)]) == 0
    assert "report.html: " in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing is loaded
    assert "50.0 [40.0, 60.0]" in page
    assert "stage 2 - stage 1, dice: +10.0 [+0.0, +20.0] points" in page
    for text in ("mask: none", "text: no_answer", "1 of 9", "CT", "MRI", "worst, by Dice", "20 steps, 7 s"):
        assert text in page, text
    assert page.count("<polyline") == 4  # reward, its component, Dice, KL
    assert page.count('class="group"') == 3
    worst = page[page.index("worst, by Dice") :]
    assert worst.index("Dice 0.000") < worst.index("Dice 0.100") < worst.index("median, by Dice")


def test_an_interrupted_run_reports_what_is_there(tmp_path, capsys):
    run = make_run(tmp_path / "run", finished=False)
    assert main(["report", str(run), "-o", str(tmp_path / "r" / "page.html")]) == 0
    assert "stage 2 was interrupted after step 20" in capsys.readouterr().out
    page = (tmp_path / "r" / "page.html").read_text()
    assert "Stage 2 was interrupted after step 20." in page
    assert "Not evaluated: no results.json." in page
    assert page.count("<polyline") == 4
    (run / "results.csv").write_text("step,loss\n1,abc\n")
    assert main(["report", str(run)]) == 2
    assert "results.csv: not a table of numbers" in capsys.readouterr().err


def test_what_is_no_run(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run: none of segrl_run.json, log_history.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "-o", str(tmp_path / "notes.txt")]) == 2
    assert "is there and is no HTML file" in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(tmp_path / "notes.txt" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "notes.txt" in said
    assert said.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for name in ("results.json", "predictions.json", "log_history.json", "segrl_run.json"):
        (run / name).write_text("{")
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_run(run)
        (run / name).unlink()


def test_two_runs_beside_each_other(tmp_path, capsys):
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", groups=1)
    assert main(["report", str(one), str(two), "-o", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert f"{two} - {one}, the same 9 samples" in page
    assert page.count("<polyline") == 8
    assert page.count("stroke-dasharray") == 4
    make_run(tmp_path / "other", count=5)
    assert main(["report", str(one), str(tmp_path / "other"), "-o", str(tmp_path / "both.html")]) == 0
    assert "not compared sample by sample" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["images", "volumes"])
def test_cases_beyond_the_first_pictures(task, tmp_path):
    """The first half is right, the second finds nothing."""
    count, half = (40, 20) if task == "images" else (20, 10)
    (tmp_path / "masks").mkdir()
    if task == "images":
        rows = make_synthetic(count, size=32)
        for n in range(count):
            row: Any = rows[n]
            mask = np.asarray(row["mask"])
            write_mask_image(tmp_path / "masks" / f"{row['name']}.png", mask if n < half else np.zeros_like(mask))
    else:
        rows = make_synthetic_volumes(count, tmp_path / "scans", depth=4, size=32)
        for n in range(count):
            row = rows[n]
            label = nib.load(row["label"])  # type: ignore[attr-defined]
            values = np.asarray(label.dataobj) * (n < half)  # type: ignore[attr-defined]
            nib.save(nib.Nifti1Image(values, label.affine), tmp_path / "masks" / f"{row['name']}.nii.gz")  # type: ignore[attr-defined]
    results = results_for(task)(tmp_path / "run")
    summary, records = results.score(StoredMasks(tmp_path / "masks", rows), rows, 4, draw=True)
    results.write({"model": summary}, {"model": records}, "model")
    ordered = sorted(range(count), key=lambda n: (records[n]["dice"], n))
    shown = sorted({*ordered[:6], *ordered[count // 2 - 3 : count // 2 + 3], *ordered[-6:]})
    assert len(shown) == 18
    assert [int(path.stem) for path in sorted((tmp_path / "run" / "cases").iterdir())] == shown
    (tmp_path / "run" / "segrl.json").write_text(json.dumps({"task": task}))
    files = read_run(tmp_path / "run")
    for number in shown:
        with Image.open(files.pictures[number]) as picture:
            assert np.asarray(picture).max() > 0
    page = run_report([files])
    assert page.count('alt="case ') == 18
    assert (
        f"<td>mask: none</td><td>{count - half} of {count}</td>" in page
    )  # of run lengths as an evaluation writes them


def test_distances_are_compared_in_millimetres(tmp_path):
    runs = [make_run(tmp_path / name, volumes=True) for name in ("one", "two")]
    (runs[1] / "predictions.json").write_text(json.dumps(answers(9, volumes=True, shift=1.5)))
    assert main(["report", *map(str, runs), "-o", str(tmp_path / "both.html")]) == 0
    cells = "".join(f"<td>{text}</td>" for text in ("hd95_mm", "2.00", "3.50", "+1.50 [+1.50, +1.50]"))
    assert cells in (tmp_path / "both.html").read_text()


def test_answers_say_which_slice_they_name(tmp_path):
    found = record()
    for answer, index in zip(found["answers"], (4, NOT_SHOWN), strict=True):
        answer["slice"] = index
    page = run_report([RunFiles(name="run", groups=[(found, None)])])
    assert 'alt="answer 1 (names slice 5)"' in page
    assert 'alt="answer 2 (names a slice that was not shown)"' in page


def test_a_page_is_smaller_than_20_mb(tmp_path):
    """200 steps, 24 groups of noise, which no format makes small."""
    run = make_run(tmp_path / "run", groups=24, steps=200)
    assert len(run_report([read_run(run)]).encode()) < 5e6
    several = [*read_run(run).groups] * 20
    page = run_report([RunFiles(name="run", groups=several)])
    assert len(page.encode()) < MOST_BYTES
    assert "pictures were left out" in page


def test_a_panel_without_curves_is_none():
    assert svg_panel("reward", [("a", {})]) == ""
    assert svg_panel("reward", [("a", {"x": ([3], [1.0])})]).count("<circle") == 1


@in_a_browser
def test_the_page_in_a_browser(tmp_path):
    """Next, next, previous, only groups with spread, open all; each click shows what it says."""
    run = make_run(tmp_path / "run")
    main(["report", str(run)])
    script = """
    const seen = [], open = () => groups().map(group => group.open ? "1" : "0").join("");
    function groups() { return [...document.querySelectorAll("details.group")]; }
    const click = name => { document.querySelector("." + name).click(); seen.push(open()); };
    seen.push(open());
    click("next"); click("next"); click("previous"); click("previous");
    seen.push(document.querySelector(".at").textContent);
    const box = document.querySelector(".spread");
    box.click(); box.dispatchEvent(new Event("input"));
    seen.push(groups().filter(group => !group.hidden).length + " left");
    click("open");
    seen.push([...document.images].every(image => image.complete && image.naturalWidth > 0) + "");
    const written = document.querySelector("details.group pre").textContent;
    seen.push(written.includes("<scr" + "ipt>alert(1)</scr" + "ipt>") + "");
    document.title = seen.join(" ");
    """
    found = browse(run / "report.html", script)
    assert found == "000 100 010 100 001 3 of 3 2 left 011 true true"
