"""The trainers: the difference to TRL's, and nothing else. The only files that import TRL."""

from segrl.trainers.config import SegGRPOConfig, SegSFTConfig
from segrl.trainers.grpo import SegGRPOTrainer
from segrl.trainers.mask_head_mixin import MaskHeadMixin, head_detached
from segrl.trainers.sft import SegCollator, SegSFTTrainer
from segrl.trainers.shared_prompt import SharedPromptGRPOTrainer

__all__ = [
    "MaskHeadMixin",
    "SegCollator",
    "SegGRPOConfig",
    "SegGRPOTrainer",
    "SegSFTConfig",
    "SegSFTTrainer",
    "SharedPromptGRPOTrainer",
    "head_detached",
]
