"""What the processes of `test_cache.py` run; a file of its own, so that they import little."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from torch import Tensor

from segrl.caching import FeatureCache


def content(number: int) -> tuple[Tensor, ...]:
    """Tensors that say whose they are: about 10 to 30 kB, of two dtypes."""
    generator = torch.Generator().manual_seed(number)
    side = 32 + 4 * (number % 8)
    return torch.randn(1, 2, side, side, generator=generator), torch.full((3, 1000), float(number)).to(torch.bfloat16)


def equal(found: Any, expected: Any) -> bool:
    """Whether two entries are the same to the bit: dtypes, shapes, values."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


def work(seed: int, folder: str, disk_bytes: int, rounds: int, results: Any) -> None:
    """Read and write random keys that all processes share; report what was wrong and the counters."""
    warnings.simplefilter("error")  # a cache that stops writing would go on in silence
    cache, choice, wrong = FeatureCache(40_000, folder, disk_bytes), random.Random(seed), []
    try:
        for _ in range(rounds):
            number = choice.randrange(24)
            found = cache.get(f"image {number}")
            if found is None:
                cache.put(f"image {number}", content(number))
            elif not equal(found, content(number)):
                wrong.append(f"image {number} is another's")
            if cache.nbytes > cache.memory_bytes:
                wrong.append(f"{cache.nbytes} bytes in memory")
    except Exception as error:
        wrong.append(repr(error))
    results.put((wrong, cache.hits, cache.disk_hits, cache.misses))
