"""The trainers: the difference to TRL's, and nothing else. The only files that import TRL."""

from segrl.trainers.config import SegGRPOConfig, SegSFTConfig
from segrl.trainers.grpo import SegGRPOTrainer
from segrl.trainers.sft import SegSFTTrainer
from segrl.trainers.shared_prompt import SharedPromptGRPOTrainer

__all__ = ["SegGRPOConfig", "SegGRPOTrainer", "SegSFTConfig", "SegSFTTrainer", "SharedPromptGRPOTrainer"]
