"""`segrl eval`: any run, or the stored masks of any system, on any data."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, add_command, count, positive, share

__all__ = ["add_eval_command"]


def add_eval_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl eval` to the areas of the command."""
    text = "evaluate a run, or the masks that another system wrote, on a data set of images or volumes"
    command = add_command(areas, "eval", text, *parents)
    system = command.add_mutually_exclusive_group(required=True)
    system.add_argument("--model", metavar="RUN", help="a run's output_dir or checkpoint, or owner/name on the hub; "
                        "or a chat model that was not trained by segrl, with --segmenter")  # fmt: skip
    system.add_argument("--predictions", type=Path, metavar="PATH", help="folder with one mask file a row, named as "
                        "the row is; COCO's results, with --annotations; or predictions.json of a run")  # fmt: skip
    command.add_argument("--data", metavar="PATH", help="folder with manifest.csv, DatasetDict saved to "
                         "disk, or hub data set owner/name")  # fmt: skip
    command.add_argument("--benchmark", metavar="NAME", help="one of `segrl data list`: --data may be its download, "
                         "and the masks are scored in the conventions of its papers")  # fmt: skip
    command.add_argument("--split", metavar="NAME", help="default: test")
    command.add_argument("--volumes", action="store_true", help="with --predictions: the data holds volumes; a "
                         "folder says so itself")  # fmt: skip
    command.add_argument("--annotations", type=Path, metavar="FILE", help="with --predictions of COCO's results, or "
                         "with --coco: JSON with the images and categories that the ids stand for")  # fmt: skip
    command.add_argument("--min_score", type=share, metavar="X", help="of such results, drop those with a lower score "
                         "(default: 0.5)")  # fmt: skip
    command.add_argument("--missing_empty", action="store_true", help="with --predictions: no file means an empty mask")
    command.add_argument("--limit", type=positive, metavar="N", help="read and evaluate only the first rows")
    command.add_argument(
        "--batch_size", type=positive, metavar="N", help="rows per generation (default: 16, volumes 4)"
    )
    command.add_argument("--samples", type=positive, default=1, metavar="N", help="answers drawn for each row and "
                         "combined, and calibration.png: what their confidence is worth (default: 1)")  # fmt: skip
    command.add_argument("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    command.add_argument("--segmenter", metavar="PATH", help="what turns written boxes into masks: SAM 2 weights, a "
                         "folder of a run, or NAME:SOURCE such as sam:facebook/sam-vit-base")  # fmt: skip
    command.add_argument(
        "--frame_kind",
        choices=("original_px", "resized_px", "relative_1000"),
        help="frame of the boxes of a chat model that was not trained by segrl (default: that of its family)",
    )
    command.add_argument("--allow_outside", action="store_true", help="let manifest.csv name files outside its folder")
    command.add_argument("--allow_empty", action="store_true", help="volumes: rows may ask for what is not there")
    command.add_argument("--output_dir", type=Path, metavar="FOLDER", help="where to write; default: evaluation in the "
                         "folder of the run, or FOLDER_evaluation beside the masks")  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="replace the results in output_dir")
    command.add_argument("--conventions", nargs="+", metavar="NAME", help="also score the masks as published "
                         "evaluators do, such as lisa rela; all: every one, side by side, with sources")  # fmt: skip
    command.add_argument("--coco", type=Path, metavar="FILE", help="images: also write the masks as COCO's results; "
                         "without --annotations their ids are in FILE_annotations.json")  # fmt: skip
    command.add_argument("--pictures", type=count, metavar="N", help="answers drawn (default: 16 images, 8 volumes)")
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from segrl.errors import SegRLError

    stored = arguments.predictions
    if arguments.samples > 1 and stored is not None:
        raise SegRLError("--samples is for --model; drop it")
    if stored is not None and stored.suffix == ".json" and not stored.is_dir():
        if not stored.is_file():
            raise SegRLError(f"--predictions {stored}: no such file")
        if not _holds_detections(stored):
            return _score_again(arguments)
        if arguments.annotations is None:
            raise SegRLError(
                f"--predictions {stored}: holds COCO's results; pass --annotations with the JSON of their ids"
            )
        if arguments.missing_empty:
            raise SegRLError("--missing_empty is for folders, a row without a detection has an empty mask; drop it")
    else:
        for flag, other in (("annotations", arguments.coco), ("min_score", None)):
            if getattr(arguments, flag) is not None and other is None:
                raise SegRLError(f"--{flag} is for --predictions of COCO's results; drop it")
    if arguments.data is None:
        raise SegRLError("--data is missing: what is the system evaluated on?")
    if arguments.benchmark is None:
        return _evaluate_on(arguments.data, arguments)
    from segrl.data.benchmarks import BENCHMARKS, benchmark_folder

    with benchmark_folder(arguments.benchmark, arguments.data, arguments.split or "test") as folder:
        arguments.conventions = arguments.conventions or list(BENCHMARKS[arguments.benchmark].conventions)
        return _evaluate_on(folder, arguments)


