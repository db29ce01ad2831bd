"""MedVol-R1: presets, flags, data, and what is built.

| preset         | hardware      | time    | held-out result                                                      |
|----------------|---------------|---------|----------------------------------------------------------------------|
| `tiny`         | 2 CPU cores   | 14 min  | Dice 78.8 % (true boxes 79.3), visibility 60.7 to 67.2 %, boxes 22.4 |
|                |               |         | to 26.4 % from stage 1 to 2, on its synthetic volumes (docs/log.md)  |
| `medvol_r1_4b` | A6000, 48 GB  | not run | not run; published Dice: 85.43 CT-ORG, 89.86 AbdomenCT-1K,           |
|                |               |         | 45.46 KiTS23                                                         |

The paper trained on NVIDIA RTX A6000 and states neither their number nor the time; `--deepspeed
examples/medvol_r1/zero2.json` (ZeRO-2) is our choice for several of them.
`tiny` took 14 minutes with a thread on each core (`--num_cpu_threads_per_process 2`), 17 with one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from segmenter import lesions_of, train_segmenter
from slice_texts import add_reasoning, slice_pictures

from segrl import make_reward
from segrl.caching import FeatureCache
from segrl.data import (
    M3D_SEG_DATASETS,
    check_volumes,
    load_m3d_seg,
    load_volumes,
    make_synthetic_volumes,
    prepare_volumes,
    read_labels,
    uniform_slices,
)
from segrl.errors import DataError, SegRLError
from segrl.evaluation import evaluate_oracle_boxes
from segrl.inference import SegmenterBase, VolumeSegmenter
from segrl.models import load_vlm, pretrain_vision, tiny_qwen3_vl
from segrl.predictions import VolumePromptSettings
from segrl.reports import say
from segrl.scripts import (
    SEGMENTER_HELP,
    EvaluationArguments,
    FrozenSegmenterRun,
    Recipe,
    RunArguments,
    TwoStageArguments,
    pictures_key,
    reader_key,
    sam2_builder,
    train_once,
)
from segrl.segmenters import VolumePropagator, sam2_config

REWARDS = ("slice_format", "slice_visibility", "slice_boxes", "propagated_dice")  # R_f, R_a, R_s, R_c

# ---- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MedVolRecipe(Recipe):
    """One preset. A small training set is repeated up to `fill_to` rows, each time with other key slices in answers.

    Attributes:
        prompt: How the model is asked.
        top_k: Key slices of reference answers are among so many largest ones; the paper is silent on K.
        vision_warmup: For a model with random weights, whose tower is frozen afterwards: "steps" of `pretrain_vision`,
            and the number of "volumes" whose slices it sees; reasoning is that of `add_reasoning`. None has weights.
        segmenter_training: Settings of `train_segmenter`, for a segmenter with random weights; None has weights.
    """

    prompt: VolumePromptSettings
    top_k: int = 5
    vision_warmup: Mapping[str, Any] | None = None
    segmenter_training: Mapping[str, Any] | None = None


TINY_PROMPT = VolumePromptSettings(
    slices=8, size=32, instruction="", frame_kind="original_px", postprocessing=False, max_new_tokens=112
)
SYNTHETIC = {"train": 600, "test": 240, "segmenter": 120, "depth": 16, "size": 64}


def build_tiny(train: Dataset, path: str | None) -> tuple[Any, Any]:
    """About 3 M parameters of Qwen3-VL, random; the tokenizer learns the training texts."""
    if path:
        return load_vlm(path)
    rows = train.select(range(min(200, len(train))))
    columns = [name for name in ("query", "lesion", "anatomy", "modality") if name in rows.column_names]
    corpus = [str(dict(row)[name]) for row in rows for name in columns]
    corpus += [
        '"slice": 3, "bbox_2d_list": [[',
        "<slice 1>",
        ", 2 none, 3 small 0123, 4 medium 0145, 5 large 4567.",
    ] * 50
    return tiny_qwen3_vl(
        corpus=corpus,
        hidden_size=128,
        layers=3,
        heads=4,
        vision_hidden_size=64,
        vision_layers=2,
        vision_heads=2,
        patch_size=8,
        merge_size=4,  # one token a slice
        rope_theta=1e4,
        min_pixels=TINY_PROMPT.size**2,
        max_pixels=TINY_PROMPT.size**2,
    )


def build_4b(train: Dataset, path: str | None, **loading: Any) -> tuple[Any, Any]:
    """Qwen3-VL-4B, from a path or the hub."""
    return load_vlm(path or "Qwen/Qwen3-VL-4B-Instruct", dtype=torch.bfloat16, **loading)


ON_A_CPU = {
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "cosine",
}
# GRPO as published (formulas C): mean over the tokens of an answer, then over answers; KL without bias correction.
# TRL's defaults for both differ. Eq. 3 writes one ratio for an answer, "sequence"; "token" is the other reading.
AS_PUBLISHED = {"loss_type": "grpo", "use_bias_correction_kl": False, "importance_sampling_level": "sequence"}
# formulas B, for both stages: AdamW (the trainers' default), warm-up 0.1, cosine, bf16, checkpointing
PUBLISHED = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a fraction of all steps, as transformers reads a number below 1
    "bf16": True,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "save_steps": 100,
}

RECIPES = {
    "tiny": MedVolRecipe(
        build=build_tiny,
        segmenter=sam2_builder(sam2_config("tiny", image_size=64)),
        prompt=TINY_PROMPT,
        sft={
            **ON_A_CPU,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-3,
            "warmup_steps": 10,
            "max_steps": 450,
            "dataloader_num_workers": 1,  # the second core prepares the images
            "logging_steps": 50,
            "max_length": None,
        },
        grpo={
            **ON_A_CPU,
            **AS_PUBLISHED,
            "per_device_train_batch_size": 32,
            "num_generations": 4,
            "max_completion_length": 112,
            "temperature": 0.5,
            "learning_rate": 1.5e-4,
            "warmup_steps": 10,
            "max_steps": 120,
            "logging_steps": 10,
            "beta": 0.01,
        },
        rewards=REWARDS,
        vision_warmup={"steps": 200, "volumes": 300},
        demonstration=True,
        segmenter_training={"steps": 450, "learning_rate": 1e-3},
        fill_to=64,
        synthetic=SYNTHETIC,
    ),
    "medvol_r1_4b": MedVolRecipe(
        build=build_4b,
        segmenter=sam2_builder(sam2_config("sam2.1_hiera_tiny", image_size=512), "wanglab/MedSAM2:MedSAM2_latest.pt"),
        prompt=VolumePromptSettings(slices=64, size=256),
        sft={
            **PUBLISHED,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-5,
            "max_length": None,
        },
        # batches are published per GPU, so they hold for any number of processes: 1 prompt, with its 4 completions
        grpo={
            **PUBLISHED,
            **AS_PUBLISHED,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "num_generations": 4,
            "max_completion_length": 256,
            "learning_rate": 2e-6,
            "beta": 0.01,
        },
        rewards=REWARDS,
        sft_reasoning=False,  # the targets are answers alone; stage 2 asks for <think>
        lora={"r": 128, "lora_alpha": 256},  # alpha is not published
        lora_scope="all",  # "rank 128 on all linear layers"; `--lora_scope language` is the other reading
        synthetic=SYNTHETIC,
    ),
}

# ---- flags -----------------------------------------------------------------------------------------------------------

DATA = (
    "Folder with manifest.csv and NIfTI scans and labels, or (with --m3d_seg) a folder in M3D-Seg's layout, or a "
    "DatasetDict saved to disk, each with the splits train and test; None: synthetic volumes."
)
M3D_SEG = f"--data is a folder in the layout of M3D-Seg; which of its data sets: {', '.join(M3D_SEG_DATASETS)}."


@dataclass
class DataFlags(RunArguments):
    """Flags of all three scripts."""

    data: str | None = field(default=None, metadata={"help": DATA})
    m3d_seg: str | None = field(default=None, metadata={"help": M3D_SEG})
    allow_empty: bool = field(
        default=False,
        metadata={
            "help": "Let labels have no voxel of what a row asks for: the right answer is then that there is none."
        },
    )
    segmenter: str | None = field(
        default=None,
        metadata={"help": SEGMENTER_HELP},
    )


@dataclass
class TrainingFlags(DataFlags, TwoStageArguments):
    """Flags of the two training scripts."""

    segmenter_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps for which a segmenter with random weights is trained first; default: the preset's, at most "
            "--max_steps if given."
        },
    )
    reach: int = field(
        default=5,
        metadata={
            "help": "Delta of R_c: slices each way from the key slice that propagated_dice reads (2, 5, 10, 15)."
        },
    )
    key_slices: int | None = field(
        default=None, metadata={"help": "Stage 1 answers with one of so many largest slices; default: the preset's."}
    )


@dataclass
class EvaluationFlags(DataFlags, EvaluationArguments):
    """Flags of the evaluation."""


# ---- the run ---------------------------------------------------------------------------------------------------------


class MedVolRun(FrozenSegmenterRun):
    """A language model that names slices and boxes, and a frozen SAM 2 that takes the boxes through the volume."""

    name = "medvol_r1"
    recipes = RECIPES
    training_flags = TrainingFlags
    evaluation_flags = EvaluationFlags
    least: ClassVar = {"reach": 0, "key_slices": 1, "segmenter_steps": 1}
    stage2_flags = (*FrozenSegmenterRun.stage2_flags, "reach")
    recipe: MedVolRecipe
    prompt: VolumePromptSettings
    propagator: VolumePropagator | None = None  # of stage 2

    # ---- data --------------------------------------------------------------------------------------------------------

    def load(self, split: str) -> Dataset | None:
        arguments = self.arguments
        if arguments.data is None:
            self.check_synthetic(split)
            return None
        if arguments.m3d_seg is not None:
            if self.division is not None:
                raise SegRLError("--m3d_seg reads the splits of M3D-Seg; drop --folds or --hold_out_source")
            return arguments.limited(load_m3d_seg(arguments.data, arguments.m3d_seg, split, **self.reading()), split)
        empty = {"allow_empty": arguments.allow_empty}
        rows = self.read(split, folder=partial(load_volumes, **empty), check=partial(check_volumes, **empty))
        for column, default in (("label_value", "0"), ("intensity", "")):  # a data set on disk need not have them
            if column not in rows.column_names:
                rows = rows.add_column(column, [default] * len(rows))  # type: ignore[call-arg]
        return arguments.limited(rows, split)

    def synthesize(self, split: str) -> Dataset:
        size = self.recipe.synthetic
        seed = 3 * self.seed + ("train", "test", "segmenter").index(split)
        with PartialState().main_process_first():
            return make_synthetic_volumes(
                self.arguments.count(size[split], "test" if split == "test" else "train"),
                self.folder / "data" / split,
                depth=size["depth"],
                size=size["size"],
                seed=seed,
            )

    def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
        rows, copies = self.train_rows, self.copies()
        if not completions:
            return concatenate_datasets([prepare_volumes(rows, processor, self.prompt, completions=False)] * copies)
        rows = self._with_shown_lesions(rows)
        if self.recipe.vision_warmup is not None and self.prompt.reasoning and "reasoning" not in rows.column_names:
            rows = add_reasoning(rows, self.recipe.prompt.slices)
        top_k = self.arguments.key_slices or self.recipe.top_k
        return concatenate_datasets(
            [
                prepare_volumes(
                    rows,
                    processor,
                    self.prompt,
                    completions=True,
                    top_k=top_k,
                    seed=seed,
                    coordinates=self.arguments.coordinates,
                )
                for seed in range(copies)
            ]
        )

    def _with_shown_lesions(self, rows: Dataset) -> Dataset:
        """Rows without a lesion, and those of which a slice that is shown has it: no answer can name the others."""
        slices = self.recipe.prompt.slices
        read = functools.lru_cache(maxsize=1)(read_labels)  # neighbouring rows may share a label
        label_rows = map(dict, rows)  # type: ignore[call-overload]
        masks = (read(row["label"], row["scan"]).mask(row["label_value"], allow_empty=True) for row in label_rows)
        seen = [n for n, mask in enumerate(masks) if mask[uniform_slices(len(mask), slices)].any() or not mask.any()]
        if not seen:
            raise DataError(f"no lesion of {len(rows)} rows is on one of the {slices} slices shown")
        if len(seen) < len(rows) and PartialState().is_main_process:
            say(f"stage 1: {len(rows) - len(seen)} of {len(rows)} rows left out, no slice shown has the lesion")
        return rows.select(seen)

    # ---- the segmenter -----------------------------------------------------------------------------------------------

    def check_parts(self) -> None:
        if self.arguments.m3d_seg is not None and self.arguments.data is None:
            raise SegRLError(f"--m3d_seg {self.arguments.m3d_seg}: pass --data with the folder of M3D-Seg too")
        super().check_parts()

    @property
    def trains_segmenter(self) -> bool:
        return self.recipe.segmenter_training is not None

    def gather_segmenter_data(self) -> Any:
        self.synthetic_lesions = self.synthesize("segmenter")

    def train_segmenter(self, segmenter: Any) -> None:
        settings = dict(self.recipe.segmenter_training or {})
        settings["steps"] = self._segmenter_steps()
        self.phases.begin("segmenter")
        more = self.train_rows if self.arguments.data is not None else ()
        lesions = lesions_of([*self.synthetic_lesions, *more])
        made_of = {"lesions": lesions, "seed": self.seed, **settings}

        def learn() -> float:
            losses = train_segmenter(segmenter, lesions, seed=self.seed, **settings)
            last = losses[-min(20, len(losses)) :]
            return sum(last) / len(last)

        loss = train_once(self.arguments.pretrained_dir, "segmenter", segmenter, lambda: made_of, learn)
        say(f"segmenter: {settings['steps']} steps, loss {loss:.2f} in the last ones")

    # ---- the language model ------------------------------------------------------------------------------------------

    def preparations(self) -> dict[str, float]:
        parts = {}
        if self.segmenter is None and self.trains_segmenter:
            parts["segmenter"] = float(self._segmenter_steps())
        if self.recipe.vision_warmup is not None and self.own_model:
            parts["vision"] = 8.0 * self.shortened(self.recipe.vision_warmup["steps"])
        return parts

    def _segmenter_steps(self) -> int:
        return self.arguments.segmenter_steps or self.shortened((self.recipe.segmenter_training or {})["steps"])

    def warm_up(self, model: Any, processor: Any) -> tuple[Any, Any]:
        warmup = self.recipe.vision_warmup
        if warmup is not None and self.own_model:
            self.phases.begin("vision")
            rows = self.train_rows.select(range(min(warmup["volumes"], len(self.train_rows))))
            pictures = slice_pictures(rows, self.recipe.prompt.size)
            steps = self.shortened(warmup["steps"])
            settings = {"steps": steps, "batch_size": 128, "seed": self.seed}
            learn = partial(pretrain_vision, model, processor, pictures, **settings)

            def made_of() -> dict[str, Any]:
                return {**settings, "pictures": pictures_key(pictures), "reader": reader_key(processor)}

            seen = train_once(self.arguments.pretrained_dir, "vision", model, made_of, learn)
            if PartialState().is_main_process:
                say(f"in place of pretraining: {seen:.0%} of the lesions on held-out slices are seen")
        return model, processor

    # ---- training and evaluation -------------------------------------------------------------------------------------

    def make_rewards(self) -> list[Any]:
        """Rewards that were asked for; those of the paper read masks as far as `--reach` goes."""
        within = {"propagated_dice": {"delta": self.arguments.reach}, "medvol_r1": {"delta": self.arguments.reach}}
        return [make_reward(name, **within.get(name, {})) for name in self.arguments.rewards]

    def trainer_arguments(self, model: Any, stage: Literal["sft", "grpo"]) -> dict[str, Any]:
        if self.recipe.vision_warmup is not None and self.own_model:
            # a tower that has learned to see is left alone: from words it forgets more than it learns (docs/log.md)
            model.model.visual.requires_grad_(False)
        if stage == "sft":
            return {}
        assert self.segmenter is not None
        config, rewards = self.config, self.make_rewards()
        self.propagator = VolumePropagator(
            self.segmenter,
            reach=self.arguments.reach,
            cache=FeatureCache(config.feature_cache_memory, config.feature_cache_dir, config.feature_cache_disk),
            postprocessing=self.prompt.postprocessing,
        )
        masks = any(reward.needs_mask for reward in rewards)
        return {"reward_funcs": rewards, "propagator": self.propagator if masks else None}

    def baselines(self, segmenter: SegmenterBase, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        """The ceiling of the frozen segmenter, prompted with the true boxes on the best slice."""
        assert isinstance(segmenter, VolumeSegmenter)
        assert segmenter.propagator is not None
        asked = {"batch_size": self.arguments.eval_batch_size, "settings": segmenter.settings}
        return {"oracle": evaluate_oracle_boxes(segmenter.propagator, rows, **asked)}

    def figures(self) -> dict[str, Any]:
        return {} if self.propagator is None else {"encoded_slices": self.propagator.encoded_slices}
