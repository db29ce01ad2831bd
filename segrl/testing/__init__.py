"""Tiny models for tests, tutorials and smoke runs: built in memory, offline, in under two seconds."""

from segrl.testing.tiny import (
    tiny_causal_lm,
    tiny_llava,
    tiny_qwen2_5_vl,
    tiny_qwen3_vl,
    tiny_tokenizer,
)

__all__ = ["tiny_causal_lm", "tiny_llava", "tiny_qwen2_5_vl", "tiny_qwen3_vl", "tiny_tokenizer"]
