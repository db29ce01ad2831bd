"""`segrl predict`: a trained run asked about images or volumes; masks, overlays and one JSON line each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segrl.cli.output import BAD, OK, add_command, positive, share

__all__ = ["add_predict_command"]

RECORDS = "predictions.jsonl"
_READ = {"images": 64, "volumes": 4}  # inputs in memory at once
_EXAMPLES = """examples:
  segrl predict runs/core_seg lesion.png "Where is the cyst?" -o out
  segrl predict runs/core_seg scans/ "more/**/*.dcm" "Where is the nodule?" -o out --samples 8 --abstain_below 0.6
  segrl predict runs/medvol ct.nii.gz dicom_folder/ "the tumour in the liver" -o out --modality CT
  segrl predict owner/name image.png "Where is the cyst?" -o out --coco out/coco.json
"""


def add_predict_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl predict` to the areas of the command."""
    text = "ask a trained run about images or volumes; masks, overlays and one JSON line each"
    command = add_command(
        *(areas, "predict", text, *parents),
        usage='segrl predict RUN INPUT [INPUT ...] "QUESTION" [options]',
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="RUN", help="a run's output_dir or checkpoint, or owner/name on the hub")
    command.add_argument("words", nargs="+", metavar="INPUT ... QUESTION", help="images (PNG, JPEG, TIFF, DICOM), or "
                         "volumes (NIfTI, .npy, DICOM series), as the run's task is; folders and patterns in quotes; "
                         "last the question, in quotes")  # fmt: skip
    command.add_argument("-o", "--output_dir", type=Path, default=Path("predictions"), metavar="FOLDER",
                         help="where to write (default: predictions)")  # fmt: skip
    command.add_argument("--no_overwrite", action="store_true",
                         help="leave out inputs that have an answer in the folder already")  # fmt: skip
    command.add_argument("--batch_size", type=positive, metavar="N", help="inputs answered together (default: what "
                         "fits into memory, at most 16 images or 4 volumes)")  # fmt: skip
    command.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    command.add_argument("--segmenter", metavar="PATH", help="what turns written boxes into masks (default: the run's)")
    command.add_argument("--max_new_tokens", type=positive, metavar="N", help="longest answer (default: the run's)")
    sure = command.add_argument_group("confidence")
    sure.add_argument("--samples", type=positive, default=1, metavar="N", help="answers drawn from one prefill and "
                      "combined (default: 1, greedy)")  # fmt: skip
    sure.add_argument("--temperature", type=float, metavar="T", help="of the samples (default: 1)")
    sure.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    sure.add_argument("--abstain_below", type=share, metavar="X", help="write no mask where the confidence is below X")
    scan = command.add_argument_group("grey values")
    scan.add_argument("--modality", default="", metavar="NAME", help="such as CT, for scans that do not say it")
    scan.add_argument("--intensity", default="", metavar="SCALING", help="of images with more than 8 bits, and of "
                      'volumes in place of that of training, such as "window:-160:240"')  # fmt: skip
    scan.add_argument("--spacing_mm", default="", metavar="LIST", help='of volumes whose file does not say it, as '
                      '"[5.0, 0.7, 0.7]": z, y, x')  # fmt: skip
    out = command.add_argument_group("more output")
    out.add_argument("--no_overlay", action="store_true", help="draw no overlays")
    out.add_argument("--coco", type=Path, metavar="FILE", help="images: also write all masks as COCO annotations")
    out.add_argument("--dicom_seg", action="store_true", help="also write masks of DICOM inputs as DICOM-SEG")
    out.add_argument("--json", action="store_true", help="print the JSON lines")
    command.set_defaults(run=_predict)


@dataclass(frozen=True)
class _Job:
    """One input and the start of the names of its files."""

    path: Path
    stem: str


