"""`SegGRPOTrainer`: TRL's GRPO with predictions, mask rewards and dense losses.

What is overridden, and why (each calls `super()`):

- `_generate_single_turn`: records the backbone's states while tokens are decoded, so that masks need no forward of
  their own.
- `_generate`: keeps the recorded states only if the tokens are still the generated ones; hides the head from vLLM's
  weight sync.
- `_get_per_token_logps_and_entropies`: takes these states from the old-log-prob pass when generation gave none (vLLM).
- `_calculate_rewards`: turns completions into `Prediction`s with masks, once, for all rewards.
- `_generate_and_score_completions`: sends the segmenter's inputs along to the loss; compares vLLM's log-probabilities
  with the trainer's.
- `_compute_loss`: adds the dense losses on masks decoded inside TRL's own forward.
- `log`: the first time, says which share of the answers is invalid, and why; writes predictions (`log_completions`).

What differs between images and volumes is in `segrl.tasks`. With `share_prompt` a prompt is computed once for the
completions that answer it: see `shared_prompt`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from segrl.data.row_texts import check_batch_texts
from segrl.heads.attach import find_mask_head
from segrl.heads.decoding import Completions, append_tokens
from segrl.heads.dense import DenseLoss
from segrl.heads.probes import query_tokens
from segrl.models.agreement import check_call_settings
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.prediction import Prediction, invalid_text
from segrl.predictions.prompt_settings import PromptSettings
from segrl.predictions.records import answer_record
from segrl.reports.terminal import say
from segrl.rewards.reward import Reward
from segrl.segmenters.box_segmenter import BoxSegmenter
from segrl.segmenters.propagation import VolumePropagator
from segrl.tasks import Task, check_columns, make_task, rollout_metrics
from segrl.trainers import engines
from segrl.trainers.config import SegGRPOConfig
from segrl.trainers.kept_groups import KeptGroups, write_records
from segrl.trainers.mask_head_mixin import MaskHeadMixin, default_args, head_detached
from segrl.trainers.reference_sync import sync_without_head
from segrl.trainers.reward_funcs import check_groups, common_format, resolve_reward_funcs
from segrl.trainers.rollout import Rollout, is_policy, tensors_of_prompts
from segrl.trainers.sampling_gap import check_sampling_gap
from segrl.trainers.shared_prompt import SharedPromptGRPOTrainer
from segrl.trainers.validation import Validate

__all__ = ["SegGRPOTrainer"]


class SegGRPOTrainer(MaskHeadMixin, SharedPromptGRPOTrainer):
    """`GRPOTrainer` for models that reason, write boxes and prompt a segmenter.

    Called as TRL's trainer. In addition:

    - `reward_funcs` may hold registered names (`"format"`, `"box_f1"`, ...; see `segrl.rewards.list_rewards`),
      `"module:attribute"`, paths of YAML files (`segrl.rewards.load_reward`), reward functions and classes, and
      `Reward` objects. These also decide how completions are read (`CompletionFormat`: answer format, whether a
      `<seg>` is required).
    - `dense_losses=[DenseLoss("dice_ce", weight=1.0)]` train the model and its mask head on the masks of all
      completions, jointly with the policy: `policy_weight * GRPO + sum_i weight_i * term_i` (CORE-Seg: `L_S2`).
    - A model with a mask head (`attach_mask_head`) gives every reward function the lists `prediction` and `target`.
    - `prompt_settings`, the settings that the data was prepared with, decide the frame of written boxes and whether
      answers reason; they are saved with the model as `segrl.json`, for inference. The defaults of the task when None.
    - A model without a head may have `box_segmenter=BoxSegmenter(segmenter)`, a frozen segmenter that is prompted with
      the boxes of answers (Seg-Zero).
    - Rewards of volumes read rows of `segrl.data.prepare_volumes`. With `propagator=VolumePropagator(segmenter)`, with
      a mask head, or with both, an answer gets a mask of the volume: see `segrl.tasks.VolumeTask`.
    - `validate=function` measures the model while it is trained: `function(trainer)` returns numbers by name, which are
      logged as `eval_<name>` whenever transformers evaluates, in the place of a loss on `eval_dataset`. So
      `load_best_model_at_end` with `metric_for_best_model="dice"` keeps the checkpoint with the best masks.
    - `log_completions=True` also writes `completions/predictions_<step>.jsonl`, which `segrl rewards score` reads:
      texts, masks and ground truth of the last batch, so that other rewards can be tried on them.
    - A prompt and its images are computed once for the G completions that answer it (`share_prompt` of the settings).
      Everything equals TRL's passes up to rounding (1e-5 in float32). A model that cannot do it gets TRL's passes and
      one warning that says why.

    Data set columns of images: `prompt`, `image` or `images` (the first is segmented), `mask`, and what your rewards
    read. Without mask head, dense losses and segrl rewards this is TRL's trainer, bit for bit, unless
    `share_prompt=True`.

    Raises:
        SegRLError: Before training, for an unknown reward name, dense losses without a mask head, a probe whose token
            is not the tokenizer's, data without the columns that masks need, rewards of volumes beside rewards of
            images, a reward that reads masks further than the propagator reaches, or a box segmenter beside a mask head
            or volumes.

    Example:
        >>> from segrl.data import make_synthetic, prepare
        >>> from segrl.models import tiny_qwen2_5_vl
        >>> from segrl.trainers import SegGRPOConfig
        >>> model, processor = tiny_qwen2_5_vl()
        >>> rows = prepare(make_synthetic(4, size=56), processor, completions=False)
        >>> args = SegGRPOConfig("run", use_cpu=True, bf16=False, report_to="none", num_generations=2)
        >>> trainer = SegGRPOTrainer(model, ["format", "box_f1"], args, train_dataset=rows, processing_class=processor)
        >>> [reward.name for reward in trainer.reward_funcs], trainer.task.makes_masks
        (['format', 'box_f1'], False)
    """

    # read by overridden methods also where `__init__` did not run, as in TRL's own tests
    task: Task | None = None
    completion_format = CompletionFormat()
    _text_term = "policy"
    _tag_names = ("trl", "grpo", "segrl")
    _needs_probability = False
    _rollout: Rollout | None = None
    _texts_checked = True
    _records: Sequence[dict[str, Any]] = ()
    _groups: KeptGroups | None = None
    _compared_sampling = False  # whether a rollout of vLLM has been compared
    _first_statuses: Counter[str] | None = None  # of the answers before the first log

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *positional: Any,
        dense_losses: Sequence[DenseLoss] | None = None,
        propagator: VolumePropagator | None = None,
        box_segmenter: BoxSegmenter | None = None,
        prompt_settings: PromptSettings | None = None,
        validate: Validate | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else default_args(SegGRPOConfig, model, "SegGRPO")
        reward_funcs = resolve_reward_funcs(reward_funcs)
        self._share_by_default = bool(
            dense_losses
            or (not isinstance(model, str) and find_mask_head(model) is not None)
            or any(isinstance(item, Reward) for item in reward_funcs or [])
        )
        self._init_joint(
            *(model, dense_losses, args, validate),
            lambda: SharedPromptGRPOTrainer.__init__(self, model, reward_funcs, args, *positional, **kwargs),
        )
        sync_without_head(self)
        rewards = [reward for reward in self.reward_funcs if isinstance(reward, Reward)]
        self._needs_probability = any(reward.info.needs_probability for reward in rewards)
        if self.mask_head is not None or propagator is not None or box_segmenter is not None or rewards:
            self.task = make_task(
                self.processing_class,
                prompt_settings,
                head=self.mask_head,
                propagator=propagator,
                box_segmenter=box_segmenter,
                rewards=rewards,
                prompt_boxes=getattr(args, "prompt_boxes", "matched"),
            )
            self.task.check(rewards, self._tokenizer)
            self._first_statuses = Counter()
            self._groups = KeptGroups.of(self)
            self.completion_format = common_format(rewards, self.task.settings).for_tokenizer(self._tokenizer)
            check_groups(rewards, self.args, self.num_generations or 1)
            check_columns({"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}, self.task.needed)
        given: Any = self.chat_template_kwargs
        check_call_settings(given, self.processing_class, "chat_template_kwargs")
        self._texts_checked = self._check_inputs()
        for frozen in (propagator, box_segmenter):
            if frozen is not None:
                frozen.segmenter.to(self.accelerator.device)
        self._keep_settings(prompt_settings)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task is not None:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.task.columns]))

    # ---- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._texts_checked:
            check_batch_texts(inputs, self.processing_class)
        self._rollout = rollout = Rollout()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rollout = None
        if self._groups is not None:
            self._groups.close()
        if self.use_vllm and check_sampling_gap(self, output, first=not self._compared_sampling) is not None:
            self._compared_sampling = True
        if self.dense_losses:
            output["seg_inputs"] = rollout.inputs  # a list of B references: shuffled and split with the batch
        return output

    def _generate(self, prompts: list) -> Any:
        rollout = self._rollout
        if rollout is None or self.mask_head is None:
            output = super()._generate(prompts)
        else:
            with head_detached(self.model) if self.use_vllm else nullcontext():
                output = super()._generate(prompts)
        if rollout is not None:
            rollout.finish(*output[:3], device=self.accelerator.device, queries=self._queries)
        return output

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rollout, head = self._rollout, self.mask_head
        if (
            rollout is None
            or head is None
            or rollout.recorded
            or self._queries is not None
            or self.use_vllm
            or self.use_transformers_continuous_batching
        ):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        synced = engines.is_sharding(self.accelerator) and self.accelerator.num_processes > 1
        with head.record(last_only=True) as recording:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout.record(prompt_ids, completion_ids, recording, synced)
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        rollout, head = self._rollout, self.mask_head
        wanted = head is not None and rollout is not None and rollout.needs_states and model is self.model
        if head is None or not (head.is_asked or (wanted and is_policy(model))):
            call = super()._get_per_token_logps_and_entropies
            return call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if head.is_asked or rollout is None:
            return self._scored(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        with head.record() as recording:
            result = self._scored(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        rollout.take_states(recording, attention_mask[:, -logits_to_keep:])
        return result

    def _scored(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's scoring pass with the probe's query tokens behind each completion; scores are those without them."""
        call = super()._get_per_token_logps_and_entropies
        if self._queries is None:
            return call(model, input_ids, attention_mask, keep, *args, **kwargs)
        token_id, count = self._queries
        own_ids, own_mask, _ = append_tokens(input_ids[:, -keep:], attention_mask[:, -keep:], token_id, count)
        input_ids = torch.cat([input_ids[:, :-keep], own_ids], 1)
        attention_mask = torch.cat([attention_mask[:, :-keep], own_mask], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = torch.nn.functional.pad(kwargs[name], (0, count))
        logps, entropies, loss = call(model, input_ids, attention_mask, keep + count, *args, **kwargs)
        return logps[:, :keep], None if entropies is None else entropies[:, :keep], loss

    @property
    def _added_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._queries[1] if self._queries is not None else 0

    @property
    def _queries(self) -> tuple[int, int] | None:
        return None if self.mask_head is None else query_tokens(self.mask_head.probe)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self.task is not None:
            inputs = self._with_predictions(self.task, inputs, prompts, completion_ids_list)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _with_predictions(
        self, task: Task, inputs: list[dict[str, Any]], prompts: list, ids: list[list[int]]
    ) -> list[dict[str, Any]]:
        """The rows with `prediction` and `target`, and the masks' metrics logged."""
        rollout = self._rollout or Rollout()
        if rollout.completions is None:
            rollout.completions = Completions.of(ids, self.accelerator.device, queries=self._queries)
        rows = task.read(inputs)
        # Not the messages that TRL makes of the completion: where those are parsed (tools), the reasoning is cut out
        # and stray text around it is lost, which the grammar has to see.
        texts = self._tokenizer.batch_decode(rollout.completions.last_text_ids(), skip_special_tokens=True)
        predictions = [self.completion_format.parse(text, row.frame) for text, row in zip(texts, rows, strict=True)]
        targets = [row.target for row in rows]
        if task.head is not None:
            rollout.inputs = task.seg_inputs(rows, predictions)
            if engines.any_process(self.accelerator, rollout.needs_states):
                self._score_states(rollout, prompts)
        whole = engines.whole_head(self.accelerator, self.model_wrapped, task.head)
        with self.accelerator.autocast(), torch.no_grad(), whole:
            predictions = task.add_masks(
                predictions, rows, rollout.completions, rollout.inputs, probabilities=self._needs_probability
            )
        self._log_predictions(task, predictions, targets)
        if self._groups is not None:
            self._groups.see(task, inputs, rows, predictions)
        if self.log_completions:
            self._keep_records(predictions, rows)
        return [
            {**row, "prediction": prediction, "target": target}
            for row, prediction, target in zip(inputs, predictions, targets, strict=True)
        ]

    def _score_states(self, rollout: Rollout, prompts: list) -> None:
        """Get states by one forward, for rollouts of several turns or from outside, which leave none behind."""
        assert rollout.completions is not None
        assert self.mask_head is not None
        prompt_ids, images, multimodal = self._tokenize_prompts(prompts)
        prompt_ids = prompt_ids if rollout.prompt_ids is None else rollout.prompt_ids
        tokenizer: Any = self._tokenizer
        ids, mask, extra = tensors_of_prompts(
            prompt_ids, rollout.completions, int(tokenizer.pad_token_id), multimodal, images
        )
        keep = rollout.completions.ids.size(1)
        with self.mask_head.record() as recording, torch.no_grad():
            super()._get_per_token_logps_and_entropies(
                self.model, ids, mask, keep, batch_size=self.args.per_device_train_batch_size, **extra
            )
        if rollout.needs_states:
            rollout.take_states(recording, mask[:, -keep:])

    def _log_predictions(self, task: Task, predictions: list[Prediction], targets: list[Any]) -> None:
        for name, values in rollout_metrics(predictions, targets, masks=task.makes_masks).items():
            for value in values:
                self._log_metric(f"rollout/{name}", value)
        for name, value in task.log().items():
            self._log_metric(f"rollout/{name}", value)
        if self._first_statuses is not None and self._mode() == "train":
            self._first_statuses.update(gather_object([prediction.status.value for prediction in predictions]))

    def _keep_records(self, predictions: list[Prediction], rows: list[Any]) -> None:
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
        if self._first_statuses:
            if self.accelerator.is_main_process:
                say(f"first rollouts: {invalid_text(dict(self._first_statuses.most_common()))}")
            self._first_statuses = None  # on all processes, since they gather together
        if self._records and self.log_completions and self.accelerator.is_main_process:
            write_records(self, self._records)

    # ---- loss --------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        engines.gather_output_embeddings(model)  # for every micro-batch of a token budget
        weight = getattr(self.args, "policy_weight", 1.0)
        mode = self._mode()
        scale = 1.0 / self.current_gradient_accumulation_steps if mode == "train" else 1.0
        if self._part is not None:
            scale *= self._part.rows
        if not self.dense_losses or self.mask_head is None:
            return self._joint_loss(super()._compute_loss(model, inputs), weight, None, scale, mode)
        ids, own = inputs["completion_ids"], inputs["completion_mask"]
        if "tool_mask" in inputs:
            own = own * inputs["tool_mask"]
        exists = inputs["completion_mask"].bool()
        completions = Completions(ids, exists, own.bool())
        if self._queries is not None:
            completions = completions.with_queries(*self._queries)
        index, valid = self.mask_head.probe(completions.ids, completions.probed())
        last = completions.ids.size(1)
        with self.mask_head.decode_next(index, valid, inputs["seg_inputs"], last=last) as request:
            loss = super()._compute_loss(model, inputs)
        return self._joint_loss(loss, weight, request, scale, mode)
