"""`ImageRun`: a run on images, from data to baselines; `HeadRun` and `CascadeRun`, its two ways to a mask."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from accelerate import PartialState
from datasets import Dataset

from segrl.data.images.augmentation import augment
from segrl.data.images.prompts import prepare
from segrl.data.images.synthetic import make_scene, make_synthetic
from segrl.errors import CheckpointError, SegRLError
from segrl.evaluation.constant_mask import evaluate_constant_mask
from segrl.evaluation.images import evaluate_true_boxes
from segrl.geometry.mask_images import binarize
from segrl.heads.attach import attach_mask_head, find_mask_head
from segrl.heads.dense import DenseLoss
from segrl.heads.mask_head import MaskHead
from segrl.inference.base import SegmenterBase
from segrl.models.loading import ensure_seg_token
from segrl.models.tiny_pretraining import Picture, list_findings, pretrain_captions, pretrain_vision
from segrl.predictions.prompt_settings import ImagePromptSettings
from segrl.reports.terminal import say
from segrl.scripts.frozen_segmenter import FrozenSegmenterRun
from segrl.scripts.image_recipe import (
    CascadeEvaluationFlags,
    HeadTrainingFlags,
    ImageEvaluationFlags,
    ImageRecipe,
    ImageTrainingFlags,
)
from segrl.scripts.pretrained import pictures_key, reader_key, train_once
from segrl.scripts.two_stages import TwoStageRun
from segrl.segmenters.box_segmenter import BoxSegmenter
from segrl.segmenters.pretraining import pretrain_segmenter
from segrl.trainers.sft import SegSFTTrainer

__all__ = ["CascadeRun", "HeadRun", "ImageRun"]

_MOST_VIEWS = 32  # of a row, itself and its copies
# cost of a step of each preparation, in rows of stage 1 (preset tiny: 0.05 s on a core, docs/log.md)
_COSTS, _TEXT_STEP = {"vision": 5.0, "captions": 4.0, "segmenter": 6.0}, 3.5


class ImageRun(TwoStageRun):
    """A run on images: its data, what stands in for pretraining, and the best constant mask beside it.

    Without `--data` the images are synthetic (`make_synthetic`). Of a model with random weights the vision tower and
    the language model learn to see and to say first, as the recipe's `pretraining` says.

    Example:
        >>> ImageRun.baseline_splits, ImageRun.training_flags.__name__
        (('train',), 'ImageTrainingFlags')
    """

    training_flags = ImageTrainingFlags
    evaluation_flags = ImageEvaluationFlags
    baseline_splits = ("train",)
    pretrained: ClassVar[Sequence[str]] = ("vision", "captions", "segmenter")  # in the order of a run
    recipe: ImageRecipe
    prompt: ImagePromptSettings

    # ---- data --------------------------------------------------------------------------------------------------------

    def load(self, split: str) -> Dataset:
        if self.arguments.data is not None:
            return self.arguments.limited(self.read(split), split)
        self.check_synthetic(split)
        return make_synthetic(self.count(split), **self.scenes(split))

    def scenes(self, part: str) -> dict[str, Any]:
        """Return which synthetic scenes a part of the data has; no two parts and no two seeds share one."""
        seed = 3 * self.seed + ("train", "test", "pretraining").index(part)
        return {"size": self.recipe.synthetic["size"], "seed": seed, "hard": True}

    def views(self) -> int:
        return sum(1 + copies for copies in self.augmented())

    def written(self) -> int:
        known = None if self.arguments.data is not None else self.recipe.synthetic.get("sft")
        return min(known or self.views(), self.views())

    def augmented(self) -> list[int]:
        """Return the number of augmented copies of each row; rare kinds of rows get more, as the square root says."""
        rows = self.train_rows
        if "reasoning" in rows.column_names:
            return [0] * len(rows)  # a turned image would contradict it
        kinds = list(zip(rows["modality"], rows["lesion"], strict=True))
        counts = Counter(kinds)
        roots = sum(math.sqrt(count) for count in counts.values())
        views = {kind: int(self.recipe.fill_to / (math.sqrt(count) * roots)) for kind, count in counts.items()}
        return [min(max(1, views[kind]), _MOST_VIEWS) - 1 for kind in kinds]

    @cached_property
    def repeated(self) -> Dataset:
        """The training rows with their augmented copies; synthetic scenes are repeated as they are.

        What their reasoning says is known of scenes only as they were drawn.
        """
        rows, copies = self.train_rows, self.augmented()
        if not any(copies):
            return rows
        if self.arguments.data is None:
            return rows.select([n for turn in range(1 + max(copies)) for n, more in enumerate(copies) if turn <= more])
        return augment(rows, copies)

    def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
        rows, recipe = self.repeated, self.recipe
        if completions:
            rows = rows.select(range(self.written()))
            if recipe.noun is not None:
                names = [self.called(lesion) for lesion in rows["lesion"]]
                rows = rows.remove_columns("lesion").add_column("lesion", names)  # type: ignore[call-arg]
        if completions and self.pretrains and self.prompt.reasoning and "reasoning" not in rows.column_names:
            rows = rows.add_column("reasoning", [list_findings(picture) for picture in self.pictures(rows)])  # type: ignore[call-arg]
        limits = {"brief": recipe.brief, "max_boxes": recipe.max_boxes, "coordinates": self.arguments.coordinates}
        return prepare(rows, processor, self.prompt, completions=completions, **limits)

    def called(self, lesion: str) -> str:
        """Return what reference answers call a lesion; one without a name, "", stays without."""
        return self.recipe.noun if lesion and self.recipe.noun is not None else lesion

    def pictures(self, rows: Dataset) -> list[Picture]:
        """Return what is known about training rows: of synthetic ones all lesions, of others the one asked for."""
        if self.arguments.data is None:
            numbers = [int(name.rsplit("_", 1)[1]) for name in rows["name"]]
            return [make_scene(number, **self.scenes("train")).picture() for number in numbers]
        dicts = map(dict, rows)  # type: ignore[call-overload]
        return [
            Picture.from_mask(row["image"], binarize(row["mask"]), self.called(row["lesion"]) or "lesion")
            for row in dicts
        ]

    def baselines(self, segmenter: SegmenterBase, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        train = self.rows.get("train")
        return {} if train is None else {"baseline": evaluate_constant_mask(train, rows)}

    # ---- in place of pretraining -------------------------------------------------------------------------------------

    @property
    def pretrains(self) -> bool:
        """Whether the model is one with random weights, or was when its stage 1 began."""
        return self.recipe.pretraining is not None and self.own_model

    @cached_property
    def material(self) -> list[Picture]:
        """Pictures that pretraining learns from: synthetic scenes of its own, or the training rows."""
        if self.arguments.data is not None or self.recipe.pretraining is None:
            return self.pictures(self.repeated)
        scenes = range(self.arguments.count(self.recipe.pretraining["scenes"], "train"))
        return [make_scene(n, **self.scenes("pretraining")).picture() for n in scenes]

    def trained_once(
        self, part: str, module: Any, settings: Mapping[str, Any], learn: Callable[[], float], processor: Any = None
    ) -> float:
        """Train on the `material`, or load what a run with the same one has kept in `--pretrained_dir`."""

        def made_of() -> dict[str, Any]:
            reader = None if processor is None else reader_key(processor)
            return {"seed": self.seed, "settings": dict(settings), "pictures": self.material_key, "reader": reader}

        return train_once(self.arguments.pretrained_dir, part, module, made_of, learn)

    @cached_property
    def material_key(self) -> str:
        return pictures_key(self.material)

    def preparations(self) -> dict[str, float]:
        recipe, warmup = self.recipe.pretraining, self.recipe.text_warmup
        if recipe is None or not self.pretrains:
            return {}
        parts = [part for part in self.pretrained if part != "segmenter" or self.segmenter is None]
        costs = {part: _COSTS[part] * sum(_steps(self.short(recipe[part]))) for part in parts}
        text = {} if warmup is None else {"text alone": _TEXT_STEP * self.short(warmup)["max_steps"]}
        return costs | text

    def warm_up(self, model: Any, processor: Any) -> tuple[Any, Any]:
        recipe = self.recipe.pretraining
        if recipe is not None and self.pretrains:
            vision, captions = (self.short(recipe[part]) for part in ("vision", "captions"))
            self.phases.begin("vision")
            learn = partial(pretrain_vision, model, processor, self.material, seed=self.seed, **vision)
            seen = self.trained_once("vision", model, vision, learn, processor)
            self.phases.begin("captions")
            learn = partial(pretrain_captions, model, processor, self.material, seed=self.seed, **captions)
            said = self.trained_once("captions", model, captions, learn, processor)
            if PartialState().is_main_process:
                say(f"in place of pretraining: {seen:.0%} of held-out lesions are seen; {said:.0%} of caption tokens "
                    "right")  # fmt: skip
        return model, processor

    def train_segmenter(self, segmenter: Any) -> None:
        """Train a segmenter with random weights from true boxes."""
        recipe = self.short((self.recipe.pretraining or {})["segmenter"])
        self.phases.begin("segmenter")
        learn = partial(pretrain_segmenter, segmenter, self.material, seed=self.seed, **recipe)
        loss = self.trained_once("segmenter", segmenter, recipe, learn)
        if PartialState().is_main_process:
            say(f"segmenter: DiceCE {loss:.2f} from boxes")

    def before_sft(self, config: Any, model: Any, processor: Any, rows: Dataset) -> None:
        vars(self).pop("material", None)  # gigabytes, of large data
        if self.recipe.text_warmup is None or not self.pretrains:
            return
        alone = {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
        self.phases.begin("text alone")
        warmup = replace(config, **self.short({**self.recipe.text_warmup, **alone}))
        self.trainer_arguments(model, "sft")  # freezes the tower
        SegSFTTrainer(model, warmup, train_dataset=rows, processing_class=processor).train()

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        if self.pretrains:
            # a tower that has learned to see is left alone: from words it forgets more than it learns (docs/log.md)
            model.model.visual.requires_grad_(False)
        return {}

    def short(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with each number of steps `shortened`."""
        return {name: self.shortened(n) if name.endswith("steps") else n for name, n in settings.items()}


