"""Training settings: TRL's, plus what joint training of text and masks needs. Every field is a command-line flag."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig


@dataclass
class SegGRPOConfig(GRPOConfig):
    """`GRPOConfig` with the weight of the policy term, the head's learning rate and the frame of written boxes.

    The defaults add nothing: without a mask head and dense losses `SegGRPOTrainer` is TRL's `GRPOTrainer` bit for bit.
    """

    policy_weight: float = field(
        default=1.0, metadata={"help": "Weight of the GRPO loss beside the dense losses (lambda_3 in CORE-Seg)."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask head; None uses learning_rate."}
    )
    frame_kind: str | None = field(
        default=None,
        metadata={
            "help": "Frame of the boxes that the model writes: original_px, resized_px or relative_1000; "
            "None reads it off the processor.",
            "choices": ["original_px", "resized_px", "relative_1000"],
        },
    )
    require_reasoning: bool = field(
        default=True, metadata={"help": "Whether a valid completion has a <think> block (False: ablation without CoT)."}
    )


@dataclass
class SegSFTConfig(SFTConfig):
    """`SFTConfig` with the weight of the text term and the head's learning rate.

    The defaults add nothing: without a mask head and dense losses `SegSFTTrainer` is TRL's `SFTTrainer` bit for bit.
    """

    text_weight: float = field(
        default=1.0, metadata={"help": "Weight of the text loss beside the dense losses (lambda_1 in CORE-Seg)."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask head; None uses learning_rate."}
    )
