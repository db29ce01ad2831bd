"""Sources of a build: data in the layouts that segrl reads, turned into cases.

Folders with a `manifest.csv` of images stay where they are. Other layouts are written once into `build/sources/NAME` as
such a folder; of scans some slices that show the lesion are.
"""

# D slices of a scan, H/W pixels

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage
from rich.progress import track

from segrl.caching.content import content_key
from segrl.curation.case import Case, case_id
from segrl.data import formats
from segrl.data.csv_files import read_csv
from segrl.data.formats.rows import FormatRow, ScanRow, free_name, plain_name, write_rows
from segrl.errors import DataError
from segrl.geometry.image_files import open_image
from segrl.geometry.mask_images import read_mask_file

__all__ = ["LoadedSources", "SourceSettings", "Surveyed", "load_sources", "survey_sources"]

Format = Literal["folder", "pairs", "coco", "nnunet", "biomedparse", "sa_med2d", "imed_361m"]
FEWEST, LISTED = 20, 5  # images of a source; names in one message


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One entry of the section `sources`.

    Attributes:
        path: Folder, or for COCO the file of annotations.
        licence: Of the data set; or one for each text in the column source of its manifest. Every source needs one.
        format: Layout, as `segrl data convert` knows them; "folder" has a `manifest.csv` of images, or of scans.
        images: Of COCO the folder of the images.
        name: Of the source, unless the manifest has a column source; None takes the name of the folder.
        lesion: Of all rows, in place of what the source says; None keeps that. So are modality and anatomy.
        modality: Of all rows.
        anatomy: Of all rows.
        patients: Regular expression searched in the names of rows: what it finds is the patient. None: the column
            patient; of scans without one the scan; else the patient is not known, and every image is one of its own.
        split: Only rows of this split; None takes all.
        slices: Of a scan, how many of the slices that show the lesion are taken, at equal distances.

    Raises:
        DataError: No licence, an expression that is none, or a number below 1.

    Example:
        >>> SourceSettings(path=Path("polyps"), licence="")
        Traceback (most recent call last):
        segrl.errors.DataError: licence of polyps is empty; name it, such as "CC BY 4.0"
    """

    path: Path
    licence: str | dict[str, str]
    format: Format = "folder"
    images: Path | None = None
    name: str | None = None
    lesion: str | None = None
    modality: str | None = None
    anatomy: str | None = None
    patients: str | None = None
    split: str | None = None
    slices: int = 3

    def __post_init__(self) -> None:
        given = [self.licence] if isinstance(self.licence, str) else list(self.licence.values())
        if not given or not all(text.strip() for text in given):
            raise DataError(f'licence of {self.path} is empty; name it, such as "CC BY 4.0"')
        if self.slices < 1:
            raise DataError(f"slices={self.slices}; expected 1 or more")
        if (self.format == "coco") != (self.images is not None):
            raise DataError(f"format {self.format!r}: images, the folder of the images, goes with the format coco")
        try:
            re.compile(self.patients or "")
        except re.error as error:
            raise DataError(f"patients={self.patients!r}: no regular expression: {error}") from error

    @property
    def title(self) -> str:
        """Name of the source where its rows have none."""
        return self.name or self.path.stem or "source"


@dataclass(frozen=True)
class LoadedSources:
    """Cases of all sources, and what was left out.

    Attributes:
        cases: In the order of the sources; ids differ.
        left_out: For each reason the names of the rows, such as "empty mask".

    Example:
        >>> LoadedSources([], {"empty mask": ["mine: a.png"]}).left_out["empty mask"]
        ['mine: a.png']
    """

    cases: list[Case]
    left_out: dict[str, list[str]]


def load_sources(sources: tuple[SourceSettings, ...], build: str | Path) -> LoadedSources:
    """Read every file of every source.

    Rows whose mask is empty and rows with the pixels, mask and lesion of an earlier one are left out, and listed.

    Args:
        sources: In the order of their cases.
        build: The build's folder, which exists; `sources/` in it gets what is converted.

    Raises:
        DataError: As the readers of the layouts; a source without a licence, with rows that name no lesion or no
            modality, with several modalities, with less than 20 images, with one patient only, or whose masks are all
            empty.

    Example:
        >>> from segrl.data import make_synthetic, write_folder
        >>> _ = write_folder(make_synthetic(20, size=32), "mine")
        >>> Path("build").mkdir()
        >>> source = SourceSettings(path=Path("mine"), modality="MRI", licence="CC0-1.0")
        >>> found = load_sources((source,), "build")
        reading mine ...
        >>> len(found.cases), found.left_out
        (20, {})
    """
    _check_names(sources)
    cases: dict[str, Case] = {}
    left_out: dict[str, list[str]] = {}
    for source in sources:
        rows = _rows(source, Path(build))
        found = []
        for row in track(rows, f"reading {source.title}"):
            case, reason = _case(source, row)
            if reason == "" and case.id in cases:
                reason = "same image, mask and lesion as an earlier row"
            if reason:
                left_out.setdefault(reason, []).append(f"{case.source}: {case.name}")
                continue
            cases[case.id] = case
            found.append(case)
        if not found:
            raise DataError(f"{source.path}: none of {len(rows)} rows is left: all masks are empty, or known already")
        _check(source, found)
    return LoadedSources(list(cases.values()), left_out)


@dataclass(frozen=True)
class Surveyed:
    """A row of a source, as far as it is known without reading its pixels.

    Attributes:
        case: Without an id; its files are those of the source, or `Path()` where they will be made.
        size: (width, height) of the image, pixels.
        made: Whether the build will hold files of its own for it.
    """

    case: Case
    size: tuple[int, int]
    made: bool


def survey_sources(sources: tuple[SourceSettings, ...]) -> list[Surveyed]:
    """List the rows of every source, and write nothing. Empty masks and rows that repeat others are among them.

    Of scans, every structure counts as often as slices are taken of it at most, in the size of the first scan.

    Raises:
        DataError: As `load_sources`, but for what only pixels tell.

    Example:
        >>> from segrl.data import make_synthetic, write_folder
        >>> _ = write_folder(make_synthetic(20, size=32), "survey")
        >>> found = survey_sources((SourceSettings(path=Path("survey"), modality="MRI", licence="CC0-1.0"),))
        >>> len(found), found[0].size, found[0].made
        (20, (32, 32), False)
    """
    _check_names(sources)
    found = []
    for source in sources:
        rows = list(_surveyed(source))
        if not rows:
            raise DataError(f"{source.path}: no rows")
        _check(source, [row.case for row in rows])
        found += rows
    return found


def _surveyed(source: SourceSettings) -> Iterator[Surveyed]:
    if source.format == "folder" and not _holds_scans(source.path):
        for row in _images(source.path, source.split):
            files = {name: Path(row[name]["path"] or "") for name in ("image", "mask")}
            with open_image(files["image"], f"image {files['image']}") as opened:
                yield Surveyed(_described(source, {**row, **files}), opened.size, row["mask"]["bytes"] is not None)
        return
    scan_size = (0, 0)
    for row in _read(source):
        if isinstance(row, FormatRow):
            texts = {"name": row.name, "split": row.split, **row.texts, "image": Path(), "mask": Path()}
            yield Surveyed(_described(source, texts), (row.mask.shape[1], row.mask.shape[0]), True)
            continue
        if scan_size == (0, 0):
            scan_size = _read_scan(row).grey.shape[:0:-1]
        texts = {"name": row.scan.name, "patient": str(row.scan), **row.texts, "image": Path(), "mask": Path()}
        yield from [Surveyed(_described(source, texts), scan_size, True)] * source.slices


def _check_names(sources: tuple[SourceSettings, ...]) -> None:
    titles = Counter(plain_name(source.title).casefold() for source in sources)  # of their folders
    twice = [title for title, count in titles.items() if count > 1]
    if twice:
        raise DataError(f"sources: {len(twice)} names occur twice, such as {twice[0]!r}; give each a name of its own")


def _rows(source: SourceSettings, build: Path) -> list[dict[str, Any]]:
    """The rows of a source with the paths of their files."""
    folder = source.path
    if source.format != "folder" or _holds_scans(folder):
        folder = _converted(source, build / "sources" / plain_name(source.title))
    rows = _images(folder, source.split if folder == source.path else None)
    merged = build / "sources" / ".merged"  # no name of a source begins so
    for row in rows:
        row["image"] = Path(row["image"]["path"])
        data = row["mask"]["bytes"]
        if data is None:
            row["mask"] = Path(row["mask"]["path"])
        else:  # several files in one cell
            merged.mkdir(parents=True, exist_ok=True)
            row["mask"] = merged / f"{content_key(data)}.png"
            row["mask"].write_bytes(data)
    return rows


def _images(folder: Path, split: str | None) -> list[dict[str, Any]]:
    from datasets import Image

    from segrl.data import load_folder

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[^\n]*masks of the data set are empty")  # left out here, or refused
        dataset = load_folder(folder, split)
    encoded = dataset.cast_column("image", Image(decode=False)).cast_column("mask", Image(decode=False))
    return [dict(row) for row in encoded]  # type: ignore[call-overload]


def _holds_scans(folder: Path) -> bool:
    return "label" in read_csv(folder / "manifest.csv", ["image"], ["image", "mask", "label"]).header


def _converted(source: SourceSettings, home: Path) -> Path:
    """Write a source as a folder of images; one that is there is complete, and kept."""
    if home.is_dir():
        return home
    unfinished = home.with_name(f".{home.name}.partial")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # of a process that was killed
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    write_rows(_sliced(_read(source), source), unfinished, title=f"writing {source.title}")
    return unfinished.rename(home)


def _read(source: SourceSettings) -> Iterator[FormatRow | ScanRow]:
    columns = {name: getattr(source, name) for name in ("lesion", "modality", "anatomy")}
    texts = {name: text for name, text in columns.items() if text is not None}
    if source.format == "folder":
        yield from _scans(source)
    elif source.format == "coco":
        assert source.images is not None
        yield from formats.read_coco(source.path, source.images, texts=texts)
    elif source.format == "pairs":
        if source.lesion is None:
            raise DataError(f"{source.path}: pairs do not say what their masks show; add lesion to the source")
        yield from formats.read_pairs(source.path, texts=texts)
    else:
        read: Any = getattr(formats, f"read_{source.format}")
        yield from read(source.path, texts=texts)


def _scans(source: SourceSettings) -> Iterator[ScanRow]:
    from segrl.data import load_volumes

    for row in load_volumes(source.path, source.split, allow_empty=True):
        kept = {name: str(text) for name, text in dict(row).items() if name not in ("scan", "label", "name")}  # type: ignore[call-overload]
        found: Any = row
        yield ScanRow(Path(found["scan"]), Path(found["label"]), found["label_value"], kept.get("split", ""), kept)


def _sliced(rows: Iterator[FormatRow | ScanRow], source: SourceSettings) -> Iterator[FormatRow]:
    """Turn scans into slices; images stay as they are."""
    from segrl.data import CaseReader, uniform_slices

    read = CaseReader()
    stems: dict[Path, str] = {}  # scans in folders of their own may all have one file name
    taken: set[str] = set()
    for row in rows:
        if isinstance(row, FormatRow):
            yield row
            continue
        texts = {name: text for name, text in row.texts.items() if name not in ("label_value", "intensity", "query")}
        case = _read_scan(row, read)
        assert case.mask is not None
        shown = np.flatnonzero(case.mask.any(axis=(1, 2)))
        # an absent structure is one slice with an empty mask, which is left out and listed as such
        chosen = shown[uniform_slices(len(shown), source.slices)] if len(shown) else [len(case.mask) // 2]
        if row.scan not in stems:
            stems[row.scan] = free_name(taken, row.scan.name.removesuffix(".gz").removesuffix(".nii"))
        stem = stems[row.scan]
        for number in map(int, chosen):
            name = f"{stem}_{number:04d}"
            position = {"volume": row.scan.name, "slice": str(number), "patient": texts.get("patient") or stem}
            image = PILImage.fromarray(case.grey[number])
            yield FormatRow(image, case.mask[number], name, row.split, {**texts, **position, "name": name})


def _read_scan(row: ScanRow, read: Any = None) -> Any:
    """Read the scan and label of a row, (D, H, W)."""
    from segrl.data import CaseReader

    texts = {name: row.texts.get(name, "") for name in ("modality", "intensity", "spacing_mm")}
    files = {"scan": str(row.scan), "label": str(row.label), "label_value": row.label_value}
    return (read or CaseReader())({**files, **texts}, allow_empty=True)


def _case(source: SourceSettings, row: Mapping[str, Any]) -> tuple[Case, str]:
    """The case of a row, and why it is left out, or ""."""
    case = _described(source, row)
    case = replace(case, id=case_id(case.image, case.mask, case.lesion))
    return case, "" if read_mask_file(case.mask, str(case.mask)).any() else "empty mask"


def _described(source: SourceSettings, row: Mapping[str, Any]) -> Case:
    """The case of a row by its texts alone, without an id."""
    texts = {name: str(getattr(source, name) or row.get(name) or "") for name in ("lesion", "modality", "anatomy")}
    where = f"{source.path}: {row['name']}"
    for name in ("lesion", "modality"):
        if not texts[name]:
            raise DataError(f"{where}: no {name}; add it to the source, or as a column of the manifest")
    title = source.name or str(row.get("source") or "") or source.title
    return Case(
        id="",
        image=row["image"],
        mask=row["mask"],
        source=title,
        patient=_patient(source, row, where),
        licence=_licence(source, row, title),
        name=str(row["name"]),
        split=str(row.get("split") or ""),
        volume=str(row.get("volume") or ""),
        slice=int(row["slice"]) if str(row.get("slice") or "").isdigit() else None,
        modality=texts["modality"],
        anatomy=texts["anatomy"],
        lesion=texts["lesion"],
    )


def _patient(source: SourceSettings, row: Mapping[str, Any], where: str) -> str:
    if source.patients is None:
        return str(row.get("patient") or "")
    found = re.search(source.patients, str(row["name"]))
    if found is None:
        raise DataError(f"{where}: patients='{source.patients}' is not found in the name; expected in all names of a "
                        "source: add an alternative, such as '...|.*'")  # fmt: skip
    return found[0]


def _licence(source: SourceSettings, row: Mapping[str, Any], title: str) -> str:
    licence = source.licence if isinstance(source.licence, str) else source.licence.get(title, "")
    licence = licence or str(row.get("licence") or row.get("license") or "")
    if not licence:
        raise DataError(f"{source.path}: the source {title!r} has no licence; name it, as in licence: {{{title}: "
                        "CC BY 4.0}")  # fmt: skip
    return licence


def _check(source: SourceSettings, cases: list[Case]) -> None:
    """Refuse a set that no committee can be trained on."""
    for title, count in Counter(case.source for case in cases).items():
        own = [case for case in cases if case.source == title]
        modalities = Counter(case.modality for case in own)
        if len(modalities) > 1:
            listed = ", ".join(f"{number} {name}" for name, number in modalities.most_common(LISTED))
            raise DataError(
                f"{source.path}: the source {title!r} has several modalities ({listed}), and a committee is trained on "
                "one; tell them apart in the column source of its manifest"
            )
        if count < FEWEST:
            raise DataError(f"{source.path}: the source {title!r} has {count} images with a lesion; expected "
                            f"{FEWEST} or more, or all errors are chance")  # fmt: skip
        patients = {case.patient for case in own}
        if len(patients) == 1 and patients != {""}:
            raise DataError(f"{source.path}: all {count} images of the source {title!r} are of one patient "
                            f"{own[0].patient!r}; an error out of fold needs two or more")  # fmt: skip
