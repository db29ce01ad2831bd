"""Training scripts: command lines, presets, output folders, and the skeleton of a run in two stages."""

from segrl.scripts.arguments import (
    MACHINE_FLAGS,
    EvaluationArguments,
    RunArguments,
    TwoStageArguments,
    check_numbers,
    first_stage_settings,
)
from segrl.scripts.command_line import Parser, check_rewards, find_preset, missing_processes, parse, run_script
from segrl.scripts.frozen_segmenter import SEGMENTER_HELP, FrozenSegmenterRun
from segrl.scripts.image_recipe import ImageRecipe
from segrl.scripts.image_run import CascadeRun, HeadRun, ImageRun
from segrl.scripts.pretrained import pictures_key, reader_key, train_once
from segrl.scripts.recipe import Recipe, sam2_builder
from segrl.scripts.run_folder import Progress, check_batches, check_output, claim_output, claimed
from segrl.scripts.stages import find_stage1, is_finished, save_start, train_and_save
from segrl.scripts.tiny_images import (
    ON_A_CPU,
    TINY_IMAGES,
    TINY_ON_DATA,
    TINY_QUICK,
    TINY_SFT,
    TINY_TEXT,
    build_tiny_reader,
)
from segrl.scripts.trainer_settings import check_counts, check_trainer
from segrl.scripts.two_stages import TwoStageRun

__all__ = [
    "MACHINE_FLAGS",
    "ON_A_CPU",
    "SEGMENTER_HELP",
    "TINY_IMAGES",
    "TINY_ON_DATA",
    "TINY_QUICK",
    "TINY_SFT",
    "TINY_TEXT",
    "CascadeRun",
    "EvaluationArguments",
    "FrozenSegmenterRun",
    "HeadRun",
    "ImageRecipe",
    "ImageRun",
    "Parser",
    "Progress",
    "Recipe",
    "RunArguments",
    "TwoStageArguments",
    "TwoStageRun",
    "build_tiny_reader",
    "check_batches",
    "check_counts",
    "check_numbers",
    "check_output",
    "check_rewards",
    "check_trainer",
    "claim_output",
    "claimed",
    "find_preset",
    "find_stage1",
    "first_stage_settings",
    "is_finished",
    "missing_processes",
    "parse",
    "pictures_key",
    "reader_key",
    "run_script",
    "sam2_builder",
    "save_start",
    "train_and_save",
    "train_once",
]
