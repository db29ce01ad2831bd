"""Public benchmarks: what to get where, under which terms, and the command that reads it. Nothing is ever fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from segrl.data.formats import (
    read_biomedparse,
    read_columns,
    read_cvc_clinicdb,
    read_imed_361m,
    read_ispy1,
    read_m3d_refseg,
    read_medsegbench_folder,
    read_mmr_folder,
    read_pairs,
    read_reasonseg,
    read_refcoco_folder,
    read_sa_med2d,
    write_rows,
)
from segrl.errors import DataError, unknown_name

__all__ = ["BENCHMARKS", "Benchmark", "absent", "benchmark_folder"]


@dataclass(frozen=True)
class Benchmark:
    """One public data set.

    Attributes:
        what: What it holds.
        place: Where it is to be had, and on which terms; terms are to be read there.
        command: What turns it into a folder that trains and is evaluated on.
        conventions: Evaluators whose numbers are published on it, by their names in
            `segrl.evaluation.conventions.CONVENTIONS`.
        seen: Whether published samples were read, rather than the code of public loaders alone.
        read: Reads the download, and yields rows to be copied; or, given the split or None, returns a `DatasetDict` of
            volumes that stay where they are.
        default: What `read` takes where the download leaves something open.
        hub: Whether it is a Hugging Face data set, whose columns `read` knows; on disk, or as parquet.
        in_place: Whether `read` returns a `DatasetDict`.

    Example:
        >>> BENCHMARKS["reasonseg"].conventions, BENCHMARKS["reasonseg"].seen
        (('lisa', 'vision_reasoner'), False)
    """

    what: str
    place: str
    command: str
    conventions: tuple[str, ...] = ()
    seen: bool = False
    read: Callable[..., Any] = field(kw_only=True, repr=False)
    default: str = ""
    hub: bool = False
    in_place: bool = False


@contextmanager
def benchmark_folder(name: str, path: str | Path, split: str | None = None) -> Iterator[str | Path]:
    """Yield a folder that evaluations read: `path` itself, or what a download in the benchmark's layout holds.

    Args:
        name: One of `BENCHMARKS`.
        path: The download, which is read into a temporary folder that is removed afterwards; or a folder with
            `manifest.csv` or a `DatasetDict` saved to disk, which are yielded, unless the benchmark is itself a Hugging
            Face data set, whose columns are renamed. Never a name on the hub: nothing is downloaded.
        split: Of a download, keep the rows of this one; None keeps all.

    Raises:
        UnknownNameError: No such benchmark, or a download has no such split.
        DataError: No such folder, or what the reader raises; with the place where the benchmark is to be had, its
            terms, and the command for other files.

    Example:
        >>> with benchmark_folder("reasonseg", "."):
        ...     pass
        Traceback (most recent call last):
        segrl.errors.DataError: .: none of the folders train, val, test
        reasonseg: github.com/dvlab-research/LISA, which links to it; for research; nothing is downloaded here
        another layout: segrl data convert reasonseg ReasonSeg/ DESTINATION
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    benchmark, home = BENCHMARKS[name], Path(path)
    if not home.exists():
        raise absent(name, path)
    ready = ("manifest.csv",) if benchmark.hub else ("manifest.csv", "dataset_dict.json", "dataset_info.json")
    if any((home / part).is_file() for part in ready):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            if benchmark.in_place:
                benchmark.read(home, split).save_to_disk(Path(place) / name)
            else:
                write_rows(_of_split(benchmark.read(home), split, str(path)), Path(place) / name, title=name)
        except DataError as error:
            raise DataError(
                f"{error}\n{name}: {benchmark.place}; nothing is downloaded here\nanother layout: {benchmark.command}"
            ) from error
        yield Path(place) / name


def _of_split(rows: Iterator[Any], split: str | None, where: str) -> Iterator[Any]:
    """The rows of a split, whatever its capitals, as `read_manifest` takes them."""
    known: dict[str, None] = {}
    for row in rows:
        known[row.split] = None
        if split is None or row.split.casefold() == split.strip().casefold():
            yield row
    if split is not None and known and split.strip().casefold() not in map(str.casefold, known):
        raise unknown_name(f"split of {where}", split, known)


