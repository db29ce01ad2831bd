"""Mask heads: from hidden states of a language model to mask logits."""

from segrl.heads.adapters import LinearAdapter, MLPAdapter, SemanticGuidedAdapter, register_adapter
from segrl.heads.attach import attach_mask_head, detach_mask_head, find_mask_head
from segrl.heads.dense import DenseLoss, register_dense_loss
from segrl.heads.mask_head import MaskHead
from segrl.heads.probes import AnswerProbe, QueryProbe, SegTokenProbe, register_probe
from segrl.heads.requests import SegInput

__all__ = [
    "AnswerProbe",
    "DenseLoss",
    "LinearAdapter",
    "MLPAdapter",
    "MaskHead",
    "QueryProbe",
    "SegInput",
    "SegTokenProbe",
    "SemanticGuidedAdapter",
    "attach_mask_head",
    "detach_mask_head",
    "find_mask_head",
    "register_adapter",
    "register_dense_loss",
    "register_probe",
]
