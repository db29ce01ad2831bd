"""Questions of a data set: many wordings, and implicit ones that do not name the lesion."""

from __future__ import annotations

import json
from pathlib import Path

from segrl.curation.facts import Facts
from segrl.data.queries import Queries
from segrl.data.reasoning import build_query, lower_words, pick_by_hash
from segrl.errors import DataError

__all__ = ["read_descriptions", "write_question"]

_EXPLICIT = (
    "Outline the {lesion} in {place}.",
    "Mark the {lesion} that is visible in {place}.",
    "Which pixels of {place} belong to the {lesion}?",
    "Delineate the {lesion} in {place}.",
    "Please locate the {lesion} in {place} and segment it.",
    "Where in {place} can the {lesion} be seen? Segment it.",
    "Identify the {lesion} in {place}.",
    "Point out the {lesion} in {place} with a mask.",
    "Look for the {lesion} in {place} and give its outline.",
    "Give the boundary of the {lesion} in {place}.",
    "Can the {lesion} be delineated in {place}?",
    "Highlight the extent of the {lesion} in {place}.",
)
_IMPLICIT = (
    "Which region of {place} looks abnormal? Segment it.",
    "Is there anything in {place} that does not belong to normal tissue? Segment it.",
    "What in {place} would need a closer look? Give its mask.",
    "Segment whatever departs from the expected anatomy in {place}.",
    "Find the finding in {place} that would be mentioned in a report.",
    "Which part of {place} explains why it was taken? Segment it.",
    "Where does the tissue change its appearance in {place}? Segment that area.",
    "Outline the suspicious area in {place}.",
    "If this were your patient, what in {place} would you describe first? Segment it.",
    "Something in {place} is not normal. Find and segment it.",
    "Compare the structures in {place} and segment the one that stands out.",
    "Which area of {place} would you follow up? Give its outline.",
    "Segment the pathological finding in {place}.",
    "Reason about {place}: where is the abnormality, and what are its borders?",
)
_DESCRIBED = (
    "{text}. Where is it in {place}? Segment it.",
    "Segment in {place} what fits this description: {text}.",
    "Look at {place}. Which structure is described here: {text}?",
)


def read_descriptions(path: str | Path | None) -> Queries | None:
    """Read descriptions by lesion for implicit questions, a JSON object of lists of texts; None without a file.

    Raises:
        DataError: The file cannot be read or is not of this layout, or all descriptions of a lesion name it.
    """
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"descriptions {str(path)!r} cannot be read ({error}); expected JSON") from error
    return Queries.from_texts(content, source=f"descriptions {str(path)!r}")


def write_question(
    facts: Facts, key: str, *, implicit_share: float = 0.5, descriptions: Queries | None = None
) -> tuple[str, bool]:
    """Write the question of one case; a stable hash of its key picks kind and words.

    Args:
        facts: Of the case.
        key: Its id.
        implicit_share: Share of questions that do not name the lesion.
        descriptions: Of lesions, for implicit questions; lesions without one are asked for as an abnormality.

    Returns:
        The question, and whether it is implicit.

    Example:
        >>> facts = Facts("cyst", "Breast", "Ultrasound", 1, "small", "centre", (0.4, 0.4, 0.6, 0.6))
        >>> write_question(facts, "a", implicit_share=0.0)
        ('Give the boundary of the cyst in this ultrasound image of the breast.', False)
        >>> write_question(facts, "a", implicit_share=1.0)[1]
        True
    """
    place = f"this {lower_words(facts.modality)} image" if facts.modality else "this image"
    place += f" of the {lower_words(facts.anatomy)}" if facts.anatomy else ""
    implicit = pick_by_hash(range(1000), f"kind of {key}") < 1000 * implicit_share
    if not implicit:
        template = pick_by_hash(("", "", "", *_EXPLICIT), f"words of {key}")  # a fifth as `build_query` words them
        if not template:
            return build_query(facts.lesion, facts.anatomy, facts.modality, key), False
        return template.format(lesion=facts.lesion, place=place), False
    texts = descriptions.of(facts.lesion) if descriptions is not None else None
    if texts:
        text = pick_by_hash(texts, f"text of {key}")
        return pick_by_hash(_DESCRIBED, f"words of {key}").format(text=text, place=place), True
    return pick_by_hash(_IMPLICIT, f"words of {key}").format(place=place), True