def _predict(arguments: argparse.Namespace) -> int:
    from segrl.data.input_files import find_inputs
    from segrl.inference import load
    from segrl.inference.base import find_run
    from segrl.reports.terminal import say

    inputs, question = _words(arguments.words)
    folder = find_run(arguments.model)
    task = _task(arguments.model, folder)
    paths, others = find_inputs(inputs, task)
    if others:
        say(f"{others} files that are no {task} are left out", stderr=True)
    kept = _kept(arguments.output_dir / RECORDS) if arguments.no_overwrite else {}
    jobs = _jobs(paths, kept)
    _check(arguments, jobs, task)
    waiting = [job for job in jobs if str(job.path) not in kept]
    if len(waiting) < len(jobs):
        known = len(jobs) - len(waiting)
        say(f"{known} of {len(jobs)} inputs have an answer in {arguments.output_dir} and are left out", stderr=True)
    if not waiting:
        return OK
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the loaded weights
    more = {name: value for name in ("device", "segmenter") if (value := getattr(arguments, name)) is not None}
    return _answer(load(folder, **more), waiting, question, task, arguments, list(kept.values()))


def _words(words: Sequence[str]) -> tuple[list[str], str]:
    """Return the inputs and the question, which is the last word."""
    from segrl.errors import SegRLError

    *inputs, question = words
    form = 'expected segrl predict RUN INPUT ... "QUESTION"'
    if not inputs:
        what = "the question, in quotes, is" if Path(question).exists() else "an input is"
        raise SegRLError(f"{question!r}: {form}; {what} missing")
    if Path(question).exists():
        raise SegRLError(f"{question!r} is a file, and the last word is the question; {form}")
    if not question.strip():
        raise SegRLError(f"the question is empty; {form}")
    return inputs, question


def _task(name: str, folder: Path) -> str:
    from segrl.errors import CheckpointError
    from segrl.predictions.prompt_settings import SETTINGS_FILE, load_prompt_settings

    settings = load_prompt_settings(folder)
    if settings is None:
        raise CheckpointError(f"{name!r}: no {SETTINGS_FILE}; expected the output directory of a run")
    return settings.task


def _jobs(paths: Iterable[Path], kept: Mapping[str, str]) -> list[_Job]:
    """Give each input a name that no other has, whatever their folders and endings, and no answer that is kept."""
    from segrl.inference.result import result_stem

    taken = _stems(kept.values())
    jobs = []
    for path in paths:
        plain = stem = result_stem(str(path.absolute()))
        number = 1
        while stem.casefold() in taken:
            stem, number = f"{plain}_{number}", number + 1
        taken.add(stem.casefold())
        jobs.append(_Job(path, stem))
    return jobs


def _check(arguments: argparse.Namespace, jobs: Sequence[_Job], task: str) -> None:
    """Refuse, before the model is loaded, what cannot be written, and what would replace an input."""
    from segrl.data.dicom.segmentation import highdicom_modules
    from segrl.data.dicom.series import holds_dicom
    from segrl.errors import SegRLError

    folder = arguments.output_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise SegRLError(f"--output_dir {folder}: {there.name} is a file; pass a folder")
    if arguments.temperature is not None and arguments.samples == 1:
        raise SegRLError("--temperature is for --samples of 2 or more; a single answer is greedy")
    if arguments.abstain_below is not None and task == "volumes" and arguments.samples == 1:
        raise SegRLError("--abstain_below: one answer about a volume has no confidence; pass --samples of 2 or more")
    if arguments.coco is not None and task == "volumes":
        raise SegRLError("--coco is for images; masks of volumes are NIfTI")
    if arguments.coco is not None and arguments.no_overwrite:
        raise SegRLError("--coco with --no_overwrite would hold the new answers only; leave one of the two out")
    if arguments.coco is not None and not arguments.coco.absolute().parent.is_dir() and folder != arguments.coco.parent:
        raise SegRLError(f"--coco {arguments.coco}: there is no folder {arguments.coco.parent}; create it first")
    if arguments.spacing_mm and task == "images":
        raise SegRLError("--spacing_mm is for volumes; leave it out")
    if arguments.dicom_seg:
        highdicom_modules()
        other = next((job.path for job in jobs if not holds_dicom(job.path)), None)
        if other is not None:
            raise SegRLError(f"--dicom_seg: {other} is no DICOM, to which a DICOM-SEG could refer; leave the flag out")
    written = [folder / RECORDS, *([] if arguments.coco is None else [arguments.coco])]
    written += [folder / f"{job.stem}{end}" for job in jobs for end in _ENDS]
    sources = {job.path.resolve() for job in jobs}
    for path in written:
        if path.resolve() in sources:
            raise SegRLError(f"{path} is an input and would be replaced; pass another --output_dir")


