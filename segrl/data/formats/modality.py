"""Modalities as people write them, of the codes in file names of large collections."""

from __future__ import annotations

__all__ = ["modality_name"]

_NAMES = {
    "ct": "CT",
    "mr": "MRI",
    "pet": "PET",
    "x": "X-ray",
    "ultrasound": "Ultrasound",
    "fundus": "Fundus photography",
    "endoscopy": "Endoscopy",
    "dermoscopy": "Dermoscopy",
}


def modality_name(code: str) -> str:
    """Return the modality that a code stands for, with its sequence or map; an unknown code as it is.

    Example:
        >>> [modality_name(code) for code in ("ct_00", "mr_t1ce", "x_ray", "ct", "oct")]
        ['CT', 'MRI t1ce', 'X-ray', 'CT', 'oct']
    """
    kind, _, more = code.partition("_")
    name = _NAMES.get(kind.lower())
    if name is None:
        return code
    return name if kind.lower() in ("fundus", "x") or more in ("", "00") else f"{name} {more}"