def _coco_results(arguments: argparse.Namespace, names: Any, lesions: Any) -> Any:
    """Return the writer of --coco, checked as far as it can be before any answer; None without the flag."""
    from segrl.errors import SegRLError
    from segrl.evaluation import CocoResults

    if arguments.coco is None:
        return None
    if not arguments.coco.absolute().parent.is_dir():
        raise SegRLError(f"--coco {arguments.coco}: there is no folder {arguments.coco.parent}; create it first")
    if arguments.coco.exists() and not arguments.overwrite:
        raise SegRLError(f"--coco {arguments.coco}: exists; pass --overwrite, or another name")
    return CocoResults(list(names), list(lesions), arguments.annotations)


def _holds_detections(path: Path) -> bool:
    from segrl.evaluation.coco_results import is_coco_results

    return is_coco_results(path)


def _score_again(arguments: argparse.Namespace) -> int:
    """Of records only the conventions are left to find: they hold both masks and every score of segrl's own."""
    from segrl.data.benchmarks import BENCHMARKS
    from segrl.errors import DataError, SegRLError, unknown_name
    from segrl.evaluation import read_records
    from segrl.evaluation.conventions import cases_of, check_conventions, compare_conventions, conventions_page
    from segrl.reports.results_file import versions, write_results
    from segrl.reports.terminal import say
    from segrl.scripts.run_folder import check_output, claimed

    path = arguments.predictions.absolute()
    for flag in (
        "data",
        "split",
        "allow_outside",
        "allow_empty",
        "volumes",
        "min_score",
        "missing_empty",
        "batch_size",
        "device",
        "segmenter",
        "frame_kind",
        "pictures",
    ):
        if getattr(arguments, flag):
            raise SegRLError(f"--{flag}: {path.name} holds the answers and the true masks; drop the flag")
    if arguments.annotations is not None and arguments.coco is None:
        raise SegRLError(f"--annotations: {path.name} holds the answers and the true masks; drop the flag")
    if arguments.benchmark is not None and arguments.benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", arguments.benchmark, BENCHMARKS)
    of_papers = BENCHMARKS[arguments.benchmark].conventions if arguments.benchmark else ()
    names = check_conventions(arguments.conventions or of_papers or ["all"])
    output = arguments.output_dir or path.with_name(f"{path.stem}_evaluation")
    check_output(output, overwrite=arguments.overwrite, inputs={"predictions": path})
    try:
        records = read_records(path)[: arguments.limit]
        cases = cases_of(records)
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error
    if arguments.coco is not None and any(len(record["target_mask"]["size"]) != 2 for record in records):
        raise SegRLError("--coco is for images; masks of volumes are NIfTI")
    coco = _coco_results(arguments, *([record[name] for record in records] for name in ("name", "lesion")))
    asked = {name: value for name, value in vars(arguments).items() if name not in ("run", "modules")}
    with claimed(output, asked):
        if coco is not None:
            coco.write(arguments.coco, records)
        found = {"config": asked, "conventions": compare_conventions(cases, names)}
        page = conventions_page(found["conventions"])
        (output / "conventions.md").write_text(page, encoding="utf-8")
        write_results(output / "results.json", {**found, "versions": versions()})
    say(page)
    return OK


