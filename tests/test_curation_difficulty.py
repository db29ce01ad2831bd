"""Hard cases: votes, tails and thresholds; the committee and its folds; masks to look at; publication; the command."""

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image
from script_modules import Example
from test_files import killed_while_writing

from segrl.cli.main import main
from segrl.curation import (
    Case,
    CommitteeSettings,
    CurationSettings,
    DifficultySettings,
    PublishSettings,
    SourceSettings,
    SuspectSettings,
    TailSettings,
    find_difficulty,
    find_tail,
    publish_cases,
    read_errors,
    run_difficulty,
    select_cases,
    vote,
)
from segrl.curation.committee import case_folds, committee_jobs, run_committee
from segrl.curation.duplicates import near_duplicates
from segrl.curation.json_lines import write_json_lines
from segrl.curation.publish import FinalText, read_final_texts
from segrl.curation.report import errors_figure
from segrl.curation.stages import claim_build
from segrl.curation.suspects import find_suspects, read_rejected, write_suspects
from segrl.data import load_split
from segrl.errors import DataError, SegRLError
from segrl.geometry import mask_to_rle
from segrl.geometry.mask_images import read_mask_file

TINY = CommitteeSettings(encoders=("tu-regnetx_002",), size=32, steps=3, batch=2, check=2, folds=2)


