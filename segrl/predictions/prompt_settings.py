"""Prompt settings: how a model is asked and its answers are read, in data, training and inference alike.

One frozen dataclass per task. `segrl.json` in a run's folder is its text form, with the task and a version.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from segrl.errors import CheckpointError, DataError, SegRLError, UnknownNameError, unknown_name
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.frames import FrameKind
from segrl.predictions.modalities import modality_kind
from segrl.predictions.parsing import SEG_TOKEN, AnswerForm

__all__ = [
    "SETTINGS_FILE",
    "ImagePromptSettings",
    "PromptSettings",
    "VolumePromptSettings",
    "load_prompt_settings",
    "prompt_settings_from_dict",
]

SETTINGS_FILE = "segrl.json"
VERSION = 1
_CONTENTS: dict[str, str] = {
    "": "name the lesion and give its boxes [x1, y1, x2, y2]",
    "sentence": "name the lesion, give its boxes [x1, y1, x2, y2] and end with the mask token",
    "mask": "say that it follows, with the mask token",
    "json": 'JSON of the box of each lesion and a point inside, [{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}]',
}


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Prompt settings that both tasks share; use `ImagePromptSettings` or `VolumePromptSettings`.

    Attributes:
        instruction: Text after every question; None takes the task's default for `reasoning`, "" adds none.
        reasoning: Whether the model is asked for a `<think>` block, and a valid answer has one.
        frame_kind: Frame of the boxes that the model writes; None reads it off the processor (`frame_for`).
        seg_token: The segmentation token that ends every target answer; "" for a model without one.
        max_new_tokens: Token budget of an answer in inference and evaluation.

    Raises:
        UnknownNameError: An unknown frame kind.
        DataError: A value of another type, or a number below 1.

    Example:
        >>> from segrl.predictions import ImagePromptSettings
        >>> ImagePromptSettings(max_new_tokens=0)
        Traceback (most recent call last):
        segrl.errors.DataError: max_new_tokens=0: expected a whole number, 1 or more
    """

    instruction: str | None = None
    reasoning: bool = True
    frame_kind: FrameKind | None = None
    seg_token: str = SEG_TOKEN
    max_new_tokens: int = 512

    task: ClassVar[str] = ""
    same_between_stages: ClassVar[tuple[str, ...]] = ("frame_kind",)
    default_instruction: ClassVar[str] = ""
    answer_only_instruction: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), str(item.type))
        if self.frame_kind is not None and self.frame_kind not in get_args(FrameKind):
            raise unknown_name("frame_kind", self.frame_kind, get_args(FrameKind))

    @property
    def full_instruction(self) -> str:
        """The text that follows every question."""
        if self.instruction is not None:
            return self.instruction
        return self.default_instruction if self.reasoning else self.answer_only_instruction

    @property
    def completion_format(self) -> CompletionFormat:
        """Format in which answers to these prompts are parsed, apart from their frame."""
        raise NotImplementedError

    def for_rows(self, rows: Any) -> Self:
        """These settings with what the training rows, a data set or None, add to them: nothing for images."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values with `task` and `version`; `prompt_settings_from_dict` gives equal settings back."""
        return {"task": self.task, "version": VERSION, **dataclasses.asdict(self)}

    def save(self, folder: str | os.PathLike) -> None:
        """Write `segrl.json` into `folder`, which exists."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / SETTINGS_FILE).write_text(text, encoding="utf-8")

    def check_continues(self, earlier: PromptSettings, name: str) -> None:
        """Refuse to train a model further in another task, frame or picture size than it was trained in before.

        Instruction, reasoning and token budget may change between stages.

        Args:
            earlier: Settings of the earlier stage.
            name: What the user knows that stage by, such as "--model 'runs/sft'".

        Raises:
            SegRLError: The first setting that differs, with both values.
        """
        if earlier.task != self.task:
            raise SegRLError(f"{name} was trained on {earlier.task}, expected a run on {self.task}")
        for key in self.same_between_stages:
            was, now = earlier._comparable(key, self), self._comparable(key, earlier)
            if was != now:
                raise SegRLError(f"{name} was trained with {key}={was!r:.80}, here it is {now!r:.80}; use the same")

    def _comparable(self, key: str, other: PromptSettings) -> Any:
        """The value of a setting that must be the same in `other`."""
        return getattr(self, key)


@dataclass(frozen=True, kw_only=True)
class ImagePromptSettings(PromptSettings):
    """Prompt settings of images.

    Attributes:
        max_edge: Images with a longer edge are scaled down to it, in pixels; None allows any. CORE-Seg: 512.
        answer_form: What an answer holds: "sentence", the lesion and its boxes (CORE-Seg); "mask", the token alone
            (LISA); "json", a box and a point for each lesion, which both prompt a frozen segmenter (Seg-Zero,
            VisionReasoner).
        answer_tags: Whether answers stand between tags. Without, a text that has no tags is an answer as a whole, as
            LISA writes it and as models do that were not trained here; only where `reasoning` is off.

    Example:
        >>> ImagePromptSettings(max_edge=512).full_instruction[:27]
        'Think in <think></think>, t'
        >>> ImagePromptSettings(reasoning=False).full_instruction[:29]
        'Answer in <answer></answer>: '
    """

    max_edge: int | None = None
    answer_form: AnswerForm = "sentence"
    answer_tags: bool = True

    task: ClassVar[str] = "images"
    same_between_stages: ClassVar[tuple[str, ...]] = ("frame_kind", "seg_token", "max_edge", "answer_form")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_form not in get_args(AnswerForm):
            raise unknown_name("answer_form", self.answer_form, get_args(AnswerForm))
        if self.reasoning and not self.answer_tags:
            raise DataError("answer_tags=False with reasoning=True: nothing would part them; set one of the two")
        if self.answer_form == "mask" and not self.seg_token:
            raise DataError('answer_form="mask" with seg_token="": the answer would say nothing; give it a token')

    @property
    def full_instruction(self) -> str:
        """The text that follows every question."""
        if self.instruction is not None:
            return self.instruction
        content = _CONTENTS[self.answer_form if self.seg_token or self.answer_form == "json" else ""]
        if not self.answer_tags:
            return f"{content[0].upper()}{content[1:]}."
        joint = ", with " if self.answer_form == "json" else ": "
        start = "Think in <think></think>, then answer" if self.reasoning else "Answer"
        return f"{start} in <answer></answer>{joint}{content}."

    @property
    def completion_format(self) -> CompletionFormat:
        return CompletionFormat(
            seg_token=self.seg_token or SEG_TOKEN,
            require_seg=bool(self.seg_token),
            require_reasoning=self.reasoning,
            require_tags=self.answer_tags,
            answer_format="json" if self.answer_form == "json" else "text",
        )


@dataclass(frozen=True, kw_only=True)
class VolumePromptSettings(PromptSettings):
    """Prompt settings of volumes.

    Attributes:
        slices: Slices shown, at equal distances; a volume with fewer shows all of them. MedVol-R1: 64.
        size: Longest edge of a shown slice, in pixels; the aspect is that of its millimetres. MedVol-R1: 256.
        scaling: (modality, intensity) of the training rows, each pair once: inference scales a scan as training did.
            An intensity is the text form of `segrl.data.Intensity`; "" leaves the choice to `segrl.data.intensity_for`.
        postprocessing: Of the `VolumePropagator` that turns boxes into masks.

    Example:
        >>> VolumePromptSettings(scaling=(("CT", "window:-160:240"),)).scaling_for()
        ('CT', 'window:-160:240')
    """

    slices: int = 64
    size: int = 256
    seg_token: str = ""
    scaling: tuple[tuple[str, str], ...] = ()
    postprocessing: bool = True
    max_new_tokens: int = 256

    task: ClassVar[str] = "volumes"
    same_between_stages: ClassVar[tuple[str, ...]] = ("frame_kind", "seg_token", "slices", "size", "scaling")
    answer_only_instruction: ClassVar[str] = (
        "Answer in <answer></answer> with JSON: the slice that shows it best and its boxes on that slice, "
        '{"slice": number, "bbox_2d_list": [[x1, y1, x2, y2]]}.'
    )
    default_instruction: ClassVar[str] = (
        "Think in <think></think>, then answer in <answer></answer> with JSON: the slice that shows it best and its "
        'boxes on that slice, {"slice": number, "bbox_2d_list": [[x1, y1, x2, y2]]}.'
    )

    def __post_init__(self) -> None:
        given = self.scaling if isinstance(self.scaling, list | tuple) else None
        if given is None or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in given
        ):
            raise DataError(f"scaling={self.scaling!r:.100}: expected pairs of texts, (modality, intensity)")
        object.__setattr__(self, "scaling", tuple((modality, intensity) for modality, intensity in given))
        super().__post_init__()

    @property
    def completion_format(self) -> CompletionFormat:
        return CompletionFormat(
            seg_token=self.seg_token or SEG_TOKEN,
            require_seg=bool(self.seg_token),
            require_reasoning=self.reasoning,
            answer_format="json",
        )

    def for_rows(self, rows: Any) -> Self:
        """These settings with the `scaling` of data set rows.

        Rows without the two columns change nothing, nor does a stream, which would have to be read to its end.
        """
        columns = getattr(rows, "column_names", None) or ()
        if not hasattr(rows, "__len__") or "modality" not in columns or "intensity" not in columns:
            return self
        pairs: Iterable[tuple[Any, Any]] = zip(rows["modality"], rows["intensity"], strict=True)
        return replace(self, scaling=tuple(sorted({(str(m or ""), str(i or "")) for m, i in pairs})))

    def _comparable(self, key: str, other: PromptSettings) -> Any:
        if key != "scaling" or not isinstance(other, VolumePromptSettings):
            return super()._comparable(key, other)
        own, others = ({(modality_kind(m), i) for m, i in settings.scaling} for settings in (self, other))
        shared = {kind for kind, _ in own} & {kind for kind, _ in others}
        return tuple(sorted(pair for pair in own if pair[0] in shared))  # other data may have other modalities

    def scaling_for(self, modality: str = "", intensity: str = "") -> tuple[str, str]:
        """Return (modality, intensity) with which a scan is turned into grey values as in training.

        Args:
            modality: Of the scan, such as "CT" or "CT scan"; "" where it is not known.
            intensity: A scaling that is wanted in any case.

        Raises:
            DataError: The run was trained with several scalings, and the arguments do not say which one applies.
        """
        if intensity:
            return modality, intensity
        known = [pair for pair in self.scaling if not modality or pair[0].casefold() == modality.casefold()]
        if not known:
            known = [pair for pair in self.scaling if modality_kind(pair[0]) == modality_kind(modality)]
        known = list({(modality_kind(name), scaling): (name, scaling) for name, scaling in known}.values())
        if not known:
            return modality, intensity
        if len(known) > 1:
            listed = ", ".join(f"{m or 'no modality'}: {i or 'by its voxels'}" for m, i in known)
            fix = "intensity=" if modality else "modality= or intensity="
            raise DataError(f"modality {modality!r}: the run was trained with several scalings ({listed}); pass {fix}")
        return known[0]

    def scaling_of_row(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return (modality, intensity) with which a data set row is turned into grey values as in training.

        A row with an intensity has its own; so has a row as there were in training. Any other gets `scaling_for`.

        Raises:
            DataError: As `scaling_for`; names the row.

        Example:
            >>> VolumePromptSettings(scaling=(("CT", "window:0:80"),)).scaling_of_row({"modality": "CT scan"})
            ('CT', 'window:0:80')
        """
        modality, intensity = (str(row.get(column) or "") for column in ("modality", "intensity"))
        if (modality, intensity) in self.scaling:
            return modality, intensity
        try:
            return self.scaling_for(modality, intensity)
        except DataError as error:
            where = row.get("name") or row.get("scan") or "row"
            raise DataError(f"{where}: {str(error).partition('; pass ')[0]}; fill its column 'intensity'") from error