_ENDS = ("_mask.png", "_mask.nii.gz", "_mask.dcm", "_overlay.png")


def _stems(lines: Iterable[str]) -> set[str]:
    """Return the starts of the names of files that records name, for comparison."""
    files = (Path(file).name for line in lines for kind in _FILES if (file := json.loads(line).get(kind)))
    return {file[: -len(end)].casefold() for file in files for end in _ENDS if file.endswith(end)}


_FILES = ("mask", "overlay", "dicom_seg")


def _kept(path: Path) -> dict[str, str]:
    """Return the lines of inputs that have an answer in a file of records.

    Those that failed are asked again, and so is one whose line has no end: the process was killed while it wrote.
    """
    from segrl.errors import SegRLError

    if not path.is_file():
        return {}
    found = {}
    *ended, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(ended, start=1):
        try:
            record = json.loads(line)
            if "error" not in record:
                found[str(record["input"])] = line.decode()
        except (ValueError, KeyError, TypeError) as error:
            raise SegRLError(f"{path}: line {number} is no record of an answer; move the file away") from error
    return found


def _answer(
    segmenter: Any,
    jobs: Sequence[_Job],
    question: str,
    task: str,
    arguments: argparse.Namespace,
    kept: Sequence[str],
) -> int:
    """Read, ask and write part by part; the file of records is whole after every part."""
    from rich.progress import Progress

    from segrl.data.formats.coco_writing import CocoWriter
    from segrl.errors import DataError
    from segrl.files.whole import remove_unfinished, write_whole
    from segrl.reports.terminal import console, say

    folder, coco, failed = arguments.output_dir, CocoWriter(), 0
    settings = _settings(arguments)
    records = folder / RECORDS
    bar = Progress(console=console(stderr=True), disable=len(jobs) == 1, transient=True)
    with bar:
        shown = bar.add_task("predict", total=len(jobs))
        for first in range(0, len(jobs), _READ[task]):
            part = jobs[first : first + _READ[task]]
            read: list[tuple[_Job, Any]] = []
            lines: list[dict[str, Any]] = []
            for job in part:
                try:
                    read.append((job, _read(segmenter, job.path, task, arguments)))
                except DataError as error:
                    if len(jobs) == 1:
                        raise
                    failed += 1
                    lines.append({"input": str(job.path), "query": question, "error": str(error)})
                    say(f"segrl: error: {error}", stderr=True)
            results = segmenter.predict([value for _, value in read], question, **settings)
            if not first:
                folder.mkdir(parents=True, exist_ok=True)
                remove_unfinished(folder)
            for (job, _), result in zip(read, results, strict=True):
                lines.append(_written(result, job, folder, arguments))
                if arguments.coco is not None:
                    _add(coco, result, job, question)
            texts = [json.dumps(line, allow_nan=False, ensure_ascii=False) for line in lines]
            if first:
                with records.open("a", encoding="utf-8") as file:
                    file.writelines(f"{text}\n" for text in texts)
            else:  # at once, or a killed process would lose the answers of earlier ones
                write_whole(records, "".join(f"{text}\n" for text in (*kept, *texts)))
            for line in lines:
                _show(line, arguments, alone=len(jobs) == 1)
            bar.update(shown, advance=len(part))
    if arguments.coco is not None:
        coco.write(arguments.coco)
    if not arguments.json:
        say(f"Written to {folder}: {RECORDS}" + (f"; {failed} of {len(jobs)} inputs failed" if failed else ""))
    return BAD if failed else OK


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `predict`."""
    settings: dict[str, Any] = {"samples": arguments.samples, "abstain_below": arguments.abstain_below}
    settings |= {"batch_size": arguments.batch_size, "probabilities": True}
    if arguments.samples > 1:
        settings["seed"] = arguments.seed
        if arguments.temperature is not None:
            settings["temperature"] = arguments.temperature
    if arguments.max_new_tokens is not None:
        settings["max_new_tokens"] = arguments.max_new_tokens
    return settings


def _read(segmenter: Any, path: Path, task: str, arguments: argparse.Namespace) -> Any:
    """Return an input as `predict` takes it, read."""
    from segrl.data.images.files import load_image

    if task == "images":
        return load_image(path, modality=arguments.modality, intensity=arguments.intensity)
    return segmenter.read_case(
        path, modality=arguments.modality, intensity=arguments.intensity, spacing_mm=arguments.spacing_mm
    )


def _written(result: Any, job: _Job, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the files of a result and return its record."""
    files = result.save(folder, job.stem, record=False, overlay=not arguments.no_overlay)
    if arguments.dicom_seg and "mask" in files:
        files["dicom_seg"] = folder / f"{job.stem}_mask.dcm"
        result.save_dicom_seg(files["dicom_seg"])
    record = {"input": str(job.path), **result.to_dict(mask=False)}
    del record["name"]  # the same
    return {**record, **{kind: str(files[kind]) if kind in files else None for kind in _kinds(arguments)}}


