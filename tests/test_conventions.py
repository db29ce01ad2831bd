"""Conventions of published evaluators against oracles that follow each source step by step, on 10,000 random rows."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from segrl.cli.main import main
from segrl.data import make_synthetic, write_folder
from segrl.errors import DataError, UnknownNameError
from segrl.evaluation.conventions import (
    CONVENTIONS,
    KINDS,
    VOLUMES,
    Case,
    ConventionError,
    cases_of,
    compare_conventions,
    conventions_page,
    explain_difference,
)
from segrl.geometry import mask_to_rle
from segrl.metrics import dice, iou
from segrl.reports.results_file import write_results

COUNT, BATCHES = 10_000, 100


class Row(NamedTuple):
    """What a case is made of, for the oracles."""

    true: np.ndarray
    predicted: np.ndarray | None = None
    ignored: np.ndarray | None = None
    valid: bool = True
    name: str = ""
    group: str = ""
    spacing: tuple[float, float, float] | None = None

    @property
    def case(self) -> Case:
        masks = self.true, self.predicted, self.ignored
        return Case.of(*masks, valid=self.valid, name=self.name, group=self.group, spacing_mm=self.spacing)


def score(name: str, rows: Sequence[Row]) -> dict[str, float]:
    return CONVENTIONS[name]([row.case for row in rows])


def random_cases(count: int, seed: int, shape: tuple[int, ...] = (6, 7)) -> list[Row]:
    """Rows with empty masks, no masks, false alarms and ignored pixels, each often."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        true = rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0], p=[0.3, 0.3, 0.3, 0.1])
        predicted = None
        if rng.random() < 0.8:
            flipped = rng.random(shape) < rng.choice([0.0, 0.1, 0.5])
            predicted = (true ^ flipped) if rng.random() < 0.7 else rng.random(shape) < rng.choice([0.0, 0.3])
        ignored = rng.random(shape) < rng.choice([0.1, 1.0], p=[0.95, 0.05]) if rng.random() < 0.2 else None
        group = str(rng.choice(["cyst", "nodule"]))
        found.append(Row(true, predicted, ignored, bool(rng.random() < 0.9), f"row {n}", group))
    return found


def labels(case: Row) -> np.ndarray:
    """The truth as LISA's data has it: 0, 1, and 255 for ignored."""
    found = case.true.astype(np.int64)
    if case.ignored is not None:
        found[case.ignored] = 255
    return found


def lisa(cases: Sequence[Row]) -> dict[str, float]:
    total, inter, union, count = 0.0, 0, 0, 0
    for case in cases:
        target = labels(case).ravel()
        output = np.zeros_like(target) if case.predicted is None else case.predicted.astype(np.int64).ravel()
        output = np.where(target == 255, 255, output)
        same = output[output == target]
        i = int((same == 1).sum())
        u = int((output == 1).sum()) + int((target == 1).sum()) - i
        value = i / (u + 1e-5)
        if u == 0:
            value += 1.0
        total, inter, union, count = total + value, inter + i, union + u, count + 1
    return {"giou": total / (count + 1e-5), "ciou": inter / (union + 1e-10)}


def mmr(cases: Sequence[Row]) -> dict[str, float]:
    return lisa([case for case in cases if case.predicted is not None])


def rela(cases: Sequence[Row]) -> dict[str, float]:
    sums = {"iou": 0.0, "i": 0, "u": 0, "targets": 0, "TP": 0, "TN": 0, "FP": 0, "FN": 0}
    hits = dict.fromkeys((0.7, 0.8, 0.9), 0)
    for case in cases:
        predicted = np.zeros_like(case.true) if case.predicted is None else case.predicted
        says_none = not predicted.any()
        i, u = int(np.logical_and(predicted, case.true).sum()), int(np.logical_or(predicted, case.true).sum())
        if not case.true.any():
            if says_none:
                sums["TP"] += 1
                sums["iou"] += 1
            else:
                sums["FN"] += 1
                sums["u"] += u
            continue
        if says_none:
            sums["FP"] += 1
            i = 0
        else:
            sums["TN"] += 1
        value = 0.0 if u == 0 else i / u
        sums["iou"] += value
        sums["i"] += i
        sums["u"] += u
        sums["targets"] += 1
        for threshold in hits:
            hits[threshold] += value >= threshold
    found = {"giou": sums["iou"] / len(cases), "ciou": sums["i"] / sums["u"]}
    found |= {f"p@{threshold}": hit / sums["targets"] for threshold, hit in hits.items()}
    if sums["TP"] + sums["FN"]:
        found |= {"t_acc": sums["TN"] / (sums["TN"] + sums["FP"]), "n_acc": sums["TP"] / (sums["TP"] + sums["FN"])}
    else:
        found |= {"t_acc": 0, "n_acc": 0}
    return found


