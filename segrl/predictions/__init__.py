"""From the text of a completion to one `Prediction`, its ground truth, and the coordinate frame between them."""

from segrl.predictions.characters import END_TOKENS, is_blank, strip_end_tokens, visible_text
from segrl.predictions.completion_format import CompletionFormat
from segrl.predictions.families import FAMILIES, ChatFamily, zero_shot_settings
from segrl.predictions.frames import NOT_SHOWN, Frame, frame_for, shrunk_size
from segrl.predictions.json_answers import Answer, read_json_answer
from segrl.predictions.parsing import SEG_TOKEN, completion_text, format_answer, format_completion, parse_completion
from segrl.predictions.prediction import Prediction, Status, invalid_text
from segrl.predictions.prompt_settings import (
    ImagePromptSettings,
    PromptSettings,
    VolumePromptSettings,
    load_prompt_settings,
    prompt_settings_from_dict,
)
from segrl.predictions.records import answer_record, read_answer, read_frame, read_mask, read_probability, read_target
from segrl.predictions.reserved_text import check_reserved
from segrl.predictions.target import METADATA_COLUMNS, Metadata, Target, VolumeTarget

__all__ = [
    "END_TOKENS",
    "FAMILIES",
    "METADATA_COLUMNS",
    "NOT_SHOWN",
    "SEG_TOKEN",
    "Answer",
    "ChatFamily",
    "CompletionFormat",
    "Frame",
    "ImagePromptSettings",
    "Metadata",
    "Prediction",
    "PromptSettings",
    "Status",
    "Target",
    "VolumePromptSettings",
    "VolumeTarget",
    "answer_record",
    "check_reserved",
    "completion_text",
    "format_answer",
    "format_completion",
    "frame_for",
    "invalid_text",
    "is_blank",
    "load_prompt_settings",
    "parse_completion",
    "prompt_settings_from_dict",
    "read_answer",
    "read_frame",
    "read_json_answer",
    "read_mask",
    "read_probability",
    "read_target",
    "shrunk_size",
    "strip_end_tokens",
    "visible_text",
    "zero_shot_settings",
]