def _steps(settings: Mapping[str, Any]) -> list[int]:
    return [value for name, value in settings.items() if name.endswith("steps")]


class HeadRun(ImageRun):
    """A language model whose `<seg>` prompts a segmenter, trained with dense losses on its masks in each stage.

    Example:
        >>> from segrl.scripts import TINY_IMAGES, TINY_SFT
        >>> class LungRun(HeadRun):
        ...     name = "lung"
        ...     recipes = {"tiny": ImageRecipe(**TINY_IMAGES, prompt=ImagePromptSettings(), sft=TINY_SFT, grpo={})}
        >>> callable(LungRun.check_sft(["--train_limit", "2", "--eval_limit", "2", "--use_cpu"]))
        True
    """

    training_flags = HeadTrainingFlags
    least: ClassVar = {"dense_weight": 0}
    stage1_flags = ("adapter", "probe", "segmenter")

    def build(self) -> tuple[Any, Any]:
        model, processor = super().build()
        own, settings = self.recipe.adapter
        adapter = self.arguments.adapter or own
        head = MaskHead.build(
            model,
            self.segmenter or self.build_segmenter(None),
            token_id=ensure_seg_token(model, processor),
            adapter=adapter,
            probe=self.arguments.probe or "seg_token",
            tokenizer=processor.tokenizer,
            **(settings if adapter == own else {}),
        )
        return attach_mask_head(model, head), processor

    def check_run(self, folder: str | Path) -> None:
        if Path(folder).is_dir() and not (Path(folder) / "mask_head.json").is_file():
            raise CheckpointError(
                f"--model {str(folder)!r} has no mask head (no mask_head.json); train stage 1 with train_sft.py, or "
                "pass --skip_stage1 to train_grpo.py"
            )
        super().check_run(folder)

    def warm_up(self, model: Any, processor: Any) -> tuple[Any, Any]:
        model, processor = super().warm_up(model, processor)
        if self.pretrains and self.arguments.segmenter is None:
            head = find_mask_head(model)
            assert head is not None
            self.train_segmenter(head.segmenter)
        return model, processor

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        factor = self.arguments.dense_weight
        losses = [DenseLoss(name, weight=factor * weight) for name, weight in self.recipe.dense.items()]
        return {**super().trainer_arguments(model, stage), "dense_losses": losses if factor else None}