def absent(name: str, path: str | Path) -> DataError:
    """Return the error for a benchmark that is not there: where it is to be had.

    Example:
        >>> print(absent("tnscui2020", "TNSCUI"))
        TNSCUI: no such folder. tnscui2020: tn-scui2020.grand-challenge.org; its terms forbid passing it on; nothing ...
    """
    return DataError(f"{path}: no such folder. {name}: {BENCHMARKS[name].place}; nothing is downloaded here")


_REFER = "github.com/lichengunc/refer for refs and instances"
_ONE, _ANY = "expressions about one object of a COCO image", "expressions about any number of objects, none included"
_COLUMNS = {
    "image": ("image", "images"),
    "mask": ("mask", "masks"),
    "query": ("query", "question", "prompt"),
    "reasoning": ("reasoning", "think"),
}
"""Columns of U-MRG-14K by what they are here: of its description, and images, masks and prompt, which `eval/eval.py` of
PRIS-CV/MedReasoner, 915d369, reads."""
_OF_COLUMNS = "columns image, mask, query (or question) and reasoning (or think); boxes and points are not read"


def _m3d_seg(path: Path, split: str | None) -> Any:
    from segrl.data.volumes.m3d_seg import m3d_seg_splits  # not for a list of benchmarks

    return m3d_seg_splits(path, split)


