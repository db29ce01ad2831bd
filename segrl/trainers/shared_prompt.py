"""TRL's GRPO with a prompt computed once for the G completions that answer it: in generation, scoring and loss.

What is overridden, and why (each calls `super()`):

- `_generate_and_score_completions`: images are preprocessed once; rows get the key of their prompt.
- `_generate`: reads these keys off the prompts as they were tokenised.
- `_generate_single_turn`: one prefill per prompt.
- `_get_per_token_logps_and_entropies`: one packed row for all completions of a micro-batch.
- `_prepare_inputs`: puts the answers to one prompt back side by side after TRL's shuffle.
- `_compute_loss`: says which rows share a prompt.
- `compute_loss`: divides the rows into micro-batches by `tokens_per_micro_batch` (see `token_budget`).

How it is done is in `segrl.sharing`, which knows nothing of TRL.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from segrl import sharing
from segrl.caching.content import ImageKeys
from segrl.caching.feature_cache import FeatureCache
from segrl.errors import SegRLError
from segrl.heads.attach import attach_mask_head, detach_mask_head
from segrl.models.backbone import backbone_of, base_instance
from segrl.sharing.packing import IMAGE_INPUTS
from segrl.sharing.support import COMPARED
from segrl.trainers.engines import is_sharding, synced_generation
from segrl.trainers.layer_settings import leave_unpacked, prepare_layers
from segrl.trainers.token_budget import NORMALIZERS, Part, TokenBudgetMixin, select_batch
from segrl.trainers.tried_shapes import TriedShapes, score_difference

__all__ = ["SharedPromptGRPOTrainer"]


class SharedPromptGRPOTrainer(TokenBudgetMixin, GRPOTrainer):
    """`GRPOTrainer` that heeds `share_prompt` of `SegGRPOConfig` (None means yes); off, it is `GRPOTrainer`.

    Also off with settings that do not have it, as TRL's own.

    Example:
        >>> from datasets import Dataset
        >>> from segrl.models import tiny_causal_lm
        >>> from segrl.trainers import SegGRPOConfig
        >>> model, tokenizer = tiny_causal_lm(layers=1)
        >>> args = SegGRPOConfig("run", use_cpu=True, bf16=False, report_to="none", share_prompt=True)
        >>> trainer = SharedPromptGRPOTrainer(
        ...     model,
        ...     lambda completions, **_: [0.0] * len(completions),
        ...     args,
        ...     train_dataset=Dataset.from_dict({"prompt": ["Where is it?"] * 8}),
        ...     processing_class=tokenizer,
        ... )
        >>> trainer._shares
        True
    """

    args: Any
    _buffered_inputs: Any
    _prompt_keys: list[sharing.PromptKey] | None = None  # of the rows that are to be scored next
    _image_keys: ImageKeys | None = None  # of one rollout
    _shares = False
    _share_by_default = True
    _warned = False  # whether the warning about inputs has been given
    _added_tokens = 0  # put behind each completion in scoring and loss
    _tried: TriedShapes | None = None  # batches that have gone through packed
    _untried = True  # whether the row that is scored now is larger than those

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        leave_unpacked(self.model)
        self._shares = self._wants_sharing and self._start_sharing()
        prepare_layers(self)
        self._check_budget()
        copies, length = (self.num_generations or 1) if self._shares else 1, self.max_completion_length or 0
        if self._budget is not None and self._budget <= copies * length:
            raise SegRLError(
                f"tokens_per_micro_batch={self._budget}: {copies} completions of up to "
                f"max_completion_length={length} tokens take {copies * length} tokens, and their prompt comes on top; "
                f"the smallest number that works is {copies * length} and the tokens of the longest prompt"
            )

    @property
    def _wants_sharing(self) -> bool:
        wanted = getattr(self.args, "share_prompt", False)
        return self._share_by_default if wanted is None else wanted

    def _start_sharing(self) -> bool:
        """Prepare policy and reference model for packed rows, or warn why they cannot take them."""
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        reason = None
        if self.aux_loss_enabled:
            reason = "the router's auxiliary loss counts every token; router_aux_loss_coef=0 leaves it out"
        if self.args.torch_compile:
            reason = "torch_compile=True would compile the model anew for every layout"
        for model in models:
            reason = reason or sharing.enable_sharing(model)
        if reason is not None:
            _warn(reason)
            return False
        for model in models:
            base = base_instance(model)
            sharded = is_sharding(self.accelerator)
            cache = None if sharded else FeatureCache(memory_bytes=self.args.feature_cache_memory)
            sharing.install_vision(backbone_of(base), base.get_decoder(), cache)
        return True

    # ---- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._image_keys = keys = ImageKeys()
        once = sharing.preprocess_once(self.processing_class, keys) if self._wants_sharing else nullcontext()
        try:
            with once:
                output = super()._generate_and_score_completions(inputs)
            if self._prompt_keys is not None:
                output["prompt_keys"] = self._prompt_keys  # type: ignore[assignment]  # a list, as num_images
        finally:
            self._prompt_keys = self._image_keys = None
        return output

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        if self._shares:
            prompt_ids, completion_ids, images = output[0], output[1], output[6]
            shown = images if images is not None else [sharing.images_of(prompt) for prompt in prompts]
            self._prompt_keys = self._keys(prompt_ids, shown)
            image = self._image_token  # TRL lets no model write it
            if any(token == image for row in completion_ids for token in row):
                self._prompt_keys = None  # tools answered with images, which are not the prompt's
        return output

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        once: Any = nullcontext()
        if self._shares:
            backbone = backbone_of(base_instance(self.accelerator.unwrap_model(self.model_wrapped)))
            counts = None if images is None else [len(group or ()) for group in images]
            once = sharing.prefill_once(backbone, self._keys(prompt_ids, images), counts)
        with once, synced_generation(self.accelerator, self.model_wrapped):
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _keys(self, prompt_ids: Sequence[Sequence[int]], images: Sequence[Any] | None) -> list[sharing.PromptKey]:
        read = self._image_keys or ImageKeys()
        groups: Sequence[Any] = images or [None] * len(prompt_ids)
        return [
            sharing.PromptKey(tuple(map(int, row)), tuple(map(read, group or ())))
            for row, group in zip(prompt_ids, groups, strict=True)
        ]

    @property
    def _image_token(self) -> int | None:
        config = base_instance(self.accelerator.unwrap_model(self.model)).config
        return getattr(config, "image_token_id", None)

    # ---- scoring -----------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        keys, rows, keep = self._prompt_keys, len(input_ids), logits_to_keep
        dense = super()._get_per_token_logps_and_entropies
        other = {name for name, value in images.items() if value is not None} - set(IMAGE_INPUTS)
        if not self._shares or keys is None or len(keys) != rows or compute_aux_loss or other:
            if self._shares and other and not self._warned:
                self._warned = True
                _warn(f"the model takes {', '.join(sorted(other))}, which cannot be shared")
            if batch_size is not None and self._training_budget is not None:
                batch_size = max(1, self._training_budget // input_ids.size(1))
            settings = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return dense(model, input_ids, attention_mask, keep, batch_size, **settings, **images)
        try:
            return self._packed_logps(model, input_ids, attention_mask, keep, batch_size, compute_entropy, **images)
        except (SegRLError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            if not self._untried:
                raise
            self._shares = False  # before training only a text was tried; TRL's pass raises what is not about sharing
            name = "first" if self._tried is None or not self._tried.tokens else "larger"
            _warn(f"the {name} batch did not go through packed: {type(error).__name__}: {error}")
            settings = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return dense(model, input_ids, attention_mask, keep, batch_size, **settings, **images)

    def _packed_logps(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        keep: int,
        batch_size: int | None,
        compute_entropy: bool,
        **images: Any,
    ) -> Any:
        """Score with one packed row for all completions of a micro-batch, where any share a prompt."""
        keys, rows = self._prompt_keys or [], len(input_ids)
        dense = super()._get_per_token_logps_and_entropies
        whole = self.accelerator.unwrap_model(model)
        backbone = backbone_of(base_instance(whole))
        compares = type(base_instance(whole)).__name__ not in COMPARED and not is_sharding(self.accelerator)
        self._tried = tried = self._tried or TriedShapes()
        results = []
        if batch_size is not None and self._training_budget is not None:
            parts = sharing.consecutive_parts(keys, attention_mask[:, -keep:].sum(1).tolist(), self._training_budget)
        else:
            starts = range(0, rows, batch_size or rows)
            parts = [range(start, min(start + (batch_size or rows), rows)) for start in starts]
        for part in parts:
            self._untried = True
            packed = sharing.pack_rows(backbone, input_ids, attention_mask, keep, keys, part, **images)
            ids, mask = input_ids[part.start : part.stop], attention_mask[part.start : part.stop]
            if packed is None:
                own = sharing.select_rows(part, **images)
                results.append(dense(model, ids, mask, keep, compute_entropy=compute_entropy, **own)[:2])
                continue
            self._untried = tried.outgrown(packed)
            if compares and tried.needs_comparison(packed):
                self._untried = True
                self._compare(whole, packed, ids, mask, keep, **sharing.select_rows(part, **images))
                tried.passed(packed, compared=True)
            with self.accelerator.autocast():
                output = model(**packed.inputs, shift_labels=packed.labels, fused_lm_head=True)
            tried.passed(packed)
            results.append((output.log_probs[:, :keep], output.entropy[:, :keep] if compute_entropy else None))
        entropies = torch.cat([entropy for _, entropy in results]) if compute_entropy else None
        return torch.cat([logps for logps, _ in results]), entropies, None

    @torch.no_grad()
    def _compare(self, model: Any, packed: sharing.Packed, ids: Tensor, mask: Tensor, keep: int, **images: Any) -> None:
        """Score a packed row and the same rows apart, both without dropout; raises if the scores differ."""
        training, head = model.training, detach_mask_head(model)  # the head waits for another forward
        model.eval()
        try:
            with self.accelerator.autocast():
                output = model(**packed.inputs, shift_labels=packed.labels, fused_lm_head=True)
            expected = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, **images)[0]
        finally:
            model.train(training)
            if head is not None:
                attach_mask_head(model, head)
        difference = score_difference(output.log_probs[:, :keep], expected, packed.labels[:, :keep])
        exact = next(model.parameters()).dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if not difference < (1e-2 if exact else 1.0):
            name = type(base_instance(model)).__name__
            raise RuntimeError(
                f"log-probabilities of {name} differ by {difference:.2g} from those of rows of their own"
            )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or "prompt_keys" not in inputs or len(self._buffered_inputs) == 1:
            return inputs
        self._buffered_inputs = _side_by_side(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        call = super().compute_loss
        if self._training_budget is None:
            return call(model, inputs, *args, **kwargs)
        return self._loss_in_parts(model, self._parts(inputs), lambda part: call(model, part, *args, **kwargs))

    def _parts(self, inputs: dict[str, Any]) -> list[Part]:
        """The micro-batches of a batch, with what each of their losses counts in it."""
        assert self._budget is not None
        groups = self._row_groups(inputs)
        needed = max(group.tokens for group in groups)
        if needed > self._budget:
            raise SegRLError(
                f"tokens_per_micro_batch={self._budget}: the completions to one prompt, as long as "
                f"max_completion_length={self.max_completion_length} allows, take up to {needed} tokens with it; the "
                f"smallest number that works is {needed}"
            )
        groups = self._row_groups(inputs, written=True)
        count = self._micro_batch_count(len(sharing.fill_micro_batches(groups, self._budget)))
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        own = mask.sum(1).tolist()
        kind, total = NORMALIZERS[self.loss_type], max(1, sum(own))
        parts = []
        for rows in sharing.fill_micro_batches(groups, self._budget, count):
            share = len(rows) / len(own)
            weight = {"rows": share, "tokens": sum(own[row] for row in rows) / total, "rollout": 1.0}[kind]
            chosen = set(rows)
            tokens = sum(group.tokens for group in groups if chosen >= set(group.rows))
            parts.append(Part(select_batch(inputs, rows), share, weight, tokens))
        return parts

    def _row_groups(self, inputs: dict[str, Any], written: bool = False) -> list[sharing.RowGroup]:
        """The rows that share a prompt, with their tokens: those that are written, or at least as many as may be."""
        lengths, least = inputs["completion_mask"].sum(1).tolist(), 0 if written else self.max_completion_length or 0
        lengths = [max(length, least) + self._added_tokens for length in lengths]
        if self._shares and "prompt_keys" in inputs:
            return sharing.prompt_groups(inputs["prompt_keys"], lengths)
        width = inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1) + self._added_tokens  # TRL pads
        return [sharing.RowGroup((row,), width) for row in range(len(lengths))]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._prompt_keys = inputs.get("prompt_keys")
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._prompt_keys = None
        return loss if self._part is None else self._part.loss * loss


def _warn(reason: str) -> None:
    warnings.warn(
        f"share_prompt: {reason}. Every completion is computed with a prompt of its own, as in TRL; "
        "share_prompt=False says that this is meant.",
        stacklevel=7,  # where the trainer is made
    )


def _side_by_side(batches: list[dict[str, Any]]) -> list[Any]:
    """The micro-batches of a rollout, with the answers to one prompt in as few of them as can be."""
    whole = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
    keys = whole["prompt_keys"]
    position = {key: n for n, key in enumerate(dict.fromkeys(keys))}  # prompts stay in TRL's random order
    order = sorted(range(len(keys)), key=lambda row: position[keys[row]])
    size = len(keys) // len(batches)
    return [select_batch(whole, order[n * size : (n + 1) * size]) for n in range(len(batches))]


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, list):
        return [item for value in values for item in value]
    return torch.cat(values) if isinstance(first, Tensor) and first.ndim else first
