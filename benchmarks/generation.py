"""Generation for groups of completions: caches, compiled steps and continuous batching of transformers, on a CPU.

    python benchmarks/generation.py [--prompt 430] [--new 64] [--group 4] [--rounds 5] [--compile]

Two prompts, greedy, all completions of one length, a text model of random weights in float32 on one thread.
`dynamic` is what TRL's trainer does, `shared` (one prefill a prompt) what segrl's does. The ways take turns; times are
CPU seconds of a whole generation, medians over the rounds. Operations are those of PyTorch that are no views, MiB the
most that their tensors hold at once; neither can be counted in compiled steps (there: kernels that inductor made, and
its library calls) and in the thread of continuous batching.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from step_counts import Operations
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from segrl.models import backbone_of, tiny_causal_lm
from segrl.reports import say
from segrl.sharing.generation import prefill_once
from segrl.sharing.packing import PromptKey

UNCOUNTED = ("continuous", "compiled", "compiled, shared")


def ways(
    model: Any, ids: torch.Tensor, keys: list[PromptKey], new: int, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """Generations of the same rows, by name; each returns the new tokens of every row."""
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    mask = torch.ones_like(ids)

    def generate(shared: bool = False, **settings: Any) -> list[list[int]]:
        with prefill_once(backbone_of(model), keys, None) if shared else nullcontext():
            return model.generate(ids, attention_mask=mask, **length, **settings)[:, ids.size(1) :].tolist()

    def batched() -> list[list[int]]:
        before = model.config._attn_implementation
        settings = GenerationConfig(**length, eos_token_id=-1, pad_token_id=model.generation_config.pad_token_id)
        config = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024, page_size=16)
        found = model.generate_batch(
            ids.tolist(), generation_config=settings, continuous_batching_config=config, progress_bar=False
        )
        model.set_attn_implementation(before)
        return [output.generated_tokens for output in found.values()]

    found: dict[str, Callable[[], Any]] = {
        "dynamic": generate,
        "shared": lambda: generate(True),
        "static": lambda: generate(cache_implementation="static"),
        "static, shared": lambda: generate(True, cache_implementation="static"),
        "continuous": batched,
    }
    if compiled:
        config: Any = CompileConfig(mode="default")
        config._compile_all_devices = True  # transformers compiles on accelerators only
        for name, shared in (("compiled", False), ("compiled, shared", True)):
            found[name] = partial(generate, shared, cache_implementation="static", compile_config=config)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--prompt", type=int, default=430, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--group", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also a compiled step, which takes minutes to compile")
    options = parser.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, _ = tiny_causal_lm(layers=options.layers, hidden_size=options.hidden_size)
    model.eval()
    rows = torch.randint(
        20, model.config.vocab_size - 32, (2, options.prompt), generator=torch.Generator().manual_seed(0)
    )
    ids = rows.repeat_interleave(options.group, 0)
    keys = [PromptKey((row,)) for row in range(2) for _ in range(options.group)]
    known: Any = None
    runs = ways(model, ids, keys, options.new, options.compile)
    counts: dict[str, str] = {}
    for name, run in list(runs.items()):
        counted = Operations()
        try:
            with nullcontext() if name in UNCOUNTED else counted:
                tokens = run()
        except (RuntimeError, ValueError, ImportError, AttributeError, TypeError) as error:
            say(f"{name}: {type(error).__name__}: {error}")
            del runs[name]
            continue
        known = known or tokens
        equal = sum(one == other for one, other in zip(tokens, known, strict=True))
        numbers = ("-", "-") if name in UNCOUNTED else (counted.total.total(), f"{counted.peak.total() / 2**20:.1f}")
        counts[name] = f"{numbers[0]:>12}{numbers[1]:>8}{equal:7} of {len(tokens)}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    if options.compile:
        from torch._dynamo.utils import counters
        from torch._inductor import metrics

        made = metrics.generated_kernel_count + counters["inductor"]["extern_calls"]
        say(f"compiled steps: {made} kernels and library calls in {counters['stats']['unique_graphs']} graph(s)")
    say(f"{'':18}{'CPU s':>8}{'ratio':>8}{'operations':>12}{'MiB':>8}  same tokens as dynamic")
    for name, values in seconds.items():
        ratio = median([one / other for one, other in zip(values, seconds["dynamic"], strict=True)])
        say(f"{name:18}{median(values):8.2f}{ratio:8.2f}{counts[name]}")


if __name__ == "__main__":
    main()
