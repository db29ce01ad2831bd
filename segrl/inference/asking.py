"""Settings of one call of `predict`, checked before anything is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from segrl.errors import DataError, unknown_name
from segrl.predictions.characters import is_blank

__all__ = ["Asked", "modalities_for", "queries_for", "seeded", "split_settings"]

_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}  # the model's own distribution


@dataclass(frozen=True)
class Asked:
    """Number of answers to each question, and what becomes of them.

    Attributes:
        samples: Answers drawn for each question; one is greedy, several are sampled.
        seed: Of the sampling; None takes PyTorch's own state.
        abstain_below: Confidence below which an answer abstains; None: none does.
        probabilities: Whether one greedy answer carries foreground probabilities and a confidence, as several do.
        generation: To `model.generate`.

    Raises:
        DataError: Fewer than one sample, a threshold outside [0, 1], or several beams or sequences.
        UnknownNameError: A keyword that neither `predict` nor `model.generate` has.

    Example:
        >>> Asked(samples=8, generation={"temperature": 0.7}).options()["temperature"]
        0.7
        >>> Asked(generation={"max_new_token": 5})
        Traceback (most recent call last):
        segrl.errors.UnknownNameError: unknown keyword of predict 'max_new_token'; did you mean 'max_new_tokens'? ...
    """

    samples: int = 1
    seed: int | None = None
    abstain_below: float | None = None
    probabilities: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.generation:
            if name not in _known():
                raise unknown_name("keyword of predict", name, _known(), shown=_OWN)
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise DataError(f"samples={self.samples!r}: expected a whole number from 1, such as 8")
        if self.seed is not None and not isinstance(self.seed, int):
            raise DataError(f"seed={self.seed!r}: expected a whole number, or None")
        if self.abstain_below is not None and not (
            isinstance(self.abstain_below, int | float) and 0 <= self.abstain_below <= 1
        ):
            raise DataError(f"abstain_below={self.abstain_below!r}: expected a confidence from 0 to 1")
        if self.generation.get("num_beams", 1) != 1 or self.generation.get("num_return_sequences", 1) != 1:
            raise DataError(
                "num_beams and num_return_sequences must be 1: states of several beams cannot be told apart; for "
                "several answers to one question pass samples="
            )
        if self.samples > 1 and self.generation.get("do_sample", True) is False:
            raise DataError(f"samples={self.samples} with do_sample=False: all would be equal; leave do_sample out")

    @property
    def confident(self) -> bool:
        """Whether results carry a confidence."""
        return self.samples > 1 or self.probabilities or self.abstain_below is not None

    def options(self) -> dict[str, Any]:
        """Return the settings of `model.generate`."""
        if self.samples == 1:
            return dict(self.generation)
        return {**_SAMPLED, **self.generation, "num_return_sequences": self.samples}

    def abstains(self, value: float | None) -> bool:
        """Return whether an answer of this confidence abstains; one whose confidence is not known does."""
        if self.abstain_below is None:
            return False
        return value is None or math.isnan(value) or value < self.abstain_below


def split_settings(settings: Mapping[str, Any]) -> Asked:
    """Return the keywords of `predict` as settings; those that are not our own go to `model.generate`.

    Raises:
        DataError: See `Asked`.
        UnknownNameError: See `Asked`.
    """
    own = {name: settings[name] for name in ("samples", "seed", "abstain_below", "probabilities") if name in settings}
    return Asked(**own, generation={name: value for name, value in settings.items() if name not in own})


def queries_for(query: Any, count: int, several: bool) -> list[str]:
    """Return one question for each input.

    Raises:
        DataError: No text, or another number of questions than inputs.
    """
    if isinstance(query, str):
        if is_blank(query):
            raise DataError("query: is empty; expected a question, such as 'Where is the cyst?'")
        return [query] * count
    if not several or not isinstance(query, Sequence) or not all(isinstance(one, str) for one in query):
        expected = "a text, or a list of one text per input" if several else "a text"
        raise DataError(f"query={query!r:.100}: expected {expected}")
    if len(query) != count:
        raise DataError(f"{len(query)} queries for {count} inputs; expected one text for all, or one per input")
    if blank := [number for number, one in enumerate(query) if is_blank(one)]:
        raise DataError(f"query: question {blank[0]} is empty; expected a text for each input")
    return list(query)


def modalities_for(modality: Any, count: int) -> list[str]:
    """Return one modality for each input, "" where none is given.

    Raises:
        DataError: No text, or another number of texts than inputs.
    """
    if isinstance(modality, str):
        return [modality] * count
    if not isinstance(modality, Sequence) or not all(isinstance(one, str) for one in modality):
        raise DataError(f"modality={modality!r:.100}: expected a text such as 'CT', or a list of one text per input")
    if len(modality) != count:
        raise DataError(f"{len(modality)} modalities for {count} inputs; expected one text for all, or one per input")
    return list(modality)


_OWN = ("samples", "seed", "abstain_below", "probabilities", "max_new_tokens", "do_sample", "temperature", "top_p")


def _known() -> set[str]:
    """Keywords that `model.generate` takes."""
    of_function = set(inspect.signature(vars(GenerationMixin)["generate"]).parameters) - {"self", "inputs", "kwargs"}
    return of_function | set(GenerationConfig().to_dict()) | set(_OWN)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside the context PyTorch draws from this seed; afterwards as before. None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
