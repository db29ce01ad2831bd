"""`fuse_lora` beside PEFT's own LoRA layers: operations of a loss pass, and the loss of supervised training.

    python benchmarks/lora_layers.py [--layers 36] [--steps 200] [--seeds 3]

The decoder is Qwen2.5-VL's in bfloat16 at a small width, under autocast as `bf16=True` trains, every linear layer with
LoRA of rank 8. Operations are those of PyTorch that are no views, of forward and backward, on a CPU; on a GPU most of
them are one kernel each. Losses are those of the same rows in the same order, means over the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from step_counts import Operations

from segrl.models import language_model_lora, tiny_qwen2_5_vl
from segrl.models.lora_layers import fuse_lora
from segrl.reports import say


def adapted(layers: int, dropout: float, seed: int) -> tuple[Any, Any, Any]:
    """The model without LoRA, with PEFT's, and with fused layers."""
    torch.manual_seed(seed)
    model, _ = tiny_qwen2_5_vl(layers=layers)
    bare = model.to(torch.bfloat16)
    settings = language_model_lora(bare, r=8, lora_alpha=16, lora_dropout=dropout)
    peft = get_peft_model(copy.deepcopy(bare), settings)
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    return bare.requires_grad_(False), peft, fused


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def operations(model: Any, ids: torch.Tensor) -> int:
    """Operations of a loss and its gradients, of the second pass."""
    if not any(value.requires_grad for value in model.parameters()):  # as PEFT does for gradient checkpointing
        model.enable_input_require_grads()
    loss_of(model, ids).backward()
    with Operations() as counted:
        loss_of(model, ids).backward()
    return counted.total.total()


def trained(model: Any, steps: int, seed: int) -> list[float]:
    """Losses of a model that learns 64 random texts by heart."""
    rng = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, 200, (64, 24), generator=rng)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=3e-3)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = loss_of(model.train(), texts[torch.randint(0, 64, (8,), generator=rng)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=36, help="decoder layers whose operations are counted")
    parser.add_argument("--steps", type=int, default=200, help="steps of training, with two layers; 0 trains nothing")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    ids = torch.randint(0, 200, (1, 64), generator=torch.Generator().manual_seed(0))
    for dropout in (0.0, 0.05):
        bare, peft, fused = (operations(model, ids) for model in adapted(arguments.layers, dropout, 0))
        say(
            f"dropout {dropout}: {bare} operations without LoRA, {peft} with PEFT's, {fused} fused; "
            f"what LoRA adds: {(fused - bare) / (peft - bare):.2f} of PEFT's"
        )
    last = max(1, arguments.steps // 10)
    for seed in range(arguments.seeds if arguments.steps else 0):
        _, *models = adapted(2, 0.0, seed)
        losses = [trained(model, arguments.steps, seed) for model in models]
        means = [float(np.mean(values[-last:])) for values in losses]
        say(
            f"seed {seed}: loss {losses[0][0]:.3f}, after {arguments.steps} steps {means[0]:.4f} with PEFT's, "
            f"{means[1]:.4f} fused"
        )


if __name__ == "__main__":
    main()
