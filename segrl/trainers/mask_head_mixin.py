"""Shared by both trainers: a mask head beside the language model in construction, optimiser, saving and loading.

TRL's trainer never sees the head while it is built, saved or loaded: PEFT would freeze, wrap or copy it, a reference
model would duplicate it, and `save_pretrained` would mix it into the language model's files. The head has files of
its own in the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from segrl.caching.feature_cache import FeatureCache
from segrl.data.row_texts import check_row_texts
from segrl.errors import CheckpointError, SegRLError
from segrl.heads.attach import attach_mask_head, detach_mask_head, find_mask_head, without_prefix
from segrl.heads.dense import DenseLoss, check_dense_losses, dense_terms
from segrl.heads.mask_head import MaskHead
from segrl.heads.requests import MaskRequest
from segrl.models.agreement import check_processor
from segrl.models.loading import restore_weights
from segrl.predictions.prompt_settings import PromptSettings
from segrl.trainers import engines
from segrl.trainers.checkpoints import check_checkpoint, newest_checkpoint, write_manifest
from segrl.trainers.config import SegSFTConfig
from segrl.trainers.validation import Validate, ValidationMixin, no_rows_asked

__all__ = ["MaskHeadMixin", "default_args", "head_detached"]


def default_args(config: Callable[[str], Any], model: Any, suffix: str) -> Any:
    """TRL's default settings of a trainer, whose output folder has the model's name."""
    name = model if isinstance(model, str) else (getattr(model.config, "_name_or_path", "") or "model")
    return config(f"{name.rstrip('/').split('/')[-1]}-{suffix}")


@contextmanager
def head_detached(model: Any) -> Iterator[MaskHead | None]:
    """Take the mask head off `model` inside the context. A model without one is left alone."""
    head = detach_mask_head(model)
    try:
        yield head
    finally:
        if head is not None:
            attach_mask_head(model, head)


class MaskHeadMixin(ValidationMixin):
    """Mixin before a TRL trainer: `class SegXTrainer(MaskHeadMixin, XTrainer)`."""

    mask_head: MaskHead | None = None
    _head_state: dict[str, Tensor] | None = None  # whole weights, while an engine's model is saved
    dense_losses: Sequence[DenseLoss] = ()
    prompt_settings: PromptSettings | None = None
    _text_term: str  # name of TRL's own loss in the logs

    def _init_joint(
        self, model: Any, dense_losses: Sequence[DenseLoss] | None, args: Any, validate: Validate | None, build: Any
    ) -> None:
        """Run TRL's `__init__` (`build`) with the head off the model, then put it on the model that TRL prepared."""
        self.validate = validate
        self.dense_losses = check_dense_losses(dense_losses)
        head = None if isinstance(model, str) else find_mask_head(model)
        if self.dense_losses and head is None:
            raise SegRLError(
                f"dense_losses={self.dense_losses} need mask logits, but the model has no mask head; "
                "call attach_mask_head(model, head) first"
            )
        trained: Any = model
        if head is not None:
            detach_mask_head(model)
        try:
            with no_rows_asked(args, validate):
                build()
            trained = self.model  # type: ignore[attr-defined]
        finally:
            if head is not None:
                attach_mask_head(trained, head)
        _name_missing_bias(trained)
        if head is not None:
            if getattr(self.args, "save_strategy", "no") != "no":  # type: ignore[attr-defined]
                head.check_saving()  # now, not at the first checkpoint
            head.freeze()
            if not self.dense_losses:
                head.requires_grad_(False)  # masks for rewards only
            head.cache = _feature_cache(self.args, head.cache)  # type: ignore[attr-defined]
            engines.prepare_head(self.accelerator, head)  # type: ignore[attr-defined]
            self.add_callback(engines.CheckUnits(self))  # type: ignore[attr-defined]
        self.mask_head = head

    def _keep_settings(self, settings: PromptSettings | None) -> None:
        """Remember what `_save` writes: the prompt settings, with what the training rows add to them."""
        self.prompt_settings = None if settings is None else settings.for_rows(self.train_dataset)  # type: ignore[attr-defined]

    def _check_inputs(self) -> bool:
        """Check processor and texts before training; returns False where a stream has to be checked by the batch.

        Without images and without a task the trainer is TRL's, whose users may write any token.
        """
        trainer: Any = self
        check_processor(trainer.model, trainer.processing_class)
        if trainer.task is None and not hasattr(trainer.processing_class, "tokenizer"):
            return True
        datasets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
        return check_row_texts(datasets, trainer.processing_class)

    def _mode(self) -> str:
        """TRL's key of the metrics: "train" or "eval"."""
        trainer: Any = self
        return "train" if trainer.model.training else "eval"

    # ---- loss --------------------------------------------------------------------------------------------------------

    def _joint_loss(self, loss: Tensor, weight: float, request: MaskRequest | None, scale: float, mode: str) -> Tensor:
        """`weight * loss + scale * sum_i weight_i * term_i`, every term logged raw and weighted."""
        total = loss if weight == 1.0 else weight * loss
        if request is None:
            return total
        terms, statistics = dense_terms(self.dense_losses, request)
        trainer: Any = self
        metrics = trainer._metrics[mode]
        for item in self.dense_losses:
            total = total + scale * item.weight * terms[item.name]
            value = trainer.accelerator.gather(terms[item.name].detach()).mean().item()
            metrics[f"dense/{item.name}"].append(value)
            metrics[f"dense/{item.name}_weighted"].append(item.weight * value)
        text = trainer.accelerator.gather(loss.detach()).mean().item() / scale
        metrics[f"{self._text_term}"].append(text)
        metrics[f"{self._text_term}_weighted"].append(weight * text)
        dice = statistics["dice"]
        overlap = (
            torch.stack([dice * len(request.rows), dice.new_tensor(len(request.rows))])
            if dice is not None and request.rows is not None
            else torch.zeros(2, device=loss.device)
        )
        joined = trainer.accelerator.reduce(overlap.float(), reduction="sum")
        if joined[1] > 0:
            metrics["mask/dice"].append((joined[0] / joined[1]).item())
        return total

    # ---- optimiser ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        fresh = trainer.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        rate = getattr(trainer.args, "head_learning_rate", None)
        if fresh and rate is not None and self.mask_head is not None:
            own = {id(parameter) for parameter in self.mask_head.parameters()}
            for group in list(optimizer.param_groups):
                head_params = [p for p in group["params"] if id(p) in own]
                if head_params:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    optimizer.add_param_group({**group, "params": head_params, "lr": rate})
        return optimizer

    # ---- files -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; what is resumed is complete, and a checkpoint of the last step is not trained further.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True for the newest complete one in `output_dir`.
            *args: As in transformers.
            **kwargs: As in transformers.

        Raises:
            CheckpointError: The checkpoint is incomplete, there is none, or one cannot be written.
        """
        trainer: Any = self
        if resume_from_checkpoint is True:
            resume_from_checkpoint, skipped = newest_checkpoint(trainer.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"resume_from_checkpoint=True: no complete checkpoint in {trainer.args.output_dir!r}"
                    + "".join(f"; {name}: {problem}" for name, problem in skipped.items())
                )
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
            engines.check_written_by(trainer.accelerator, os.fspath(resume_from_checkpoint))
            if (output := self._trained_already(resume_from_checkpoint)) is not None:
                return output
            if self.mask_head is not None and self._has_engine:  # before the engine takes the model: frozen weights too
                self.mask_head.load_weights(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _trained_already(self, folder: str) -> TrainOutput | None:
        """Load a checkpoint of the last step, from which transformers would train one step more; None for others."""
        trainer: Any = self
        state, args = TrainerState.load_from_json(str(Path(folder, TRAINER_STATE_NAME))), trainer.args
        same = state.global_step >= (args.max_steps if args.max_steps > 0 else state.max_steps)
        longer = args.max_steps <= 0 and args.num_train_epochs > state.num_train_epochs
        if not same or longer or self._has_engine:
            return None
        trainer._load_from_checkpoint(folder)
        trainer.state = state
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            trainer._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        with _written(f"checkpoint-{trainer.state.global_step} in {trainer.args.output_dir!r}"):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does, and the head beside it; all processes call this.

        With FSDP2 and `SHARDED_STATE_DICT` transformers writes no model. Here a checkpoint gets the head and its
        settings, and any other folder, such as that of the finished run, the whole model.
        """
        trainer: Any = self
        folder = output_dir if output_dir is not None else trainer.args.output_dir
        with _written(f"the model in {folder!r}"):
            if self.mask_head is not None and self._has_engine:
                self._head_state = engines.head_state(trainer.accelerator, trainer.model_wrapped, self.mask_head)
            try:
                super().save_model(output_dir, _internal_call)  # type: ignore[misc]
                if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(
                    trainer.accelerator.state.fsdp_plugin.state_dict_type
                ):
                    if _internal_call:
                        self._save_head(folder)
                    else:
                        self._save(folder, trainer.accelerator.get_state_dict(trainer.model))
            finally:
                self._head_state = None

    def _save_rng_state(self, output_dir: str) -> None:
        """The last files of a checkpoint but its state: when all processes have written theirs, sizes are kept."""
        trainer: Any = self
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            write_manifest(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        trainer: Any = self
        with self._without_head():
            super()._save(output_dir, None if state_dict is None else without_prefix(state_dict))  # type: ignore[misc]
        self._save_head(output_dir if output_dir is not None else trainer.args.output_dir)

    def _save_head(self, folder: str) -> None:
        """Write the files of the head and of the prompt settings, on the process that saves."""
        if not self.args.should_save:  # type: ignore[attr-defined]
            return
        os.makedirs(folder, exist_ok=True)
        if self.mask_head is not None:
            self.mask_head.save_pretrained(folder, self._head_state)
        if self.prompt_settings is not None:
            self.prompt_settings.save(folder)

    @property
    def _has_engine(self) -> bool:
        """Whether FSDP or DeepSpeed holds the model: it gathers, saves and restores weights by itself."""
        trainer: Any = self
        return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled

    def _without_head(self) -> Any:
        """Take the head off while transformers writes or reads a model; an engine names the weights itself."""
        has_head = self.mask_head is not None and not self._has_engine
        return head_detached(self.model) if has_head else nullcontext()  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load(
            resume_from_checkpoint,
            lambda: super(MaskHeadMixin, self)._load_from_checkpoint(resume_from_checkpoint, model),  # type: ignore[misc]
        )

    def _load_best_model(self) -> None:
        trainer: Any = self
        self._load(
            os.fspath(trainer.state.best_model_checkpoint),
            lambda: super(MaskHeadMixin, self)._load_best_model(),  # type: ignore[misc]
        )

    def _load(self, folder: str, load: Callable[[], None]) -> None:
        """Load model and head. For a whole model transformers' own way (`load`) would lose every renamed weight."""
        trainer: Any = self
        with self._without_head():
            if _is_whole(trainer, folder):
                restore_weights(trainer.model, folder)
            else:
                kinds = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
                load()
                for name, parameter in trainer.model.named_parameters():
                    if (kind := kinds.get(name, parameter.dtype)) != parameter.dtype:  # PEFT's float32, over 4 bit
                        parameter.data = parameter.data.to(kind)
        if self.mask_head is not None:
            engines.load_head(trainer.accelerator, trainer.model_wrapped, self.mask_head, folder)


@contextmanager
def _written(what: str) -> Iterator[None]:
    """Inside the context, reraise that a file cannot be written as one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is a RuntimeError of torch
        raise CheckpointError(
            f"{what} cannot be written: {' '.join(str(error).split())}; make room, then go on with "
            "--resume_from_checkpoint last"
        ) from error


def _feature_cache(args: Any, old: FeatureCache | None) -> FeatureCache:
    """The cache that the settings ask for (TRL's own have none: then the defaults); `old` if it is just that."""
    memory, folder, disk = (
        getattr(args, f"feature_cache_{name}", getattr(SegSFTConfig, f"feature_cache_{name}"))
        for name in ("memory", "dir", "disk")
    )
    new = FeatureCache(memory, folder, disk)
    return old if old is not None and old.__reduce__() == new.__reduce__() else new


def _name_missing_bias(model: Any) -> None:
    """Let TRL read `bias` of tied output embeddings that PEFT's `trainable_token_indices` wrapped.

    TRL's fused head reads `weight` and `bias` of that layer; the wrapper has the weight, with its trained rows, but no
    name `bias`, which ends in an AttributeError.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wrapped = getattr(layer, "original_module", None)
    if layer is not None and wrapped is not None and getattr(wrapped, "bias", None) is None:
        layer.register_parameter("bias", None)


def _is_whole(trainer: Any, folder: str) -> bool:
    """Whether `folder` holds what `save_pretrained` of a plain model in this process's memory wrote."""
    model, path = trainer.model, Path(folder)
    return (
        isinstance(model, PreTrainedModel)
        and not getattr(model, "_hf_peft_config_loaded", False)
        and not getattr(model, "is_quantized", False)
        and not trainer.is_fsdp_enabled
        and not trainer.is_deepspeed_enabled
        and (path / "config.json").is_file()
        and any(next(path.glob(pattern), None) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    )
