"""`SegSFTTrainer`: TRL's supervised fine-tuning plus dense losses on the answers' masks (CORE-Seg: `L_S1`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from segrl.data.row_texts import check_batch_texts
from segrl.errors import DataError, SegRLError
from segrl.heads.decoding import append_tokens
from segrl.heads.dense import DenseLoss
from segrl.heads.probes import query_tokens
from segrl.predictions.parsing import SEG_TOKEN
from segrl.predictions.prompt_settings import PromptSettings
from segrl.predictions.reserved_text import message_texts
from segrl.sharing.micro_batches import fill_padded
from segrl.tasks import Task, check_columns, make_task
from segrl.trainers import engines
from segrl.trainers.config import SegSFTConfig
from segrl.trainers.layer_settings import leave_unpacked, prepare_layers
from segrl.trainers.mask_head_mixin import MaskHeadMixin, default_args
from segrl.trainers.token_budget import Part, RowCollator, TokenBudgetMixin, join_rows
from segrl.trainers.validation import Validate

__all__ = ["SegCollator", "SegSFTTrainer"]


class SegCollator:
    """TRL's collator, plus `seg_inputs`: the segmenter's input and target of each row.

    Raises:
        DataError: A row's segmentation token is cut off by `max_length`, which would leave its mask untrained.
    """

    def __init__(self, collator: Any, task: Task) -> None:
        self.collator, self.task = collator, task

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        rows = self.task.read(examples)  # before TRL's collator, which rewrites the examples
        written = [_answer_text(example) for example in examples]
        batch = self.collator([{k: v for k, v in row.items() if k not in self.task.columns} for row in examples])
        self._check_length(examples, written, batch["input_ids"])
        batch["seg_inputs"] = self.task.seg_inputs(rows)
        return batch

    def _check_length(self, examples: Sequence[Mapping[str, Any]], written: Sequence[str], ids: Tensor) -> None:
        head, limit = self.task.head, getattr(self.collator, "max_length", None)
        token_id = None if head is None else getattr(head.probe, "token_id", None)
        if limit is None or token_id is None or ids.size(1) < limit:
            return
        kept = (ids == token_id).any(1).tolist()
        for number, text in enumerate(written):
            if SEG_TOKEN in text and not kept[number]:
                raise DataError(
                    f"{examples[number].get('name') or f'row {number} of the batch'}: max_length={limit} cuts "
                    f"{SEG_TOKEN!r} off the row, so no mask is learned from it; set max_length=None, or show smaller "
                    "images"
                )


def _answer_text(example: Mapping[str, Any]) -> str:
    return "".join(message_texts(example.get("completion") or (example.get("messages") or [])[-1:]))


class CheckedCollator:
    """A collator of streamed rows, whose texts cannot be checked before training: they are here."""

    def __init__(self, collator: Any, processor: Any) -> None:
        self.collator, self.processor = collator, processor

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        check_batch_texts(examples, self.processor)
        return self.collator(examples)


class SegSFTTrainer(MaskHeadMixin, TokenBudgetMixin, SFTTrainer):
    """`SFTTrainer` whose model also learns masks: `text_weight * L_txt + sum_i weight_i * term_i`.

    Called as TRL's trainer, with `dense_losses=[DenseLoss("dice_ce")]` for a model with a mask head. Masks are
    decoded inside TRL's own forward, at the `<seg>` of the completion (never of the prompt). Data set columns:
    `prompt`, `completion` (or `messages`), `image` or `images` (the first is segmented), `mask`; of volumes those of
    `segrl.data.prepare_volumes`, whose `key_slice` is segmented. `prompt_settings` are saved with the model as
    `segrl.json`. With `validate`, a function of the trainer, evaluations while training are what it returns, see
    `SegGRPOTrainer`.

    Without dense losses this is TRL's trainer, bit for bit.

    Raises:
        SegRLError: before training, for dense losses without a mask head, with packing or padding-free batches, where
            rows are not images, or on data without the columns that masks need.

    Example:
        >>> from segrl.heads import DenseLoss
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> model, processor = tiny_qwen2_5_vl()
        >>> args = SegSFTConfig("run", use_cpu=True, bf16=False, report_to="none")
        >>> SegSFTTrainer(model, args, dense_losses=[DenseLoss("dice")])
        Traceback (most recent call last):
        segrl.errors.SegRLError: dense_losses=[DenseLoss('dice', weight=1.0)] need mask logits, but the model has no ...
    """

    task: Task | None = None
    _text_term = "text"
    _tag_names = ("trl", "sft", "segrl")

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *positional: Any,
        dense_losses: Sequence[DenseLoss] | None = None,
        prompt_settings: PromptSettings | None = None,
        validate: Validate | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else default_args(SegSFTConfig, model, "SegSFT")
        if dense_losses and (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
            raise SegRLError("dense losses need one row per image: set packing=False and padding_free=False")
        self._init_joint(
            *(model, dense_losses, args, validate),
            lambda: SFTTrainer.__init__(self, model, args, *positional, **kwargs),
        )
        if self.dense_losses:
            columns = getattr(self.train_dataset, "column_names", None) or ()
            self.task = make_task(self.processing_class, prompt_settings, head=self.mask_head, columns=columns)
            check_columns({"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}, self.task.needed)
            self.data_collator = SegCollator(self.data_collator, self.task)
        if not self._check_inputs():
            self.data_collator = CheckedCollator(self.data_collator, self.processing_class)
        self._keep_settings(prompt_settings)
        leave_unpacked(self.model)
        prepare_layers(self)
        self._check_budget()

    def get_train_dataloader(self) -> Any:
        if self._budget is None:
            return super().get_train_dataloader()
        whole, self.data_collator = self.data_collator, RowCollator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole  # evaluation has batches

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task is not None:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.task.columns]))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "rows" in inputs:
            parts = self._parts(inputs["rows"], num_items_in_batch)
            return self._loss_in_parts(
                model, parts, lambda part: self.compute_loss(model, part, False, num_items_in_batch)
            )
        engines.gather_output_embeddings(model)  # for every micro-batch of a token budget
        weight = getattr(self.args, "text_weight", 1.0)
        mode = self._mode()
        steps = self.current_gradient_accumulation_steps if mode == "train" and num_items_in_batch is not None else 1
        request = None
        if self.dense_losses and self.mask_head is not None:
            seg_inputs = inputs.pop("seg_inputs")
            probed = inputs["labels"] != -100
            if (queries := query_tokens(self.mask_head.probe)) is not None:
                probed = _add_queries(inputs, probed, *queries)
            index, valid = self.mask_head.probe(inputs["input_ids"], probed)
            with self.mask_head.decode_next(index, valid, seg_inputs) as request:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss: Tensor = result[0] if return_outputs else result
        scale = 1.0 / steps
        if self._part is not None:
            loss, scale = self._part.loss * loss, self._part.rows * scale
        joint = self._joint_loss(loss, weight, request, scale, mode)
        return (joint, result[1]) if return_outputs else joint

    def _parts(self, rows: Sequence[Mapping[str, Any]], num_items_in_batch: Any) -> list[Part]:
        """The micro-batches of a batch of single rows, with what each of their losses counts in it."""
        assert self._budget is not None
        queries = None if self.mask_head is None else query_tokens(self.mask_head.probe)
        lengths = [row["input_ids"].size(1) + (0 if queries is None else queries[1]) for row in rows]
        if max(lengths) > self._budget:
            raise SegRLError(
                f"tokens_per_micro_batch={self._budget}: a row has {max(lengths)} tokens, which is the smallest number "
                "that works for it"
            )
        count = self._micro_batch_count(len(fill_padded(lengths, self._budget)))
        learned = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
        total, pad = max(1, sum(learned)), int(self._tokenizer.pad_token_id)  # type: ignore[arg-type]
        parts = []
        for part in fill_padded(lengths, self._budget, count):
            share, tokens = len(part) / len(rows), len(part) * lengths[part[0]]
            weight = sum(learned[row] for row in part) / total if num_items_in_batch is None else 1.0
            parts.append(Part(join_rows([rows[row] for row in part], pad), share, weight, tokens))
        return parts


def _add_queries(inputs: dict[str, Any], probed: Tensor, token_id: int, count: int) -> Tensor:
    """Put query tokens, which are not learned as text, behind each row of a batch; returns the mask for the probe."""
    ids, mask, new = append_tokens(inputs["input_ids"], inputs["attention_mask"], token_id, count)
    inputs |= {"input_ids": ids, "attention_mask": mask, "labels": F.pad(inputs["labels"], (0, count), value=-100)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if inputs.get(name) is not None:
            inputs[name] = F.pad(inputs[name], (0, count))
    return F.pad(probed, (0, count)) | new
