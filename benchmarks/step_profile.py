"""Where the time of a loss goes: the same loss once more, timed, and then under `torch.profiler`.

Work is sorted twice: by part of the model (module hooks open a range with the part's name; an operation of the backward
pass belongs to the part of the operation that it differentiates) and by kind (what the operation is called). On CUDA
the time of an operation is that of its kernels, and what is left of the loss's time is the GPU waiting for the next
launch. On the CPU it is the operation's own time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from step_probe import backbone_of
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

OUTSIDE = "output layer, loss"
PARTS = ("decoder", "LoRA", "vision tower", "mask head", OUTSIDE)
KINDS = {  # the first whose piece is in the operation's name
    "attention": ("attention", "flash", "softmax_dropout"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_addmm"),
    "convolutions": ("conv", "mkldnn"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::index", "aten::gather", "Memcpy", "Memset"),
    "reductions": ("softmax", "aten::sum", "aten::mean", "logsumexp", "aten::max", "norm", "aten::all", "aten::any"),
}
OTHER = "element by element"
_PREFIX = "part: "
_LAUNCHES = ("cuda_runtime", "cuda_driver")


class Kept:
    """Keeps what a trainer's last `compute_loss` was given, so that it can be repeated."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.given = trainer, None
        self._method = trainer.compute_loss
        trainer.compute_loss = self._keep

    def _keep(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.given = model, dict(inputs), args, kwargs
        return self._method(model, inputs, *args, **kwargs)

    def repeat(self) -> None:
        """Forward and backward of that loss."""
        assert self.given is not None
        model, inputs, args, kwargs = self.given
        with self.trainer.compute_loss_context_manager():
            loss = self._method(model, dict(inputs), *args, **kwargs)
        self.trainer.accelerator.backward(loss)
        self.trainer.optimizer.zero_grad()


@dataclass(frozen=True)
class Profile:
    """A loss that was repeated.

    Attributes:
        text: tables for people.
        seconds: of every repetition, without the profiler.
        work: seconds of all kernels together (on the CPU: of all operations), with the profiler.
    """

    text: str
    seconds: list[float]
    work: float


def profile_loss(kept: Kept, cuda: bool, repeats: int = 5) -> Profile:
    """Time the kept loss `repeats` times after one that is not timed, then profile it once."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        kept.repeat()
        synchronize()
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with marked(kept.trainer), profile(activities=activities) as profiler:
        kept.repeat()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        work = sort_work(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], cuda)
    return Profile(report(work, seconds[1:], cuda), seconds[1:], work.cells.total() / 1e6)


# ---- parts -----------------------------------------------------------------------------------------------------------


@contextmanager
def marked(trainer: Any) -> Iterator[None]:
    """Inside the context the parts of a trainer's model open ranges with their names."""
    backbone = backbone_of(trainer)
    found: list[tuple[nn.Module, str]] = [(backbone.language_model, "decoder"), (backbone.visual, "vision tower")]
    # with checkpointing the second forward starts inside a layer
    found += [(module, "decoder") for layer in backbone.language_model.layers for module in layer.children()]
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            found += [(module, "LoRA"), (module.get_base_layer(), "decoder")]
    head = getattr(trainer, "mask_head", None)
    if head is not None:
        found.append((head, "mask head"))
    handles = []
    for module, part in found:
        opened: list[Any] = []

        def enter(*_: Any, part: str = part, opened: list[Any] = opened) -> None:
            opened.append(record_function(_PREFIX + part))
            opened[-1].__enter__()

        def leave(*_: Any, opened: list[Any] = opened) -> None:
            opened.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Work:
    """Microseconds by part and kind, by kernel (on the CPU: operation), and how many of them there were."""

    cells: Counter[tuple[str, str]]
    kernels: Counter[str]
    calls: Counter[str]


def sort_work(events: Sequence[Mapping[str, Any]], cuda: bool) -> Work:
    """Sort the work of a profile by part and kind.

    Args:
        events: `traceEvents` of the profiler's trace: reading them takes seconds, its own objects take minutes.
        cuda: count kernels, and not the operations' own time on the CPU.
    """
    known = {"cpu_op", "user_annotation", *_LAUNCHES}
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") in known]
    spans.sort(key=lambda event: (str(event["tid"]), event["ts"], -event["dur"]))
    home: dict[int, str] = {}  # part of a forward operation by sequence number; checkpointing's second forward has none
    first = next((event["tid"] for event in spans if event["name"].startswith(_PREFIX)), None)
    for event, around in _nested(spans):
        number, forward = _link(event)
        if event["tid"] == first and number is not None and forward:
            home[number] = next(filter(None, map(_range, reversed(around))), OUTSIDE)  # the last one made the node
    work = Work(Counter(), Counter(), Counter())
    launched: dict[Any, tuple[str, str]] = {}
    own: list[tuple[Mapping[str, Any], tuple[str, str]]] = []
    inside: Counter[int] = Counter()  # time of the operations directly inside another one
    for event, around in _nested(spans):
        chain = [*around, event]
        if event["cat"] in _LAUNCHES:
            launched[event.get("args", {}).get("correlation")] = _part(chain, home), _kind(chain)
        elif event["cat"] == "cpu_op" and not cuda:
            own.append((event, (_part(chain, home), _kind(chain))))
            for outer in reversed(around):
                if outer["cat"] == "cpu_op":
                    inside[id(outer)] += event["dur"]
                    break
    kernels = [event for event in events if cuda and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spent = [(event, event["dur"], launched.get(event.get("args", {}).get("correlation"))) for event in kernels]
    spent += [(event, event["dur"] - inside[id(event)], place) for event, place in own]
    for event, duration, place in spent:
        work.cells[place or (OUTSIDE, OTHER)] += duration
        work.kernels[event["name"]] += duration
        work.calls[event["name"]] += 1
    return work


def _nested(spans: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Every span with those around it, the outermost first."""
    around: list[Mapping[str, Any]] = []
    for span in spans:
        while around and (around[-1]["tid"] != span["tid"] or around[-1]["ts"] + around[-1]["dur"] <= span["ts"]):
            around.pop()
        yield span, around
        if span["cat"] not in _LAUNCHES:
            around.append(span)


def _range(event: Mapping[str, Any]) -> str | None:
    return event["name"].removeprefix(_PREFIX) if event["name"].startswith(_PREFIX) else None


def _link(event: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Sequence number of an operation, which a forward operation and its gradient share; whether it is the forward."""
    given = event.get("args", {})
    return given.get("Sequence number"), not given.get("Fwd thread id")


def _part(chain: Sequence[Mapping[str, Any]], home: Mapping[int, str]) -> str:
    """The innermost range, or the part of the operation whose gradient this is."""
    for event in reversed(chain):
        part = _range(event)
        if part is not None:
            return part
        number, forward = _link(event)
        if number is not None and not forward and number in home:
            return home[number]
    return OUTSIDE


def _kind(chain: Sequence[Mapping[str, Any]]) -> str:
    """The kind of the innermost operation of PyTorch's own, or of what is around it."""
    for event in reversed(chain):
        if event["cat"] in _LAUNCHES:
            continue
        found = _kind_of_name(event["name"])
        if found != OTHER or event["name"].startswith("aten::"):
            return found
    return OTHER


@cache
def _kind_of_name(name: str) -> str:
    return next((kind for kind, pieces in KINDS.items() if any(piece in name for piece in pieces)), OTHER)


# ---- text ------------------------------------------------------------------------------------------------------------


def report(work: Work, seconds: list[float], cuda: bool, most: int = 20) -> str:
    """The tables of a profile."""
    wall, total = statistics.median(seconds), work.cells.total() / 1e6
    kinds = [*KINDS, OTHER]
    unit = "kernels" if cuda else "operations"
    lines = [
        f"loss, forward and backward: median {wall * 1e3:.1f} ms of " + ", ".join(f"{s * 1e3:.1f}" for s in seconds),
        f"{unit}: {work.calls.total()}, together {total * 1e3:.1f} ms, {total / wall:.1%} of that time"
        + (f"; the GPU waits {max(0.0, 1 - total / wall):.1%}" if cuda else ""),
        "",
        f"{'ms in ' + unit:22}" + "".join(f"{kind:>20}" for kind in kinds) + f"{'all':>10}{'share':>8}",
    ]
    for part in (*PARTS, "all"):
        row = [
            sum(value for (p, k), value in work.cells.items() if k == kind and part in (p, "all")) / 1e3
            for kind in kinds
        ]
        share = sum(row) / 1e3 / max(total, 1e-12)
        lines.append(f"{part:22}" + "".join(f"{value:20.2f}" for value in row) + f"{sum(row):10.2f}{share:8.1%}")
    lines += ["", f"{'ms':>10}{'calls':>8}  {unit}"]
    lines += [
        f"{value / 1e3:10.2f}{work.calls[name]:8}  {name[:120]}" for name, value in work.kernels.most_common(most)
    ]
    return "\n".join(lines) + "\n"
