"""`RunSteps`: the steps of a run that its scripts put together: data ready, stages trained, results written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from segrl.data.division import check_fraction, hold_out
from segrl.data.queries import Queries
from segrl.errors import SegRLError
from segrl.heads.attach import find_mask_head
from segrl.inference.base import SegmenterBase
from segrl.models.loading import language_model_lora
from segrl.predictions.prompt_settings import load_prompt_settings
from segrl.reports.terminal import say
from segrl.scripts.config_file import CONFIG_FILE, write_config
from segrl.scripts.example_run import ExampleRun, Model
from segrl.scripts.phases import Phases
from segrl.scripts.run_folder import claimed
from segrl.scripts.stages import CONTROL, is_finished, read_history, steps_as_long, train_and_save
from segrl.scripts.validation import LiveDice, early_stopping
from segrl.scripts.watching import Watch
from segrl.trainers.grpo import SegGRPOTrainer
from segrl.trainers.sft import SegSFTTrainer

__all__ = ["RunSteps"]


class RunSteps(ExampleRun):
    """The steps that `segrl.scripts.TwoStageRun` takes, in the order of a run.

    Attributes:
        argv: The command line, with what a file of flags adds to it.
        variables: Environment variables that such a file has set.
    """

    argv: Sequence[str] = ()
    variables: Mapping[str, str] = {}
    queries: Queries | None
    _stage = ""  # name of the phase at hand

    # ---- training ----------------------------------------------------------------------------------------------------

    def train_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        """Train stage 1 and save it in the config's `output_dir`."""
        more = self.trainer_arguments(model, "sft")
        train_and_save(SegSFTTrainer(model, config, **self._common(config, model, processor, rows), **more))

    def train_grpo(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        """Train stage 2 and save it in the config's `output_dir`."""
        self._stage = "stage 2"
        more = {"reward_funcs": self.make_rewards(), **self.trainer_arguments(model, "grpo")}
        train_and_save(SegGRPOTrainer(model, args=config, **self._common(config, model, processor, rows), **more))

    # ---- from flags to results ---------------------------------------------------------------------------------------

    def _hold_out(self) -> None:
        """Take the validation split off the training rows, if they are there."""
        fraction, rows = self.arguments.val_fraction, self.rows["train"]
        if fraction is None or "val" in self.rows:
            return
        if rows is None:  # of data that is made later
            check_fraction(fraction, self.arguments.count(self.recipe.synthetic["train"], "train"))
            return
        self.rows["train"], self.rows["val"] = hold_out(rows, fraction, self.arguments.patients)

    def _plan(self, configs: Mapping[str, Any]) -> Phases:
        """The phases of the run, with their cost: the rows that a model reads or writes."""
        plan = dict(self.preparations()) if "stage 1" in configs else {}
        for name, config in sorted(configs.items()):
            batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
            plan[name] = float(self.steps(config) * batch)
        if self.arguments.control:
            plan["stage 1 continued"] = plan["stage 2"]
        plan["evaluation"] = float(self.count("test") * (len(configs) + self.arguments.control))
        return Phases(plan)

    def _enter(self, stage: Literal["sft", "grpo"]) -> None:
        """Ask from now on as a stage does."""
        first = self.arguments.sft_reasoning if stage == "sft" else None
        self.prompt = replace(self.prompt, reasoning=self.arguments.reasoning if first is None else first)

    def _check_division(self) -> None:
        if self.division is not None and not self._divided:
            raise SegRLError(
                f"{self.name} reads --data without `read`, which divides it; drop --folds or --hold_out_source"
            )

    def _asked(self, rows: Dataset | None) -> Dataset | None:
        """Rows with the questions that `--descriptions` or `--paraphrases` gives."""
        return rows if rows is None or self.queries is None else self.queries.ask(rows)

    def _continued(self, stage1: Path) -> Model:
        """The model of a stage 1 run, if what the flags ask for fits it."""
        name = f"--model {str(stage1)!r}"
        for flag in (*self.stage1_flags, "lora_scope"):
            if getattr(self.arguments, flag) is not None:
                raise SegRLError(f"--{flag} belongs to stage 1; {name} has its own already, drop the flag")
        loaded = self.load_run(stage1, **self.trainable())
        earlier = load_prompt_settings(stage1)
        if earlier is not None:
            self.prompt.check_continues(earlier, name)
        return loaded.model, loaded.processor

    def _ready(self, start: Model | None, *, completions: bool) -> tuple[Any, Any, Dataset] | None:
        """Model, processor and prepared rows, if the data is there."""
        self._enter("sft" if completions else "grpo")
        if self.rows["train"] is None:
            return None
        if start is None:
            set_seed(self.seed)  # random weights, also those of a new head
            start = self.build()
        return *start, self.prepare(*start, completions=completions)

    def _claimed(self, work: Callable[[], None]) -> None:
        """Claim the folder, make what is made there, and work."""
        with claimed(self.folder, asdict(self.arguments), self.progress):
            main = PartialState().is_main_process
            if main and self.config is not None and not (self.folder / CONFIG_FILE).is_file():
                write_config(self.folder, self.argv, self.arguments, self.config, self.variables)
            if main and self.recipe.demonstration and self.own_model:
                others = ", ".join(name for name in self.recipes if name != self.arguments.preset)
                say(f"preset {self.arguments.preset}: a demonstration. A small model with random weights, which will "
                    f"know nothing but these data; for real use: --preset {others}")  # fmt: skip
            for split, rows in self.rows.items():
                self.rows[split] = self._asked(self.synthesize(split)) if rows is None else rows
            if self.config is not None:
                self._hold_out()
            self.make_parts()
            work()

    def _fit_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        self._enter("sft")
        if not config.resume_from_checkpoint:  # which has what the warm-up learned
            set_seed(self.seed)
            model, processor = self.warm_up(model, processor)
            set_seed(self.seed)
            self.before_sft(config, model, processor, rows)
        set_seed(self.seed)
        self._stage = "stage 1"
        self.train_sft(config, model, processor, rows)

    def _fit_control(self, config: Any, stage1: Path) -> None:
        """Continue stage 1 for as long as stage 2 took, unless that is done."""
        folder = self.folder / CONTROL
        if is_finished(folder):
            return
        config.max_steps = steps_as_long(stage1, self.folder)
        config.seed = self.seed + 1  # other batches than stage 1 had
        self._stage = "stage 1 continued"
        self._enter("sft")
        loaded = self.load_run(stage1, **self.trainable())
        rows = self.prepare(loaded.model, loaded.processor, completions=True)
        set_seed(config.seed)
        self.train_sft(config, loaded.model, loaded.processor, rows)
        self._enter("grpo")

    def _common(self, config: Any, model: Any, processor: Any, rows: Dataset) -> dict[str, Any]:
        """Arguments of either stage's trainer."""
        lora = self.adapters(model)
        live, stops = None, []
        if config.eval_strategy != "no" and (held := self.rows.get("val")) is not None:
            live = LiveDice(held, self._in_training, self.results.evaluate, self.arguments.eval_batch_size)
            stops = early_stopping(self.arguments)
        return {
            "train_dataset": rows,
            "processing_class": processor,
            "peft_config": lora,
            "prompt_settings": self.prompt,
            "callbacks": [Watch(self.phases, self._stage), *stops],
            "validate": live,
        }

    def adapters(self, model: Any) -> Any:
        """Return the settings of the adapters that a stage adds to a model; None where it adds none."""
        if not self.recipe.lora or isinstance(model, PeftModel):  # one of stage 1 has its adapter
            return None
        head = find_mask_head(model)
        tokens = [] if head is None else [head.probe.token_id]
        scope = self.arguments.lora_scope or self.recipe.lora_scope
        return language_model_lora(model, tokens=tokens, scope=scope, **self.recipe.lora)

    def _in_training(self, trainer: Any) -> SegmenterBase:
        """The model of a trainer, asked as it will be after training."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        return self.results.segmenter_class(model, trainer.processing_class, trainer.prompt_settings, self.segmenter)

    def _report(self, stages: Mapping[str, Path | SegmenterBase], configs: Mapping[str, Any] | None = None) -> None:
        """Evaluate the stages in order, each loaded afresh, and write what was found; on the first process."""
        state = PartialState()
        if not state.is_main_process:
            return
        rows = self.rows[getattr(self.arguments, "split", "test")]
        assert rows is not None
        results: dict[str, Any] = {"config": {**asdict(self.arguments), **(configs or {})}}
        records: dict[str, list[dict[str, Any]]] = {}
        last = max(stages)
        self.phases.begin("evaluation")
        for number, (name, stage) in enumerate(sorted(stages.items())):
            self.phases.progress(number / len(stages))
            segmenter = stage if isinstance(stage, SegmenterBase) else self.load_run(stage, device=str(state.device))
            if name == min(stages):
                records = self.baselines(segmenter, rows)
                results |= {other: self.results.summarise(found) for other, found in records.items()} | self.figures()
            size = self.arguments.eval_batch_size
            results[name], records[name] = self.results.score(segmenter, rows, size, draw=name == last)
        for other, name in (("stage1", "gain"), ("control", "gain_over_control")):
            if {"stage2", other} <= records.keys():
                results[name] = self.results.gain(records["stage2"], records[other])
        if "baseline" in records:
            results["gain_over_baseline"] = self.results.gain_by_group(records[last], records["baseline"])
        if (spread := _zero_spread(read_history(self.folder))) is not None:
            results["zero_spread"] = spread
        self.results.write(results, records, last)


def _zero_spread(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean share of groups of stage 2 whose rewards were all equal, from which nothing is learned."""
    shares = [entry["frac_reward_zero_std"] for entry in history if entry.get("frac_reward_zero_std") is not None]
    return sum(shares) / len(shares) if shares else None
