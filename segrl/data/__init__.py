"""Data sets with the columns that segrl trains on.

Images: image, mask, query, modality, anatomy, lesion, name, [reasoning]. Volumes have scan, label, label_value and
intensity instead of image and mask.
"""

from segrl.data.contents import SplitContents
from segrl.data.coordinates import find_coordinates, strip_coordinates
from segrl.data.division import Division
from segrl.data.images.augmentation import augment
from segrl.data.images.files import LoadedImage, load_image
from segrl.data.images.folder import check_rows, load_folder
from segrl.data.images.kept import KeptPixels
from segrl.data.images.prompts import build_prompt, prepare, shown_image
from segrl.data.images.synthetic import LESIONS, Scene, make_scene, make_synthetic, write_folder
from segrl.data.manifest import write_manifest
from segrl.data.overview import data_overview
from segrl.data.queries import Queries
from segrl.data.reasoning import build_query, build_reasoning
from segrl.data.splits import load_split
from segrl.data.text_columns import name_classes
from segrl.data.volumes.case import Case, CaseReader, grey_values, read_case, read_grey
from segrl.data.volumes.folder import check_volumes, load_volumes
from segrl.data.volumes.intensity import CT_WINDOW, Intensity, intensity_for, scale_intensity
from segrl.data.volumes.labels import Labels, label_values, read_label, read_labels
from segrl.data.volumes.m3d_seg import M3D_SEG_DATASETS, load_m3d_seg
from segrl.data.volumes.nifti import read_volume, write_mask, write_volume
from segrl.data.volumes.prompts import build_volume_prompt, format_slice_answer, prepare_volumes
from segrl.data.volumes.slices import render_slices, shown_frame, uniform_slices
from segrl.data.volumes.synthetic import VOLUME_LESIONS, SyntheticVolume, make_synthetic_volumes, make_volume
from segrl.data.volumes.volume import Volume

__all__ = [
    "CT_WINDOW",
    "LESIONS",
    "M3D_SEG_DATASETS",
    "VOLUME_LESIONS",
    "Case",
    "CaseReader",
    "Division",
    "Intensity",
    "KeptPixels",
    "Labels",
    "LoadedImage",
    "Queries",
    "Scene",
    "SplitContents",
    "SyntheticVolume",
    "Volume",
    "augment",
    "build_prompt",
    "build_query",
    "build_reasoning",
    "build_volume_prompt",
    "check_rows",
    "check_volumes",
    "data_overview",
    "find_coordinates",
    "format_slice_answer",
    "grey_values",
    "intensity_for",
    "label_values",
    "load_folder",
    "load_image",
    "load_m3d_seg",
    "load_split",
    "load_volumes",
    "make_scene",
    "make_synthetic",
    "make_synthetic_volumes",
    "make_volume",
    "name_classes",
    "prepare",
    "prepare_volumes",
    "read_case",
    "read_grey",
    "read_label",
    "read_labels",
    "read_volume",
    "render_slices",
    "scale_intensity",
    "shown_frame",
    "shown_image",
    "strip_coordinates",
    "uniform_slices",
    "write_folder",
    "write_manifest",
    "write_mask",
    "write_volume",
]