def vision_reasoner(cases: Sequence[Row]) -> dict[str, float]:
    items = []
    for case in cases:
        truth = labels(case).astype(bool)  # 255, too
        if case.predicted is None:
            items.append((0, int(truth.sum())))
            continue
        union = int((case.predicted | truth).sum())
        if union:  # else its two values cannot be unpacked, and the row is skipped
            items.append((int((case.predicted & truth).sum()), union))
    inter, union = (sum(item[n] for item in items) for n in (0, 1))
    ious = [i / u if u > 0 else 0 for i, u in items]
    return {"giou": float(np.mean(ious)), "ciou": inter / union if union > 0 else 0}


def vision_reasoner_nonobj(cases: Sequence[Row]) -> dict[str, float]:
    all_ious, total_intersection, total_union, non_object, total_non_object_gt = [], 0, 0, 0, 0
    for case in cases:
        gt_mask = labels(case).astype(bool)
        mask_all = np.zeros_like(gt_mask) if case.predicted is None else case.predicted
        readable = case.valid
        intersection, union = int((mask_all & gt_mask).sum()), int((mask_all | gt_mask).sum())
        found_none = int(readable and gt_mask.sum() == 0 and not mask_all.any())
        iou_ = intersection / union if union > 0 else 0
        if found_none == 1:
            iou_ = 1.0
        all_ious.append(iou_)
        non_object += found_none
        total_intersection += intersection
        total_union += union
        total_non_object_gt += int(gt_mask.sum() == 0)
    return {
        "giou": float(np.mean(all_ious)),
        "ciou": total_intersection / total_union if total_union > 0 else 0,
        "n_acc": non_object / total_non_object_gt if total_non_object_gt > 0 else 0,
    }


def m3d(cases: Sequence[Row]) -> dict[str, float]:
    scores = []
    for case in cases:
        target = (labels(case) == 1).astype(float).ravel()
        assert case.predicted is not None
        predict = case.predicted.astype(float).ravel()
        scores.append(2 * (predict * target).sum() / (predict.sum() + target.sum() + 1))
    return {"mdice": float(np.mean(scores))}


def unibiomed(cases: Sequence[Row]) -> dict[str, float]:
    sums: dict[str, list[list[float]]] = {}
    for case in cases:
        assert case.predicted is not None
        pred, gt = case.predicted.astype(np.uint8), case.true.astype(np.uint8)
        score = 2.0 * (pred * gt).sum() / (pred.sum() + gt.sum() + 1e-8)
        if pred.sum() == 0 or gt.sum() == 0:
            hd95, nsd = math.nan, 0.0
        else:
            pred_dist: Any = ndimage.distance_transform_edt(1 - pred)
            gt_dist: Any = ndimage.distance_transform_edt(1 - gt)
            one, other = pred * gt_dist, gt * pred_dist
            wrong = np.concatenate([one[one > 0], other[other > 0]])
            hd95 = math.nan if not len(wrong) else float(np.percentile(wrong, 95))
            rim_pred: Any = pred - ndimage.binary_erosion(pred)
            rim_gt: Any = gt - ndimage.binary_erosion(gt)
            near = ((rim_pred > 0) & (gt_dist <= 2)).sum() + ((rim_gt > 0) & (pred_dist <= 2)).sum()
            nsd = near / (rim_pred.sum() + rim_gt.sum() + 1e-8)
        sums.setdefault(case.group, []).append([score, hd95, nsd])
    mean = [float(value) for value in np.mean([np.mean(rows, axis=0) for rows in sums.values()], axis=0)]
    return {"mdice": mean[0], "hd95_voxels": mean[1], "nsd": mean[2]}


