"""Weights that stand in for pretraining, kept for later runs: rows of a table differ in what comes after them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from segrl._version import __version__
from segrl.caching.content import content_key
from segrl.errors import CheckpointError
from segrl.files.whole import whole_file
from segrl.models.tiny_pretraining import Picture

__all__ = ["pictures_key", "reader_key", "train_once"]


def pictures_key(pictures: Sequence[Picture]) -> str:
    """Return a key of pictures in their order: images (W, H), kinds and (H, W) masks; no pictures have one, too.

    Example:
        >>> from PIL import Image
        >>> image = Image.new("RGB", (2, 2))
        >>> pictures = [Picture.from_mask(image, np.eye(2, dtype=bool), kind) for kind in ("cyst", "abscess")]
        >>> pictures_key(pictures) == pictures_key(pictures[::-1])
        False
    """
    return content_key(
        [
            (picture.image, None if picture.known is None else sorted(picture.known), _findings(picture))
            for picture in pictures
        ]
    )


def _findings(picture: Picture) -> list[tuple[str, np.ndarray]]:
    return [(finding.kind, finding.mask) for finding in picture.findings]


def reader_key(processor: Any) -> str:
    """Return a key of what a processor makes of texts and images; of models with equal weights it may differ.

    Example:
        >>> from segrl.models import tiny_qwen3_vl
        >>> processors = [tiny_qwen3_vl(corpus=[text])[1] for text in ("a dark cyst", "a dark cyst", "an abscess")]
        >>> len({reader_key(processor) for processor in processors})
        2
    """
    tokenizer, images = processor.tokenizer.backend_tokenizer.to_str(), processor.image_processor.to_json_string()
    return content_key(tokenizer, images, processor.chat_template)


def train_once(
    folder: str | os.PathLike[str] | None,
    part: str,
    module: nn.Module,
    made_of: Callable[[], Any],
    train: Callable[[], float],
) -> float:
    """Train a module with random weights, or load what an earlier run made of the same weights.

    A file of the folder is named after all that it was made of: other weights or another `config` at the start, other
    data, settings or versions of segrl and torch make another file. A mask head inside the module is neither trained
    nor kept.

    Args:
        folder: Where weights are kept, created if need be; None keeps none.
        part: What is trained, such as "vision".
        module: Trained in place, in eval mode afterwards.
        made_of: Returns all else that the weights depend on, see `segrl.caching.content_key`; not asked without a
            folder.
        train: Trains the module and returns a score.

    Returns:
        The score.

    Raises:
        CheckpointError: The folder is a file, or a file of it cannot be read.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> def train():
        ...     print("trained")
        ...     return float(layer.eval().weight.data.zero_().sum())
        >>> before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        >>> [train_once("kept", "layer", layer, lambda: [7], train) for _ in range(2) if layer.load_state_dict(before)]
        trained
        [0.0, 0.0]
    """
    if folder is None:
        return train()
    if Path(folder).exists() and not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: not a folder; name another one for weights that stand in for pretraining")
    start = [__version__, torch.__version__, repr(getattr(module, "config", None)), _weights(module)]
    path = Path(folder) / f"{part}-{content_key(part, start, made_of())}.safetensors"
    if path.is_file():
        return _loaded(path, module)
    score = train()
    with whole_file(path) as unfinished:
        own = {name: tensor.clone() for name, tensor in _weights(module).items()}  # files share no memory
        save_file(own, unfinished, {"score": repr(score)})
    return score


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if not name.startswith("mask_head.")}


def _loaded(path: Path, module: nn.Module) -> float:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
            score = float(file.metadata()["score"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error
    module.load_state_dict({**module.state_dict(), **weights})
    module.eval()
    return score
