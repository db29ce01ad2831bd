"""A folder of a trained run, uploaded with its card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from segrl.errors import SegRLError
from segrl.hub import check_token, hub_licence, is_hub_name, upload_files
from segrl.models.saved_files import read_object
from segrl.publishing.model_card import model_card
from segrl.publishing.run_files import ADAPTER, find_base, run_files

__all__ = ["publish_folder"]


def publish_folder(
    folder: str | os.PathLike,
    repository: str,
    *,
    run: str | os.PathLike | None = None,
    private: bool = False,
    overwrite: bool = False,
    base: str | None = None,
    licence: str | None = None,
    data: str | None = None,
) -> str:
    """Upload the published files of a run, `run_files`, with its `model_card`.

    Args:
        folder: The run, or a copy of it.
        repository: `owner/name`.
        run: The run that it is a copy of, for the card; `folder` when None.
        private: Let only its owner see a new repository.
        overwrite: Add a commit to a repository that exists.
        base: The model on the hub that it began with; that of `find_base` when None.
        licence: Identifier of the licence; None takes the one that the card of the base model names.
        data: Name of the training data; None takes the last part of the run's `--data`.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: As `run_files`.
        SegRLError: As `segrl.hub.upload_files`, or an adapter of a model that is not on the hub.

    Example:
        >>> publish_folder("no_run", "acme/nodules")
        Traceback (most recent call last):
        segrl.errors.CheckpointError: 'no_run': no such folder; expected the output directory of a run
    """
    if base is not None and not is_hub_name(base):
        raise SegRLError(f"base {base!r}: expected the name of a model on the hub, owner/name")
    files = run_files(folder)
    base = base or find_base(folder if run is None else run)
    if ADAPTER in files and base is None:
        written = read_object(files[ADAPTER]).get("base_model_name_or_path")
        raise SegRLError(
            f"{str(folder)!r}: an adapter of {written!r}, which others do not have; pass --base owner/name, or --merge"
        )
    check_token(repository)
    licence = licence or (None if base is None else hub_licence(base))
    card = model_card(folder, repository, run=run, base=base, licence=licence, data=data)
    with TemporaryDirectory() as scratch:
        if ADAPTER in files:  # as it was trained, it may name a folder of this machine
            named = {**read_object(files[ADAPTER]), "base_model_name_or_path": base}
            files[ADAPTER] = Path(scratch, ADAPTER)
            files[ADAPTER].write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        return upload_files(files, card, repository, private=private, overwrite=overwrite)