def _kinds(arguments: argparse.Namespace) -> list[str]:
    overlay = [] if arguments.no_overlay else ["overlay"]
    return ["mask", *overlay, *(["dicom_seg"] if arguments.dicom_seg else [])]


def _add(coco: Any, result: Any, job: _Job, question: str) -> None:
    score = None if result.confidence is None else result.confidence.value
    mask = None if result.abstained else result.mask
    coco.add(str(job.path), result.source.size, mask, category=question, score=score)


def _show(record: dict[str, Any], arguments: argparse.Namespace, *, alone: bool) -> None:
    """Print one record: as JSON, in full where it is the only one, else on one line."""
    from segrl.reports.terminal import excerpt, printable, say

    if arguments.json:
        say(json.dumps(record, allow_nan=False))
    elif alone:
        for name in _SHOWN:
            if name in record:
                meaning = f"   ({_MEANINGS[name]})" if name in _MEANINGS else ""
                say(f"{name:12} {printable(_plain(record[name]))}{meaning}")
    elif "error" not in record:
        sure = record["confidence"] or {}
        found = "-" if sure.get("value") is None else f"{sure['value']:.2f}"
        end = " abstained" if record["abstained"] else ""
        say(f"{excerpt(record['input'], 60):60} {record['status']:12} confidence {found}{end}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):  # the confidence
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items() if number is not None)
    return str(value)


_SHOWN = (
    *("input", "query", "status", "reasoning", "answer", "boxes", "slice", "shown_slice", "file_slice", "file_axis"),
    *("z_mm", "intensity", "confidence", "abstained", "foreground", "mask", "overlay", "dicom_seg"),
)
_MEANINGS = {
    "slice": "index in the volume as segrl reads it, from the lowest slice, counted from 0",
    "shown_slice": "number in the answer, among the slices that were shown, counted from 1",
    "file_slice": "index in the file, counted from 0",
    "file_axis": "axis of the file that this index counts along, from 0",
    "z_mm": "height of the slice in the file's world, millimetres; None if the file does not say it",
    "foreground": "pixels or voxels of the mask",
}
