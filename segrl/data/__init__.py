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
from segrl.data.splits import load_split
from segrl.data.synthetic import LESIONS, Scene, make_scene, make_synthetic, write_folder
from segrl.data.synthetic_volumes import VOLUME_LESIONS, SyntheticVolume, make_synthetic_volumes, make_volume
from segrl.data.volume_folder import check_volumes, load_volumes, write_manifest
from segrl.data.volume_prompts import (
    SLICE_INSTRUCTION,
    build_volume_prompt,
    format_slice_answer,
    prepare_volumes,
    read_grey,
    render_slices,
    shown_frame,
)

__all__ = [
    "ANSWER_ONLY_INSTRUCTION",
    "INSTRUCTION",
    "LESIONS",
    "M3D_SEG_DATASETS",
    "SLICE_INSTRUCTION",
    "VOLUME_LESIONS",
    "Scene",
    "SyntheticVolume",
    "Volume",
    "augment",
    "build_prompt",
    "build_query",
    "build_reasoning",
    "build_volume_prompt",
    "check_rows",
    "check_volumes",
    "format_slice_answer",
    "label_values",
    "load_folder",
    "load_m3d_seg",
    "load_split",
    "load_volumes",
    "make_scene",
    "make_synthetic",
    "make_synthetic_volumes",
    "make_volume",
    "prepare",
    "prepare_volumes",
    "read_grey",
    "read_label",
    "read_volume",
    "render_slices",
    "shown_frame",
    "write_folder",
    "write_manifest",
    "write_mask",
    "write_volume",
]
