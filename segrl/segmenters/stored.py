"""Any segmenter as two files of a folder, and any segmenter from what a user types."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from segrl.errors import CheckpointError, SegRLError
from segrl.files.whole import whole_file
from segrl.models.saved_files import check_counts, read_object, read_weights, require_shapes
from segrl.registry.parts import build_part, check_settings, part_config
from segrl.segmenters.registry import SEGMENTERS
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, SEGMENTER_WEIGHTS, Sam2Config, Sam2Segmenter

__all__ = ["load_segmenter", "save_segmenter"]


def save_segmenter(segmenter: Any, folder: str | os.PathLike) -> None:
    """Write `segmenter.json` and `segmenter.safetensors` into a folder, which is made.

    Args:
        segmenter: A `Segmenter` whose class is registered or can be imported.
        folder: Where `load_segmenter` finds it.

    Raises:
        SegRLError: Its class is local and not registered.

    Example:
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> save_segmenter(Sam2Segmenter(Sam2Config(image_size=64)), "frozen")
        >>> sorted(path.name for path in Path("frozen").iterdir())
        ['segmenter.json', 'segmenter.safetensors']
    """
    if isinstance(segmenter, Sam2Segmenter):
        segmenter.save_pretrained(folder)
        return
    path = Path(folder)
    config = part_config(SEGMENTERS, segmenter)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in segmenter.state_dict().items()}
    with whole_file(path / SEGMENTER_WEIGHTS) as unfinished:
        save_file(state, unfinished, metadata={"format": "pt"})
    (path / SEGMENTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_segmenter(source: str | os.PathLike, config: Sam2Config | None = None) -> Any:
    """Load a segmenter.

    Args:
        source: A folder that `save_segmenter` wrote; weights of the `sam2` package, a `.pt` file or
            `owner/name:file.pt` on the hub; or `NAME:SOURCE` with the name of a registered segmenter and what its
            `from_pretrained` takes, such as `sam:facebook/sam-vit-base`, `sam:sam-med2d_b.pth` or
            `sam2_transformers:facebook/sam2.1-hiera-tiny`.
        config: Sizes of the model that wrote a file of the `sam2` package.

    Raises:
        CheckpointError: There is no such file, folder or repository, or weights do not fit.

    Example:
        >>> from segrl.segmenters import Sam2Config, Sam2Segmenter
        >>> save_segmenter(Sam2Segmenter(Sam2Config(image_size=64)), "frozen")
        >>> load_segmenter("frozen").image_size, load_segmenter("sam2:frozen").image_size
        (64, 64)
    """
    name, found, rest = os.fspath(source).partition(":")
    if found and name in SEGMENTERS.names() and name != "sam2":
        return SEGMENTERS.get(name).from_pretrained(rest)
    place = rest if found and name == "sam2" else os.fspath(source)
    path = Path(place) / SEGMENTER_CONFIG
    if path.is_file() and "type" in (values := read_object(path)):
        return _from_folder(path, values)
    return Sam2Segmenter.from_pretrained(place, config)


def _from_folder(path: Path, config: dict[str, Any]) -> Any:
    weights = path.with_name(SEGMENTER_WEIGHTS)
    if ":" not in str(config["type"]):
        check_counts(path, config, weights)
    try:
        with torch.random.fork_rng(devices=[]):
            made = build_part(SEGMENTERS, config, {})
        check_settings(made, config)
    except Exception as error:  # whatever a part's class raises
        reason = f"{error}" if isinstance(error, SegRLError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: {reason}; restore the file from the run") from error
    require_shapes(weights, {name: value.shape for name, value in made.state_dict().items()})
    made.load_state_dict(read_weights(weights))
    return made