def nnunet(cases: Sequence[Row]) -> dict[str, float]:
    found: dict[str, list[list[float]]] = {}
    for case in cases:
        if case.predicted is None:  # no file
            continue
        use = np.ones_like(case.true) if case.ignored is None else ~case.ignored
        tp = (case.true & case.predicted & use).sum()
        fp = (~case.true & case.predicted & use).sum()
        fn = (case.true & ~case.predicted & use).sum()
        with np.errstate(invalid="ignore"):
            found.setdefault(case.group, []).append([2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)])
    means = np.mean([np.nanmean(rows, axis=0) for rows in found.values()], axis=0)
    return {"mdice": float(means[0]), "miou": float(means[1])}


def core_seg(cases: Sequence[Row]) -> dict[str, float]:
    scores, ious, failed = [], [], []
    for case in cases:
        predicted = np.zeros_like(case.true) if case.predicted is None else case.predicted
        i, u = (predicted & case.true).sum(), (predicted | case.true).sum()
        scores.append(2 * i / (predicted.sum() + case.true.sum()))
        ious.append(i / u)
        failed.append(scores[-1] == 0 or not case.valid)
    return {"mdice": float(np.mean(scores)), "miou": float(np.mean(ious)), "fail": float(np.mean(failed))}


def surfaces(cases: Sequence[Row]) -> dict[str, float]:
    """HD95 and NSD in millimetres, from the distances between all pairs of surface voxels."""
    distances, shares = [], []
    for case in cases:
        if case.spacing is None:
            continue
        keep = np.ones_like(case.true) if case.ignored is None else ~case.ignored
        both = [keep & (np.zeros_like(keep) if mask is None else mask) for mask in (case.predicted, case.true)]
        rims = [
            np.argwhere(mask & ~np.asarray(ndimage.binary_erosion(mask), dtype=bool)) * case.spacing for mask in both
        ]
        if not all(map(len, rims)):
            shares.append(float(not any(map(len, rims))))
            distances += [] if any(map(len, rims)) else [0.0]
            continue
        apart = np.linalg.norm(rims[0][:, None] - rims[1][None], axis=-1)
        ways = apart.min(axis=1), apart.min(axis=0)
        distances.append(max(np.percentile(way, 95) for way in ways))
        shares.append(sum((way <= 2.0 + 1e-9).sum() for way in ways) / sum(map(len, ways)))
    found = {"hd95_mm": float(np.mean(distances))} if distances else {}
    return found | ({"nsd": float(np.mean(shares))} if shares else {})


def segrl(cases: Sequence[Row]) -> dict[str, float]:
    ious, dices, failed, hits, right, kept = [], [], [], [], [], []
    inter = union = 0
    for case in cases:
        keep = np.ones_like(case.true) if case.ignored is None else ~case.ignored
        true = case.true[keep][None]
        predicted = np.zeros_like(true) if case.predicted is None else case.predicted[keep][None]
        if not true.size:  # every pixel is ignored
            true = predicted = np.zeros((1, 1), dtype=bool)
        ious.append(iou(predicted, true))
        dices.append(dice(predicted, true))
        failed.append(dices[-1] == 0 or not case.valid)
        inter += (predicted & true).sum()
        union += (predicted | true).sum()
        if true.any():
            hits.append(float(ious[-1]))
            kept.append(predicted.any())
        else:
            right.append(not predicted.any())
    found = {"giou": np.mean(ious), "ciou": inter / union, "mdice": np.mean(dices), "miou": np.mean(ious)}
    found |= {"fail": np.mean(failed)} | {f"p@{t}": np.mean(np.array(hits) > t) for t in (0.5, 0.7, 0.9)}
    found |= surfaces(cases)
    return found | {name: float(np.mean(rows)) for name, rows in (("n_acc", right), ("t_acc", kept)) if rows}


