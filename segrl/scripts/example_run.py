"""`ExampleRun`: what an example has or overrides of a run, data, model, parts, rewards and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import PartialState
from datasets import Dataset

from segrl.data.contents import SplitContents
from segrl.data.division import Division
from segrl.data.splits import load_split
from segrl.errors import CheckpointError, unknown_name
from segrl.heads.adapters import ADAPTERS
from segrl.heads.probes import PROBES
from segrl.hub import check_source, reraise_as
from segrl.inference.base import SegmenterBase
from segrl.predictions.prompt_settings import PromptSettings
from segrl.rewards.factory import make_reward
from segrl.rewards.reward import Reward
from segrl.scripts.arguments import EvaluationArguments, TwoStageArguments
from segrl.scripts.four_bit import check_four_bit, four_bit_loading
from segrl.scripts.phases import Phases
from segrl.scripts.recipe import Recipe
from segrl.scripts.run_folder import Progress
from segrl.scripts.stages import began_without_model
from segrl.trainers.config import SegGRPOConfig, SegSFTConfig

__all__ = ["ExampleRun", "Model"]

Model = tuple[Any, Any]  # with its processor


class ExampleRun:
    """Hooks of a run: class attributes that an example sets, and methods that it overrides.

    `segrl.scripts.TwoStageRun` calls them.
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
    seed: int
    folder: Path
    given: set[str]
    progress: Progress
    phases: Phases
    rows: dict[str, Dataset | None]
    contents: SplitContents
    division: Division | None
    results: Any
    _divided: dict[str, Dataset]

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
            return self.recipe.build(self.train_rows, path, **self.loading())

    def loading(self) -> dict[str, Any]:
        """Return how the base model of training is loaded, as arguments of `load_vlm`."""
        wanted = getattr(self.arguments, "load_in_4bit", False) and self.config is not None
        return four_bit_loading(self.config) if wanted else {}

    def trainable(self) -> dict[str, Any]:
        """Return the arguments with which `load_run` loads a stage that is trained on."""
        loading = self.loading()
        return {"device": loading["device_map"][""] if loading else "cpu", "trainable": True, **loading}

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
        if getattr(arguments, "load_in_4bit", False):
            check_four_bit(self.recipe, arguments.preset)
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

    def preparations(self) -> dict[str, float]:
        """Return the phases before stage 1 in their order, with their cost; none by default.

        The unit is a row of stage 1. `self.phases.begin(name)` is called where one begins.
        """
        return {}

    def make_rewards(self) -> list[Reward]:
        """Return the rewards of stage 2."""
        return [make_reward(name) for name in self.arguments.rewards]

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        """Return more arguments of a stage's trainer; the place to freeze parts of the model, too."""
        return {}

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

    def trained_rows(self) -> int:
        """Return the number of rows that are trained on, also before a validation split is taken off them."""
        count, fraction = self.count("train"), getattr(self.arguments, "val_fraction", None)
        return count if fraction is None or "val" in self.rows else count - round(fraction * count)

    @property
    def own_model(self) -> bool:
        """Whether stage 1 begins, or began, with the preset's own model rather than with that of `--model`."""
        if getattr(self.arguments, "skip_stage1", False):  # an evaluation has no such flag
            return False
        if self.arguments.model is None:
            return True
        return isinstance(self.config, SegGRPOConfig) and began_without_model(Path(self.arguments.model))

    def copies(self) -> int:
        """Return how often each training row is in the data set: as often as it takes to reach `fill_to`."""
        return max(1, self.recipe.fill_to // self.trained_rows())

    def views(self) -> int:
        """Return the number of rows that are trained on, copies included."""
        return self.trained_rows() * self.copies()

    def written(self) -> int:
        """Return the number of rows with written answers, copies included, which stage 1 is trained on."""
        return self.views()

    def steps(self, config: Any) -> int:
        """Return the optimizer steps of the trainer of a stage; an epoch of GRPO has `num_generations` answers a row.

        Args:
            config: Its settings.
        """
        if config.max_steps > 0:
            return config.max_steps
        answers = getattr(config, "num_generations", 1) * getattr(config, "num_iterations", 1)
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * PartialState().num_processes
        rows = self.written() if isinstance(config, SegSFTConfig) else self.views()
        return max(1, round(rows * answers * config.num_train_epochs / batch))

    def shortened(self, steps: int) -> int:
        """Return the steps of a part before stage 1: a run that is a short look is short in all of its parts."""
        asked = self.config.max_steps if "max_steps" in self.given and self.config.max_steps > 0 else steps
        return min(steps, self.arguments.pretrain_steps or asked)

    def check_synthetic(self, split: str) -> None:
        """Refuse a split that synthetic data has not."""
        if split not in ("train", "test"):
            raise unknown_name(f"split of the synthetic {self.prompt.task}", split, ("train", "test"))