_TASKS: dict[str, type[PromptSettings]] = {kind.task: kind for kind in (ImagePromptSettings, VolumePromptSettings)}


def load_prompt_settings(folder: str | os.PathLike) -> PromptSettings | None:
    """Read `segrl.json` of a run's folder, or of the folder around a checkpoint.

    Returns:
        The settings; None where neither folder has the file.

    Raises:
        CheckpointError: It is no JSON object, is of a newer version or an unknown task, or has an unknown or mistyped
            value; names file and key.

    Example:
        >>> ImagePromptSettings(max_edge=96).save(".")
        >>> load_prompt_settings(".").max_edge, load_prompt_settings(".").task
        (96, 'images')
    """
    path = next((p / SETTINGS_FILE for p in (Path(folder), Path(folder).parent) if (p / SETTINGS_FILE).is_file()), None)
    if path is None:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore the file from the run") from error
    return prompt_settings_from_dict(data, str(path))


def prompt_settings_from_dict(data: Any, where: str = SETTINGS_FILE) -> PromptSettings:
    """Build the settings that `PromptSettings.to_dict` described; `where` names the file in errors.

    Raises:
        CheckpointError: As `load_prompt_settings`.

    Example:
        >>> prompt_settings_from_dict({"task": "images", "version": 1, "max_edge": 96}).max_edge
        96
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: holds a {type(data).__name__}, expected an object of settings")
    values = dict(data)
    version, task = values.pop("version", None), values.pop("task", None)
    if isinstance(version, bool) or not isinstance(version, int):
        raise CheckpointError(f"{where}: version={version!r}, expected a whole number up to {VERSION}")
    if version > VERSION:
        raise CheckpointError(f"{where}: version={version} is of a newer segrl, this one reads up to {VERSION}; update")
    try:
        if task not in _TASKS:
            raise unknown_name("task", str(task), _TASKS)
        known = [item.name for item in fields(_TASKS[task])]
        for key in values:
            if key not in known:
                raise unknown_name("key", str(key), known)
        return _TASKS[task](**values)
    except (DataError, UnknownNameError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_type(name: str, value: Any, kind: str) -> None:
    if kind.endswith("| None") and value is None:
        return
    if kind.startswith("bool"):
        fits, expected = isinstance(value, bool), "true or false"
    elif kind.startswith("int"):
        fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < math.inf
        expected = "a whole number, 1 or more"
    elif kind.startswith("tuple"):
        fits, expected = True, ""  # checked where it is declared
    else:
        fits, expected = isinstance(value, str), "a text"
    if not fits:
        raise DataError(f"{name}={value!r:.100}: expected {expected}{' or null' if kind.endswith('None') else ''}")