def _evaluate_on(data: str | Path, arguments: argparse.Namespace) -> int:
    from segrl.data.images.folder import check_rows, load_folder
    from segrl.data.images.kept import KeptPixels
    from segrl.data.overview import holds_volumes
    from segrl.data.splits import load_split
    from segrl.data.volumes.folder import check_volumes, load_volumes
    from segrl.errors import SegRLError
    from segrl.evaluation.conventions import cases_of, check_conventions, compare_conventions, conventions_page
    from segrl.inference.base import find_run
    from segrl.predictions.prompt_settings import load_prompt_settings
    from segrl.reports.terminal import say
    from segrl.scripts.results import results_for
    from segrl.scripts.run_folder import check_output, claimed

    if arguments.predictions is None:
        for flag in ("volumes", "missing_empty"):
            if getattr(arguments, flag):
                raise SegRLError(f"--{flag} is for --predictions; drop it")
        run = find_run(arguments.model)
        settings = load_prompt_settings(run)
        task = "images" if settings is None else settings.task
        default = Path(run) / "evaluation"
    else:
        for flag in ("segmenter", "frame_kind"):
            if getattr(arguments, flag) is not None:
                raise SegRLError(f"--{flag} is for --model; drop it")
        task = "volumes" if arguments.volumes or holds_volumes(Path(data)) else "images"
        masks = arguments.predictions.absolute()
        default = masks.with_name(f"{masks.name.removesuffix('.json')}_evaluation")
    output = arguments.output_dir or default
    check_output(output, overwrite=arguments.overwrite, inputs={"data": arguments.data, "model": arguments.model})
    readers: dict[str, Any] = {"folder": load_folder, "check": check_rows}
    if task == "volumes":
        empty = {"allow_empty": arguments.allow_empty}
        readers = {"folder": partial(load_volumes, **empty), "check": partial(check_volumes, **empty)}
        if arguments.coco is not None:
            raise SegRLError("--coco is for images; masks of volumes are NIfTI")
    elif arguments.allow_empty:
        raise SegRLError("--allow_empty is for volumes, masks of images may be empty; drop it")
    kept = KeptPixels() if task == "images" else None
    wanted = {"kept": kept, "allow_outside": arguments.allow_outside, "limit": arguments.limit}
    rows = load_split(str(data), arguments.split or "test", **readers, **wanted)
    if arguments.conventions:
        names = check_conventions(arguments.conventions)
    coco = _coco_results(arguments, rows["name"], rows["lesion"])
    results = results_for(task)(output, arguments.pictures, arguments.samples)
    size = arguments.batch_size or (4 if task == "volumes" else 16)
    system = _loaded(arguments, task) if arguments.predictions is None else _stored(arguments, rows)
    asked = {name: value for name, value in vars(arguments).items() if name not in ("run", "modules")}
    with claimed(output, asked):
        summary, records = results.score(system, rows, size, draw=True, kept=kept)
        found = {"config": asked, "model": summary}
        if arguments.conventions:
            found["conventions"] = compare_conventions(cases_of(records), names)
            page = conventions_page(found["conventions"])
            (output / "conventions.md").write_text(page, encoding="utf-8")
        results.write(found, {"model": records}, "model")
        if coco is not None:
            coco.write(arguments.coco, records)
            say(f"Written to {arguments.coco}: COCO's results")
        if arguments.conventions:
            say(page)
    return OK


def _loaded(arguments: argparse.Namespace, task: str) -> Any:
    from segrl.errors import SegRLError
    from segrl.heads.attach import find_mask_head
    from segrl.heads.mask_head import HEAD_CONFIG
    from segrl.inference import ReasoningSegmenter, load
    from segrl.inference.base import find_run
    from segrl.predictions.prompt_settings import load_prompt_settings

    more = {} if arguments.device is None else {"device": arguments.device}
    folder = find_run(arguments.model)
    if load_prompt_settings(folder) is None and not (folder / HEAD_CONFIG).is_file():
        if arguments.segmenter is None:
            raise SegRLError(
                f"--model {arguments.model!r} was not trained by segrl and makes no masks; pass --segmenter"
            )
        return ReasoningSegmenter.zero_shot(folder, arguments.segmenter, frame_kind=arguments.frame_kind, **more)
    if arguments.frame_kind is not None:
        raise SegRLError(f"--frame_kind: the run in {arguments.model!r} has its own; drop the flag")
    if arguments.segmenter is not None:
        if task == "images" and (folder / HEAD_CONFIG).is_file():
            raise SegRLError("--segmenter: the run has its segmenter in its mask head; drop the flag")
        more["segmenter"] = arguments.segmenter
    loaded = load(arguments.model, **more)
    if loaded.segmenter is None and find_mask_head(loaded.model) is None:
        raise SegRLError(f"--model {arguments.model!r} makes no masks; pass --segmenter with SAM 2 weights")
    return loaded


def _stored(arguments: argparse.Namespace, rows: Any) -> Any:
    from segrl.evaluation import CocoMasks, StoredMasks

    if arguments.annotations is not None and not arguments.predictions.is_dir():
        least = 0.5 if arguments.min_score is None else arguments.min_score
        return CocoMasks(arguments.predictions, arguments.annotations, rows, min_score=least)
    return StoredMasks(arguments.predictions, rows, missing_empty=arguments.missing_empty)
