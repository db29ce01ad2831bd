"""Load, ask and save a trained model: what asking about images and about volumes has in common."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from segrl.errors import CheckpointError, DataError
from segrl.heads.attach import attach_mask_head, detach_mask_head
from segrl.heads.mask_head import HEAD_CONFIG, MaskHead
from segrl.models.backbone import base_instance
from segrl.models.loading import load_vlm

__all__ = ["SETTINGS", "SegmenterBase", "save_settings"]

SETTINGS = "segrl.json"


class SegmenterBase:
    """A trained model, its processor and how it is to be asked: what asking about images and volumes has in common.

    Args:
        model: a vision-language model, with a mask head or without.
        processor: its processor.
        settings: how the training data was built; saved with the model.
    """

    def __init__(self, model: Any, processor: Any, settings: dict[str, Any] | None = None) -> None:
        self.model, self.processor = model, processor
        self.settings = dict(settings or {})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        device: str | None = None,
        dtype: Any = None,
        merge: bool = False,
        trainable: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load what a segrl trainer saved: a full model or a PEFT adapter, the mask head, and the prompt settings.

        Args:
            folder: an output directory or one of its `checkpoint-*` folders.
            device: where to put it; a CUDA device if there is one when None.
            dtype: of the language model.
            merge: fold a PEFT adapter into the base model.
            trainable: let a PEFT adapter be trained further (all else is trainable by itself).
            kwargs: to `from_pretrained` of the language model.

        Raises:
            CheckpointError: no model there, or weights that do not fit.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(
                f"model folder {str(folder)!r} does not exist; pass an output directory of a segrl run"
            )
        model: Any
        if (path / "adapter_config.json").is_file():
            model, processor = _load_adapter(path, dtype, merge, trainable, kwargs)
        else:
            model, processor = load_vlm(str(path), dtype=dtype, **kwargs)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if (path / HEAD_CONFIG).is_file():
            attach_mask_head(model, MaskHead.from_pretrained(path, tokenizer=processor.tokenizer))
        settings = next((p / SETTINGS for p in (path, path.parent) if (p / SETTINGS).is_file()), None)
        model.eval()
        return cls(model, processor, json.loads(settings.read_text(encoding="utf-8")) if settings else None)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model, processor, mask head and prompt settings; `from_pretrained` gives the same predictions."""
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
        save_settings(path, self.settings)

    def push_to_hub(self, repository: str, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes to a hub repository, created if needed (not run in segrl's tests)."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            HfApi().create_repo(repository, exist_ok=True)
            return HfApi().upload_folder(repo_id=repository, folder_path=folder, **kwargs)

    @torch.no_grad()
    def _answer(
        self, conversations: Sequence[Any], generation: dict[str, Any], head: MaskHead | None = None
    ) -> tuple[list[list[int]], list[str], Any]:
        """One answer for each conversation, in one batch; greedy unless `generation` says otherwise.

        Args:
            conversations: messages whose image blocks hold their images.
            generation: to `model.generate`.
            head: a mask head that listens.

        Returns:
            The tokens that were generated, the texts up to the first end token, and what the head recorded.
        """
        inputs = self._inputs(conversations)
        options = {
            "do_sample": False,
            "max_new_tokens": self.settings.get("max_new_tokens") or 512,
            "suppress_tokens": _image_tokens(self.model),
            **generation,
        }
        if options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1:
            raise DataError(
                "num_beams and num_return_sequences must be 1: states of several beams cannot be told apart"
            )
        if not options["do_sample"]:
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        with head.record(last_only=True) if head is not None else nullcontext() as recording:
            output = self.model.generate(**inputs, **options)
        written = output[:, inputs["input_ids"].size(1) :].tolist()
        texts = self.processor.tokenizer.batch_decode([self._trimmed(row) for row in written], skip_special_tokens=True)
        return written, texts, recording

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
        configured = self.model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured]) | {
            self.processor.tokenizer.eos_token_id
        }
        stop = next((n for n, token in enumerate(ids) if token in ends), len(ids) - 1)
        return ids[: stop + 1]


def save_settings(folder: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write how a model is to be asked beside its files, as `segrl.json`, which `from_pretrained` reads."""
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (Path(folder) / SETTINGS).write_text(text, encoding="utf-8")


def _image_tokens(model: Any) -> list[int] | None:
    token = getattr(base_instance(model).config, "image_token_id", None)
    return None if token is None else [token]


def _load_adapter(path: Path, dtype: Any, merge: bool, trainable: bool, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from transformers import AutoProcessor

    base_name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base_name:
        raise CheckpointError(
            f"{path}/adapter_config.json: names no base model; set base_model_name_or_path to its folder or hub name"
        )
    base, _ = load_vlm(base_name, dtype=dtype, **kwargs)
    model: Any = PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    processor = AutoProcessor.from_pretrained(str(path))
    return (model.merge_and_unload() if merge else model), processor