def make_cases(folder: Path, count: int = 24, source: str = "mine") -> list[Case]:
    """Images of noise with one bright disc each; two images a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[:40, :48]
        mask = (y - rng.integers(8, 32)) ** 2 + (x - rng.integers(8, 40)) ** 2 < rng.integers(9, 50)
        image = (rng.integers(0, 120, mask.shape) + 130 * mask).astype(np.uint8)
        paths = folder / f"{source}{number}.png", folder / f"{source}{number}_seg.png"
        Image.fromarray(image).save(paths[0])
        Image.fromarray(mask.astype(np.uint8) * 255).save(paths[1])
        texts = (source, f"p{number // 2}", "CT", "Lung", "nodule", "CC0-1.0")
        cases.append(Case(f"{source}{number:04d}", *paths, *texts, name=paths[0].name))
    return cases


# votes and tails


def test_votes():
    errors = [[0.1, 0.5, 0.9, 0.3], [1.0, 1.0, 0.0, 1.0]]
    assert vote(errors, TailSettings(vote="mean")).tolist() == pytest.approx([0.45, 0.75])
    assert vote(errors, TailSettings(vote="median")).tolist() == pytest.approx([0.4, 1.0])
    for share in (0.25, 0.5, 0.75, 1.0):
        found = vote(errors, TailSettings(share=share))
        for threshold in (0.05, 0.3, 0.6, 0.95):  # exactly: that share of the members is beyond
            beyond = (np.array(errors) >= threshold).mean(axis=1) >= share
            assert (found >= threshold).tolist() == beyond.tolist()
    with pytest.raises(DataError, match=r"expected \(cases, members\)"):
        vote([0.1, 0.2])
    with pytest.raises(DataError, match="from 0 to 1"):
        vote([[1.5]])


def two_kinds(seed: int = 0, easy: int = 140, hard: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.beta(2, 16, easy), rng.uniform(0.5, 0.99, hard)])


def test_the_knee_selects_by_default_with_clauset_beside_it():
    assert (TailSettings().mode, TailSettings().vote, TailSettings().share) == ("knee", "share", 0.5)
    found = find_tail(two_kinds())
    assert found.selected_by == "knee"
    assert found.threshold == found.knee
    assert found.x_min is not None
    assert {each.other for each in found.comparisons} == {"lognormal", "exponential"}
    assert found == find_tail(two_kinds()[::-1])


def test_the_knee_of_a_power_law_has_a_closed_form():
    """The distance to the diagonal is largest where the curve, with both axes scaled to 1, falls by 1."""
    found = find_tail(two_kinds(1), TailSettings(grid=20001))
    a, start = found.start_alpha, found.start
    assert a is not None
    assert start is not None
    slope = (1 - start**a) / (1 - start)  # of the curve (x / start)^-a from start to 1
    assert found.knee == pytest.approx((a * start**a / slope) ** (1 / (a + 1)), abs=1e-3)


def test_clauset_on_a_power_law():
    values = 0.01 * (1 - np.random.default_rng(0).random(300)) ** (-1 / 1.5)
    found = find_tail(values[values < 1], TailSettings(mode="clauset"))
    assert found.threshold == found.x_min
    assert found.alpha_error is not None
    assert found.alpha == pytest.approx(2.5, abs=3 * found.alpha_error)
    assert found.power_law is True


def power_laws(samples: int, below: int = 0) -> list[np.ndarray]:
    """500 errors each of a power law of exponent 2.5 from 0.01 on, and uniform ones below it."""
    found = []
    for seed in range(samples):
        rng = np.random.default_rng(seed)
        values = np.concatenate([rng.uniform(0, 0.01, below), 0.01 * (1 - rng.random(500)) ** (-1 / 1.5)])
        found.append(values[values < 1])
    return found


@pytest.mark.parametrize("below", [0, 500])
def test_the_longest_power_law_begins_where_the_true_one_does(below):
    found = [find_tail(values, TailSettings(x_min="longest")) for values in power_laws(20, below)]
    starts, exponents = (np.array([getattr(tail, name) for tail in found]) for name in ("x_min", "alpha"))
    assert starts.mean() == pytest.approx(0.01, rel=0.1)
    assert exponents.mean() == pytest.approx(2.5, abs=2 * exponents.std(ddof=1) / 20**0.5)


def test_one_power_law_in_ten_is_rejected():
    """As its bound says: a sample that is not rejected begins at its smallest error."""
    begins = [find_tail(values, TailSettings(x_min="longest")).x_min == values.min() for values in power_laws(200)]
    assert 0.84 < np.mean(begins) < 0.96


def test_errors_that_are_nowhere_a_power_law_have_no_longest_one():
    values = 0.9 + 0.002 * np.repeat(np.arange(20), 40)  # steps: every tail is far from its fit
    found = find_tail(values, TailSettings(x_min="longest", mode="clauset"))
    assert (found.x_min, found.alpha, found.selected_by) == (None, None, "quantile")
    assert "no power law could be fitted" in found.notes


def test_a_tail_that_is_no_power_law_is_said_to_be_none():
    found = find_tail(np.random.default_rng(0).beta(2, 8, 200))
    assert found.power_law is False
    assert any("no power law" in note for note in found.notes)


def test_complete_misses_are_hard_and_in_no_fit():
    errors = two_kinds()
    found, without = find_tail([*errors, *[1.0] * 30, 0.0]), find_tail(errors)
    assert (found.ones, found.zeros) == (30, 1)
    assert (found.knee, found.x_min, found.alpha) == (without.knee, without.x_min, without.alpha)
    assert found.threshold < 1
    assert any("30 complete misses" in note for note in found.notes)


def test_no_knee_falls_back_and_says_so():
    found = find_tail(two_kinds(), TailSettings(sensitivity=1e6))  # Kneedle asks for more than the curve has
    assert (found.knee, found.selected_by) == (None, "clauset")
    assert any("no knee was found; clauset selects" in note for note in found.notes)


def test_few_errors_take_a_quantile():
    found = find_tail(two_kinds()[:49])
    assert (found.selected_by, found.x_min, found.power_law) == ("quantile", None, None)
    assert any("too few" in note for note in found.notes)


def test_equal_errors_are_refused():
    with pytest.raises(DataError, match=r"all 60 errors are 0.3: nothing tells hard cases from easy ones"):
        find_tail([0.3] * 60)
    with pytest.raises(DataError, match="0 errors"):
        find_tail([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TailSettings(share=1.1), "share=1.1"),
        (lambda: TailSettings(start=1.0), "start=1.0"),
        (lambda: TailSettings(grid=3), "grid=3"),
        (lambda: CommitteeSettings(size=50), "size=50; expected a multiple of 16"),
        (lambda: CommitteeSettings(folds=1), "folds=1; expected 2 or more"),
        (lambda: CommitteeSettings(encoders=()), "encoders is empty"),
        (lambda: CommitteeSettings(learning_rate=0), "learning_rate=0"),
        (lambda: SuspectSettings(agreement=2), "agreement=2"),
        (lambda: PublishSettings(test_fraction=1), "test_fraction=1"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(DataError, match=re.escape(message)):
        make()


def test_small_sets_of_a_modality_are_fitted_together(tmp_path):
    kinds = (("a", "CT", 30), ("b", "ct", 30), ("c", "MRI", 60), ("d", "Fundus", 20))
    cases, errors = [], {}
    for seed, (source, modality, count) in enumerate(kinds):
        for number, error in enumerate(np.random.default_rng(seed).permutation(two_kinds(seed))[:count]):
            texts = (source, "", modality, "", "cyst", "MIT")
            cases.append(Case(f"{source}{number}", tmp_path / "i", tmp_path / "m", *texts))
            errors[cases[-1].id] = [float(error)]
    a, b, c, d = select_cases(cases, errors, TailSettings(), tmp_path)
    assert (a.pooled, b.pooled, c.pooled, d.pooled) == (("a", "b"), ("a", "b"), ("c",), ("d",))
    assert a.tail.threshold == b.tail.threshold
    assert a.tail.notes[0] == "30 errors are few: fitted with a, b"
    assert d.tail.selected_by == "quantile"
    assert d.selected == 10
    assert c.hard_dice < c.mean_dice < c.easy_dice
    selected = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    assert all(row["difficulty"] >= a.tail.threshold for row in selected if row["source"] in "ab")
    with pytest.raises(DataError, match=r"a: all 60 errors are 0.5"):
        select_cases(cases[:60], {key: [0.5] for key in errors}, TailSettings(), tmp_path)


# committee


def test_patients_and_near_duplicates_are_in_one_fold(tmp_path):
    cases = make_cases(tmp_path)
    with Image.open(cases[5].image) as image:  # of another patient, and the same scene
        image.resize((44, 38)).save(cases[20].image)
    groups, folds = case_folds(cases, replace(TINY, folds=3))
    assert groups[4] == groups[5] == groups[20] == groups[21]
    assert sorted(n for fold in folds for n in fold) == list(range(24))
    assert next(fold for fold in folds if 4 in fold) >= {4, 5, 20, 21}
    assert max(map(len, folds)) - min(map(len, folds)) <= 2
    with pytest.raises(DataError, match="mine: 11 groups of cases"):
        case_folds(cases, replace(TINY, folds=12))


def test_duplicates_far_apart_are_found():
    """More images than distances of are in memory at once, each of them like one in another block or in its own."""
    noise = [np.random.default_rng(n).integers(0, 255, (32, 32), dtype=np.uint8) for n in range(600)]
    images = [Image.fromarray(noise[n % 600]) for n in range(1200)]
    assert near_duplicates(images, 8) == [n % 600 for n in range(1200)]
    assert near_duplicates(images[:9], -1) == list(range(9))
    with pytest.raises(DataError, match="no images"):
        near_duplicates([], 8)


def test_every_error_is_out_of_fold_and_the_same_each_time(tmp_path):
    cases = make_cases(tmp_path / "cases", 12)
    jobs = committee_jobs(cases, TINY, tmp_path / "one")
    assert [job.path.name for job in run_committee(jobs)] == ["member0_fold0.json", "member0_fold1.json"]
    assert sorted(n for job in jobs for n in job.held_out) == list(range(12))
    for job in jobs:
        rest = {job.groups[n] for n in range(12) if n not in job.held_out}
        assert rest.isdisjoint(job.groups[n] for n in job.held_out)
        assert set(json.loads(job.path.read_text())) == {cases[n].id for n in job.held_out}
    first, second = (job.path.read_bytes() for job in jobs)
    jobs[1].path.unlink()
    before = jobs[0].path.stat().st_mtime_ns
    list(run_committee(jobs))  # goes on with what is not there
    assert jobs[0].path.stat().st_mtime_ns == before
    assert jobs[1].path.read_bytes() == second
    other = committee_jobs(cases, replace(TINY, seed=1), tmp_path / "two")[:1]
    list(run_committee(other))
    assert other[0].path.read_bytes() != first


def test_an_unknown_encoder_is_named(tmp_path):
    jobs = committee_jobs(make_cases(tmp_path, 8), replace(TINY, encoders=("resnet19",)), tmp_path / "one")
    with pytest.raises(SegRLError, match="encoders: 'resnet19'"):
        list(run_committee(jobs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoders": ("tu-regnetx_002", "resnet19")}, r"'resnet19' is no encoder .*did you mean 'resnet1"),
        ({"encoders": ("tu-resnet19x",)}, r"'tu-resnet19x' with weights=None: .*resnet19x"),
        ({"encoders": ("resnet18",), "weights": "imagnet"}, r"'resnet18' with weights='imagnet': .*imagnet"),
    ],
)
def test_a_wrong_encoder_leaves_no_build(tmp_path, settings, message):
    make_cases(tmp_path / "pairs", 20)
    source = SourceSettings(path=tmp_path / "pairs", format="pairs", lesion="cyst", modality="CT", licence="MIT")
    wrong = CurationSettings(sources=(source,), difficulty=DifficultySettings(committee=CommitteeSettings(**settings)))
    with pytest.raises(SegRLError, match=rf"^encoders: {message}") as found:
        run_difficulty(wrong, tmp_path / "build")
    assert len(str(found.value)) < 300
    assert "\n" not in str(found.value)
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", "errors": []}', r"errors.jsonl, line 1: damaged \(errors=\[\]; expected numbers from 0 to 1"),
        ('{"id": "a", "errors": [NaN]}', r"line 1: damaged \(errors=\[nan\]"),
        ('{"id": "a", "errors": [0.1]}\n{"id": "b", "errors": [0.1, 0.2]}', r"errors of different numbers of members"),
    ],
)
def test_damaged_errors(tmp_path, lines, message):
    (tmp_path / "difficulty").mkdir()
    (tmp_path / "difficulty/errors.jsonl").write_text(lines + "\n")
    with pytest.raises(DataError, match=message):
        read_errors(tmp_path)


def test_cases_without_errors(tmp_path):
    cases = make_cases(tmp_path, 3)
    with pytest.raises(DataError, match=rf"^no errors of 2 cases, such as {cases[1].id}; run the stage"):
        select_cases(cases, {cases[0].id: [0.5]}, TailSettings(), tmp_path)


# masks to look at


def test_suspects_are_where_members_agree_and_the_mask_does_not(tmp_path):
    cases = make_cases(tmp_path, 4)
    target = [read_mask_file(case.mask) for case in cases]
    wrong, empty = np.roll(target[0], 20, axis=1), np.zeros_like(target[0])
    drawn = [[wrong, wrong], [target[1], target[1]], [empty, empty], [wrong, np.roll(wrong, 15, axis=0)]]
    masks = {case.id: [mask_to_rle(mask) for mask in found] for case, found in zip(cases, drawn, strict=True)}
    errors = {case.id: [1.0, 1.0] for case in cases} | {cases[1].id: [0.0, 0.1]}
    (found,) = find_suspects(cases, masks, errors, SuspectSettings())
    assert (found.case, found.agreement, found.error) == (cases[0], 1.0, 1.0)
    write_suspects([found], masks, tmp_path)
    page = (tmp_path / "spot_check.html").read_text()
    assert page.count("<img ") == 3
    assert "http" not in page
    identity = re.findall(r'"id": "(\w+)"', page)[0]
    assert read_rejected(tmp_path) == set()
    for answer, rejected in (("accept", set()), ("reject", {cases[0].id}), ("", set())):
        with open(tmp_path / "answers.csv", "w", newline="") as file:
            csv.writer(file).writerows([["review", "sample", "answer", "remark"], [identity, 1, answer, ""]])
        assert read_rejected(tmp_path) == rejected
    (tmp_path / "answers.csv").write_text("review,sample,answer,remark\nother,1,reject,\n")
    with pytest.raises(DataError, match=r"answers.csv, line 2: review 'other', expected"):
        read_rejected(tmp_path)
    write_suspects([], {}, tmp_path)
    assert not (tmp_path / "spot_check.html").exists()


# publication


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_data_set(tmp_path):
    cases = [replace(case, difficulty=0.5) for case in make_cases(tmp_path / "cases")]
    cases[0] = replace(cases[0], licence="a | [b](c)", volume="scan.nii.gz", slice=7)
    texts = {case.id: FinalText("Where?", "There.", "", {"total": 0.9}) for case in cases[:20]}
    assert publish_cases(cases, texts, PublishSettings(), tmp_path) == {"train": 16, "test": 4}
    alone: Any = load_from_disk(str(tmp_path / "dataset"))
    train, test = alone["train"], alone["test"]
    assert not set(train["patient"]) & set(test["patient"])
    row: Any = next(row for part in (train, test) for row in part if dict(row)["name"] == cases[0].id)
    assert (row["volume"], row["slice"], row["difficulty"], row["source"]) == ("scan.nii.gz", 7, 0.5, "mine")
    assert (row["query"], row["reasoning"], json.loads(row["scores"])) == ("Where?", "There.", {"total": 0.9})
    assert row["answer"] == f"The nodule is located at {row['boxes'][0]}."
    assert np.array_equal(np.asarray(row["mask"]) > 0, read_mask_file(cases[0].mask))
    assert len(load_split(str(tmp_path / "dataset"), "train")) == 16
    files = files_of(tmp_path / "dataset")
    assert r"| mine | a \| \[b](c) | CT | 1 |" in files["README.md"].decode()
    assert "statistics.png" in files
    publish_cases(cases, texts, PublishSettings(), tmp_path)
    assert files_of(tmp_path / "dataset") == files


def test_without_texts_questions_are_from_templates(tmp_path):
    publish_cases(make_cases(tmp_path / "cases", 8), None, PublishSettings(test_fraction=0.5), tmp_path)
    rows = load_split(str(tmp_path / "dataset"), "test")
    assert "nodule" in rows["query"][0]
    assert rows["reasoning"][0] == ""
    assert "Questions are from templates" in (tmp_path / "dataset/README.md").read_text()
    with pytest.raises(DataError, match="none with an accepted text"):
        publish_cases(make_cases(tmp_path / "cases", 8), {}, PublishSettings(), tmp_path)


def test_final_texts(tmp_path):
    rows = [{"id": "a", "status": "rejected", "query": "?"}, {"id": "a", "status": "accepted", "query": "Where?"}]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"id": "b", "status": "written", "query": "There?"}) + "\n")
    assert read_final_texts(tmp_path) == {"b": FinalText("There?", scores={})}
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_final_texts(tmp_path) == {"a": FinalText("Where?", scores={})}
    (tmp_path / "judgements.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"judgements.jsonl, line 1: damaged"):
        read_final_texts(tmp_path)


def test_a_separator_of_lines_inside_of_a_text_ends_no_row(tmp_path):
    rows = [{"id": name, "status": "accepted", "query": f"a{sign}b"} for name, sign in (("x", "\u2028"), ("y", "\x85"))]
    write_json_lines(tmp_path / "judgements.jsonl", rows)
    assert read_final_texts(tmp_path) == {row["id"]: FinalText(row["query"], scores={}) for row in rows}


def test_the_curve_of_a_report_has_the_area_of_what_was_fitted():
    errors = np.array([*two_kinds(), *[1.0] * 30])
    tail = asdict(find_tail(errors))
    axes = errors_figure([{"source": "a", "cases": 230, "selected": 90, "tail": tail}], {"a": errors}).axes[0]
    x, y = axes.lines[0].get_data()
    assert np.trapezoid(y, x) == pytest.approx(0.04 * ((errors >= tail["start"]) & (errors < 1)).sum())


def test_sources_that_would_share_a_folder_are_refused(tmp_path):
    cases = [*make_cases(tmp_path, 2, "a b"), *make_cases(tmp_path, 2, "A_b")]
    with pytest.raises(DataError, match="'a b' and 'A_b' would share a folder"):
        find_difficulty(cases, DifficultySettings(committee=TINY), tmp_path / "build")
    assert not (tmp_path / "build").exists()


# the command


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    make_cases(tmp_path / "pairs", 24)
    committee = "{encoders: [tu-regnetx_002, tu-regnetx_002], size: 32, steps: 3, batch: 2, check: 2, folds: 2}"
    path = tmp_path / "curate.yaml"
    path.write_text(
        "sources: [{path: pairs, format: pairs, lesion: nodule, modality: CT, licence: MIT}]\n"
        f"difficulty: {{committee: {committee}}}\n"
    )
    return path


@pytest.mark.slow
def test_the_command_builds_and_goes_on(settings_file, tmp_path, capsys):
    assert main(["curate", "run", str(settings_file)]) == 0
    out = capsys.readouterr().out
    assert "pairs: 12 of 24 cases are hard" in out
    assert "selected by quantile" in out
    assert "texts.jsonl: 12 written" in out
    assert "judgements.jsonl: 12 accepted" in out
    report = (tmp_path / "build/report.html").read_text()
    assert "http" not in report
    assert "Errors and thresholds" in report
    kept = files_of(tmp_path / "build")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("member*")}
    assert len(times) == 4
    assert main(["curate", "run", str(settings_file)]) == 0
    assert files_of(tmp_path / "build") == kept
    assert {path: path.stat().st_mtime_ns for path in times} == times
    changed = settings_file.read_text().replace("folds: 2}", "folds: 2}, tail: {quantile: 0.75}")
    settings_file.write_text(changed)
    assert main(["curate", "select", str(settings_file)]) == 0
    assert "pairs: 6 of 24 cases are hard" in capsys.readouterr().out
    settings_file.write_text(changed.replace("licence: MIT", "licence: GPL"))
    assert main(["curate", "select", str(settings_file)]) == 2
    assert "holds a build with other sources" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_build_trains(settings_file, tmp_path):
    """Both stages of CORE-Seg on the published data set, one step each."""
    assert main(["curate", "run", str(settings_file)]) == 0
    few = ("--max_steps", 1, "--eval_limit", 2, "--per_device_train_batch_size", 8, "--dataloader_pin_memory", "false")
    flags = ("--data", tmp_path / "build/dataset", *few, "--output_dir", tmp_path / "run")
    Example("core_seg").done("train_grpo", *flags)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["stage2"]["n"] == 2
    assert json.loads((tmp_path / "run/log_history.json").read_text())


def test_a_folder_that_is_no_build_is_refused(settings_file, tmp_path, capsys):
    (tmp_path / "mine/deeper").mkdir(parents=True)
    for name in ("notes.txt", "deeper/.draft.tmp"):
        (tmp_path / "mine" / name).write_text("mine")
    assert main(["curate", "difficulty", str(settings_file), "--build", str(tmp_path / "mine")]) == 2
    assert "no build of segrl curate" in capsys.readouterr().err
    assert (tmp_path / "mine/deeper/.draft.tmp").read_text() == "mine"
    assert main(["curate", "difficulty", str(settings_file), "--build", str(tmp_path / "mine/notes.txt")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["curate", "publish", str(settings_file)]) == 2
    assert "run the stage difficulty first" in capsys.readouterr().err


def test_a_build_that_was_killed_at_its_first_file_goes_on(tmp_path):
    (tmp_path / "curate.yaml").write_text("sources: [{path: pairs, licence: MIT}]")
    (tmp_path / "build").mkdir()
    (tmp_path / "build/.curation.json.7.tmp").write_text("{")
    claim_build(CurationSettings.read(tmp_path / "curate.yaml"), tmp_path / "build")
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["curation.json"]


def test_what_killed_processes_left_in_a_build_is_removed(tmp_path):
    (tmp_path / "curate.yaml").write_text("sources: [{path: pairs, licence: MIT}]")
    settings, build = CurationSettings.read(tmp_path / "curate.yaml"), tmp_path / "build"
    build.mkdir()
    killed_while_writing(build / "curation.json", "")  # at its first file
    claim_build(settings, build)
    (build / "sources").mkdir()
    for name, suffix in (("texts.jsonl", ""), ("sources/a.nii.gz", ".nii.gz"), ("sources/b.png", ".png")):
        killed_while_writing(build / name, suffix)
    (build / "sources/.mine.tmp").write_text("mine")
    claim_build(settings, build)
    found = {path.relative_to(build).as_posix() for path in build.rglob("*") if path.is_file()}
    assert found == {"curation.json", "sources/.mine.tmp"}
