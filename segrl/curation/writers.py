"""Who writes the reasoning of a case: a model, by two prompts, or templates."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from segrl.curation.call_cache import Answer
from segrl.curation.calls import Caller, Question
from segrl.curation.case import Case
from segrl.curation.facts import Facts
from segrl.curation.prompts import Prompt
from segrl.curation.template_texts import measure_appearance, template_reasoning
from segrl.data.reasoning import count_word
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file
from segrl.reports.drawing import draw_overlay

__all__ = ["TEMPLATE", "Draft", "ModelWriter", "TemplateWriter", "Writer", "prompt_fields", "shown_images", "usable"]

TEMPLATE = "template"  # name of the writer that needs no server
_THINKING = re.compile(r"^.*</think>", re.DOTALL)  # of models that reason before they answer


@dataclass(frozen=True)
class Draft:
    """A text, or why there is none.

    Attributes:
        text: Reasoning; "" if there is none.
        reason: Why there is none; "" if there is one.
    """

    text: str
    reason: str = ""


class Writer(Protocol):
    """Writes the reasoning of a case."""

    @property
    def name(self) -> str:
        """Model, or "template"."""
        ...

    async def write(self, case: Case, facts: Facts, query: str, round: int, earlier: str, remarks: str) -> Draft:
        """Return reasoning.

        Args:
            case: What it is about.
            facts: Of the case.
            query: The question.
            round: 0 for the first text; of a later one `earlier` is the text that was refused.
            earlier: The text that was refused.
            remarks: What must be changed about it.
        """
        ...


@dataclass(frozen=True)
class TemplateWriter:
    """Writes from templates, other words in each round."""

    name: str = TEMPLATE

    async def write(self, case: Case, facts: Facts, query: str, round: int, earlier: str, remarks: str) -> Draft:
        """Return reasoning, as `Writer.write`."""
        return Draft(await asyncio.to_thread(_from_template, case, facts, case.id + f" round {round}" * (round > 0)))


@dataclass(frozen=True)
class ModelWriter:
    """Asks a model twice: what is seen, then the reasoning that leads to the lesion. The text is both.

    Args:
        caller: Asks the model.
        prompts: By name.
        outline: Whether a second image with the outline of the mask is shown.
    """

    caller: Caller
    prompts: Mapping[str, Prompt]
    outline: bool = True

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.caller.endpoint.model

    async def write(self, case: Case, facts: Facts, query: str, round: int, earlier: str, remarks: str) -> Draft:
        """Return reasoning, as `Writer.write`."""
        images = await asyncio.to_thread(shown_images, case, self.outline)
        fields = prompt_fields(facts, query, self.outline) | {"text": earlier, "remarks": remarks}
        added = "\n\n" + self.prompts["remarks"].fill(fields) if round else ""
        parts: list[str] = []
        for name in ("perception", "reasoning"):
            prompt = self.prompts[name].fill(fields | {"perception": parts[0] if parts else ""}) + added
            label = f"{name} of {case.id}, round {round}"
            text, reason = usable(await self.caller.ask(Question(prompt, images, label=label)))
            if reason:
                return Draft("", f"{name}: {reason}")
            parts.append(text)
        return Draft("\n".join(parts))


def prompt_fields(facts: Facts, query: str, outline: bool) -> dict[str, str]:
    """Return the fields of prompts that every prompt may use."""
    return {
        "lesion": facts.lesion,
        "anatomy": facts.anatomy or "unknown region",
        "modality": facts.modality or "unknown modality",
        "count": count_word(facts.count),
        "size": facts.size or "absent",
        "location": facts.location or "image, nowhere",
        "query": query,
        "outline": " The second image is the same, with the outline of the lesion in green." if outline else "",
    }


def shown_images(case: Case, outline: bool) -> tuple[Image.Image, ...]:
    """Return the image of a case, and once more with the outline of its mask.

    Raises:
        DataError: A file cannot be read.
    """
    image = read_image(case.image, f"image of {case.name or case.id}")
    if not outline:
        return (image,)
    mask = read_mask_file(case.mask, f"mask of {case.name or case.id}")
    line = max(1, round(max(image.size) / 256))
    return image, draw_overlay(image, image.size, target=mask, line=line)


def usable(answer: Answer) -> tuple[str, str]:
    """Return the text of an answer, without what a model thought before it, and why it cannot be used, or ""."""
    text = _THINKING.sub("", answer.text).strip()
    reason = answer.reason
    if answer.status == "answered" and not text:
        reason = "empty answer after </think>"
    return text, reason


def _from_template(case: Case, facts: Facts, key: str) -> str:
    if not facts.count:
        return template_reasoning(facts, None, key)
    grey = np.asarray(read_image(case.image, f"image of {case.name or case.id}").convert("L"))
    mask = read_mask_file(case.mask, f"mask of {case.name or case.id}")
    return template_reasoning(facts, measure_appearance(grey, mask), key)
