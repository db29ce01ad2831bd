"""Mask heads: from hidden states of a language model to mask logits."""

from segrl.heads.adapters import LinearAdapter, MLPAdapter, SemanticGuidedAdapter
from segrl.heads.attach import attach_mask_head, detach_mask_head, find_mask_head
from segrl.heads.dense import DenseLoss
from segrl.heads.mask_head import MaskHead, SegInput
from segrl.heads.probes import AnswerProbe, SegTokenProbe

__all__ = [
    "AnswerProbe",
    "DenseLoss",
    "LinearAdapter",
    "MLPAdapter",
    "MaskHead",
    "SegInput",
    "SegTokenProbe",
    "SemanticGuidedAdapter",
    "attach_mask_head",
    "detach_mask_head",
    "find_mask_head",
]
