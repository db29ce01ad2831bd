"""`SegGRPOTrainer`: TRL's GRPO with predictions, mask rewards and dense losses.

What is overridden, and why (each calls `super()`):

- `_generate_single_turn`: records the backbone's states while tokens are decoded, so that masks need no forward of
  their own.
- `_get_per_token_logps_and_entropies`: takes these states from the old-log-prob pass when generation gave none (vLLM).
- `_calculate_rewards`: turns completions into `Prediction`s with masks, once, for all rewards.
- `_generate_and_score_completions`: sends the segmenter's inputs along to the loss.
- `_compute_loss`: adds the dense losses on masks decoded inside TRL's own forward.
- `log`: with `log_completions`, writes the predictions and their truths beside TRL's table of completions.
- `_generate`: keeps the recorded states only if the tokens are still the generated ones; hides the head from vLLM's
  weight sync.

A model that answers about volumes has no mask head: a frozen segmenter (`propagator`) turns its boxes into the masks
that rewards read, and no loss reaches it.

With `share_prompt` a prompt is computed once for the completions that answer it: see `shared_prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from segrl.heads.attach import find_mask_head
from segrl.heads.decoding import add_masks, generation_states, pad_ids
from segrl.heads.dense import DenseLoss
from segrl.heads.mask_head import MaskHead
from segrl.metrics import overlap as metrics
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prediction import Prediction
from segrl.predictions.records import answer_record
from segrl.rewards.builtin.rules import JSON_ANSWERS
from segrl.rewards.reward import Reward
from segrl.segmenters.propagated_masks import add_volume_masks
from segrl.segmenters.propagation import VolumePropagator
from segrl.tasks.images import SEG_COLUMNS, RowReader, SegRow, _check_token, check_columns
from segrl.tasks.volumes import VOLUME_COLUMNS, VolumeReader, VolumeRow, _check_volumes
from segrl.trainers.config import SegGRPOConfig
from segrl.trainers.mask_head_mixin import MaskHeadMixin, head_detached
from segrl.trainers.reward_funcs import check_groups, common_format, resolve_reward_funcs
from segrl.trainers.rollout import _is_policy, _last_run, _Rollout, _wide
from segrl.trainers.shared_prompt import SharedPromptGRPOTrainer


class SegGRPOTrainer(MaskHeadMixin, SharedPromptGRPOTrainer):
    """`GRPOTrainer` for models that reason, write boxes and prompt a segmenter.

    Called as TRL's trainer. In addition:

    - `reward_funcs` may hold registered names (`"format"`, `"box_f1"`, ...; see `segrl.rewards.list_rewards`),
      `"module:attribute"`, paths of YAML files (`segrl.rewards.load_reward`), reward functions and classes, and
      `Reward` objects. These also decide how completions are read (`CompletionFormat`: answer format, whether a
      `<seg>` is required); the frame is the processor's.
    - `dense_losses=[DenseLoss("dice_ce", weight=1.0)]` train the model and its mask head on the masks of all
      completions, jointly with the policy: `policy_weight * GRPO + sum_i weight_i * term_i` (CORE-Seg: `L_S2`).
    - A model with a mask head (`attach_mask_head`) gives every reward function the lists `prediction` and `target`.
    - `log_completions=True` also writes `completions/predictions_<step>.jsonl`, which `segrl rewards score` reads:
      texts, masks and truths of the last batch, so that other rewards can be tried on them.

    - Rewards of volumes (`make_reward(...).volume`) read rows of `segrl.data.prepare_volumes`. With
      `propagator=VolumePropagator(segmenter)` the boxes of an answer become a mask of the volume, for rewards that read
      one; `prompt_boxes` of the settings says which boxes.

    Data set columns: `prompt`, `image` or `images` (the first is segmented), `mask`, and what your rewards read.

    - A prompt and its images are computed once for the G completions that answer it (`share_prompt` of the settings).
      Everything equals TRL's passes up to rounding (1e-5 in float32). A model that cannot do it gets TRL's passes and
      one warning that says why.

    Without mask head, dense losses and segrl rewards this is TRL's trainer, bit for bit, unless `share_prompt=True`.

    Raises:
        SegRLError: before training, for an unknown reward name, dense losses without a mask head, a probe whose token
            is not the tokenizer's, data without the columns that masks need, rewards of volumes beside rewards of
            images or a mask head, or a reward that reads masks further than the propagator reaches.
    """

    _text_term = "policy"
    _tag_names = ("trl", "grpo", "segrl")
    _reads_predictions = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *positional: Any,
        dense_losses: Sequence[DenseLoss] | None = None,
        propagator: VolumePropagator | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else (getattr(model.config, "_name_or_path", "") or "model")
            args = SegGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-SegGRPO")
        reward_funcs = resolve_reward_funcs(reward_funcs)
        self._rollout: _Rollout | None = None
        self._records: list[dict[str, Any]] = []
        self._share_by_default = bool(
            dense_losses
            or (not isinstance(model, str) and find_mask_head(model) is not None)
            or any(isinstance(item, Reward) for item in reward_funcs or [])
        )
        self._init_joint(
            model,
            dense_losses,
            lambda: SharedPromptGRPOTrainer.__init__(self, model, reward_funcs, args, *positional, **kwargs),
        )
        rewards = [reward for reward in self.reward_funcs if isinstance(reward, Reward)]
        self._reads_predictions = self.mask_head is not None or bool(rewards)
        self._needs_probability = any(reward.info.needs_probability for reward in rewards)
        self.propagator = propagator
        self._volumes = propagator is not None or any(reward.volume for reward in rewards)
        if self._volumes:
            _check_volumes(rewards, self.mask_head, propagator, getattr(args, "prompt_boxes", "matched"))
            self._reads_predictions = True
        # without a segrl reward nothing says how answers are read: those about volumes are JSON
        default = CompletionFormat(**JSON_ANSWERS) if self._volumes else CompletionFormat()
        self._format = common_format(rewards, getattr(args, "require_reasoning", True), default)
        check_groups(rewards, self.args, self.num_generations or 1)
        frame_kind = getattr(args, "frame_kind", None)
        if self._volumes:
            self._reader: Any = VolumeReader(self.processing_class, frame_kind)
        else:
            segmenter = self.mask_head.segmenter if self.mask_head is not None else None
            self._reader = RowReader(self.processing_class, segmenter, frame_kind)
        if self._reads_predictions:
            datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
            needed = ("mask",) if self.mask_head is None else ("image", "mask")
            check_columns(datasets, ("images", *VOLUME_COLUMNS) if self._volumes else needed)
        if self.mask_head is not None:
            _check_token(self.mask_head, self._tokenizer)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._reads_predictions and "mask" not in self._signature_columns:
            wanted = [*self._signature_columns, *SEG_COLUMNS, *(VOLUME_COLUMNS if self._volumes else ())]
            self._signature_columns = list(dict.fromkeys(wanted))

    # ---- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollout = rollout = _Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rollout = None
        if self.dense_losses:
            output["seg_inputs"] = rollout.inputs  # a list of B references: shuffled and split with the batch
        return output

    def _generate(self, prompts: list) -> Any:
        rollout = self._rollout
        if rollout is None or self.mask_head is None:
            return super()._generate(prompts)
        with head_detached(self.model) if self.use_vllm else nullcontext():
            output = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask = output[:3]
        rollout.prompt_ids = [list(map(int, row)) for row in prompt_ids]
        if rollout.generated != (rollout.prompt_ids, [list(map(int, row)) for row in completion_ids]):
            # Tools, environments and rollout functions put text of others between or around the generated tokens:
            # their states come from the old-log-prob pass or from `_score_states`.
            rollout.states = None
        if tool_mask is not None:
            rollout.own = [list(map(int, row)) for row in tool_mask]
            rollout.foreign = pad_ids(tool_mask, self.accelerator.device) == 0
        return output

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rollout, head = self._rollout, self.mask_head
        if (
            rollout is None
            or head is None
            or rollout.generated is not None
            or self.use_vllm
            or self.use_transformers_continuous_batching
        ):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with head.record(last_only=True) as recording:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout.generated = [list(row) for row in prompt_ids], [list(row) for row in completion_ids]
        rollout.states = generation_states(recording, completion_ids)
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        call = super()._get_per_token_logps_and_entropies
        rollout, head = self._rollout, self.mask_head
        if (
            rollout is None
            or head is None
            or rollout.states is not None
            or model is not self.model
            or not _is_policy(model)
        ):
            return call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        with head.record() as recording:
            result = call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        rollout.states = torch.cat([states[:, -logits_to_keep:] for states in recording.calls])
        # `mask_truncated_completions` hides a whole completion from attention: its states mean nothing
        hidden = attention_mask[:, -logits_to_keep:] == 0
        rollout.foreign = hidden if rollout.foreign is None else hidden | _wide(rollout.foreign, logits_to_keep)
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self._reads_predictions:
            inputs = self._with_predictions(inputs, prompts, completion_ids_list)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _with_predictions(
        self, inputs: list[dict[str, Any]], prompts: list, ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """The rows with `prediction` and `target`, and the masks' metrics logged."""
        rows = self._reader(inputs)
        predictions = [self._format.parse(text, row.frame) for text, row in zip(self._texts(ids), rows, strict=True)]
        if self.mask_head is not None:
            predictions = self._decode(self.mask_head, rows, predictions, prompts, ids)
            self._log_masks(predictions, rows)
        elif self.propagator is not None:
            predictions = self._propagate(self.propagator, rows, predictions)
        if self.log_completions:
            self._keep_records(predictions, rows)
        return [
            {**row, "prediction": prediction, "target": read.target}
            for row, prediction, read in zip(inputs, predictions, rows, strict=True)
        ]

    def _texts(self, ids: list[list[int]]) -> list[str]:
        """What the model wrote; with tools or environments, what it wrote last.

        Not the messages that TRL makes of it: where those are parsed (tools), the reasoning is cut out and stray text
        around it is lost, which the grammar has to see.
        """
        own = self._rollout.own if self._rollout is not None else None
        last = ids if own is None else [_last_run(row, mask) for row, mask in zip(ids, own, strict=True)]
        return self._tokenizer.batch_decode(last, skip_special_tokens=True)

    @torch.no_grad()
    def _decode(
        self, head: MaskHead, rows: list[SegRow], predictions: list[Prediction], prompts: list, ids: list[list[int]]
    ) -> list[Prediction]:
        """Predictions with masks in original pixels."""
        rollout = self._rollout or _Rollout()
        rollout.inputs = [row.seg_input for row in rows if row.seg_input is not None]
        tokens = pad_ids(ids, self.accelerator.device)
        states = rollout.states if rollout.states is not None else self._score_states(prompts, tokens)
        if rollout.foreign is not None:
            tokens = tokens.masked_fill(_wide(rollout.foreign, tokens.size(1)), -1)
        sizes = [(row.target.height, row.target.width) for row in rows]
        with self.accelerator.autocast():
            return add_masks(
                head, predictions, tokens, states, rollout.inputs, sizes, probabilities=self._needs_probability
            )

    def _propagate(
        self, propagator: VolumePropagator, rows: list[VolumeRow], predictions: list[Prediction]
    ) -> list[Prediction]:
        """Predictions with masks of whole volumes; the G answers about a volume share its features."""
        before = propagator.encoded_slices
        propagator.segmenter.to(self.accelerator.device)
        with self.accelerator.autocast():
            predictions = add_volume_masks(
                propagator,
                predictions,
                [row.grey for row in rows],
                [row.key for row in rows],
                [row.target for row in rows],
                prompt_boxes=getattr(self.args, "prompt_boxes", "matched"),
            )
        self._log_metric("rollout/encoded_slices", float(propagator.encoded_slices - before))
        for prediction in predictions:
            self._log_metric("rollout/valid", float(prediction.valid))
        return predictions

    def _score_states(self, prompts: list, tokens: Tensor) -> Tensor:
        """States "B T D" by one forward, for rollouts of several turns or from outside, which leave none behind."""
        prompt_ids, images, multimodal = self._tokenize_prompts(prompts)
        if self._rollout is not None and self._rollout.prompt_ids is not None:
            prompt_ids = self._rollout.prompt_ids
        tokenizer: Any = self._tokenizer
        device, pad = self.accelerator.device, int(tokenizer.pad_token_id)
        longest = max(len(ids) for ids in prompt_ids)

        def left(values: Sequence[Sequence[int]], filler: int) -> Tensor:
            return torch.tensor([[filler] * (longest - len(v)) + list(v) for v in values], device=device)

        keep = tokens.size(1)
        written = tokens >= 0
        input_ids = torch.cat([left(prompt_ids, pad), tokens.masked_fill(~written, pad)], dim=1)
        attention_mask = torch.cat([left([[1] * len(v) for v in prompt_ids], 0), written.long()], dim=1)
        extra: dict[str, Any] = {}
        for name, value in multimodal.items():
            if name in ("token_type_ids", "mm_token_type_ids"):
                extra[name] = torch.cat([left([list(map(int, v)) for v in value], 0), torch.zeros_like(tokens)], dim=1)
            elif torch.is_tensor(value):
                extra[name] = value.to(device)
        if images is not None:
            extra["num_images"] = [len(group) if group else 0 for group in images]
        assert self.mask_head is not None
        with self.mask_head.record() as recording:
            super()._get_per_token_logps_and_entropies(
                self.model,
                input_ids,
                attention_mask,
                keep,
                batch_size=self.args.per_device_train_batch_size,
                **extra,
            )
        return torch.cat([states[:, -keep:] for states in recording.calls])

    def _log_masks(self, predictions: list[Prediction], rows: list[SegRow]) -> None:
        for prediction, row in zip(predictions, rows, strict=True):
            true = row.target.mask
            mask = prediction.mask if prediction.mask is not None else np.zeros_like(true)  # as in `evaluate`
            self._log_metric("rollout/dice", metrics.dice(mask, true))
            self._log_metric("rollout/valid", float(prediction.valid))
            self._log_metric("rollout/fail", float(metrics.failure(prediction.mask, true, prediction.valid)))

    def _keep_records(self, predictions: list[Prediction], rows: list[SegRow]) -> None:
        """Keep the batch of all processes for `log`; the answers to one prompt have one group number."""
        answers = (self.num_generations if self._mode() == "train" else self.num_generations_eval) or 1
        records = [
            answer_record(prediction, row.target, row.frame) for prediction, row in zip(predictions, rows, strict=True)
        ]
        gathered = gather_object(records)
        step = self.state.global_step
        self._records = [{"group": f"{step}/{n // answers}", **record} for n, record in enumerate(gathered)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._records and self.log_completions and self.accelerator.is_main_process:
            path = Path(str(self.args.output_dir), "completions", f"predictions_{self.state.global_step:05d}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in self._records), encoding="utf-8")

    # ---- loss --------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        weight = getattr(self.args, "policy_weight", 1.0)
        mode = self._mode()
        scale = 1.0 / self.current_gradient_accumulation_steps if mode == "train" else 1.0
        if not self.dense_losses or self.mask_head is None:
            return self._joint_loss(super()._compute_loss(model, inputs), weight, None, scale, mode)
        ids, written = inputs["completion_ids"], inputs["completion_mask"]
        if "tool_mask" in inputs:
            written = written * inputs["tool_mask"]
        index, valid = self.mask_head.probe(ids, written)
        with self.mask_head.decode_next(index, valid, inputs["seg_inputs"], last=ids.size(1)) as request:
            loss = super()._compute_loss(model, inputs)
        return self._joint_loss(loss, weight, request, scale, mode)
