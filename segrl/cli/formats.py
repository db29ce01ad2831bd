"""The layouts of `segrl data convert` and `segrl data export`, one entry each; their code is in `segrl.data.formats`.

A new layout is a file with a reader there, and an entry here: its places and flags are the reader's arguments.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segrl.errors import SegRLError, unknown_name

__all__ = ["FORMATS", "TEXTS", "Flag", "Format", "imported"]

TEXTS = ("lesion", "modality", "anatomy", "query", "source")


@dataclass(frozen=True)
class Flag:
    """A flag that becomes an argument of the reader.

    Attributes:
        help: Its help.
        settings: More of `ArgumentParser.add_argument`.
        parse: Turns what was given into the argument.
    """

    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parse: Callable[[Any], Any] = lambda given: given


@dataclass(frozen=True)
class Format:
    """One layout.

    Attributes:
        help: What it is.
        read: Its reader, "module:function" in `segrl.data.formats`; called with the places, `texts` and the flags.
        places: The reader's first arguments, files and folders, with their help.
        flags: Its other arguments.
        write: Its writer, called with rows and a folder; "" for none.
        unnamed: Whether nothing in the layout says what masks show, given the arguments.
    """

    help: str
    read: str
    places: Mapping[str, str]
    flags: Mapping[str, Flag] = field(default_factory=dict)
    write: str = ""
    unnamed: Callable[[argparse.Namespace], bool] = lambda arguments: False

    def rows(self, name: str, arguments: argparse.Namespace) -> Any:
        """Return what the reader yields.

        Raises:
            SegRLError: Nothing says what masks show, a flag that cannot be read, or what the reader raises.
        """
        texts = {text: value for text in TEXTS if (value := getattr(arguments, text)) is not None}
        if self.unnamed(arguments) and not texts.keys() & {"lesion", "query"}:
            raise SegRLError(f"{name}: what do the masks show? Pass --lesion, such as --lesion polyp, or --query")
        flags = {flag: entry.parse(getattr(arguments, flag)) for flag, entry in self.flags.items()}
        return imported(self.read)(*(getattr(arguments, place) for place in self.places), texts=texts, **flags)


def imported(path: str) -> Callable[..., Any]:
    """Import a function of `segrl.data.formats`, "module:function"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"segrl.data.formats.{module}"), name)


def _columns(given: list[str]) -> dict[str, str]:
    from segrl.data.formats.columns import COLUMNS

    ours_to_theirs: dict[str, str] = {}
    for pair in given:
        theirs, equals, ours = pair.partition("=")
        if not equals or not theirs or not ours:
            raise SegRLError(f"--columns {pair}: expected THEIRS=OURS, such as text=query")
        if ours not in COLUMNS:
            raise unknown_name("column", ours, COLUMNS)
        if ours in ours_to_theirs:
            raise SegRLError(f"--columns: {ours_to_theirs[ours]} and {theirs} are both {ours}; drop one")
        ours_to_theirs[ours] = theirs
    return ours_to_theirs


def _labels(given: list[str] | None) -> dict[int, str] | None:
    names: dict[int, str] = {}
    for pair in given or ():
        value, equals, name = pair.partition("=")
        if not equals or not name or not value.isdigit() or not int(value):
            raise SegRLError(f"--labels {pair}: expected VALUE=NAME, such as 1=polyp")
        names[int(value)] = name
    return names or None


_DRAWN = {
    "test_fraction": Flag(
        "share drawn for the split test, where the source has no split but train (default: 0.2; 0 draws none)",
        {"type": float, "default": 0.2, "metavar": "X"},
    ),
    "seed": Flag("of that draw", {"type": int, "default": 0, "metavar": "N"}),
}
_FOLDER = {"path": "the folder"}
_SETS = {"path": "folder of one set, or of several"}


def _split(help: str) -> dict[str, Flag]:
    return {"split": Flag(help, {"metavar": "NAME"})}


