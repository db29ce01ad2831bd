"""GRPO with Liger's kernels, prompts shared and not: `liger_runs.py FOLDER KIND`.

It is a process of its own, since Liger changes classes of transformers. Without a GPU Triton's interpreter runs the
kernels. It lacks two things that they need: numbers with a fraction reach a kernel as Python's, and functions of the
GPU's own library are empty there.
"""

import os
import sys
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import numpy as np
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm  # type: ignore[import-not-found]
from test_settings_matrix import both, check
from triton.runtime import interpreter


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


def interpret() -> None:
    """Fill the two gaps."""
    known: Any = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return known(value)

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = rsqrt


if __name__ == "__main__":
    if not torch.cuda.is_available():
        interpret()
    folder, kind = sys.argv[1:]
    settings = {"use_liger_kernel": True, "use_cpu": not torch.cuda.is_available()}
    shared, dense = both(folder, settings, kind=kind)
    assert all("Liger" in str(layer.mlp.forward) for layer in shared.model.get_decoder().layers)
    check(shared, dense)