ORACLES: dict[str, Callable[[Sequence[Row]], dict[str, float]]] = {
    "lisa": lisa,
    "mmr": mmr,
    "rela": rela,
    "vision_reasoner": vision_reasoner,
    "vision_reasoner_nonobj": vision_reasoner_nonobj,
    "m3d": m3d,
    "unibiomed": unibiomed,
    "nnunet": nnunet,
    "core_seg": core_seg,
    "segrl": segrl,
}


VOLUMETRIC = ("m3d", "unibiomed", "nnunet", "segrl")  # the others state no rule for volumes


def allowed(cases: Sequence[Row], name: str) -> list[Row]:
    return [case for case in cases if not case.case.traits.intersection(CONVENTIONS[name].refuses)]


def test_every_convention_has_an_oracle_and_every_kind_occurs():
    assert ORACLES.keys() == CONVENTIONS.keys()
    cases = random_cases(2000, 0)
    assert {case.case.kind for case in cases} == set(KINDS)
    volumes = random_cases(2000, 0, (3, 4, 5))
    for name in VOLUMETRIC:
        assert len(allowed(volumes, name)) > 400
    for name in CONVENTIONS:
        assert len(allowed(cases, name)) > 400


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (6, 7)) for name in CONVENTIONS if name != "unibiomed"), *((name, (3, 5, 5)) for name in VOLUMETRIC)],
)
def test_a_convention_equals_its_oracle_on_ten_thousand_rows(name, shape):
    cases = allowed(random_cases(COUNT * 3, 1, shape), name)[:COUNT]
    assert len(cases) == COUNT
    if len(shape) == 3:  # distances in millimetres are of some only
        cases = [case._replace(spacing=(3.0, 0.5, 1.0)) if n % 50 == 0 else case for n, case in enumerate(cases)]
    for start in [0, *range(0, COUNT, COUNT // BATCHES)]:
        rows = cases if not start else cases[start : start + COUNT // BATCHES]
        if name == "unibiomed":  # one NaN makes a mean NaN: also rows without any
            assert math.isnan(score(name, rows)["hd95_voxels"])
            rows = [case for case in rows if not math.isnan(unibiomed([case])["hd95_voxels"])]
        found, expected = score(name, rows), ORACLES[name](rows)
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            assert found[what] == pytest.approx(float(value), abs=1e-9), (what, start)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_mean_of_a_convention_is_that_of_its_rows(name):
    cases = allowed(random_cases(500, 2), name)
    rows = [value for case in cases if (value := CONVENTIONS[name].row(case.case)) is not None]
    if name not in ("unibiomed", "nnunet"):  # which average over classes
        assert score(name, cases)[CONVENTIONS[name].mean] == pytest.approx(np.mean(rows), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("lisa", Row(np.eye(3, dtype=bool), name="a"), r"lisa states no rule for 1 of 2 rows \(no mask\), such as a"),
        ("lisa", Row(np.zeros((3, 3), dtype=bool), name="a"), r"no rule for 1 of 2 rows \(no mask\)"),
        ("m3d", Row(np.eye(3, dtype=bool)), r"\(no mask\), such as a row without a name"),
        ("core_seg", Row(np.zeros((3, 3), dtype=bool), np.zeros((3, 3), dtype=bool)), r"\(both empty\)"),
        *(
            (name, Row(np.ones((2, 3, 3), dtype=bool), np.ones((2, 3, 3), dtype=bool)), r"\(volumes\)")
            for name in CONVENTIONS
            if name not in VOLUMETRIC
        ),
        ("rela", Row(np.eye(3, dtype=bool), np.eye(3, dtype=bool), np.eye(3, dtype=bool)), r"\(ignored pixels\)"),
    ],
)
def test_rows_without_a_rule_are_refused(name, row, message):
    plain = Row(np.eye(3, dtype=bool), np.eye(3, dtype=bool))
    with pytest.raises(ConventionError, match=message):
        score(name, [plain, row])
    assert score(name, [plain])


def test_nothing_and_division_by_zero():
    nothing = Row(np.zeros((3, 3), dtype=bool), np.zeros((3, 3), dtype=bool))
    for name, message in (
        ("rela", "no pixel is true or predicted"),
        ("vision_reasoner", "every row is left out"),
    ):
        with pytest.raises(ConventionError, match=message):
            score(name, [nothing])
    with pytest.raises(ConventionError, match="no row has a mask"):
        score("mmr", [Row(np.eye(3, dtype=bool))])
    alarm = Row(np.zeros((3, 3), dtype=bool), np.eye(3, dtype=bool))
    with pytest.raises(ConventionError, match="no row has a target"):
        score("rela", [alarm])
    for convention in CONVENTIONS.values():
        with pytest.raises(ConventionError, match="at least one row"):
            convention([])


def mmr_answers(answers: Sequence[tuple[list[np.ndarray], list[np.ndarray]]]) -> dict[str, float]:
    """MMR's `validate`, train_ds.py lines 548 to 602: lists of true masks with lists of masks that were given."""
    inter, union, total, count = 0.0, 0.0, 0.0, 0
    for masks_list, output_list in answers:
        if len(output_list) == 0:
            continue
        acc_iou = 0.0
        for mask_i, output_i in zip(masks_list, output_list):  # noqa: B905  as there
            i, u = float((mask_i & output_i).sum()), float((mask_i | output_i).sum())
            inter, union = inter + i, union + u
            acc_iou += i / (u + 1e-5) + (u == 0)
        total += acc_iou / len(masks_list) * len(masks_list)
        count += len(masks_list)
    return {"giou": total / (count + 1e-5), "ciou": inter / (union + 1e-10)}


def test_several_masks_of_an_answer_are_scored_as_mmr_does():
    """10,000 masks in answers with one to four, of which some have fewer than they should, or none."""
    rows, rng = random_cases(COUNT, 7), np.random.default_rng(7)
    answers, records, start = [], [], 0
    while start < COUNT:
        part = rows[start : start + int(rng.integers(1, 5))]
        given = int(rng.integers(0, len(part) + 1))
        found = [row.true if row.predicted is None else row.predicted for row in part[:given]]
        answers.append(([row.true for row in part], found))
        for index, row in enumerate(part):
            record = {"name": f"{start}#{index}", "query": "Which?", "target_mask": mask_to_rle(row.true)}
            records.append({**record, "predicted_mask": mask_to_rle(found[index]) if index < given else None})
        start += len(part)
    order = rng.permutation(COUNT)
    scores = CONVENTIONS["mmr"](cases_of([records[n] for n in order]))
    expected = mmr_answers(answers)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-9)
    apart = CONVENTIONS["mmr"](cases_of([{**record, "name": f"row {n}"} for n, record in enumerate(records)]))
    assert apart["giou"] > scores["giou"] + 0.01  # a missing mask beside others is no skipped answer


def test_every_source_names_its_lines():
    """File and lines of a public evaluator; CORE-Seg has no public code, segrl's own functions are named."""
    for name, convention in CONVENTIONS.items():
        if name in ("core_seg", "segrl"):
            continue
        assert re.search(r"\.py\b", convention.source), name
        for rule, text in convention.rules.items():
            stated = not text.startswith(("no rule", "part of the target, as in"))
            assert not stated or re.search(r"\(.*\d.*\)", text) or rule == VOLUMES, (name, rule)


def test_masks_that_are_none():
    for wrong in (np.zeros((3, 3)), np.zeros((3, 4), dtype=bool), [[True]]):
        with pytest.raises(DataError, match="row 3: predicted mask is"):
            Case.of(np.eye(3, dtype=bool), wrong, name="row 3")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="record 0: holds no masks"):
        cases_of([{"dice": 1.0}])


