"""Folders of small synthetic volumes, as the tests of MedVol-R1 use them."""

from pathlib import Path
from typing import Any

from segrl.data import make_synthetic_volumes, write_manifest

MANY = 33  # rows: the preset repeats smaller training sets
HOSTILE = "\x1b[31m spot"  # reasoning that a terminal must not obey


def volumes(folder: Path, splits: list[str], count: int) -> Path:
    """Write small volumes, all of them in each split; in "train" so often that none is repeated."""
    made = make_synthetic_volumes(count, folder, depth=6, size=32)
    rows: list[dict[str, Any]] = []
    for split in splits:
        for number in range(MANY if split == "train" else count):
            row: Any = made[number % count]
            files = {key: str(Path(row[name]).relative_to(folder)) for key, name in (("image", "scan"), ("label",) * 2)}
            texts = {name: row[name] for name in ("label_value", "modality", "anatomy", "lesion")}
            rows.append({**files, "split": split, **texts, "name": f"{split} {number}", "reasoning": HOSTILE})
    write_manifest(folder, rows)
    return folder
