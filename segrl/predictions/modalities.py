"""Names of imaging modalities, which data sets and users spell in many ways."""

from __future__ import annotations

import re

__all__ = ["modality_kind"]

_CT = {"ct", "cta", "cbct", "hrct", "ldct", "mdct", "ncct", "cect", "ctscan"}
_MR = {"mr", "mri", "nmr", "magnetic", "resonance"}
_ANY = {"scan", "scans", "image", "images", "imaging", "volume", "volumes", "3d"}  # say nothing of the modality


def modality_kind(modality: str) -> str:
    """Return one name for all spellings of a modality: "ct", "mr", or its words in lower case; "" for "".

    Example:
        >>> [modality_kind(text) for text in ("CT scan", "Computed tomography (CT)", "MRI", "MR imaging", "PET", "")]
        ['ct', 'ct', 'mr', 'mr', 'pet', '']
    """
    words = [word for word in re.split(r"[\W_]+", modality.casefold()) if word]
    text = " ".join(words)
    if _CT.intersection(words) or re.search(r"comput\w+ tomograph", text):
        return "ct"
    telling = [word for word in words if word not in _ANY]
    return "mr" if telling and _MR.issuperset(telling) else " ".join(telling) or text