def test_a_difference_is_divided_among_the_rows_that_cause_it():
    for seed, (first, second) in enumerate(
        (("segrl", "vision_reasoner"), ("mmr", "segrl"), ("rela", "vision_reasoner"))
    ):
        cases = allowed(allowed(random_cases(400, seed), first), second)
        parts = explain_difference([row.case for row in cases], first, second)
        means = []
        for name in (first, second):
            rows = [value for case in cases if (value := CONVENTIONS[name].row(case.case)) is not None]
            means.append(sum(rows) / len(rows))
        assert sum(parts.values()) == pytest.approx(means[1] - means[0], abs=1e-12)
        assert any(abs(part) > 1e-3 for part in parts.values())
    assert explain_difference([row.case for row in cases], "segrl", "segrl") == dict.fromkeys(parts, 0.0)
    with pytest.raises(ConventionError, match="rela averages giou, core_seg mdice"):
        explain_difference([row.case for row in cases], "rela", "core_seg")


def test_side_by_side():
    cases = random_cases(300, 5)
    found = compare_conventions([row.case for row in cases])
    assert json.loads(json.dumps(found)) == found
    assert sum(found["kinds"].values()) == 300
    assert found["conventions"]["lisa"]["scores"] is None
    assert "lisa states no rule for" in found["conventions"]["lisa"]["reason"]
    page = conventions_page(found)
    table = page.splitlines()[2:]
    assert table[0] == f"| | {' | '.join(CONVENTIONS)} |"
    assert table[2].startswith("| gIoU | - | ")
    for convention in CONVENTIONS.values():
        assert convention.source in page
    with pytest.raises(UnknownNameError, match="convention 'lissa'"):
        compare_conventions([row.case for row in cases], ["lissa"])


