"""Results of a run: scores, pictures, a table. One class a task, which `results_for` picks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from segrl.evaluation.conventions.cases import cases_of
from segrl.evaluation.images import evaluate, whole_image
from segrl.evaluation.stored_masks import StoredMasks, evaluate_masks
from segrl.evaluation.volumes import VOLUME_GROUPINGS, evaluate_volumes, summarise_volumes
from segrl.geometry.run_lengths import rle_counts
from segrl.inference.base import SegmenterBase
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.volumes import VolumeSegmenter
from segrl.metrics.calibration import calibration
from segrl.metrics.summary import SUMMARY_METRICS, paired_difference, summarise
from segrl.predictions.prediction import invalid_text
from segrl.reports.cases import encode_case, write_cases
from segrl.reports.charts import calibration_chart
from segrl.reports.contact_sheets import contact_sheet
from segrl.reports.results_file import EVALUATION_TIME, versions, write_results
from segrl.reports.table import IMAGE_COLUMNS, VOLUME_COLUMNS, VOLUME_STAGES, results_table
from segrl.reports.terminal import say
from segrl.reports.volume_pictures import volume_picture
from segrl.rewards.factory import make_reward

__all__ = ["ImageResults", "VolumeResults", "results_for"]


SAMPLES = "samples"  # folder of the first images, as they were

_BOX_F1 = make_reward("box_f1")


def box_f1(prediction: Any, target: Any) -> float | None:
    """The reward of CORE-Seg's Eq. 8, as a metric."""
    return _BOX_F1.score(prediction, target)


