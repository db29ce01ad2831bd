"""Image and mask folders with a `manifest.csv`, checked in full before training starts.

The checks open every file once and report all problems together, so that a broken mask does not stop a run after hours
of training and all bad files can be fixed at once.
"""

# H, W pixels of an image and its mask, after EXIF rotation

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from segrl.caching.content import content_key
from segrl.data.contents import SplitContents
from segrl.data.images.kept import KeptPixels
from segrl.data.listed_files import find_file
from segrl.data.manifest import check_dataset, parts_of, raise_all, read_manifest
from segrl.data.read_ahead import read_ahead
from segrl.errors import DataError
from segrl.geometry.image_files import image_orientation, open_image, read_image
from segrl.geometry.mask_images import binarize, read_mask_file
from segrl.geometry.masks import mask_to_box
from segrl.predictions.target import METADATA_COLUMNS

__all__ = ["IGNORED", "check_rows", "load_folder"]

IGNORED = "ignored"  # column of pixels that scores leave out
_AHEAD = 4  # rows that are read before they are looked at
_FEW = 256  # pixels that are compared first


def load_folder(
    path: str | Path,
    split: str | None = None,
    *,
    validate: bool = True,
    limit: int | None = None,
    allow_outside: bool = False,
    contents: SplitContents | None = None,
    kept: KeptPixels | None = None,
) -> Dataset:
    """Load the pairs of image and mask that `<path>/manifest.csv` lists.

    The manifest has the columns image and mask (paths relative to the folder) and optionally split, query, reasoning,
    modality, anatomy, lesion, name and ignored, the path of a mask of pixels that the scores of an evaluation leave
    out; any other column is kept as text. Without a query column the query is built from
    lesion, anatomy and modality. Pixels are decoded when a row is read. Several masks of one image and question are
    merged if one cell names them all, as in `masks/a.png;masks/a_1.png`. Cells may be separated by commas, semicolons
    or tabs.

    Args:
        path: The folder.
        split: Keep only rows with this value in the split column; None keeps all.
        validate: Open every file now (see `check_rows`), so that a broken one does not stop the training.
        limit: Keep only the first rows, after the split.
        allow_outside: Whether the manifest may name files outside the folder, by `..`, absolute paths or links.
        contents: Collects what the split holds, so that it is compared with the others (see `check_rows`).
        kept: Keeps the pixels that are read to validate, by the number of their row, for an evaluation.

    Returns:
        A data set with the columns image, mask, query, modality, anatomy, lesion, name (the image path, unless the
        manifest has names) and the manifest's other columns. Optional columns that are missing are empty strings.

    Raises:
        DataError: For a missing or unreadable manifest, a missing column, an unknown split, no rows, and, with all
            problems in one message, for bad rows and files.

    Example:
        >>> import tempfile
        >>> from segrl.data import make_synthetic, write_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_folder(make_synthetic(3, size=32), folder, split=["train", "test", "train"])
        ...     rows = load_folder(folder, "train")
        >>> rows["name"][:], rows["lesion"][:]
        (['synthetic_0_00000', 'synthetic_0_00002'], ['ring abscess', 'dark cyst'])
    """
    found = read_manifest(
        Path(path), ("image", "mask"), split, limit, noun="image", merged=["mask"], allow_outside=allow_outside
    )
    rows, locations, problems = [], [], list(found.problems)
    for row, location in zip(found.rows, found.locations, strict=True):
        try:
            image = {"path": row["image"], "bytes": None}
            more = _ignored(Path(path), row, allow_outside)
            rows.append({**row, "image": image, "mask": _merged(parts_of(row["mask"])), **more})
            locations.append(location)
        except DataError as error:
            problems.append(f"{location}: {error}")
    names = list(found.rows[0]) if found.rows else ["image", "mask", *METADATA_COLUMNS]
    features = {name: Image() if name in ("image", "mask", IGNORED) else Value("string") for name in names}
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=Features(features))
    contents = contents or SplitContents()
    if validate:
        problems += _problems(dataset, locations, contents, split or "", kept)
    raise_all(problems, found.total, found.source)
    contents.warn(found.source)
    return dataset