class CascadeRun(ImageRun, FrozenSegmenterRun):
    """A language model that writes boxes or points, and a frozen segmenter that makes masks of them.

    Example:
        >>> from segrl.scripts import TINY_IMAGES, TINY_SFT
        >>> prompt = ImagePromptSettings(seg_token="")
        >>> class LungRun(CascadeRun):
        ...     name = "lung"
        ...     recipes = {"tiny": ImageRecipe(**TINY_IMAGES, prompt=prompt, sft=TINY_SFT, grpo={})}
        >>> callable(LungRun.check_sft(["--train_limit", "2", "--eval_limit", "2", "--use_cpu"]))
        True
    """

    evaluation_flags = CascadeEvaluationFlags
    pretrained = ("segmenter", "vision", "captions")

    @property
    def trains_segmenter(self) -> bool:
        return self.recipe.pretraining is not None

    def baselines(self, segmenter: SegmenterBase, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        """The constant mask, and the ceiling of the frozen segmenter, prompted with what is true."""
        frozen = BoxSegmenter(segmenter.segmenter, points=self.prompt.answer_form == "json")
        asked = {"batch_size": self.arguments.eval_batch_size}
        return {**super().baselines(segmenter, rows), "oracle": evaluate_true_boxes(frozen, rows, **asked)}

    def check_run(self, folder: str | Path) -> None:
        if (Path(folder) / "mask_head.json").is_file():
            raise SegRLError(f"--model {str(folder)!r} has a mask head, and {self.name} is for models without one")
        super().check_run(folder)

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        more = super().trainer_arguments(model, stage)
        if stage == "sft":
            return more
        points = self.prompt.answer_form == "json"
        return {**more, "box_segmenter": BoxSegmenter(self.segmenter, points=points)}
