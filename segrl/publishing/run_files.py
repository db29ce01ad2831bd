"""Files of a run that are published: the model, its head, its segmenter and its settings, and nothing else.

A run's folder also holds what must not leave: answers about its test data, pictures of it, states of the trainer in
pickles, and the command line with the paths of a machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segrl.errors import CheckpointError
from segrl.heads.head_file import HEAD_CONFIG, HEAD_WEIGHTS
from segrl.hub import is_hub_name
from segrl.models.saved_files import check_saved_files, read_object
from segrl.predictions.prompt_settings import SETTINGS_FILE, load_prompt_settings
from segrl.segmenters.sam2 import SEGMENTER_CONFIG, SEGMENTER_WEIGHTS

__all__ = ["ADAPTER", "find_base", "run_arguments", "run_files"]

ADAPTER = "adapter_config.json"
_ARGUMENTS = "segrl_run.json"
_MODEL = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(ADAPTER, "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *(HEAD_CONFIG, HEAD_WEIGHTS),
)
_SHARED = (SETTINGS_FILE, SEGMENTER_CONFIG, SEGMENTER_WEIGHTS)  # of a checkpoint they may be in the folder around it


def run_files(folder: str | os.PathLike) -> dict[str, Path]:
    """Return the files of a run that are published, by their names.

    Args:
        folder: The run's output directory, or one of its checkpoints.

    Raises:
        CheckpointError: There is no run with prompt settings, it has no weights in safetensors, or a file of it is
            missing or damaged.

    Example:
        >>> from segrl.inference import VolumeSegmenter
        >>> from segrl.models import tiny_qwen3_vl
        >>> VolumeSegmenter(*tiny_qwen3_vl()).save_pretrained("run")
        >>> Path("run", "predictions.json").write_text("[]")
        2
        >>> [name for name in run_files("run") if name.startswith(("model", "segrl", "pred"))]
        ['model.safetensors', 'segrl.json']
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{str(folder)!r}: no such folder; expected the output directory of a run")
    if load_prompt_settings(path) is None:
        raise CheckpointError(f"{str(folder)!r}: no {SETTINGS_FILE}; expected the output directory of a run")
    check_saved_files(path)
    found = {file.name: file for pattern in _MODEL for file in sorted(path.glob(pattern))}
    weights = "adapter_model.safetensors" if ADAPTER in found else "model*.safetensors"
    if not any(Path(name).match(weights) for name in found):
        raise CheckpointError(f"{str(folder)!r}: no {weights}; only safetensors are published, save the model in them")
    for name in _SHARED:
        home = next((place for place in (path, path.parent) if (place / name).is_file()), None)
        if home is not None:
            found[name] = home / name
    for one, other in ((HEAD_CONFIG, HEAD_WEIGHTS), (SEGMENTER_CONFIG, SEGMENTER_WEIGHTS)):
        if (one in found) != (other in found):
            raise CheckpointError(f"{str(folder)!r}: of {one} and {other} one is missing; copy the run again")
    return dict(sorted(found.items()))


def find_base(folder: str | os.PathLike) -> str | None:
    """Return the hub name of the model that a run began with; None if it began with random weights, or is not known.

    Args:
        folder: The run's output directory, or one of its checkpoints.

    Raises:
        CheckpointError: A file that would name it is damaged.

    Example:
        >>> _ = Path("adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
        >>> find_base(".")
        'acme/base'
    """
    path = Path(folder)
    adapter = read_object(path / ADAPTER) if (path / ADAPTER).is_file() else {}
    for value in (adapter.get("base_model_name_or_path"), run_arguments(path).get("model")):
        if isinstance(value, str) and is_hub_name(value) and not Path(value).exists():
            return value
    return None


def run_arguments(folder: Path) -> Mapping[str, Any]:
    """Return the arguments of the script that made a run; empty where it is not known.

    Args:
        folder: The run's output directory, or one of its checkpoints, whose arguments are in the folder around it.

    Raises:
        CheckpointError: `segrl_run.json` is damaged.
    """
    file = next((place / _ARGUMENTS for place in (folder, folder.parent) if (place / _ARGUMENTS).is_file()), None)
    found = {} if file is None else read_object(file).get("arguments")
    return found if isinstance(found, Mapping) else {}