def check_rows(
    dataset: Dataset, *, contents: SplitContents | None = None, split: str = "", kept: KeptPixels | None = None
) -> None:
    """Check every row of a data set with the columns image, mask and query, reading one row at a time.

    A row is bad if its image or mask is missing or corrupt, holds several pages or transparent pixels, or declares more
    than `PIL.Image.MAX_IMAGE_PIXELS` pixels, if the image is not 8-bit, if the two differ in size after EXIF rotation
    or are equal, if the mask holds more than two values, if the query is empty, or if an earlier row asks the same of
    the same image and has another mask. An empty mask is accepted: there is nothing to find.

    Args:
        dataset: Columns of classes (`datasets.ClassLabel`) count as the names of the classes.
        contents: Collects what the split holds. Pass the same object for all splits to be warned of images that two of
            them share.
        split: Name of the split, for warnings; "" takes it from a column split, if there is one.
        kept: As in `load_folder`.

    Raises:
        DataError: For a missing or wrongly typed column, for no rows, and for bad rows: all of them, with row number,
            name and fix.

    Warns:
        UserWarning: Images that two splits share, masks that are all empty or all full, and a split with one lesion
            beside one with several.

    Example:
        >>> from segrl.data import make_synthetic
        >>> check_rows(make_synthetic(2, size=32))
        >>> check_rows(make_synthetic(2, size=32).map(lambda row: {"query": ""}))
        Traceback (most recent call last):
        segrl.errors.DataError: dataset: 2 problems in 2 rows, expected none:
          row 0 (synthetic_0_00000): the query is empty; write what to segment
          row 1 (synthetic_0_00001): the query is empty; write what to segment
    """
    contents = contents or SplitContents()
    check_dataset(
        dataset,
        ("image", "mask", "query"),
        lambda rows, locations: _problems(rows, locations, contents, split, kept),
    )
    contents.warn("dataset")


def _problems(
    dataset: Dataset,
    locations: Iterable[str],
    contents: SplitContents,
    split: str,
    kept: KeptPixels | None,
) -> Iterator[str]:
    """Yield every problem with the files of a data set, row by row; at most one per file and one per pair."""
    for column in ("image", "mask"):
        if not isinstance(dataset.features[column], Image):
            raise DataError(
                f"column {column!r} has the type {dataset.features[column]}: expected datasets.Image; "
                f"use dataset.cast_column({column!r}, datasets.Image()) for paths or bytes, and fill polygons with "
                "PIL.ImageDraw.Draw(image).polygon first"
            )
    encoded = dataset
    for column in ("image", "mask", IGNORED):
        if column in encoded.column_names:
            encoded = encoded.cast_column(column, Image(decode=False))
    for number, (location, pair) in enumerate(zip(locations, read_ahead(_Pair.of, encoded, _AHEAD), strict=True)):
        yield from (f"{location}: {error}" for error in pair.errors)
        row, problem = pair.row, pair.problem()
        if problem is None and pair.image is not None and pair.mask is not None:
            name = split or str(row.get("split") or "")
            share = np.count_nonzero(pair.mask) / pair.mask.size
            problem = contents.add(name, location, row, image=pair.keys[0], mask=pair.keys[1], share=share)
            if kept is not None:
                kept.add(number, pair.image, pair.mask, pair.ignored)
        if problem is not None:
            yield f"{location}: {problem}"


