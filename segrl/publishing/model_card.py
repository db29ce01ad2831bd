"""The model card of a published run: what it does, what it was made of, how good it is, and how to ask it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from segrl._version import __version__
from segrl.errors import CheckpointError
from segrl.heads.head_file import HEAD_CONFIG
from segrl.models.saved_files import read_object
from segrl.predictions.prompt_settings import SETTINGS_FILE, PromptSettings, load_prompt_settings
from segrl.publishing.run_files import ADAPTER, find_base, run_arguments
from segrl.segmenters.sam2 import SEGMENTER_CONFIG

__all__ = ["model_card"]

_STAGES = {"baseline": "best constant mask", "oracle": "true boxes", "stage1": "stage 1", "stage2": "stage 2"}
_MODELS = ("stage1", "stage2", "control", "model")
# name in results.json: title, factor to what is shown, decimals
_SCORES = {
    "mdice": ("mean Dice %", 100.0, 1),
    "miou": ("mean IoU %", 100.0, 1),
    "box_f1": ("box F1 %", 100.0, 1),
    "fail": ("Failure Rate %", 100.0, 1),
    "nsd": ("NSD %", 100.0, 1),
    "hd95_mm": ("HD95 mm", 1.0, 1),
}
_SHOWN = ("instruction", "reasoning", "frame_kind", "max_edge", "slices", "size", "seg_token", "max_new_tokens")
_NOTICE = (
    "**For research. Not a medical device.** It has not been evaluated for use with patients. It also answers where "
    "it is wrong, and its masks and texts must not be used for diagnosis or treatment."
)


def model_card(
    folder: str | os.PathLike,
    repository: str,
    *,
    run: str | os.PathLike | None = None,
    base: str | None = None,
    licence: str | None = None,
    data: str | None = None,
) -> str:
    """Return the model card of a run, `README.md` of its repository.

    Args:
        folder: What is published.
        repository: `owner/name`, for the commands.
        run: The run that it is a copy of, `folder` when None; `results.json` in it, or in its `evaluation/`, gives the
            scores.
        base: The model on the hub that it began with; that of `find_base` when None.
        licence: Identifier of the licence, such as "apache-2.0"; None says that it is not stated.
        data: Name of the training data; None takes the last part of the run's `--data`.

    Raises:
        CheckpointError: There is no run.

    Example:
        >>> from segrl.predictions import ImagePromptSettings
        >>> ImagePromptSettings(max_edge=512).save(".")
        >>> card = model_card(".", "acme/nodules", licence="apache-2.0")
        >>> card.splitlines()[1:3], "Not a medical device" in card, "Not evaluated" in card
        (['library_name: segrl', 'license: apache-2.0'], True, True)
    """
    path, run = Path(folder), Path(folder if run is None else run)
    settings = load_prompt_settings(path)
    if settings is None:
        raise CheckpointError(f"{str(folder)!r}: no {SETTINGS_FILE}; expected the output directory of a run")
    base = base or find_base(run)
    adapter = (path / ADAPTER).is_file()
    results = next((read_object(file) for file in _results(run) if file.is_file()), {})
    known = run_arguments(run)
    parts = [
        _front(settings, base, licence, adapter),
        f"# {repository.partition('/')[2]}\n\n{_NOTICE}",
        f"## Task\n\n{_task(path, settings)}",
        f"## How to ask\n\n{_ask(repository, settings)}",
        f"## Model\n\n{_model(base, adapter, known)}",
        f"## Data\n\n{_data(known, results, data)}",
        f"## Results\n\n{_scores(results)}",
        f"## Licence\n\n{_licence(base, licence)}",
        f"Trained and published with segrl {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _results(path: Path) -> list[Path]:
    return [path / "results.json", path / "evaluation" / "results.json"]


def _front(settings: PromptSettings, base: str | None, licence: str | None, adapter: bool) -> str:
    fields: dict[str, Any] = {"library_name": "segrl"}
    if licence is not None:
        fields["license"] = licence
    if base is not None:
        fields |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    fields |= {
        "pipeline_tag": "image-segmentation",
        "tags": ["reasoning-segmentation", "medical-imaging", settings.task],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()}\n---"


def _task(path: Path, settings: PromptSettings) -> str:
    what = "an image" if settings.task == "images" else "a volume, of which it sees numbered slices,"
    words = "reasons in words and answers" if settings.reasoning else "answers"
    if (path / HEAD_CONFIG).is_file():
        mask = "The mask comes from a head that reads the state of its segmentation token (`mask_head.json`)."
    elif any((place / SEGMENTER_CONFIG).is_file() for place in (path, path.parent)):
        mask = "A frozen segmenter turns the boxes that it writes into a mask (`segmenter.json`)."
    else:
        mask = "It writes boxes; pass `segmenter=` for masks."
    return f"Reasoning segmentation: asked about {what} it {words} with a text, boxes and a segmentation mask. {mask}"


def _ask(repository: str, settings: PromptSettings) -> str:
    name, query = ("image.png", "Where is the nodule?") if settings.task == "images" else ("scan.nii.gz", "the tumour")
    shown = {key: value for key, value in asdict(settings).items() if key in _SHOWN and value not in (None, "")}
    lines = "\n".join(f"| {key} | {_cell(value)} |" for key, value in shown.items())
    return (
        f'```bash\npip install segrl\nsegrl predict {repository} {name} "{query}" -o out/\n```\n\n'
        "```python\nimport segrl.inference\n\n"
        f"model = segrl.inference.load({repository!r})\n"
        f"answer = model.predict({name!r}, {query!r})\nanswer.reasoning, answer.boxes, answer.mask\n```\n\n"
        "It is asked as in training, from `segrl.json`; images and questions of another kind than its data may get "
        f"worse answers.\n\n| setting | value |\n| --- | --- |\n{lines}"
    )


def _model(base: str | None, adapter: bool, known: Mapping[str, Any]) -> str:
    if base is not None:
        form = "as a PEFT adapter" if adapter else "with all weights in this repository"
        return f"Base model: [{base}](https://huggingface.co/{base}), trained further, {form}."
    if known.get("preset") == "tiny":
        return "A demonstration: a tiny model that began with random weights. It knows nothing but its training data."
    return "The base model is not stated."


def _data(known: Mapping[str, Any], results: Mapping[str, Any], data: str | None) -> str:
    name = data or (Path(str(known["data"])).name if known.get("data") else None)
    if name is None:
        preset = known.get("preset")
        name = "synthetic lesions that segrl generates" if preset == "tiny" else "not stated"
    counts = {key: results[key]["n"] for key in _MODELS if isinstance(results.get(key), dict) and "n" in results[key]}
    tested = f" Evaluated on {next(reversed(counts.values()))} held-out samples." if counts else ""
    return f"Trained on: {_cell(name)}.{tested}"


def _scores(results: Mapping[str, Any]) -> str:
    stages = {key: value for key, value in results.items() if key in (*_STAGES, *_MODELS) and isinstance(value, dict)}
    columns = [key for key in _SCORES if any(isinstance(stage.get(key), int | float) for stage in stages.values())]
    if not columns:
        return "Not evaluated. `segrl eval --model RUN --data FOLDER` measures it, before the next push."
    order = [key for key in ("baseline", "oracle", *_MODELS) if key in stages]
    lines = ["| | n | " + " | ".join(_SCORES[key][0] for key in columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for key in order:
        cells = [_score(stages[key], column) for column in columns]
        lines.append(f"| {_STAGES.get(key, key)} | {stages[key].get('n', '')} | {' | '.join(cells)} |")
    last = [_STAGES.get(key, key) for key in order if key in ("stage1", "stage2", "model")]
    which = f" The published weights are those of {last[-1]}." if last and len(order) > 1 else ""
    return "\n".join(lines) + f"\n\nMean and 95 % bootstrap interval over the samples; one training run.{which}"


def _score(stage: Mapping[str, Any], key: str) -> str:
    value = stage.get(key)
    if not isinstance(value, int | float):
        return ""
    _, factor, decimals = _SCORES[key]
    interval = stage.get("ci95", {}).get(key)
    ends = [end for end in interval or () if isinstance(end, int | float)]
    inside = f" ({ends[0] * factor:.{decimals}f} to {ends[1] * factor:.{decimals}f})" if len(ends) == 2 else ""
    return f"{value * factor:.{decimals}f}{inside}"


def _licence(base: str | None, licence: str | None) -> str:
    said = f"`{licence}`." if licence else "Not stated by its author."
    of_base = (
        ""
        if base is None
        else f" The licence of [{base}](https://huggingface.co/{base}) applies to what is made of it."
    )
    return f"{said}{of_base} segrl itself is Apache-2.0. Data sets have licences of their own."


def _cell(value: Any) -> str:
    """A value as one line that Markdown does not interpret."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#!~$])", r"\\\1", text)
