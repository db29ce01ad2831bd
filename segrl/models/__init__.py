"""Base models: load one from a folder or the hub, give it a `<seg>` token, or build a tiny one in memory."""

from segrl.models.agreement import check_processor
from segrl.models.backbone import backbone_of, base_instance
from segrl.models.loading import ensure_seg_token, language_model_lora, load_vlm, restore_weights, seg_token_id
from segrl.models.tiny import tiny_causal_lm, tiny_llava, tiny_qwen2_5_vl, tiny_qwen3_vl
from segrl.models.tiny_pretraining import Finding, Picture, list_findings, pretrain_captions, pretrain_vision
from segrl.models.tiny_tokenizer import tiny_tokenizer

__all__ = [
    "Finding",
    "Picture",
    "backbone_of",
    "base_instance",
    "check_processor",
    "ensure_seg_token",
    "language_model_lora",
    "list_findings",
    "load_vlm",
    "pretrain_captions",
    "pretrain_vision",
    "restore_weights",
    "seg_token_id",
    "tiny_causal_lm",
    "tiny_llava",
    "tiny_qwen2_5_vl",
    "tiny_qwen3_vl",
    "tiny_tokenizer",
]
