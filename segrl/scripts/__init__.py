"""Training scripts: command lines, presets and output folders."""

from segrl.scripts.arguments import (
    MACHINE_FLAGS,
    EvaluationArguments,
    RunArguments,
    TwoStageArguments,
    check_numbers,
    first_stage_settings,
)
from segrl.scripts.command_line import Parser, check_rewards, find_preset, missing_processes, parse, run_script
from segrl.scripts.run_folder import check_batches, check_output, claim_output, find_stage1, is_finished, train_and_save

__all__ = [
    "MACHINE_FLAGS",
    "EvaluationArguments",
    "Parser",
    "RunArguments",
    "TwoStageArguments",
    "check_batches",
    "check_numbers",
    "check_output",
    "check_rewards",
    "claim_output",
    "find_preset",
    "find_stage1",
    "first_stage_settings",
    "is_finished",
    "missing_processes",
    "parse",
    "run_script",
    "train_and_save",
]
