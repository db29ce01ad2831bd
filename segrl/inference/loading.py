"""`load`: a run of either task, ready to be asked; `push`: a run on the hub, where `load` finds it by its name."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

from segrl.errors import CheckpointError, SegRLError
from segrl.hub import check_token
from segrl.inference.base import find_run
from segrl.inference.images import ReasoningSegmenter
from segrl.inference.volumes import VolumeSegmenter
from segrl.predictions.prompt_settings import SETTINGS_FILE, load_prompt_settings
from segrl.publishing import publish_folder, run_files
from segrl.publishing.run_files import ADAPTER

__all__ = ["load", "push"]


def load(name: str | os.PathLike, **kwargs: Any) -> ReasoningSegmenter | VolumeSegmenter:
    """Load a run of either task: `segrl.json` says which segmenter it needs.

    Args:
        name: The run's output directory, one of its checkpoints, or a hub repository `owner/name`.
        kwargs: See `ReasoningSegmenter.from_pretrained` and `VolumeSegmenter.from_pretrained`.

    Raises:
        CheckpointError: There is no run, or its files do not fit together.

    Example:
        >>> from segrl.models import tiny_qwen3_vl
        >>> VolumeSegmenter(*tiny_qwen3_vl()).save_pretrained("run")
        >>> type(load("run", device="cpu")).__name__
        'VolumeSegmenter'
    """
    path = find_run(name)
    settings = load_prompt_settings(path)
    if settings is None:
        raise CheckpointError(f"{str(name)!r}: no {SETTINGS_FILE}; expected the output directory of a run")
    kinds = {kind.settings_class.task: kind for kind in (ReasoningSegmenter, VolumeSegmenter)}
    return kinds[settings.task].from_pretrained(path, **kwargs)


def push(
    run: str | os.PathLike, repository: str, *, merge: bool = False, base: str | None = None, **settings: Any
) -> str:
    """Upload a run to the hub: model or adapter, mask head, segmenter, prompt settings and a model card.

    Only safetensors and JSON leave: no answers or pictures of the test data, no pickles, no command line.

    Args:
        run: The run's output directory, or one of its checkpoints.
        repository: `owner/name`.
        merge: Fold a PEFT adapter into its base model, so that the repository needs no other.
        base: Hub name of the model that it began with, where the run does not know it.
        settings: `private`, `overwrite`, `licence` and `data` of `segrl.publishing.publish_folder`.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: There is no run, or its files do not fit together.
        SegRLError: As `segrl.publishing.publish_folder`, or there is no adapter to merge.

    Example:
        >>> push("no_run", "acme/nodules")
        Traceback (most recent call last):
        segrl.errors.CheckpointError: 'no_run': no such folder; expected the output directory of a run
    """
    files = run_files(run)
    if not merge:
        return publish_folder(run, repository, base=base, **settings)
    if ADAPTER not in files:
        raise SegRLError(f"{str(run)!r}: --merge, and the run holds no adapter; drop the flag")
    check_token(repository)
    with TemporaryDirectory() as folder:
        load(run, merge=True, device="cpu").save_pretrained(folder)
        return publish_folder(folder, repository, run=run, base=base, **settings)