class _Pair:
    """An image and its mask, upright, and how their files store them."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.errors: list[str] = []
        self.keys = "", ""  # of the content of image and mask
        self.image: np.ndarray | None = None  # (H, W, 3) uint8
        self.mask: np.ndarray | None = None  # (H, W) bool
        self.ignored: np.ndarray | None = None  # (H, W) bool
        self.stored: dict[str, tuple[int, tuple[int, int]]] = {}  # EXIF orientation, (width, height) before it

    @classmethod
    def of(cls, row: Any) -> _Pair:
        """Read a row."""
        pair = cls(row)
        for column, read in (("image", pair.read_image), ("mask", pair.read_mask), (IGNORED, pair.read_ignored)):
            try:
                if row.get(column) is not None or column != IGNORED:
                    read(row.get(column))
            except DataError as error:
                pair.errors.append(f"{error}{_path(error, row[column])}")
        if pair.image is not None and pair.mask is not None:
            pair.keys = content_key(pair.image), content_key(np.packbits(pair.mask), pair.mask.shape)
        return pair

    def read_image(self, value: Any) -> None:
        with open_image(value, "image") as image:
            self.stored["image"] = image_orientation(image), image.size
            self.image = np.asarray(read_image(image, "image"))

    def read_mask(self, value: Any) -> None:
        with open_image(value, "mask") as image:
            self.stored["mask"] = image_orientation(image), image.size
            self.mask = binarize(image, "mask")

    def read_ignored(self, value: Any) -> None:
        with open_image(value, IGNORED) as image:
            self.ignored = binarize(image, IGNORED)

    def problem(self) -> str | None:
        """Say why the two do not belong together; None if they do, or if one of them was not read."""
        if self.image is None or self.mask is None:
            return None
        (height, width), (mask_height, mask_width) = self.image.shape[:2], self.mask.shape
        if self.ignored is not None and self.ignored.shape != self.mask.shape:
            return (
                f"the ignored pixels are {self.ignored.shape[1]} x {self.ignored.shape[0]} px, the mask {mask_width} x "
                f"{mask_height}; expected the same size"
            )
        (turned, stored), (mask_turned, mask_stored) = self.stored["image"], self.stored["mask"]
        if (height, width) != (mask_height, mask_width):
            advice = "resize the mask with nearest neighbour"
            if mask_stored == stored:
                advice = (
                    "only one of the two has an EXIF rotation: turn the mask as the image is shown, or save the image "
                    "as it is stored, without the EXIF tag"
                )
            return (
                f"the mask is {mask_width} x {mask_height} px, the image {width} x {height}; expected the same size "
                f"after EXIF rotation; {advice}"
            )
        if turned != mask_turned and stored == mask_stored:
            return (
                f"the EXIF orientation of the image is {turned}, that of the mask {mask_turned}, and their sizes do "
                "not tell whether the mask is turned already; save both upright, without the EXIF tag"
            )
        if _is_mask(self.image, self.mask):
            return "the image is the mask itself; give the picture that the mask belongs to"
        return None


def _is_mask(image: np.ndarray, mask: np.ndarray) -> bool:
    """Return whether an image is one grey value inside a mask, and black outside; a few pixels tell most apart."""
    inside = mask_to_box(mask)
    if inside is None or mask.all():
        return False
    top = int(inside[1])
    value = image[top, int(np.argmax(mask[top])), 0]
    if not value:
        return False
    few = slice(None, None, max(1, mask.size // _FEW))
    sample = (image.reshape(-1, 3)[few] == (mask.reshape(-1, 1)[few] * value)).all()
    return bool(sample) and bool((image == mask[..., np.newaxis] * value).all())


def _merged(paths: Sequence[str]) -> dict[str, Any]:
    """Merge the masks of one row into one; a single file stays a path.

    Raises:
        DataError: A file that is no mask, or masks of different sizes.
    """
    if len(paths) == 1:
        return {"path": paths[0], "bytes": None}
    masks = [read_mask_file(path, f"mask {path}") for path in paths]
    if len({mask.shape for mask in masks}) > 1:
        sizes = ", ".join(f"{mask.shape[1]} x {mask.shape[0]}" for mask in masks)
        raise DataError(f"the masks of one row have the sizes {sizes} px, expected one size")
    buffer = io.BytesIO()
    PILImage.fromarray(np.logical_or.reduce(masks)).save(buffer, format="PNG")
    return {"path": None, "bytes": buffer.getvalue()}


def _ignored(folder: Path, row: dict[str, str], allow_outside: bool) -> dict[str, Any]:
    """The file of pixels that do not count, where the manifest has the column; None where its cell is empty."""
    if IGNORED not in row:
        return {}
    if not row[IGNORED]:
        return {IGNORED: None}
    return {IGNORED: {"path": str(find_file(folder, row[IGNORED], allow_outside=allow_outside)), "bytes": None}}


def _path(error: DataError, value: dict[str, Any] | None) -> str:
    """Return the path of a file, for an error that does not name it."""
    path = (value or {}).get("path") or ""
    return f" [{path}]" if path and path not in str(error) else ""