def _summarise_images(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not all("box_f1" in record for record in records):  # of a baseline that names no box
        return summarise(records) | _without_target(records)
    metrics = {**SUMMARY_METRICS, "box_f1": "box_f1"}
    return summarise(records, metrics=metrics, optional=("box_f1",)) | _without_target(records)


def _summarise_volumes(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return summarise_volumes(records) | _without_target(records)


def _without_target(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """N-acc of rows that ask for something that is not there, and T-acc of the others; nothing without such rows."""
    kept = [record for record in records if "target_mask" in record]  # not known of answers scored without masks
    said_none: dict[bool, list[bool]] = {True: [], False: []}
    for record in kept:
        nothing_true, nothing_predicted = _empties(record)
        said_none[nothing_true].append(nothing_predicted)
    without, others = said_none[True], said_none[False]
    if not without:
        return {}
    t_acc = 1 - sum(others) / len(others) if others else None
    return {"no_target": {"n": len(without), "n_acc": sum(without) / len(without), "t_acc": t_acc}}


def _empties(record: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the true mask is empty, and the predicted one, without what is ignored."""
    if "ignored_mask" in record:
        (case,) = cases_of([record])
        return not case.overlap.true, not case.overlap.predicted
    return _empty(record["target_mask"]), _empty(record["predicted_mask"])


def _empty(mask: Mapping[str, Any] | None) -> bool:
    """Whether run lengths have no foreground; no mask has none."""
    return mask is None or not rle_counts(mask)[1::2].any()


class ImageResults:
    """Scores of images, and a contact sheet of the first answers.

    Args:
        folder: Where to write.
        pictures: Answers of which a picture is drawn; None for the default of the task.
        samples: Answers drawn for each row and combined; 1 is greedy. With several the summary has a "calibration" and
            `calibration.png` is drawn.
    """

    segmenter_class: ClassVar[type[SegmenterBase]] = ReasoningSegmenter
    evaluate: ClassVar[Callable[..., list[dict[str, Any]]]] = staticmethod(partial(evaluate, metrics=(box_f1,)))
    summarise: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(_summarise_images)
    table: ClassVar[Mapping[str, Any]] = {"columns": IMAGE_COLUMNS}
    pictures_name: ClassVar[str] = "predictions.png"
    pictures: int = 16
    compared: ClassVar[Sequence[str]] = ("dice", "box_f1")  # scores whose gain from stage 1 to stage 2 is reported

    def __init__(self, folder: Path, pictures: int | None = None, samples: int = 1) -> None:
        self.folder, self._shown = folder, []
        self._rows: Any = None  # of the data set, of which answers were seen
        self.samples = samples
        self.seconds: list[float] = []  # for one answer, of each model that was scored
        self.pictures = self.pictures if pictures is None else pictures

    def score(
        self, system: SegmenterBase | StoredMasks, rows: Any, batch_size: int, draw: bool, kept: Any = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return summary and records of a model, or of masks, on some rows.

        Args:
            system: The model, or the masks.
            rows: Of the data set.
            batch_size: Rows per generation.
            draw: Draw the first answers, too.
            kept: Of images, `segrl.data.images.kept.KeptPixels` of these rows; None reads their files.
        """
        asked: dict[str, Any] = {"batch_size": batch_size, "on_answer": self._see if draw else None}
        self._rows = rows if draw else self._rows
        if kept is not None:
            asked["kept"] = kept
        began = time.monotonic()
        if isinstance(system, StoredMasks):
            records = evaluate_masks(system, rows, **asked)
        else:
            several = {"samples": self.samples, "seed": 0} if self.samples > 1 else {}
            records = self.evaluate(system, rows, **asked, **several)
        if self._shown:
            scored = zip(self._shown, records, strict=False)
            contact_sheet([{**row, "dice": record["dice"]} for row, record in scored], self.folder / self.pictures_name)
        if self.pictures and self._rows is not None:
            write_cases(self.folder, self._case, records)
        summary = self.summarise(records)
        if not isinstance(system, StoredMasks):  # which have no text that could be invalid
            self.seconds.append((time.monotonic() - began) / max(1, len(records)))
            summary["statuses"] = dict(Counter(record["status"] for record in records))
            if self.samples > 1:
                summary["calibration"] = self._calibration(records)
        return summary, records

    def _calibration(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Calibration of the confidences against Dice; those that are not known count as 0."""
        sure = [record["confidence"]["value"] or 0.0 for record in records]
        found = calibration(sure, [record["dice"] for record in records])
        calibration_chart(found, self.folder / "calibration.png", score="Dice")
        return found

    def write(self, results: dict[str, Any], records: Mapping[str, list[dict[str, Any]]], last: str) -> None:
        """Write `results.json`, `predictions.json` and those of earlier stages and baselines, and print the table.

        Args:
            results: What was found, by stage.
            records: The answers of each stage and baseline.
            last: The stage whose answers are the run's.
        """
        for stage, answers in records.items():
            name = "predictions.json" if stage == last else f"predictions_{stage}.json"
            write_results(self.folder / name, answers)  # pyright: ignore[reportArgumentType]
        if self.seconds:  # in the order of evaluation; in a file of its own, since all else is the same each time
            write_results(self.folder / EVALUATION_TIME, {"seconds_per_answer": self.seconds})
        # last: it says that the run has ended (segrl.sweeps)
        write_results(self.folder / "results.json", {**results, "versions": versions()})
        for key, what in (
            ("gain", "stage 2 - stage 1"),
            ("gain_over_control", "stage 2 - stage 1 continued for the same time"),
            ("gain_over_baseline", f"{last} - baseline, dice"),
        ):
            for name, gain in results.get(key, {}).items():
                mean, low, high = (100 * value for value in gain)
                ends = f"95 % interval [{low:+.1f}, {high:+.1f}]" if low < high else "in every row, so no interval"
                say(f"{what}, {name}: {mean:+.1f} points, {ends}")
        for stage in ("stage1", "stage2", "control", "model"):
            if (none := results.get(stage, {}).get("no_target")) is not None:
                kept = "" if none["t_acc"] is None else f"; T-acc {100 * none['t_acc']:.1f} % of the others"
                say(f"{stage}: N-acc {100 * none['n_acc']:.1f} % of {none['n']} rows without a target{kept}")
            if "statuses" in results.get(stage, {}):
                say(f"{stage}: {invalid_text(results[stage]['statuses'])}")
            if "calibration" in results.get(stage, {}):
                say(f"{stage}: {_calibrated(results[stage]['calibration'])}")
        if "zero_spread" in results:
            say(f"stage 2: {results['zero_spread']:.1%} of the groups had no spread in reward")
        results_table(results, **self.table)
        say(f"Written to {self.folder}: results.json, predictions.json, {self.pictures_name}")

    def gain(self, after: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Return the mean difference of each score over the same rows, with its paired 95 % bootstrap interval."""
        return {name: _gain(after, before, name) for name in self.compared}

    def gain_by_group(self, after: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Return the mean difference of Dice, with its interval, over "all" rows and over those of each modality."""
        groups: dict[str, list[int]] = {}
        for number, record in enumerate(after):
            groups.setdefault(str(record.get("modality") or "unspecified"), []).append(number)
        found = {}
        for name in sorted(groups):
            new, old = ([records[number] for number in groups[name]] for records in (after, before))
            found[name] = _gain(new, old, "dice")
        return {"all": _gain(after, before, "dice")} | {name: gain for name, gain in found.items() if name != "all"}

    def _see(self, number: int, shown: Any, prediction: Any, target: Any) -> None:
        if number < self.pictures:
            self._draw(number, shown, prediction, target)

    def _case(self, number: int) -> bytes | None:
        """Read the image again: which few of all answers a report shows is known when all are scored."""
        return encode_case(whole_image(dict(self._rows[number])))

    def _draw(self, number: int, shown: Any, prediction: Any, target: Any) -> None:
        self._shown.append({"image": shown, "prediction": prediction, "target": target})
        path = self.folder / SAMPLES / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.convert("RGB").save(path)  # what sheets of several runs draw on


def _calibrated(found: Mapping[str, Any]) -> str:
    text = f"expected calibration error {found['ece']:.3f}, area under the risk-coverage curve {found['aurc']:.3f}"
    if found["certain_half_gain"] is None:
        return text
    mean, low, high = (100 * value for value in found["certain_half_gain"])
    return f"{text}; Dice of the more certain half above the rest: {mean:+.1f} points, 95 % [{low:+.1f}, {high:+.1f}]"


def _gain(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], score: str) -> list[float]:
    return paired_difference(*([float(record[score]) for record in records] for records in (after, before)))


class VolumeResults(ImageResults):
    """Scores of volumes, and a picture of each of the first answers."""

    segmenter_class = VolumeSegmenter
    evaluate = staticmethod(evaluate_volumes)
    summarise = staticmethod(_summarise_volumes)
    table: ClassVar[Mapping[str, Any]] = {
        "columns": VOLUME_COLUMNS,
        "stages": VOLUME_STAGES,
        "groupings": VOLUME_GROUPINGS,
    }
    pictures_name = "pictures/"
    pictures = 8
    compared = ("dice", "slice_visibility", "slice_boxes")

    def __init__(self, folder: Path, pictures: int | None = None, samples: int = 1) -> None:
        super().__init__(folder, pictures, samples)
        self._cases: dict[int, bytes] = {}  # a few kB each; a scan is not read again for one slice

    def _see(self, number: int, shown: Any, prediction: Any, target: Any) -> None:
        if self.pictures:
            self._cases[number] = encode_case(shown, target.mask)
        super()._see(number, shown, prediction, target)

    def _case(self, number: int) -> bytes | None:
        return self._cases.get(number)

    def _draw(self, number: int, shown: Any, prediction: Any, target: Any) -> None:
        path = self.folder / "pictures" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {"spacing_mm": target.spacing_mm, "edges": shown.scan.edges, "intensity": shown.intensity}
        scan = target.name or Path(shown.scan.name).name
        volume_picture(shown.grey, prediction, target, path, **known, query=target.query, name=scan)


def results_for(task: str) -> type[ImageResults]:
    """Return the class that reports about a task, "images" or "volumes".

    Example:
        >>> results_for("volumes").pictures_name
        'pictures/'
    """
    return {kind.segmenter_class.settings_class.task: kind for kind in (ImageResults, VolumeResults)}[task]
