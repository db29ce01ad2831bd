"""Counts of what a step and a decoder layer run, in numbers that no clock and no load of the machine changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from step_arms import Settings, _answer_at_once, build_trainer, replayed
from step_probe import Probe, backbone_of
from step_shapes import Shape
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch that are no views, while it is on.

    Attributes:
        total: Their number.
        on: Whether operations count now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total, self.on = 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += self.on and not func.is_view
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the context nothing counts."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class _LossOperations(TrainerCallback):
    """Operations of forward and backward of all losses of an optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.mode = Operations()
        step, prepare = trainer.training_step, trainer._prepare_inputs

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.mode:
                return step(*args, **kwargs)

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            with self.mode.paused():
                return prepare(*args, **kwargs)

        trainer.training_step, trainer._prepare_inputs = counted, uncounted


def count_step(arm: str, shape: Shape, group: int, settings: Settings, folder: str) -> dict[str, float]:
    """Counts of one optimizer step: those of `Probe`, operations of the losses, and seconds, which only describe."""
    trainer, answers = build_trainer(arm, shape, group, settings, 1, 0, folder)
    if not settings.generates:
        _answer_at_once(trainer, answers, None)
    operations = _LossOperations(trainer)
    probe = Probe(trainer, cuda=False)
    with replayed(answers):
        trainer.train()
    counts = Counter(probe.counts[0])
    counts["loss_operations"] = operations.mode.total
    seconds = probe.steps[0]
    layers = len(backbone_of(trainer).language_model.layers)
    return {**counts, "layers": layers, "seconds/loss": seconds["forward"] + seconds["backward"]}


def count_layer(lora: int = 8, backend: str = "inductor", width: int = 64) -> Mapping[str, int]:
    """Operations of a decoder layer of Qwen2.5-VL, forward and backward, on a packed row of the lengths of core_seg.

    Args:
        lora: Rank of adapters on all of its matrices; 0 for none.
        backend: Of `torch.compile`.
        width: Of the model.

    Returns:
        `eager` and `compiled`, each with and without (`_outside`) what attention runs; compiled ones are the kernels
        that inductor made and the library calls beside them.
    """
    from peft import LoraConfig, get_peft_model
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    from segrl.models import base_instance, tiny_qwen2_5_vl
    from segrl.sharing import compile_layers, enable_sharing
    from segrl.sharing.group_attention import attend
    from segrl.sharing.layout import build_layout

    model: Any = tiny_qwen2_5_vl(hidden_size=width)[0]
    if lora:
        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=lora, target_modules=targets))
    enable_sharing(model)
    decoder = base_instance(model).get_decoder()
    layout = build_layout([[0, 1, 2, 3], [4, 5, 6, 7]], [430] * 8, [200 - n for n in range(8)], 200, "cpu")
    states = torch.randn(1, layout.tokens, width, requires_grad=True)
    positions = torch.arange(layout.tokens).view(1, 1, -1).expand(3, 1, -1)
    rotary = decoder.rotary_emb(states, positions)

    def run() -> None:
        output = decoder.layers[0](states, attention_mask=None, position_embeddings=rotary, shared_prompt=layout)
        (output[0] if isinstance(output, tuple) else output).sum().backward()

    with Operations() as eager:
        run()
    heads = decoder.config.num_attention_heads
    shape = (1, heads, layout.tokens, width // heads)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with Operations() as attention:
        attend(layout.batches, query, key, value, 0.0, None).sum().backward()
    with Operations() as again, torch.no_grad():  # compiled, the backward pass computes it once more
        attend(layout.batches, query, key, value, 0.0, None)
    reason = compile_layers(model, backend)
    if reason is not None:
        raise SystemExit(f"the layer cannot be compiled: {reason}")
    kernels, calls = metrics.generated_kernel_count, counters["inductor"]["extern_calls"]
    run()
    kernels, calls = metrics.generated_kernel_count - kernels, counters["inductor"]["extern_calls"] - calls
    return {
        "eager": eager.total,
        "eager_outside": eager.total - attention.total,
        "compiled": kernels + calls + attention.total + again.total,
        "compiled_outside": kernels + calls,
    }
