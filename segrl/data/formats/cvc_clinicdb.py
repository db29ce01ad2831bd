"""CVC-ClinicDB: 612 frames of colonoscopies with polyps, divided by sequence (Bernal et al., CMIG 43, 2015).

Frames of one sequence look alike, so that a draw of frames would test on what was trained on. The ranges of frames are
those of two public tables that agree, one after polyp.grand-challenge.org/CVCClinicDB and one after
datasetninja.com/cvc-612, read on 2026-11-30; other pages count 31 sequences. The download was not seen.

    Original/{1..612}.tif, Ground Truth/{1..612}.tif          a variant has PNG
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path

from segrl.data.formats.pairs import read_pairs
from segrl.data.formats.rows import FormatRow
from segrl.errors import DataError

__all__ = ["read_cvc_clinicdb"]

_LAST = (
    *(25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317),
    *(342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612),
)
"""The last frame of each sequence."""


def read_cvc_clinicdb(
    source: str | Path, *, texts: Mapping[str, str], test_fraction: float = 0.0, seed: int = 0
) -> Iterator[FormatRow]:
    """Read CVC-ClinicDB; the sequence of a frame is its patient, which divisions keep together.

    Args:
        source: The folder.
        texts: Columns that every row gets, in place of polyp and endoscopy.
        test_fraction: Share of sequences whose split is "test", drawn at random. No split is published.
        seed: Of the draw.

    Raises:
        DataError: As `read_pairs`, or a file whose name is no number from 1 to 612.

    Example:
        >>> list(read_cvc_clinicdb("no/such/folder", texts={}))
        Traceback (most recent call last):
        segrl.errors.DataError: no/such/folder: no such folder
    """
    words = {"lesion": "polyp", "modality": "Endoscopy", **texts}

    def sequence(stem: str) -> str:
        if not (stem.isascii() and stem.isdigit() and 1 <= int(stem) <= _LAST[-1]):
            raise DataError(f"{source}: {stem}: expected frames 1 to {_LAST[-1]}, named by their number")
        return f"sequence {bisect.bisect_left(_LAST, int(stem)) + 1}"

    return read_pairs(source, texts=words, test_fraction=test_fraction, seed=seed, group=sequence)