def test_differences_on_the_page():
    """Of two means: the table says the same as the two scores above it."""
    square, nothing = np.ones((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    cases = [Case.of(nothing, nothing), Case.of(nothing, square), Case.of(square, square), Case.of(square, None)]
    found = compare_conventions(cases, ["vision_reasoner", "mmr", "segrl", "core_seg"])
    scores: Any = {name: (one["scores"] or {}).get("giou") for name, one in found["conventions"].items()}
    pairs = [(one["of"], one["from"]) for one in found["differences"]]
    assert pairs == [("vision_reasoner", "segrl"), ("mmr", "segrl")]
    for one in found["differences"]:
        assert sum(one["points"].values()) == pytest.approx(scores[one["of"]] - scores[one["from"]], abs=1e-5)
        assert one["averaging"] == pytest.approx(0, abs=1e-5)
    page = conventions_page(found)
    assert "| vision_reasoner - segrl, gIoU | -16.67 | -25.00 | +0.00 | +0.00 | +8.33 | +0.00 |" in page
    classes = [Case.of(square, square, group="a"), *(Case.of(square, nothing, group="b") for _ in range(3))]
    (one,) = compare_conventions(classes, ["core_seg", "unibiomed"])["differences"]
    assert (one["of"], one["averaging"]) == ("unibiomed", pytest.approx(0.25))  # of two classes, not of four rows
    assert "## Differences" not in conventions_page(compare_conventions(cases, ["segrl", "core_seg"]))


def test_eval_in_all_conventions(tmp_path, capsys):
    rows = make_synthetic(4, size=48)
    data = write_folder(rows, tmp_path / "data", split="test")
    (tmp_path / "theirs").mkdir()
    masks = []
    for n, (row, source) in enumerate(zip(map(dict, rows), sorted((data / "masks").iterdir()), strict=True)):
        mask = np.asarray(row["mask"]) > 0
        mask = np.roll(mask, 3 * n, axis=1) if n < 3 else np.zeros_like(mask)
        masks.append(mask)
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "theirs" / source.name)
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(data)]
    assert main([*argv, "--conventions", "rela", "segrl", "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "| | rela | segrl |" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["conventions"]
    truth = [np.asarray(row["mask"]) > 0 for row in map(dict, rows)]
    expected = segrl([Row(true, mask) for true, mask in zip(truth, masks, strict=True)])
    assert found["conventions"]["segrl"]["scores"]["giou"] == pytest.approx(expected["giou"])
    assert (tmp_path / "out" / "conventions.md").read_text().startswith("# 4 rows in 2 conventions")
    assert main([*argv, "--conventions", "lissa", "--output_dir", str(tmp_path / "x")]) == 2
    assert "convention 'lissa'; did you mean 'lisa'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_stored_records_are_scored_again(tmp_path, capsys):
    """Without data and without a model, to the same numbers as when the answers were evaluated."""
    rows = make_synthetic(3, size=48)
    data = write_folder(rows, tmp_path / "data", split="test")
    for row, source in zip(map(dict, rows), sorted((data / "masks").iterdir()), strict=True):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        mask = np.roll(np.asarray(row["mask"]) > 0, 3, axis=1)
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "theirs" / source.name)
    argv = ["eval", "--predictions", str(tmp_path / "theirs"), "--data", str(data)]
    assert main([*argv, "--conventions", "all"]) == 0
    first = json.loads((tmp_path / "theirs_evaluation" / "results.json").read_text())["conventions"]
    stored = tmp_path / "theirs_evaluation" / "predictions.json"
    argv = ["eval", "--predictions", str(stored)]
    assert main(argv) == 0
    again = tmp_path / "theirs_evaluation" / "predictions_evaluation"
    assert json.loads((again / "results.json").read_text())["conventions"] == first
    assert (again / "conventions.md").read_text() in capsys.readouterr().out
    assert main([*argv, "--benchmark", "reasonseg", "--output_dir", str(tmp_path / "b")]) == 0
    found = json.loads((tmp_path / "b" / "results.json").read_text())["conventions"]["conventions"]
    assert found == {name: first["conventions"][name] for name in ("lisa", "vision_reasoner")}
    for more, message in (
        ([], "is not empty"),
        (["--split", "val"], "--split: predictions.json holds the answers"),
        (["--data", str(data)], "--data: predictions.json holds the answers and the true masks"),
        (["--benchmark", "reason_seg"], "benchmark 'reason_seg'; did you mean 'reasonseg'"),
    ):
        capsys.readouterr()
        assert main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", "--predictions", str(tmp_path / "theirs")]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["eval", "--predictions", str(tmp_path / "no.json")]) == 2
    assert "no.json: no such file" in capsys.readouterr().err
    records = json.loads(stored.read_text())
    for changed, message in (
        ([{**records[0], "target_mask": None}], "holds no masks"),
        (
            [{**records[0], "predicted_mask": {"size": [2, 2], "counts": [4]}}],
            "predicted mask is bool (2, 2), ",
        ),
        ([records[0], {**records[0], "predicted_mask": None}], "several records with different masks answer"),
        ([{**records[0], "spacing_mm": "wide"}], "spacing_mm of "),
    ):
        stored.write_text(json.dumps(changed))
        assert main([*argv, "--output_dir", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert f"{stored}: " in error
        assert message in error
    stored.write_text("{}")
    assert main([*argv, "--output_dir", str(tmp_path / "c")]) == 2
    assert "expected a list of records" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_records_keep_the_masks_exactly():
    rng = np.random.default_rng(0)
    for _ in range(200):
        true, predicted = rng.random((9, 11)) < rng.random(), rng.random((9, 11)) < rng.random()
        record = {"target_mask": mask_to_rle(true), "predicted_mask": mask_to_rle(predicted), "status": "no_answer"}
        (case,) = cases_of([json.loads(json.dumps(record))])
        found = case.masks()
        assert np.array_equal(found[0], true)
        assert found[1] is not None
        assert np.array_equal(found[1], predicted)
        assert not case.valid


def test_scores_that_are_not_numbers_are_null(tmp_path):
    square = np.zeros((3, 6, 6), dtype=bool)
    square[1, 2:4, 2:4] = True
    found = compare_conventions([Case.of(square, square)], ["unibiomed"])
    assert found["conventions"]["unibiomed"]["scores"]["hd95_voxels"] is None
    assert "| hd95_voxels | NaN |" in conventions_page(found)
    write_results(tmp_path / "results.json", found)
