"""Segment one volume: ask a trained run, and write the mask on the scan's own grid.

python examples/medvol_r1/predict.py scan.nii.gz "the tumour in the left lobe" --model runs/medvol_r1 -o mask.nii.gz
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from recipe import EvaluationFlags, MedVolRun

from segrl.data import Case, read_case, uniform_slices, write_mask
from segrl.errors import SegRLError
from segrl.inference import VolumeSegmenter
from segrl.reports import printable, say, volume_picture
from segrl.scripts import Parser, run_script

NUMBERS = {
    "slice": "index in the volume as segrl reads it, from the lowest slice, counted from 0",
    "shown_slice": "number in the answer, among the slices that were shown, counted from 1",
    "file_slice": "index in the file, counted from 0",
    "file_axis": "axis of the file that this index counts along, from 0",
    "z_mm": "height of the slice in the file's world, millimetres; None if the file does not say it",
    "boxes": "x1, y1, x2, y2 in pixels of the slice as segrl reads it",
}


def parser() -> Parser:
    """Return the command's options."""
    made = Parser(description="Segment one volume; the mask lies on the scan's own grid.")
    made.usage = "%(prog)s SCAN QUERY --model RUN [flags]"
    made.add_argument("scan", help="NIfTI file")
    made.add_argument("query", help="what to segment")
    made.add_argument("--model", required=True, help="the run's output_dir")
    made.add_argument("-o", "--output", default="mask.nii.gz", help="where the mask goes (.nii or .nii.gz)")
    made.add_argument("--picture", help="also draw the answer into this PNG")
    made.add_argument("--modality", default="", help='such as "CT", where training knew several')
    made.add_argument("--intensity", default="", help='another scaling than in training, such as "window:-160:240"')
    made.add_argument(
        "--spacing_mm", default="", help='of a scan whose file does not say it, as "[5.0, 0.7, 0.7]": z, y, x'
    )
    made.add_argument("--segmenter", help="SAM 2 weights; default: the run's")
    made.add_argument("--json", action="store_true", help="print the answer as JSON")
    made.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return made


def check(argv: Sequence[str]) -> Callable[[], None]:
    """Check options, scan and run before anything is written; return the work."""
    options = parser().parse_args(list(argv))
    written = [path for path in (options.output, options.picture) if path]
    if len({Path(path).resolve() for path in (options.scan, *written)}) <= len(written):
        raise SegRLError(f"{options.scan}, {', '.join(written)}: expected different files; nothing replaces the scan")
    for path in written:
        if Path(path).exists() and not options.overwrite:
            raise SegRLError(f"{path} exists; pass another name, or --overwrite")
        if not Path(path).parent.is_dir():
            raise SegRLError(f"{path}: there is no folder {Path(path).parent}; create it first")
    if not options.output.endswith((".nii", ".nii.gz")):
        raise SegRLError(f"--output {options.output}: expected a name that ends in .nii or .nii.gz")
    if options.picture and not options.picture.lower().endswith(".png"):
        raise SegRLError(f"--picture {options.picture}: expected a name that ends in .png")
    run = MedVolRun(EvaluationFlags(segmenter=options.segmenter), seed=0, folder=Path(options.model))
    segmenter = run.load_run(options.model, device=str(PartialState().device))
    assert isinstance(segmenter, VolumeSegmenter)
    settings = segmenter.settings
    modality, intensity = settings.scaling_for(options.modality, options.intensity)
    asked = {"scan": options.scan, "modality": modality, "intensity": intensity, "spacing_mm": options.spacing_mm}
    case = read_case(asked, label=False)

    def work() -> None:
        answer = segmenter.predict(case, options.query, progress=not options.json)
        assert answer.mask is not None
        write_mask(options.output, answer.mask, case.scan)
        if options.picture:
            known = {"spacing_mm": case.scan.spacing_mm, "edges": case.scan.edges, "intensity": case.intensity}
            scan = Path(options.scan).name
            volume_picture(case.grey, answer, None, options.picture, **known, query=options.query, name=scan)
        found: dict[str, Any] = {
            "status": answer.status.value,
            **named_slice(case, answer.slice_index, settings.slices),
            "boxes": answer.boxes.tolist(),
            "voxels": int(answer.mask.sum()),
            "reasoning": answer.reasoning,
            "answer": answer.answer,
            "mask": options.output,
        }
        if options.json:
            say(json.dumps(found))
            return
        for name, value in found.items():
            meaning = f"   ({NUMBERS[name]})" if name in NUMBERS else ""
            say(f"{name:12} {printable(str(value))}{meaning}")

    return work


def named_slice(case: Case, index: int | None, count: int) -> dict[str, Any]:
    """Return the numbers of the slice that the answer names, each None where there is none; see `NUMBERS`."""
    shown = uniform_slices(len(case.grey), count).tolist()
    if index is None or index not in shown:
        return {"slice": index, "shown_slice": None, "file_slice": None, "file_axis": None, "z_mm": None}
    axis, in_file = case.scan.file_slice(index)
    numbers = {"slice": index, "shown_slice": shown.index(index) + 1, "file_slice": in_file, "file_axis": axis}
    return {**numbers, "z_mm": case.scan.z_mm(index)}


if __name__ == "__main__":
    run_script(check)
