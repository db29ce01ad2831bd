"""Data sets with the columns that segrl trains on.

Images: image, mask, query, modality, anatomy, lesion, name, [reasoning]. Volumes have scan, label, label_value and
intensity in the place of image and mask.
"""

from segrl.data.augment import augment
from segrl.data.folder import check_rows, load_folder
from segrl.data.m3d_seg import M3D_SEG_DATASETS, load_m3d_seg
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
from segrl.data.volume_folder import check_volumes, load_volumes, write_manifest

__all__ = [
    "ANSWER_ONLY_INSTRUCTION",
    "INSTRUCTION",
    "LESIONS",
    "M3D_SEG_DATASETS",
    "Scene",
    "Volume",
    "augment",
    "build_prompt",
    "build_query",
    "build_reasoning",
    "check_rows",
    "check_volumes",
    "label_values",
    "load_folder",
    "load_m3d_seg",
    "load_volumes",
    "make_scene",
    "make_synthetic",
    "prepare",
    "read_label",
    "read_volume",
    "write_folder",
    "write_manifest",
    "write_mask",
    "write_volume",
]
