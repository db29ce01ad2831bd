"""Load, ask and save a trained model: what asking about images and about volumes has in common."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch

from segrl.errors import CheckpointError, SegRLError
from segrl.heads.attach import attach_mask_head, detach_mask_head, find_mask_head
from segrl.heads.decoding import Completions, generation_states
from segrl.heads.mask_head import HEAD_CONFIG, MaskHead
from segrl.heads.probes import query_tokens
from segrl.hub import check_token, download_run
from segrl.inference.asking import Asked, seeded
from segrl.models.agreement import check_processor
from segrl.models.backbone import backbone_of, base_instance
from segrl.models.loading import load_vlm, seg_token_id
from segrl.models.saved_files import check_saved_files
from segrl.models.whole_loading import whole_loading
from segrl.predictions.prediction import Prediction
from segrl.predictions.prompt_settings import PromptSettings, load_prompt_settings
from segrl.predictions.reserved_text import check_reserved
from segrl.publishing import publish_folder
from segrl.segmenters.sam2 import SEGMENTER_CONFIG
from segrl.segmenters.stored import load_segmenter, save_segmenter
from segrl.sharing import PromptKey, enable_sharing, images_of, prefill_once
from segrl.tasks import Task

__all__ = ["SegmenterBase", "find_device", "find_run"]


_MODELS = ("config.json", "adapter_config.json")


class SegmenterBase:
    """A trained model, its processor and how it is asked; use `ReasoningSegmenter` or `VolumeSegmenter`.

    Args:
        model: A vision-language model, with a mask head or without.
        processor: Its processor.
        settings: How the training data was prepared; the task's defaults when None.
        segmenter: A frozen segmenter that turns written boxes into masks.

    Raises:
        CheckpointError: The settings are those of another task.
        SegRLError: The processor is not the model's, see `segrl.models.check_processor`.

    Example:
        >>> from segrl.inference import ReasoningSegmenter
        >>> from segrl.predictions import VolumePromptSettings
        >>> ReasoningSegmenter(None, None, VolumePromptSettings())
        Traceback (most recent call last):
        segrl.errors.CheckpointError: ReasoningSegmenter: the model was trained on volumes, expected a model of ...
    """

    settings_class: ClassVar[type[PromptSettings]]

    def __init__(
        self, model: Any, processor: Any, settings: PromptSettings | None = None, segmenter: Any = None
    ) -> None:
        settings = settings if settings is not None else self.settings_class()
        if not isinstance(settings, self.settings_class):
            raise CheckpointError(
                f"{type(self).__name__}: the model was trained on {settings.task}, expected a model of "
                f"{self.settings_class.task}; segrl.inference.load picks the class that fits"
            )
        if model is not None:
            check_processor(model, processor)
        self.model: Any = model
        self.processor, self.settings = processor, settings
        self.segmenter: Any = segmenter
        self.run: Path | None = None  # the folder that it was loaded from, for the model card
        self._shares: bool | None = None  # whether the model takes shared prompts; None: not yet tried

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        device: str | None = None,
        dtype: Any = None,
        merge: bool = False,
        trainable: bool = False,
        head: MaskHead | None = None,
        segmenter: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load what a segrl trainer saved: a full model or a PEFT adapter, the mask head, and the prompt settings.

        Args:
            folder: An output directory, one of its `checkpoint-*` folders, or a hub repository `owner/name`.
            device: Where to put it; a CUDA device if there is one when None.
            dtype: Of the language model.
            merge: Fold a PEFT adapter into the base model.
            trainable: Let a PEFT adapter be trained further (all else is trainable by itself).
            head: A mask head built in code, which gets the saved weights; None builds it from `mask_head.json`.
            segmenter: The frozen segmenter, or what `load_segmenter` takes; None takes the one that was saved with the
                run, if any.
            kwargs: To `from_pretrained` of the language model.

        Raises:
            CheckpointError: No model there, weights that do not fit, or a run of another task.
            SegRLError: There is no such device.
        """
        where, path = find_device(device), find_run(folder)
        settings = load_prompt_settings(path)
        if settings is not None and not isinstance(settings, cls.settings_class):
            raise CheckpointError(
                f"{str(folder)!r} is a run on {settings.task}, expected one on {cls.settings_class.task}; "
                "segrl.inference.load picks the class that fits"
            )
        model: Any
        if not any((path / file).is_file() for file in _MODELS):
            raise CheckpointError(
                f"{str(folder)!r}: holds no model ({' or '.join(_MODELS)}); expected the output directory of a run "
                "that has ended, or one of its checkpoints"
            )
        with whole_loading():
            if (path / "adapter_config.json").is_file():
                model, processor = _load_adapter(path, dtype, merge, trainable, kwargs)
            else:
                model, processor = load_vlm(str(path), dtype=dtype, **kwargs)
        model.to(where)
        if (path / HEAD_CONFIG).is_file():
            loaded = MaskHead.from_pretrained(path, tokenizer=processor.tokenizer, head=head)
            _check_token(loaded, processor.tokenizer, (settings or cls.settings_class()).seg_token, path / HEAD_CONFIG)
            attach_mask_head(model, loaded)
        model.eval()
        segmenter = _frozen_segmenter(path, segmenter)
        if segmenter is not None:
            segmenter.to(base_instance(model).device)
        made = cls(model, processor, settings, segmenter)
        made.run = path
        return made

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model, processor, mask head, segmenter and settings; `from_pretrained` gives the same predictions."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        head = detach_mask_head(self.model)
        try:
            self.model.save_pretrained(path)
        finally:
            if head is not None:
                attach_mask_head(self.model, head)
                head.save_pretrained(path)
        self.processor.save_pretrained(path)
        self.settings.save(path)
        if self.segmenter is not None:
            save_segmenter(self.segmenter, path)

    def push_to_hub(self, repository: str, **settings: Any) -> str:
        """Upload what `save_pretrained` writes to the hub, with a model card; see `segrl.publishing.publish_folder`.

        Args:
            repository: `owner/name`.
            settings: `private`, `overwrite`, `base`, `licence` and `data`.

        Returns:
            The commit's address.

        Raises:
            SegRLError: No token, a name that is taken, an adapter of a model that is not on the hub, or no upload.
        """
        check_token(repository)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish_folder(folder, repository, run=self.run or folder, **settings)

    @property
    def task(self) -> Task:
        """Reads answers and makes masks, as in training."""
        raise NotImplementedError

    def _check_texts(self, queries: Sequence[str]) -> None:
        """Refuse questions, and an instruction, that hold a token with a meaning for the processor.

        Raises:
            DataError: Names the question by its number from 0.
        """
        instruction = [("prompt settings", "instruction", self.settings.full_instruction)]
        check_reserved(instruction, self.processor, messages=True)
        asked = ((f"question {number}", "query", query) for number, query in enumerate(queries))
        check_reserved(asked, self.processor, seg_token=self.settings.seg_token)

    @torch.no_grad()
    def _predict(
        self,
        conversations: Sequence[Any],
        rows: Sequence[Any],
        asked: Asked,
        **mask_settings: Any,
    ) -> list[list[Prediction]]:
        """The answers to each conversation, all in one batch.

        Args:
            conversations: Messages whose image blocks hold their images.
            rows: What each conversation is about, as the task reads them.
            asked: How many answers each gets, and the settings of `model.generate`.
            mask_settings: To `add_masks` of the task.
        """
        task, head = self.task, find_mask_head(self.model)
        with seeded(asked.seed):
            completions, texts = self._answer(conversations, asked, head)
        repeated = [row for row in rows for _ in range(asked.samples)]
        reading = self.settings.completion_format.for_tokenizer(self.processor.tokenizer)
        reading = replace(reading, require_seg=reading.require_seg and head is not None)
        predictions = [reading.parse(text, row.frame) for text, row in zip(texts, repeated, strict=True)]
        inputs = task.seg_inputs(repeated, predictions)
        wanted = {"probabilities": asked.confident, **mask_settings}
        masks = task.add_masks(predictions, repeated, completions, inputs, **wanted)
        return [masks[n : n + asked.samples] for n in range(0, len(masks), asked.samples)]

    def _answer(
        self, conversations: Sequence[Any], asked: Asked, head: MaskHead | None
    ) -> tuple[Completions, list[str]]:
        """Generated tokens up to the first end token, with their states where a head listens, and their texts."""
        inputs = self._inputs(conversations)
        options = {
            "do_sample": False,
            "max_new_tokens": self.settings.max_new_tokens,
            "suppress_tokens": _image_tokens(self.model),
            "repetition_penalty": 1.0,  # as in training; the hub's files of Qwen2.5-VL hold another one
            "eos_token_id": sorted(self._ends()) or None,
            **asked.options(),
        }
        if not options["do_sample"]:
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        recorded = head.record(last_only=True) if head is not None else nullcontext()
        with recorded as recording, self._one_prefill(conversations, asked.samples):
            output = self.model.generate(**inputs, **options)
        written = output[:, inputs["input_ids"].size(1) :].tolist()
        ids = [self._trimmed(row) for row in written]
        queries = None if head is None else query_tokens(head.probe)
        completions = Completions.of(ids, base_instance(self.model).device, queries=queries)
        if head is not None and queries is not None:
            if asked.samples > 1:
                inputs = self._inputs([one for one in conversations for _ in range(asked.samples)])
            self._score(inputs, completions, head)
        elif recording is not None:
            completions.states = generation_states(recording, written)
        return completions, self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _one_prefill(self, conversations: Sequence[Any], samples: int) -> AbstractContextManager[None]:
        """Inside the context, each prompt is computed once for its samples, if the model's layers allow it.

        Otherwise each sample has a prompt of its own; the answers are the same.
        """
        if samples == 1:
            return nullcontext()
        if self._shares is None:
            self._shares = enable_sharing(self.model) is None
        if not self._shares:
            return nullcontext()
        counts = [len(images_of(one)) for one in conversations for _ in range(samples)]
        keys = [PromptKey((n,)) for n in range(len(conversations)) for _ in range(samples)]
        return prefill_once(backbone_of(base_instance(self.model)), keys, counts if any(counts) else None)

    def _score(self, inputs: Any, completions: Completions, head: MaskHead) -> None:
        """Get the states of completions whose query tokens were not generated, by one more forward."""
        whole = dict(inputs)
        whole["input_ids"] = torch.cat([inputs["input_ids"], completions.ids], 1)
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], completions.exists.long()], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in whole:
                whole[name] = torch.cat([whole[name], torch.zeros_like(completions.ids)], 1)
        with head.record() as recording:
            self.model(**whole, use_cache=False, logits_to_keep=1)  # the states are wanted, no logits
        completions.states = recording.calls[-1][:, -completions.ids.size(1) :]

    def _tokens(self, conversation: Any) -> int:
        """The length of a prompt, images included."""
        return int(self._inputs([conversation])["input_ids"].size(1))

    def _inputs(self, conversations: Sequence[Any]) -> Any:
        """Conversations as a padded batch on the model's device."""
        self.processor.tokenizer.padding_side = "left"
        batch = self.processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return batch.to(base_instance(self.model).device)

    def _trimmed(self, ids: list[int]) -> list[int]:
        """Completion tokens up to and with the first end token."""
        ends = self._ends()
        stop = next((n for n, token in enumerate(ids) if token in ends), len(ids) - 1)
        return ids[: stop + 1]

    def _ends(self) -> set[int]:
        """Tokens that end an answer: the model's, and the tokenizer's, which TRL trains with."""
        configured = self.model.generation_config.eos_token_id
        ends = {*(configured if isinstance(configured, list) else [configured]), self.processor.tokenizer.eos_token_id}
        return {token for token in ends if token is not None}


