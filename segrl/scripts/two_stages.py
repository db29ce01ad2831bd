"""`TwoStageRun`: the skeleton of scripts that train SFT, then GRPO, and evaluate both.

Whatever can be wrong is found by `check_sft`, `check_grpo` or `check_evaluation`, before anything is written; each
returns the work. What an example adds are class attributes and overridden methods, see `ExampleRun`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from segrl.data.contents import SplitContents
from segrl.data.queries import Queries
from segrl.errors import SegRLError, UnknownNameError
from segrl.reports.terminal import say
from segrl.scripts.arguments import QUICK, TwoStageArguments, check_numbers, first_stage_settings
from segrl.scripts.command_line import Parser, check_rewards, find_preset, parse
from segrl.scripts.config_file import expand_config, flag_values
from segrl.scripts.dry_run import describe_run
from segrl.scripts.phases import Phases
from segrl.scripts.results import results_for
from segrl.scripts.run_folder import Progress, check_batches, check_output
from segrl.scripts.run_steps import RunSteps
from segrl.scripts.stages import (
    CONTROL,
    STAGE1,
    find_stage1,
    save_start,
    stage_time,
)
from segrl.scripts.trainer_settings import check_trainer
from segrl.scripts.validation import check_validation, is_validated, validation_defaults
from segrl.trainers.config import SegGRPOConfig, SegSFTConfig

__all__ = ["TwoStageRun"]

KEPT_GROUPS = 24  # of stage 2, for `segrl report`


class TwoStageRun(RunSteps):
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
        phases: The parts of the run, with their share of the whole.
        segmenter: The segmenter of `--segmenter`; None without that flag.
        rows: The splits as `load` gave them; None until synthetic files are written.
        contents: What the splits hold, to warn of what they share.

    Example:
        >>> class MyRun(TwoStageRun):
        ...     name, recipes = "mine", {}
        >>> MyRun.check_sft(["--preset", "tiny"])
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown preset 'tiny'; Known: none
    """

    def __init__(self, arguments: Any, seed: int, folder: Path, given: set[str] | None = None) -> None:
        self.arguments, self.seed, self.folder, self.given = arguments, seed, folder, given or set()
        preset = find_preset(arguments.preset, self.recipes)
        self.recipe = preset.fitted(arguments.data, quick=getattr(arguments, "quick", False))
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
        self.progress, self.phases = Progress(), Phases({})
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

        run.phases = run._plan({"stage 1": config})
        return run._script({"stage 1": config}, ready, work)

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
            check_trainer(first, validated=is_validated(arguments))
            settings["sft"] = first.to_dict()
        check_batches(config, range(run.views()))
        stages = {"stage2": run.folder} | ({} if stage1 is None else {"stage1": stage1})
        if arguments.control:
            stages["control"] = run.folder / CONTROL
            folder = str(stages["control"])
            control = SegSFTConfig(
                **first_stage_settings(run.recipe.sft, config, run.given, arguments, folder, validates=False)
            )
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
                again = run.load_run(run.folder / STAGE1, **run.trainable())
                model, processor = again.model, again.processor
                run._enter("grpo")
                rows = run.prepare(model, processor, completions=False)
            elif start is None:
                model, processor = run.warm_up(model, processor)
                if config.beta and not run.recipe.lora:
                    save_start(model, processor, run.folder)
            set_seed(run.seed)
            run.train_grpo(config, model, processor, rows)

        configs = {"stage 2": config} | ({} if first is None else {"stage 1": first})
        run.phases = run._plan(configs)
        return run._script(configs, ready, work)

    @classmethod
    def check_evaluation(cls, argv: Sequence[str]) -> Callable[[], None]:
        """Check the evaluation of a run; return the work.

        Raises:
            SegRLError: Whatever is wrong with flags, folder, data or run.
        """
        argv, _, _ = expand_config(argv)
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

    # ---- shared ------------------------------------------------------------------------------------------------------

    @classmethod
    def _begin(cls, argv: Sequence[str], config_class: type, stage: str, output_dir: str) -> tuple[Self, Any]:
        """Read the command line, look at the folder, load the data."""
        argv, files, variables = expand_config(argv)
        values = flag_values(argv)
        try:
            arguments, config, given = parse(
                argv,
                cls.training_flags,
                config_class,
                defaults=lambda known: cls._defaults(known, stage, values, output_dir),
                description=f"{cls.name}, {stage}. Presets: {', '.join(cls.recipes)}.",
                least=cls.least,
            )
        except SegRLError as error:
            if (file := next((path for name, path in files.items() if f"--{name}" in str(error)), None)) is not None:
                raise type(error)(f"--config {file}: {error}") from error
            raise
        if {"gradient_accumulation_steps", "global_batch_size"} <= given:
            raise SegRLError("--gradient_accumulation_steps follows from --global_batch_size; pass one of the two")
        config.report_to = [name for item in config.report_to for name in item.split(",")]
        run = cls(arguments, config.seed, Path(config.output_dir), given)
        if arguments.quick:  # a preset that is made for a look has its own steps
            run.given |= QUICK.keys() - ({"max_steps"} if run.recipe.quick else set())
        run.argv, run.variables = argv, variables
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
        check_trainer(config, rewards, run.prompt, validated=is_validated(arguments))
        run.rows = {split: run._asked(run.load(split)) for split in ("train", "test")}
        if arguments.val_split is not None:
            run.rows["val"] = run._asked(run.load(arguments.val_split))
        run._check_division()
        run._hold_out()
        if run.rows["train"] is not None:
            run.prompt = run.prompt.for_rows(run.rows["train"])
        return run, config

    @classmethod
    def _defaults(cls, known: Any, stage: str, values: Mapping[str, Sequence[str]], folder: str) -> dict[str, Any]:
        """The preset's settings of a stage, and those of a validation or a quick look, as defaults of flags."""
        check_validation(known, values)  # here, before transformers looks at the same settings
        recipe = find_preset(known.preset, cls.recipes).fitted(known.data, quick=known.quick)
        settings = {"output_dir": folder, **(getattr(recipe, stage) or {})}
        if "gradient_accumulation_steps" in values and "global_batch_size" not in values:
            settings.pop("global_batch_size", None)
        settings |= validation_defaults(known, values, stage)
        if known.quick:
            own = settings.get("max_steps") if stage in recipe.quick else None
            settings |= QUICK if own is None else {**QUICK, "max_steps": own}
            if not {"output_dir", "resume_from_checkpoint"} & values.keys():
                settings |= {"output_dir": f"{folder}_quick", "overwrite": True}  # of looks before
        first = recipe.sft_reasoning
        if stage == "grpo":
            settings.setdefault("kept_groups", KEPT_GROUPS)
            return {**settings, "reasoning": recipe.prompt.reasoning, "sft_reasoning": first}
        return {**settings, "reasoning": recipe.prompt.reasoning if first is None else first}

    def _script(self, configs: Mapping[str, Any], ready: Any, work: Callable[[], None]) -> Callable[[], None]:
        """Return the work of a script, or what `--dry_run` prints in its place."""
        if self.arguments.dry_run:
            return lambda: describe_run(self, dict(sorted(configs.items())), ready)
        return lambda: self._claimed(work)
