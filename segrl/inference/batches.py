"""Many inputs answered in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from rich.progress import Progress

from segrl.errors import DataError
from segrl.inference.asking import Asked
from segrl.models.backbone import base_instance

__all__ = ["MOST", "VOLUMES", "free_bytes", "in_batches", "row_bytes", "rows_that_fit"]

MOST = 16
"""Images in a batch at most, by default."""
VOLUMES = 4
"""Volumes in a batch at most, by default."""
_SHARE = 0.5  # of the free memory that a batch may take by the estimate
_ACTIVATIONS = 24  # numbers of the hidden size per prompt token that a layer holds at once, gated MLP included
_LOG = logging.getLogger("segrl.inference")
Read = TypeVar("Read")
Found = TypeVar("Found")


def in_batches(
    segmenter: Any,
    inputs: Sequence[Any],
    queries: Sequence[str],
    read: Callable[[Any], Read],
    answer: Callable[[Sequence[Read], Sequence[str]], list[Found]],
    pixels: Callable[[Read], int],
    tokens: Callable[[Read, str], int],
    asked: Asked,
    *,
    most: int,
    fit: bool,
    progress: bool,
) -> list[Found]:
    """Read each input once and answer them, batch by batch; what was read is let go after its batch.

    Args:
        segmenter: The model's memory and device decide.
        inputs: Anything that `read` takes.
        queries: One each.
        read: An input to what is shown.
        answer: A batch to its results.
        pixels: Of the mask of what was read.
        tokens: Of the prompt, images included.
        asked: Number of answers and their length.
        most: Inputs in a batch at most.
        fit: Whether a batch is as small as memory asks for. A CUDA device that runs out of memory all the same gets
            batches of half the size from there on, which is logged.
        progress: Show a progress bar.

    Raises:
        DataError: `most` is below 1.
    """
    if most < 1:
        raise DataError(f"batch_size={most}: expected 1 or more inputs per generation")
    found: list[Found] = []
    waiting: list[Read] = []  # read, and not yet answered
    with Progress(disable=not progress) as bar:
        task = bar.add_task("predict", total=len(inputs))
        while len(found) < len(inputs):
            first = len(found)
            waiting += [read(value) for value in inputs[first + len(waiting) : first + most]]
            batch = waiting[:most]
            texts = queries[first : first + len(batch)]
            if fit and len(batch) > 1:
                sizes = list(map(pixels, batch))
                longest = tokens(batch[sizes.index(max(sizes))], max(texts, key=len))
                batch = batch[: rows_that_fit(segmenter, longest, sizes, asked)]
            try:
                answered = answer(batch, texts[: len(batch)])
            except torch.cuda.OutOfMemoryError:
                if not fit or len(batch) == 1:
                    raise
                answered = []
            if not answered:  # the error is gone, whose frames held what did not fit
                most = max(1, len(batch) // 2)
                torch.cuda.empty_cache()
                _LOG.warning("out of memory with %d inputs; going on with %d at a time", len(batch), most)
            found += answered
            del waiting[: len(answered)]
            bar.update(task, completed=len(found))
    return found


def rows_that_fit(segmenter: Any, tokens: int, pixels: Sequence[int], asked: Asked, free: int | None = None) -> int:
    """Return how many of the first inputs are answered together: those whose estimate fits into memory, at least one.

    Args:
        segmenter: The model.
        tokens: Of the longest prompt; the others are padded to it.
        pixels: Of the mask of each input, in order.
        asked: Number of answers and their length.
        free: Bytes that are free; None asks the model's device.
    """
    model = base_instance(segmenter.model)
    free = free_bytes(model.device) if free is None else free
    new = int(asked.generation.get("max_new_tokens") or segmenter.settings.max_new_tokens)
    row = row_bytes(model, tokens, new, asked.samples)
    each = (5 if asked.confident else 1) * asked.samples  # a mask, and where wanted its float32 probabilities
    taken = np.cumsum([row + each * count for count in pixels])
    return max(1, int((taken <= _SHARE * free).sum()))


def row_bytes(model: Any, tokens: int, new: int, samples: int) -> int:
    """Estimate the bytes that one prompt takes while its samples are generated.

    Keys and values of prompt and answers in all layers, for each sample, the largest activations of the prefill, and
    the logits of a step in float32 with two copies for sampling.
    """
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    number = torch.finfo(model.dtype).bits // 8
    cache = 2 * text.num_hidden_layers * heads * width * (tokens + new) * samples * number
    return cache + _ACTIVATIONS * text.hidden_size * tokens * number + 3 * 4 * text.vocab_size * samples


def free_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device, with what PyTorch keeps for itself; of a CPU, of the machine."""
    if torch.device(device).type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