BENCHMARKS: dict[str, Benchmark] = {
    "reasonseg": Benchmark(
        "photographs with implicit questions, regions to ignore; train, val, test",
        "github.com/dvlab-research/LISA, which links to it; for research",
        "segrl data convert reasonseg ReasonSeg/ DESTINATION",
        ("lisa", "vision_reasoner"),
        read=partial(read_reasonseg, texts={}),
        default="the first text of each image, as LISA evaluates",
    ),
    **{
        name: Benchmark(
            f"{title}: {what}",
            f"{place}; cocodataset.org for train2014, under COCO's terms",
            f"segrl data convert refcoco '{refs}' instances.json train2014/ DESTINATION",
            conventions,
            read=partial(read_refcoco_folder, name=name, texts={}),
            default=f"{refs} and instances.json in {name}/, images in images/mscoco/images/train2014/ beside it",
        )
        for name, title, what, place, refs, conventions in (
            ("refcoco", "RefCOCO", _ONE, _REFER, "refs(unc).p", ("lisa", "vision_reasoner")),
            ("refcoco+", "RefCOCO+", f"{_ONE}, without its place", _REFER, "refs(unc).p", ("lisa", "vision_reasoner")),
            ("refcocog", "RefCOCOg", f"longer {_ONE}", _REFER, "refs(umd).p", ("lisa", "vision_reasoner")),
            ("grefcoco", "gRefCOCO", _ANY, "github.com/henghuiding/gRefCOCO", "grefs(unc).json", ("rela",)),
        )
    },
    "biomedparse": Benchmark(
        "BiomedParseData: images of nine modalities, masks named by their target",
        "huggingface.co/datasets/microsoft/BiomedParseData; each set has a licence of its own",
        "segrl data convert biomedparse BiomedParseData/ DESTINATION",
        read=partial(read_biomedparse, texts={}),
    ),
    "medsegbench": Benchmark(
        "35 sets of medical images at 128, 256 and 512 px",
        "github.com/zekikus/MedSegBench, which links to them; each set has a licence of its own",
        "segrl data convert medsegbench SET_256.npz DESTINATION --lesion NAME",
        read=partial(read_medsegbench_folder, texts={}),
        default="all sets in the folder, each in its largest size, structures by name; not covidquex",
    ),
    "sa_med2d_20m": Benchmark(
        "SA-Med2D-20M: slices and images of ten modalities, a mask for each instance; no split: divide by case",
        "huggingface.co/datasets/OpenGVLab/SA-Med2D-20M; each set has a licence of its own",
        "segrl data convert sa_med2d SAMed2Dv1/ DESTINATION --sets NAME --test_fraction 0.2",
        read=partial(read_sa_med2d, texts={}, test_fraction=0.2),
        default="all sets, a fifth of the cases drawn for test; millions of files: convert some sets instead",
    ),
    "imed_361m": Benchmark(
        "IMed-361M: images of 14 modalities with masks of named structures",
        "huggingface.co/datasets/General-Medical-AI/IMed-361M; each set has a licence of its own",
        "segrl data convert imed_361m SET/ DESTINATION",
        seen=True,
        read=partial(read_imed_361m, texts={}),
    ),
    "mmr": Benchmark(
        "MMR: questions about objects and parts of COCO images, several masks to an answer",
        "github.com/jdg900/MMR; cocodataset.org for the images, under COCO's terms",
        "segrl data convert mmr MMR_test_mixed.json COCO/ DESTINATION",
        ("mmr",),
        read=partial(read_mmr_folder, texts={}),
        default="splits train, val, test_mixed, test_obj_only, test_part_only, of the files that are there; images in "
        "refer_seg/images/mscoco/images/{train2017,val2017}/ beside MMR/; the union of the masks of an answer",
    ),
    "mmr_masks": Benchmark(
        "MMR, every mask of an answer by itself, as its evaluation takes them: for --predictions with a file for each",
        "github.com/jdg900/MMR; cocodataset.org for the images, under COCO's terms",
        "segrl data convert mmr MMR_test_mixed.json COCO/ DESTINATION --masks each",
        ("mmr",),
        read=partial(read_mmr_folder, texts={}, masks="each"),
        default="as mmr; rows are named STEM#QUESTION#MASK, with numbers from 0",
    ),
    "cvc_clinicdb": Benchmark(
        "612 frames of 29 colonoscopy sequences with polyps; no published split: drawn by sequence",
        "polyp.grand-challenge.org/CVCClinicDB; for research",
        "segrl data convert cvc_clinicdb CVC-ClinicDB/ DESTINATION --test_fraction 0.2",
        read=partial(read_cvc_clinicdb, texts={}, test_fraction=0.2),
        default="a fifth of the sequences drawn for test",
    ),
    "tnscui2020": Benchmark(
        "3,644 ultrasound images of thyroid nodules; masks of the test set are not public: a part is drawn",
        "tn-scui2020.grand-challenge.org; its terms forbid passing it on",
        "segrl data convert pairs TNSCUI2020/ DESTINATION --lesion nodule --modality Ultrasound --anatomy Thyroid",
        read=partial(
            read_pairs,
            texts={"lesion": "nodule", "modality": "Ultrasound", "anatomy": "Thyroid"},
            test_fraction=0.2,
        ),
        default="a fifth of the images drawn for test",
    ),
    "m3d_seg": Benchmark(
        "CT volumes of 25 sets with labels",
        "huggingface.co/datasets/GoodBaiBai88/M3D-Seg; each set has a licence of its own",
        "examples/medvol_r1/train_grpo.py --data M3D_Seg_npy/ --m3d_seg NAME",
        read=_m3d_seg,
        default="all data sets in the folder, files where they are",
        in_place=True,
    ),
    "m3d_refseg": Benchmark(
        "M3D-RefSeg: 210 CT scans with questions about their structures",
        "huggingface.co/datasets/GoodBaiBai88/M3D-RefSeg; scans of TotalSegmentator, under its terms",
        "segrl data convert m3d_refseg M3D_RefSeg/ DESTINATION",
        read=partial(read_m3d_refseg, texts={}, test_fraction=0.2),
        default="the split test of M3D_RefSeg_test.csv; without it a fifth of the cases",
    ),
    "ispy1": Benchmark(
        "ISPY1: MR scans of the breast with tumor volumes drawn by hand; no published split: drawn by patient",
        "cancerimagingarchive.net, analysis result ISPY1-Tumor-SEG-Radiomics, and collection ISPY1 for DICOM; under "
        "TCIA's terms",
        "segrl data convert ispy1 ISPY1-Tumor-SEG-Radiomics/ DESTINATION --test_fraction 0.2",
        read=partial(read_ispy1, texts={}, test_fraction=0.2),
        default="a fifth of the patients drawn for test; masks stv_manual",
    ),
    "u_mrg_14k": Benchmark(
        "U-MRG-14K: medical images with questions, reasoning, boxes and points",
        "huggingface.co/collections/zzzyzh/u-mrg, of MedReasoner; not seen",
        "segrl data convert hf PATH DESTINATION --columns THEIRS=OURS ...",
        read=partial(read_columns, columns=_COLUMNS, texts={}),
        default=_OF_COLUMNS,
        hub=True,
    ),
    "comlesion_14k": Benchmark(
        "CORE-Seg's images, questions and reasoning; 2,421 rows of the split test",
        "announced by CORE-Seg; not seen",
        "segrl data convert hf PATH DESTINATION --columns THEIRS=OURS ...",
        ("core_seg",),
        read=partial(read_columns, columns=_COLUMNS, texts={}),
        default=_OF_COLUMNS,
        hub=True,
    ),
}
