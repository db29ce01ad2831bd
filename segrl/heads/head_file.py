"""`mask_head.json`, the file that describes the parts of a mask head."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segrl.errors import CheckpointError
from segrl.models.saved_files import read_object

__all__ = ["HEAD_CONFIG", "HEAD_VERSION", "HEAD_WEIGHTS", "read_config"]

HEAD_CONFIG, HEAD_WEIGHTS = "mask_head.json", "mask_head.safetensors"
HEAD_VERSION = 1  # of mask_head.json; files without a version are read as version 1
_FORMER_NAMES = {"Sam2Segmenter": "sam2"}  # in files without a version


def read_config(path: Path, kinds: Iterable[str]) -> dict[str, Any]:
    """Read `mask_head.json`, and check what it holds down to the type of each part.

    Args:
        path: The file.
        kinds: Its keys that describe parts.

    Raises:
        CheckpointError: The file is missing, damaged or of a newer segrl; file and key are named.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {HEAD_CONFIG}; expected a folder written by a segrl trainer")
    config = read_object(path)
    version = config.setdefault("version", HEAD_VERSION)
    if version != HEAD_VERSION:
        raise CheckpointError(f"{path}: version: {version!r}; this segrl reads version {HEAD_VERSION}, update segrl")
    if not isinstance(config.get("freeze_encoder"), bool):
        raise CheckpointError(f"{path}: freeze_encoder: {config.get('freeze_encoder')!r}; expected true or false")
    for name in kinds:
        part = config.get(name)
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise CheckpointError(f"{path}: {name}: {part!r}; expected an object with the text 'type'")
        part["type"] = _FORMER_NAMES.get(part["type"], part["type"])
    return config
