"""`bench_step.py` at full size on one GPU: Qwen2.5-VL-3B from its config with random weights, bfloat16, LoRA of rank
64, gradient checkpointing, SAM 2.1 hiera-tiny at 512 px. Prints the MFU of the loss besides.

    python benchmarks/gpu/bench_step_3b.py [--shape all] [--generations 4 8 16] [--rounds 5] [--json result.json]

Every option of `bench_step.py` can be given, and one given here wins. Without a GPU only `--quick` makes sense: the
same settings with tiny models, on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_step import main

H200_BF16 = 989e12  # dense, by the data sheet of the H100 and H200 SXM


def defaults(given: list[str]) -> list[str]:
    """The options of this benchmark, then those that were given, which win."""
    settings = ["--size", "3b", "--lora", "64", "--checkpointing"]
    if torch.cuda.is_available():
        settings += ["--device", "cuda", "--peak-flops", str(H200_BF16)]
    elif "--quick" not in given and not {"-h", "--help"} & set(given):
        raise SystemExit(
            "no GPU: torch.cuda.is_available() is False; add --quick to try it with tiny models on the CPU"
        )
    return settings + given


if __name__ == "__main__":
    main(defaults(sys.argv[1:]))