def find_device(name: str | None) -> torch.device:
    """Return a device by its name; None: a CUDA device if there is one, else the CPU.

    Raises:
        SegRLError: PyTorch knows no such name, or the machine has no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
        >>> find_device("gpu")
        Traceback (most recent call last):
        segrl.errors.SegRLError: device 'gpu': expected cpu, cuda, or cuda:N ...
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if there else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise SegRLError(f"device {name!r}: expected cpu, cuda, or cuda:N (CUDA devices here: {there})") from error
    if found.type == "cuda" and (found.index or 0) >= there:
        raise SegRLError(f"device {name!r}: this machine has {there} CUDA devices; pass another, or leave it out")
    return found


def find_run(name: str | os.PathLike) -> Path:
    """Return the folder of a run: a folder as it is, a hub repository `owner/name` after its download.

    Raises:
        CheckpointError: There is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if re.fullmatch(r"(?![.~])[^/]+/[^/]+", str(name)):  # the hub's client tells what is wrong with a name
        return download_run(str(name))
    raise CheckpointError(
        f"model folder {str(name)!r} does not exist; pass an output directory of a segrl run, or owner/name on the hub"
    )


def _check_token(head: MaskHead, tokenizer: Any, seg_token: str, path: Path) -> None:
    """Refuse a probe that listens to another token than the one that the model was taught to write."""
    token_id = getattr(head.probe, "token_id", None)
    if token_id is None or not seg_token:
        return
    expected = seg_token_id(tokenizer, seg_token)
    if token_id != expected:
        raise CheckpointError(
            f"{path}: probe: token_id {token_id} is not {seg_token!r}, which is {expected} in the tokenizer beside it; "
            "restore the file from the run"
        )


def _image_tokens(model: Any) -> list[int] | None:
    token = getattr(base_instance(model).config, "image_token_id", None)
    return None if token is None else [token]


def _frozen_segmenter(path: Path, given: Any) -> Any:
    """The segmenter that was given, or of which a path was, or that was saved with a run; None if there is none."""
    if isinstance(given, str | os.PathLike):
        return load_segmenter(given)
    home = next((folder for folder in (path, path.parent) if (folder / SEGMENTER_CONFIG).is_file()), None)
    return load_segmenter(home) if given is None and home is not None else given


def _load_adapter(path: Path, dtype: Any, merge: bool, trainable: bool, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from transformers import AutoProcessor

    check_saved_files(path)
    try:
        base_name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # whatever PEFT makes of wrong keys and types
        raise CheckpointError(f"{path}/adapter_config.json: {type(error).__name__}: {error}") from error
    if not base_name:
        raise CheckpointError(
            f"{path}/adapter_config.json: names no base model; set base_model_name_or_path to its folder or hub name"
        )
    base, _ = load_vlm(base_name, dtype=dtype, **kwargs)
    model: Any = PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    processor = AutoProcessor.from_pretrained(str(path))
    return (model.merge_and_unload() if merge else model), processor
