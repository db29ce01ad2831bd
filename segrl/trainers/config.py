"""Training settings: TRL's, plus what joint training of text and masks needs. Every field is a command-line flag."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from segrl.errors import unknown_name
from segrl.trainers.batches import check_processes, fit_accumulation
from segrl.trainers.token_budget import fold_accumulation

__all__ = ["SegGRPOConfig", "SegSFTConfig"]


@dataclass
class _SpeedFields:
    """Settings of both trainers that are for speed: of layers, and of files for features of frozen encoders."""

    fuse_lora: bool = field(
        default=False,
        metadata={
            "help": "Compute LoRA in the precision of the layers that it adapts, with scaling and sums inside the "
            "matrix products, in place of PEFT's casts. What is trained and saved stays float32. A model without LoRA "
            "trains as it is, with a warning."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile each decoder layer with torch.compile, for any length and any shared prompts; generation "
            "runs uncompiled. A model whose layers cannot be compiled trains without, with a warning."
        },
    )
    compile_backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile for compile_layers."})
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder where these features are also kept, for later runs and other processes."},
    )
    feature_cache_disk: int = field(
        default=16 * 2**30, metadata={"help": "Bytes that the files in feature_cache_dir may take."}
    )


@dataclass
class SegGRPOConfig(_SpeedFields, GRPOConfig):
    """`GRPOConfig` with the weight of the policy term, the head's learning rate, and a global batch size.

    The defaults add nothing: without a mask head, dense losses and segrl rewards `SegGRPOTrainer` is TRL's
    `GRPOTrainer` bit for bit.

    Example:
        >>> SegGRPOConfig("runs/mine", use_cpu=True, bf16=False, report_to="none").policy_weight
        1.0
    """

    policy_weight: float = field(
        default=1.0, metadata={"help": "Weight of the GRPO loss beside the dense losses (lambda_3 in CORE-Seg)."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask head; None uses learning_rate."}
    )
    prompt_boxes: str = field(
        default="matched",
        metadata={
            "help": "Boxes that prompt the frozen segmenter of volumes during training: those matched to a true box on "
            "the named slice (MedVol-R1; then more boxes never hurt R_c, only slice_boxes), or all.",
            "choices": ["matched", "all"],
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Size of an optimizer step over all processes, in batch_unit: gradient_accumulation_steps is "
            "computed from it, per_device_train_batch_size (completions) and the number of processes. None leaves "
            "that to gradient_accumulation_steps."
        },
    )
    batch_unit: str = field(
        default="prompts",
        metadata={
            "help": "What global_batch_size counts: prompts, each with num_generations completions, or completions.",
            "choices": ["prompts", "completions"],
        },
    )
    kept_groups: int = field(
        default=0,
        metadata={
            "help": "Groups of answers to keep in the folder `groups`, spread over the steps, with pictures, masks, "
            "rewards and advantages, for `segrl report`; each also goes to TensorBoard, W&B and trackio as a picture "
            "if report_to names them. 0 keeps none."
        },
    )
    share_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Compute a prompt and its images once for the completions that answer it, in generation, scoring "
            "and loss. Equal to TRL's passes up to rounding. None: yes, unless nothing of segrl is in the run (no mask "
            "head, no dense losses, no registered rewards), which then is TRL's bit for bit. False: TRL's passes."
        },
    )
    max_sampling_gap: float | None = field(
        default=0.3,
        metadata={
            "help": "Largest mean difference between log-probabilities of vLLM and of the trainer, in nats a token: "
            "the first rollout stops the run above it, later ones are warned of. None compares nothing."
        },
    )
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Divide the rows of an optimizer step (per_device_train_batch_size times "
            "gradient_accumulation_steps) into as few micro-batches as this number of tokens allows, each prompt "
            "counted once and its completions kept together. Losses and gradients do not depend on it. None: "
            "micro-batches of per_device_train_batch_size."
        },
    )
    feature_cache_memory: int = field(
        default=2**30,
        metadata={
            "help": "Bytes for features of the mask head's frozen image encoder in memory, and as many for those of a "
            "frozen vision tower; 0 keeps none."
        },
    )

    def __post_init__(self) -> None:
        if self.batch_unit not in ("prompts", "completions"):
            raise unknown_name("batch_unit", self.batch_unit, ("prompts", "completions"))
        size = self.global_batch_size
        if size is None:
            fold_accumulation(self)
            return super().__post_init__()
        rows = size * ((self.num_generations or 1) if self.batch_unit == "prompts" else 1)
        unit = f"global_batch_size={size} {self.batch_unit} ({rows} completions)"
        processes = fit_accumulation(self, rows, unit)
        fold_accumulation(self)
        super().__post_init__()
        check_processes(self, processes)


@dataclass
class SegSFTConfig(_SpeedFields, SFTConfig):
    """`SFTConfig` with the weight of the text term, the head's learning rate, and a global batch size.

    The defaults add nothing: without a mask head and dense losses `SegSFTTrainer` is TRL's `SFTTrainer` bit for bit.

    Example:
        >>> SegSFTConfig("runs/mine", use_cpu=True, bf16=False, report_to="none", text_weight=0.5).text_weight
        0.5
    """

    text_weight: float = field(
        default=1.0, metadata={"help": "Weight of the text loss beside the dense losses (lambda_1 in CORE-Seg)."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the mask head; None uses learning_rate."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step over all processes: gradient_accumulation_steps is computed from it, "
            "per_device_train_batch_size and the number of processes. None leaves that to gradient_accumulation_steps."
        },
    )
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Divide the rows of an optimizer step (per_device_train_batch_size times "
            "gradient_accumulation_steps) into as few micro-batches as this number of tokens allows, padding "
            "included. Losses and gradients do not depend on it. None: micro-batches of per_device_train_batch_size."
        },
    )
    feature_cache_memory: int = field(
        default=2**30,
        metadata={"help": "Bytes for features of the mask head's frozen image encoder, kept in memory; 0 keeps none."},
    )

    def __post_init__(self) -> None:
        size = self.global_batch_size
        if size is None:
            fold_accumulation(self)
            return super().__post_init__()
        processes = fit_accumulation(self, size, f"global_batch_size={size} rows")
        fold_accumulation(self)
        super().__post_init__()
        check_processes(self, processes)
