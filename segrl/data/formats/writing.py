"""Files that writers of layouts share: images under free names, and rows that a layout has a place for."""

# H, W pixels of an image

from __future__ import annotations

import shutil
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image
from rich.progress import track

from segrl.data.formats.rows import FormatRow, ScanRow, free_name
from segrl.errors import DataError, unknown_name
from segrl.geometry.image_files import read_image

__all__ = ["ImageFiles", "rows_of_images"]


class ImageFiles:
    """Images that are written into a folder once, however many rows are about them.

    Args:
        home: The folder.

    Example:
        >>> import numpy as np
        >>> files = ImageFiles(Path("images_of_rows"))
        >>> row = FormatRow(Image.new("RGB", (2, 2)), np.eye(2, dtype=bool), "a b.jpg", "train")
        >>> [(path.as_posix(), new) for path, new in (files.add(row, "train"), files.add(row, "train"))]
        [('train/a_b.png', True), ('train/a_b.png', False)]
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._files: dict[Hashable, PurePosixPath] = {}
        self._taken: set[str] = set()

    def add(self, row: FormatRow, folder: str, wanted: str = "{}", *, png: bool = False) -> tuple[PurePosixPath, bool]:
        """Write the image of a row, if it is not there.

        Args:
            row: The row.
            folder: Where to, in the folder.
            wanted: Name of the file without its ending; "{}" is the image's own.
            png: Convert files of other kinds to PNG.

        Returns:
            Its path in the folder, and whether it is new.
        """
        stored = row.image if isinstance(row.image, Path) else None
        key = folder, wanted, stored.absolute() if stored is not None else (row.split, row.name)
        if key in self._files:
            return self._files[key], False
        suffix = ".png" if stored is None or png else stored.suffix
        (self.home / folder).mkdir(parents=True, exist_ok=True)
        path = PurePosixPath(free_name(self._taken, Path(row.name).stem, f"{folder}/{wanted}{suffix}"))
        target = self.home / path
        if stored is not None and stored.suffix.lower() == suffix.lower():
            shutil.copyfile(stored, target)
        elif stored is not None:
            read_image(stored, f"image {stored}").save(target)
        else:
            assert isinstance(row.image, Image.Image)
            row.image.save(target)
        self._files[key] = path
        return path, True


def rows_of_images(
    rows: Iterable[FormatRow | ScanRow], layout: str, *, splits: Sequence[str] = (), ignores: bool = False
) -> Iterator[FormatRow]:
    """Yield the rows, with a progress bar, and refuse what a layout has no place for.

    Args:
        rows: The rows.
        layout: Its name, for errors.
        splits: Names of splits that it has; () for any.
        ignores: Whether it has a place for pixels that do not count.

    Raises:
        DataError: A scan, or pixels that do not count.
        UnknownNameError: Another split.
    """
    for row in track(rows, "export"):
        if isinstance(row, ScanRow):
            raise DataError(f"{row.scan}: {layout} holds images, and this is a scan; export nnunet")
        if splits and row.split not in splits:
            raise unknown_name(f"split of {layout}", row.split, splits)
        if not ignores and row.ignored is not None and row.ignored.any():
            raise DataError(f"{row.name}: {layout} has no place for ignored pixels; drop the column ignored")
        yield row