FORMATS: dict[str, Format] = {
    "pairs": Format(
        "x.jpg with x_mask.png, or images/x.jpg with masks/x.png",
        "pairs:read_pairs",
        _FOLDER,
        _DRAWN,
        write="pairs:write_pairs",
        unnamed=lambda arguments: True,
    ),
    "coco": Format(
        "polygons and run lengths",
        "coco:read_coco",
        {"annotations": "the JSON file", "images": "folder of its images"},
        {
            **_split("split of all rows (default: train, but for --test_fraction)"),
            "crossing": Flag("fill polygons that cross themselves, as pycocotools does", {"action": "store_true"}),
            **_DRAWN,
        },
        write="coco:write_coco",
    ),
    "nnunet": Format(
        "a data set of nnU-Net, images or scans",
        "nnunet:read_nnunet",
        {"path": "the folder with dataset.json"},
        {"channel": Flag("of several channels the one to take", {"metavar": "NAME"}), **_DRAWN},
        write="nnunet:write_nnunet",
    ),
    "hf": Format(
        "a Hugging Face data set",
        "columns:read_columns",
        {"path": "folder, file, or owner/name on the hub"},
        {
            "columns": Flag(
                "such as text=query gt=mask", {"nargs": "+", "default": [], "metavar": "THEIRS=OURS"}, _columns
            ),
            **_DRAWN,
        },
        write="columns:write_columns",
    ),
    "biomedparse": Format(
        "file names that say what masks show",
        "biomedparse:read_biomedparse",
        _SETS,
        write="biomedparse:write_biomedparse",
    ),
    "reasonseg": Format(
        "the layout of ReasonSeg, with pixels to ignore",
        "reasonseg:read_reasonseg",
        {"path": "folder with train, val, test"},
        {
            "questions": Flag(
                "of an image; LISA evaluates the first (default)", {"choices": ("first", "all"), "default": "first"}
            )
        },
    ),
    "refcoco": Format(
        "RefCOCO, +, g and gRefCOCO",
        "refcoco:read_refcoco",
        {
            "refs": "expressions: grefs(unc).json or refs(unc).p",
            "instances": "instances.json",
            "images": "folder of COCO's images",
        },
        _split("only this one, such as testA"),
    ),
    "medsegbench": Format(
        "arrays of images and labels",
        "medsegbench:read_medsegbench",
        {"path": "the .npz file"},
        {"labels": Flag("of labels with several values", {"nargs": "+", "metavar": "VALUE=NAME"}, _labels)},
        unnamed=lambda arguments: not arguments.labels,
    ),
    "mmr": Format(
        "questions about objects and parts",
        "mmr:read_mmr",
        {"annotations": "MMR_NAME.json", "images": "COCO's images"},
        {
            **_split("of all rows (default: NAME of the file)"),
            "masks": Flag(
                "each: a row for every mask, as MMR's evaluation takes them, not to train on (default: union)",
                {"choices": ("union", "each"), "default": "union"},
            ),
        },
    ),
    "sa_med2d": Format(
        "SA-Med2D-20M, a file for each instance",
        "sa_med2d:read_sa_med2d",
        {"path": "the folder SAMed2Dv1"},
        {"sets": Flag("only these, such as kvasir_seg", {"nargs": "+", "metavar": "SET"}), **_DRAWN},
    ),
    "cvc_clinicdb": Format("CVC-ClinicDB, divided by sequence", "cvc_clinicdb:read_cvc_clinicdb", _FOLDER, _DRAWN),
    "m3d_refseg": Format(
        "M3D-RefSeg, questions about scans",
        "m3d_refseg:read_m3d_refseg",
        {"path": "folder of M3D_RefSeg.csv and the cases"},
        _DRAWN,
    ),
    "ispy1": Format(
        "ISPY1, masks of TCIA's ISPY1-Tumor-SEG-Radiomics on its scans or on DICOM files",
        "ispy1:read_ispy1",
        {"path": "the folder of NIfTI-Files"},
        {
            "dicom": Flag(
                "take the scans of this folder of the collection ISPY1, a folder a patient",
                {"type": Path, "metavar": "FOLDER"},
            ),
            "masks": Flag(
                "kind of masks (default: stv_manual)",
                {"choices": ("stv_manual", "stv_resunet", "ftv"), "default": "stv_manual"},
            ),
            "phase": Flag(
                "of the contrast agent, 0 before it (default: 1)", {"type": int, "default": 1, "metavar": "N"}
            ),
            **_DRAWN,
        },
    ),
    "imed_361m": Format("IMed-361M, sparse masks of all structures", "imed_361m:read_imed_361m", _SETS),
}
