"""`TwoStageRun`: the skeleton of scripts that train SFT, then GRPO, and evaluate both.

Whatever can be wrong is found by `check_sft`, `check_grpo` or `check_evaluation`, before anything is written; each
returns the work. What an example adds are class attributes and overridden methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from segrl.data.contents import SplitContents
from segrl.data.queries import Queries
from segrl.data.splits import load_split
from segrl.errors import CheckpointError, SegRLError, UnknownNameError, unknown_name
from segrl.heads.adapters import ADAPTERS
from segrl.heads.attach import find_mask_head
from segrl.heads.probes import PROBES
from segrl.hub import check_source, reraise_as
from segrl.inference.base import SegmenterBase
from segrl.models.loading import language_model_lora
from segrl.predictions.prompt_settings import PromptSettings, load_prompt_settings
from segrl.reports.terminal import say
from segrl.rewards.factory import make_reward
from segrl.rewards.reward import Reward
from segrl.scripts.arguments import EvaluationArguments, TwoStageArguments, check_numbers, first_stage_settings
from segrl.scripts.command_line import Parser, check_rewards, find_preset, given_flags, parse
from segrl.scripts.recipe import Recipe
from segrl.scripts.results import results_for
from segrl.scripts.run_folder import (
    CONTROL,
    STAGE1,
    Progress,
    began_without_model,
    check_batches,
    check_output,
    claimed,
    find_stage1,
    is_finished,
    read_history,
    save_start,
    stage_time,
    steps_as_long,
    train_and_save,
)
from segrl.scripts.trainer_settings import check_trainer
from segrl.trainers.config import SegGRPOConfig, SegSFTConfig
from segrl.trainers.grpo import SegGRPOTrainer
from segrl.trainers.sft import SegSFTTrainer

__all__ = ["TwoStageRun"]

Model = tuple[Any, Any]  # with its processor


class TwoStageRun:
    """One run of an example: stage 1 (SFT), stage 2 (GRPO), or an evaluation.

    The scripts of an example end in `run_script(MyRun.check_sft)`, `run_script(MyRun.check_grpo)` and
    `run_script(MyRun.check_evaluation)`. A subclass sets the class attributes, has the method `load`, and overrides
    what it does otherwise.

    Attributes:
        name: Of the output folders: `runs/<name>`, and `runs/<name>_sft` for stage 1 alone.
        recipes: The presets by name.
        training_flags: Flags of the two training scripts.
        evaluation_flags: Flags of the evaluation.
        least: Smallest values of the example's own numbers, for `check_numbers`.
        stage1_flags: Flags of the model that a run of stage 1 has decided.
        stage2_flags: Flags that `check_sft` refuses.
        baseline_splits: Splits that `baselines` reads, beside the one that is evaluated; one that the data lacks is
            left out.
        arguments: The flags.
        recipe: The preset.
        prompt: How the model is asked in the stage at hand: the preset's settings, changed by flags and, once it is
            loaded, by the data.
        config: Settings of the trainer of the script's own stage; None in an evaluation.
        given: Names of the flags that were given.
        seed: Of everything that is drawn.
        folder: Where the run goes.
        progress: How far the run has come that is continued.
        segmenter: The segmenter of `--segmenter`; None without that flag.
        rows: The splits as `load` gave them; None until synthetic files are written.
        contents: What the splits hold, to warn of what they share.
    """

    name: ClassVar[str]
    recipes: ClassVar[Mapping[str, Recipe]]
    training_flags: ClassVar[type[TwoStageArguments]] = TwoStageArguments
    evaluation_flags: ClassVar[type[EvaluationArguments]] = EvaluationArguments
    least: ClassVar[Mapping[str, float]] = {}
    stage1_flags: ClassVar[Sequence[str]] = ()
    stage2_flags: ClassVar[Sequence[str]] = (
        *("skip_stage1", "rewards", "drop_rewards", "sft_max_steps", "sft_learning_rate", "sft_reasoning"),
        "control",
    )
    baseline_splits: ClassVar[Sequence[str]] = ()
    arguments: Any
    recipe: Any
    prompt: PromptSettings
    config: Any = None
    segmenter: Any = None

    def __init__(self, arguments: Any, seed: int, folder: Path, given: set[str] | None = None) -> None:
        self.arguments, self.seed, self.folder, self.given = arguments, seed, folder, given or set()
        self.recipe = find_preset(arguments.preset, self.recipes).fitted(arguments.data)
        self.prompt = self.recipe.prompt
        if isinstance(arguments, TwoStageArguments):
            arguments.skip_stage1 |= self.recipe.sft is None
            kind = arguments.frame_kind or self.prompt.frame_kind
            self.prompt = replace(self.prompt, reasoning=arguments.reasoning, frame_kind=kind)
            rewards = self.recipe.rewards if arguments.rewards is None else arguments.rewards
            arguments.rewards = check_rewards(rewards, arguments.drop_rewards or ())
            if arguments.lora_scope is not None and self.recipe.lora is None:
                raise SegRLError(f"--lora_scope: preset {arguments.preset!r} trains the whole model; drop the flag")
        self.queries = Queries.from_files(arguments.descriptions, arguments.paraphrases)
        if self.queries is not None and self.queries.left_out and PartialState().is_main_process:
            say(f"{self.queries.source}: {self.queries.left_out} texts left out, they name their structure")
        self.progress = Progress()
        self.rows: dict[str, Dataset | None] = {}
        self.contents = SplitContents()
        self.division = arguments.division()
        self._divided: dict[str, Dataset] = {}
        self.results = results_for(self.prompt.task)(folder, getattr(arguments, "pictures", None))

    # ---- the three scripts -------------------------------------------------------------------------------------------

    @classmethod
    def check_sft(cls, argv: Sequence[str]) -> Callable[[], None]:
        """Check a run of stage 1; return the work.

        Raises:
            SegRLError: Whatever is wrong with flags, folder, data, model or parts.
        """
        run, config = cls._begin(argv, SegSFTConfig, "sft", f"runs/{cls.name}_sft")
        for name in cls.stage2_flags:
            if name in run.given:
                raise SegRLError(f"--{name} is for train_grpo.py; drop it")
        if run.recipe.sft is None:
            raise SegRLError(f"preset {run.arguments.preset!r} has no stage 1: it begins with a pretrained model; run "
                             "train_grpo.py")  # fmt: skip
        run.find_parts(None)
        done = run.progress.finished
        ready = None if done else run._ready(None, completions=True)

        def work() -> None:
            if not done:
                model, processor, rows = ready or run._ready(None, completions=True)  # type: ignore[misc]
                run._fit_sft(config, model, processor, rows)
            run._report({"stage1": run.folder}, {"sft": config.to_dict()})

        return lambda: run._claimed(work)

    @classmethod
    def check_grpo(cls, argv: Sequence[str]) -> Callable[[], None]:
        """Check a run of stage 2, with stage 1 before it unless `--model` or a checkpoint has it; return the work.

        Raises:
            SegRLError: Whatever is wrong with flags, folder, data, model or parts, for both stages.
        """
        run, config = cls._begin(argv, SegGRPOConfig, "grpo", f"runs/{cls.name}")
        arguments = run.arguments
        if arguments.control and arguments.skip_stage1:
            raise SegRLError("--control continues stage 1, and --skip_stage1 has none; drop one of the two")
        progress, done = run.progress, run.progress.finished
        home = run.folder if progress.inside else progress.checkpoint and Path(progress.checkpoint).parent
        begun = done or progress.checkpoint is not None
        stage1 = find_stage1(arguments.model, home or None, skip=arguments.skip_stage1, needed=begun)
        start = None if stage1 is None or done else run._continued(stage1)
        run.find_parts(stage1)
        settings, first = {"grpo": config.to_dict()}, None
        if stage1 is None and not arguments.skip_stage1:
            stage1 = run.folder / STAGE1
            first = SegSFTConfig(**first_stage_settings(run.recipe.sft, config, run.given, arguments, str(stage1)))
            first.resume_from_checkpoint = progress.stage1
            check_trainer(first)
            settings["sft"] = first.to_dict()
        check_batches(config, range(run.views()))
        stages = {"stage2": run.folder} | ({} if stage1 is None else {"stage1": stage1})
        if arguments.control:
            stages["control"] = run.folder / CONTROL
            folder = str(stages["control"])
            control = SegSFTConfig(**first_stage_settings(run.recipe.sft, config, run.given, arguments, folder))
            check_trainer(control)
            if first is None:
                stage_time(stages["stage1"])
        ready = None if done else run._ready(start, completions=first is not None)

        def work() -> None:
            if not done:
                train()
            if arguments.control:
                run._fit_control(control, stages["stage1"])
            run._report(stages, settings)

        def train() -> None:
            model, processor, rows = ready or run._ready(start, completions=first is not None)  # type: ignore[misc]
            if first is not None:
                run._fit_sft(first, model, processor, rows)
                again = run.load_run(run.folder / STAGE1, device="cpu", trainable=True)
                model, processor = again.model, again.processor
                run._enter("grpo")
                rows = run.prepare(model, processor, completions=False)
            elif start is None:
                model, processor = run.warm_up(model, processor)
                if config.beta and not run.recipe.lora:
                    save_start(model, processor, run.folder)
            set_seed(run.seed)
            run.train_grpo(config, model, processor, rows)

        return lambda: run._claimed(work)

    @classmethod
    def check_evaluation(cls, argv: Sequence[str]) -> Callable[[], None]:
        """Check the evaluation of a run; return the work.

        Raises:
            SegRLError: Whatever is wrong with flags, folder, data or run.
        """
        (arguments,) = Parser(cls.evaluation_flags, description=f"Evaluate a run of {cls.name}.").read(argv)
        check_numbers(arguments, cls.least)
        find_preset(arguments.preset, cls.recipes)
        if arguments.model is None:
            raise SegRLError(f"--model is missing: pass the folder of a run, such as runs/{cls.name}")
        folder = Path(arguments.output_dir or Path(arguments.model) / "evaluation")
        run = cls(arguments, arguments.seed, folder)
        check_output(folder, overwrite=arguments.overwrite, inputs=arguments.inputs())
        run.check_parts()
        run.rows[arguments.split] = run._asked(run.load(arguments.split))
        run._check_division()
        for split in cls.baseline_splits:
            try:
                run.rows[split] = run.load(split)
            except UnknownNameError:  # data of another source, only to test on
                continue
        segmenter = run.load_run(arguments.model, device=str(PartialState().device))

        return lambda: run._claimed(lambda: run._report({"model": segmenter}))

    # ---- what an example has -----------------------------------------------------------------------------------------

    def load(self, split: str) -> Dataset | None:
        """Return a split of `--data`, checked in full, or of synthetic data; at most as many rows as flags say.

        None stands for synthetic data in files: `synthesize` writes them when the run's folder is claimed.
        """
        raise NotImplementedError

    def read(self, split: str, **settings: Any) -> Dataset:
        """Return a split of `--data`, of those that it has or of those that `--folds` or `--hold_out_source` makes.

        Args:
            split: For example "train".
            settings: More arguments of `segrl.data.load_split`.
        """
        if self.division is None:
            return load_split(self.arguments.data, split, **settings, **self.reading())
        if not self._divided:
            everything = load_split(self.arguments.data, None, **settings, **self.reading())
            self._divided = self.division.divide(everything)
        if split not in self._divided:
            raise unknown_name("split of data that is divided anew", split, self._divided)
        return self._divided[split]

    def reading(self) -> dict[str, Any]:
        """Return the settings with which `load` reads `--data`: all splits are compared, and flags hold."""
        compared = {} if self.division else {"contents": self.contents}
        return {**compared, "allow_outside": self.arguments.allow_outside}

    def synthesize(self, split: str) -> Dataset:
        """Write a split of synthetic data into the run's folder and return it."""
        raise NotImplementedError

    def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
        """Return the training rows with prompts, and with answers where `completions`, `copies` times."""
        raise NotImplementedError

    def build(self) -> Model:
        """Return the preset's model, or that of `--model`, and its processor."""
        path = self.arguments.model
        with reraise_as(f"--model {path!r}" if path else self.arguments.preset, CheckpointError):
            return self.recipe.build(self.train_rows, path)

    def build_segmenter(self, weights: str | None) -> Any:
        """Return the preset's segmenter, or the one whose weights are given."""
        with reraise_as(f"--segmenter {weights!r}" if weights else self.arguments.preset, CheckpointError):
            return self.recipe.segmenter(weights)

    def check_run(self, folder: str | Path) -> None:
        """Refuse a folder that holds no trained model, by a look at its files.

        Raises:
            CheckpointError: Names `--model`.
        """
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(f"--model {str(folder)!r}: no such folder; pass the output_dir of a run")
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise CheckpointError(f"--model {str(folder)!r} holds no model; pass the output_dir of a finished run")

    def load_run(self, folder: str | Path, **settings: Any) -> SegmenterBase:
        """Return the trained model of a run; `settings` go to `from_pretrained` of its segmenter.

        Raises:
            CheckpointError: No run, or one that does not fit; names `--model`.
        """
        self.check_run(folder)
        with reraise_as(f"--model {str(folder)!r}", CheckpointError):
            return self.results.segmenter_class.from_pretrained(Path(folder), **settings)

    def check_parts(self) -> None:
        """Refuse a `--model`, `--segmenter`, `--adapter` or `--probe` that is not there, before data is read or made.

        Raises:
            SegRLError: Names the flag.
        """
        arguments = self.arguments
        if isinstance(arguments, EvaluationArguments) and arguments.data is None and self.recipe.synthetic:
            self.check_synthetic(arguments.split)
        if arguments.model is not None:
            if isinstance(self.config, SegSFTConfig) or getattr(arguments, "skip_stage1", False):
                check_source("--model", arguments.model, "model", CheckpointError)
            else:
                self.check_run(arguments.model)
        for flag, registry in (("adapter", ADAPTERS), ("probe", PROBES)):
            if (name := getattr(arguments, flag, None)) is not None:
                registry.get(name)
        if isinstance(arguments, TwoStageArguments) and arguments.segmenter is not None and self.recipe.segmenter:
            self.segmenter = self.build_segmenter(arguments.segmenter)

    def find_parts(self, stage1: Path | None) -> None:
        """Find what training needs beside the model, before anything is written; nothing by default.

        Args:
            stage1: The stage 1 run that stage 2 goes on with, if there is one.
        """

    def make_parts(self) -> None:
        """Make what `find_parts` did not find, after the folder is claimed; nothing by default."""

    def warm_up(self, model: Any, processor: Any) -> Model:
        """Return the model as training begins with it, after whatever comes before; unchanged by default."""
        return model, processor

    def before_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        """Do what comes between the warm-up and stage 1; nothing by default."""

    def make_rewards(self) -> list[Reward]:
        """Return the rewards of stage 2."""
        return [make_reward(name) for name in self.arguments.rewards]

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        """Return more arguments of a stage's trainer; the place to freeze parts of the model, too."""
        return {}

    def train_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        """Train stage 1 and save it in the config's `output_dir`."""
        more = self.trainer_arguments(model, "sft")
        train_and_save(SegSFTTrainer(model, config, **self._common(model, processor, rows), **more))

    def train_grpo(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        """Train stage 2 and save it in the config's `output_dir`."""
        more = {"reward_funcs": self.make_rewards(), **self.trainer_arguments(model, "grpo")}
        train_and_save(SegGRPOTrainer(model, args=config, **self._common(model, processor, rows), **more))

    def baselines(self, segmenter: SegmenterBase, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        """Return the records of baselines by their names, such as "baseline" or "oracle"; none by default.

        Args:
            segmenter: The first model that is evaluated.
            rows: The rows that it is evaluated on.
        """
        return {}

    def figures(self) -> dict[str, Any]:
        """Return more entries of `results.json`, once the baselines are scored; none by default."""
        return {}

    # ---- shared ------------------------------------------------------------------------------------------------------

    @property
    def train_rows(self) -> Dataset:
        """The training split, once it is there."""
        rows = self.rows["train"]
        assert rows is not None
        return rows

    def count(self, split: str) -> int:
        """Return the number of rows of a split, whether it is loaded or yet to be made."""
        rows = self.rows.get(split)
        return len(rows) if rows is not None else self.arguments.count(self.recipe.synthetic[split], split)

    @property
    def own_model(self) -> bool:
        """Whether stage 1 begins, or began, with the preset's own model rather than with that of `--model`."""
        if self.arguments.skip_stage1:
            return False
        if self.arguments.model is None:
            return True
        return isinstance(self.config, SegGRPOConfig) and began_without_model(Path(self.arguments.model))

    def copies(self) -> int:
        """Return how often each training row is in the data set: as often as it takes to reach `fill_to`."""
        return max(1, self.recipe.fill_to // self.count("train"))

    def views(self) -> int:
        """Return the number of rows that are trained on, copies included."""
        return self.count("train") * self.copies()

    def shortened(self, steps: int) -> int:
        """Return the steps of a part before stage 1: a run that is a short look is short in all of its parts."""
        asked = self.config.max_steps if "max_steps" in self.given and self.config.max_steps > 0 else steps
        return min(steps, self.arguments.pretrain_steps or asked)

    def check_synthetic(self, split: str) -> None:
        """Refuse a split that synthetic data has not."""
        if split not in ("train", "test"):
            raise unknown_name(f"split of the synthetic {self.prompt.task}", split, ("train", "test"))

    @classmethod
    def _begin(cls, argv: Sequence[str], config_class: type, stage: str, output_dir: str) -> tuple[Self, Any]:
        """Read the command line, look at the folder, load the data."""
        arguments, config, given = parse(
            argv,
            cls.training_flags,
            config_class,
            defaults=lambda known: {
                "output_dir": output_dir,
                **cls._defaults(known.preset, stage, given_flags(argv), known.data),
            },
            description=f"{cls.name}, {stage}. Presets: {', '.join(cls.recipes)}.",
            least=cls.least,
        )
        if {"gradient_accumulation_steps", "global_batch_size"} <= given:
            raise SegRLError("--gradient_accumulation_steps follows from --global_batch_size; pass one of the two")
        run = cls(arguments, config.seed, Path(config.output_dir), given)
        run.progress = check_output(
            run.folder,
            overwrite=arguments.overwrite,
            resume=config.resume_from_checkpoint,
            inputs=arguments.inputs(),
        )
        config.resume_from_checkpoint = run.progress.checkpoint
        run.config = config
        run.check_parts()
        rewards = run.make_rewards() if stage == "grpo" else []
        check_trainer(config, rewards, run.prompt)
        run.rows = {split: run._asked(run.load(split)) for split in ("train", "test")}
        run._check_division()
        if run.rows["train"] is not None:
            run.prompt = run.prompt.for_rows(run.rows["train"])
        return run, config

    @classmethod
    def _defaults(cls, preset: str, stage: str, given: set[str], data: str | None = None) -> dict[str, Any]:
        """The preset's settings of a stage, as defaults of flags."""
        recipe = find_preset(preset, cls.recipes).fitted(data)
        settings = dict(getattr(recipe, stage) or {})
        if "gradient_accumulation_steps" in given and "global_batch_size" not in given:
            settings.pop("global_batch_size", None)
        if stage == "grpo":
            return {**settings, "reasoning": recipe.prompt.reasoning, "sft_reasoning": recipe.sft_reasoning}
        first = recipe.sft_reasoning
        return {**settings, "reasoning": recipe.prompt.reasoning if first is None else first}

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
        loaded = self.load_run(stage1, device="cpu", trainable=True)
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
            for split, rows in self.rows.items():
                self.rows[split] = self._asked(self.synthesize(split)) if rows is None else rows
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
        self.train_sft(config, model, processor, rows)

    def _fit_control(self, config: Any, stage1: Path) -> None:
        """Continue stage 1 for as long as stage 2 took, unless that is done."""
        folder = self.folder / CONTROL
        if is_finished(folder):
            return
        config.max_steps = steps_as_long(stage1, self.folder)
        config.seed = self.seed + 1  # other batches than stage 1 had
        self._enter("sft")
        loaded = self.load_run(stage1, device="cpu", trainable=True)
        rows = self.prepare(loaded.model, loaded.processor, completions=True)
        set_seed(config.seed)
        self.train_sft(config, loaded.model, loaded.processor, rows)
        self._enter("grpo")

    def _common(self, model: Any, processor: Any, rows: Dataset) -> dict[str, Any]:
        """Arguments of either stage's trainer."""
        head = find_mask_head(model)
        tokens = [] if head is None else [head.probe.token_id]
        scope = self.arguments.lora_scope or self.recipe.lora_scope
        lora = None
        if self.recipe.lora and not isinstance(model, PeftModel):  # one of stage 1 has its adapter
            lora = language_model_lora(model, tokens=tokens, scope=scope, **self.recipe.lora)
        return {
            "train_dataset": rows,
            "processing_class": processor,
            "peft_config": lora,
            "prompt_settings": self.prompt,
        }

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
        for name, stage in sorted(stages.items()):
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
