"""Data sets with the columns that segrl trains on: image, mask, query, modality, anatomy, lesion, name, [reasoning]."""

from segrl.data.augment import augment
from segrl.data.folder import check_rows, load_folder
from segrl.data.nifti import Volume, label_values, read_label, read_volume, write_mask, write_volume
from segrl.data.prompts import (
    ANSWER_ONLY_INSTRUCTION,
    INSTRUCTION,
    build_prompt,
    build_query,
    build_reasoning,
    prepare,
)
from segrl.data.synthetic import LESIONS, Scene, make_scene, make_synthetic, write_folder

__all__ = [
    "ANSWER_ONLY_INSTRUCTION",
    "INSTRUCTION",
    "LESIONS",
    "Scene",
    "Volume",
    "augment",
    "build_prompt",
    "build_query",
    "build_reasoning",
    "check_rows",
    "label_values",
    "load_folder",
    "make_scene",
    "make_synthetic",
    "prepare",
    "read_label",
    "read_volume",
    "write_folder",
    "write_mask",
    "write_volume",
]
