"""A zip of a DICOM series, unpacked under names of our own."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from segrl.errors import DataError

__all__ = ["unpack"]

_MOST_FILES = 5000
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
_LOCKED = (RuntimeError, NotImplementedError)  # a password, or a kind of compression that nothing here reads


def unpack(path: Path, folder: Path, most_bytes: int) -> dict[str, str]:
    """Unpack the files of an archive into a new folder, whatever their folders in it.

    Args:
        path: The archive.
        folder: Where to; it is made.
        most_bytes: Of all files unpacked; what the archive says is believed, since no more than that is read.

    Returns:
        The name of each file in the archive by its own in the folder. Files whose name begins with a dot, which some
        systems add, and a DICOMDIR are left out.

    Raises:
        DataError: No archive, one with a password, too many files, or too many bytes.

    Example:
        >>> with zipfile.ZipFile("scan.zip", "w") as archive:
        ...     archive.writestr("../../IM001.dcm", "a")
        ...     archive.writestr("._IM001.dcm", "b")
        >>> unpack(Path("scan.zip"), Path("unpacked"), 10)
        {'00000.dcm': 'IM001.dcm'}
        >>> unpack(Path("scan.zip"), Path("again"), 0)
        Traceback (most recent call last):
        segrl.errors.DataError: scan.zip: 1 bytes when unpacked; this server takes at most 0
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            named = [(entry, PurePosixPath(entry.filename.replace("\\", "/")).name) for entry in entries]
            kept = [(entry, name) for entry, name in named if not name.startswith(".") and name.upper() != "DICOMDIR"]
            if len(kept) > _MOST_FILES:
                raise DataError(f"{path}: {len(kept)} files; expected one series, of at most {_MOST_FILES}")
            count = sum(entry.file_size for entry, _ in kept)
            if count > most_bytes:
                raise DataError(f"{path}: {count} bytes when unpacked; this server takes at most {most_bytes}")
            folder.mkdir()
            names = {}
            for number, (entry, name) in enumerate(kept):
                own = f"{number:05d}{'.dcm' if name.lower().endswith(('.dcm', '.dicom', '.ima')) else ''}"
                (folder / own).write_bytes(archive.read(entry))
                names[own] = name
            return names
    except _BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no zip archive that can be read: {error}") from error
    except _LOCKED as error:
        raise DataError(
            f"{path}: cannot be unpacked ({error}); send it without a password, compressed as usual"
        ) from error
