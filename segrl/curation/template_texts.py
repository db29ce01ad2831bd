"""Reasoning without a model: sentences from templates, filled with what mask and pixels show.

Brightness, evenness and shape are measured, so that the text is true; it knows nothing of medicine.
"""

# H, W pixels of image and mask

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segrl.curation.facts import Facts
from segrl.data.reasoning import count_word, lower_words, pick_by_hash, plural
from segrl.geometry.masks import boxes_from_mask

__all__ = ["Appearance", "measure_appearance", "template_reasoning"]

_RING = 0.05  # width of the ring around the lesion, as a share of the image's longest edge
_CONTRAST, _UNEVEN = 8.0, 1.4  # grey values; ratio of standard deviations
_ROUND, _LONG = 0.8, 2.0  # share of the foreground's box-like ellipse; ratio of its axes
_NORMAL = (
    "The {organ} looks normal away from the findings.",
    "Most of the {organ} has the usual structure.",
    "Outside of the findings the {organ} is unremarkable.",
    "The remaining {organ} shows an even, expected pattern.",
    "Apart from what follows, the {organ} appears undisturbed.",
    "The {organ} that surrounds the findings keeps its usual appearance.",
)
_FOUND = (
    "The {image} shows {findings} in the {location}.",
    "In the {location} of the {image} there {is_} {findings}.",
    "Attention goes to the {location}, where {findings} can be seen.",
    "{Findings} can be made out in the {location}.",
    "The {location} of the {image} holds {findings}.",
)
_REASON = (
    "This sets {it} apart from normal structures, which blend into their surroundings.",
    "Normal structures of the {organ} would not differ from their neighbours in this way.",
    "An artefact would not follow such a border, so this is taken for the {lesion}.",
    "Other areas of the {image} lack this combination, which rules them out.",
    "Confounders such as shadows or folds lack this border, so the {lesion} is the best explanation.",
    "Nothing else in the {image} stands out in the same way, so this is where the {lesion} is.",
)


@dataclass(frozen=True)
class Appearance:
    """Look of a lesion in its pixels, beside those of the ring around it.

    Attributes:
        brightness: "brighter", "darker" or "about as bright".
        texture: "more uneven", "more even" or "".
        shape: "round", "elongated" or "irregular", of the largest component.

    Example:
        >>> mask = np.zeros((40, 40), dtype=bool)
        >>> mask[15:25, 15:25] = True
        >>> measure_appearance(np.where(mask, 200, 20).astype(np.uint8), mask)
        Appearance(brightness='brighter', texture='', shape='round')
    """

    brightness: str
    texture: str
    shape: str


def measure_appearance(grey: np.ndarray, mask: np.ndarray) -> Appearance:
    """Compare a lesion with the ring around it.

    Args:
        grey: (H, W) grey values from 0 to 255.
        mask: (H, W) bool, not empty.
    """
    width = max(2, round(_RING * max(mask.shape)))
    ring = ndimage.binary_dilation(mask, iterations=width) & ~mask
    inside = grey[mask].astype(float)
    around = grey[ring].astype(float) if ring.any() else inside
    step = inside.mean() - around.mean()
    brightness = "about as bright" if abs(step) < _CONTRAST else "brighter" if step > 0 else "darker"
    ratio = (inside.std() + 2) / (around.std() + 2)
    flat = inside.std() < 1 and abs(step) >= _CONTRAST  # the ring's own border would decide
    texture = "" if flat else "more uneven" if ratio > _UNEVEN else "more even" if ratio < 1 / _UNEVEN else ""
    return Appearance(brightness, texture, _shape(mask))


def template_reasoning(facts: Facts, appearance: Appearance | None, key: str) -> str:
    """Write reasoning from templates; a stable hash of the key picks the words.

    Args:
        facts: Of the case.
        appearance: Of its lesion; None for an empty mask.
        key: Id of the case, and whatever else should change the words.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.3, 0.3))
        >>> template_reasoning(facts, Appearance("darker", "more even", "round"), "b").split(". ")[1]
        'Attention goes to the upper left part, where one small cyst can be seen'
    """
    organ = lower_words(facts.anatomy) or "tissue"
    normal = pick_by_hash(_NORMAL, f"normal {key}").format(organ=organ)
    if not facts.count or appearance is None:
        return f"{normal} No {facts.lesion} is visible, and nothing stands out that could be taken for one."
    several = facts.count > 1 or facts.lesion == plural(facts.lesion)  # "hard exudates", also of one component
    number = "" if facts.count == 1 and several else f"{count_word(facts.count)} "
    findings = f"{number}{facts.size} {plural(facts.lesion) if several else facts.lesion}"
    words = {
        "organ": organ,
        "image": f"{lower_words(facts.modality)} image".strip(),
        "location": facts.location,
        "findings": findings,
        "Findings": f"{findings[0].upper()}{findings[1:]}",
        "is_": "are" if several else "is",
        "it": "them" if several else "it",
        "lesion": facts.lesion,
    }
    if facts.count > 1:
        found = f"The {words['image']} shows {findings}, the largest in the {facts.location}."
    else:
        found = pick_by_hash(_FOUND, f"found {key}").format(**words)
    reason = pick_by_hash(_REASON, f"reason {key}").format(**words)
    return f"{normal} {found} {_look(appearance, facts)} {reason}"


def _look(appearance: Appearance, facts: Facts) -> str:
    than = "as" if appearance.brightness.startswith("about") else "than"
    parts = [f"{'the largest' if facts.count > 1 else 'it'} is {appearance.brightness} {than} its surroundings"]
    if appearance.texture:
        parts.append(f"its texture is {appearance.texture} than theirs")
    sentence = f"{', '.join(parts)} and its outline is {appearance.shape}."
    return sentence[0].upper() + sentence[1:]


def _shape(mask: np.ndarray) -> str:
    x1, y1, x2, y2 = boxes_from_mask(mask)[0].astype(int)
    rows, columns = np.nonzero(mask[y1:y2, x1:x2])
    spread = np.cov(np.stack([rows, columns])) if len(rows) > 2 else np.eye(2)
    small, large = np.sqrt(np.maximum(np.linalg.eigvalsh(spread), 1 / 12))
    filled = len(rows) / (4 * np.pi * small * large)  # 1 for an ellipse, 0.95 for a box
    return "elongated" if large / small > _LONG else "round" if filled > _ROUND else "irregular"
