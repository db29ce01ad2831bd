"""Counts of what a step and a decoder layer run and hold: no clock and no load of the machine changes them."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from step_arms import Settings, _answer_at_once, build_trainer, replayed
from step_probe import Probe, backbone_of
from step_shapes import Shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch that are no views, and the bytes of the tensors that they made, while it is on.

    A storage counts from the operation that made it until it is freed, whoever holds it: what the loss saves for its
    backward pass, gradients, caches. What was there before does not count, nor what a kernel needs within itself.

    Attributes:
        phase: Name that the next operations count under.
        total: Operations, by phase.
        live: Bytes now.
        peak: Most bytes at once, by phase.
    """

    def __init__(self, phase: str = "") -> None:
        super().__init__()
        self.phase, self.live = phase, 0
        self.total, self.peak = Counter[str](), Counter[str]()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total[self.phase] += 1
            given = {storage._cdata for storage in _storages((args, kwargs))}  # an operation in place makes none
            for storage in _storages(made):
                if storage._cdata not in given | self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak[self.phase] = max(self.peak[self.phase], self.live)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside the context operations count under another name."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _watch(trainer: Any) -> Operations:
    """Count forward and backward passes of all losses of an optimizer step under `loss`, the rest under `rollout`."""
    operations = Operations("loss")
    step, prepare = trainer.training_step, trainer._prepare_inputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        with operations:
            return step(*args, **kwargs)

    def rollout(*args: Any, **kwargs: Any) -> Any:
        with operations.during("rollout"):
            return prepare(*args, **kwargs)

    trainer.training_step, trainer._prepare_inputs = counted, rollout
    return operations


def count_step(arm: str, shape: Shape, group: int, settings: Settings, folder: str) -> dict[str, float]:
    """Counts of one optimizer step: those of `Probe` and `Operations`, and seconds, which only describe.

    Python collects no cycles meanwhile: when it does depends on what ran before.
    """
    trainer, answers = build_trainer(arm, shape, group, settings, 1, 0, folder)
    if not settings.generates:
        _answer_at_once(trainer, answers, None)
    operations = _watch(trainer)
    probe = Probe(trainer, cuda=False)
    gc.collect()
    gc.disable()
    try:
        with replayed(answers):
            trainer.train()
    finally:
        gc.enable()
    counts: dict[str, float] = dict(probe.counts[0])
    for phase in ("loss", "rollout"):
        counts[f"{phase}_operations"] = operations.total[phase]
        counts[f"peak_bytes/{phase}"] = operations.peak[phase]
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
        "eager": eager.total.total(),
        "eager_outside": eager.total.total() - attention.total.total(),
        "compiled": kernels + calls + attention.total.total() + again.total.total(),
        "compiled_outside": kernels + calls,
    }
