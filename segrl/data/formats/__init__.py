"""Data in the layouts that people have, read into rows and written as a folder with a manifest."""

from segrl.data.formats.biomedparse import read_biomedparse, write_biomedparse
from segrl.data.formats.coco import coco_annotations, coco_mask, read_coco, write_coco
from segrl.data.formats.coco_writing import CocoWriter
from segrl.data.formats.columns import read_columns, write_columns
from segrl.data.formats.cvc_clinicdb import read_cvc_clinicdb
from segrl.data.formats.imed_361m import read_imed_361m
from segrl.data.formats.ispy1 import read_ispy1
from segrl.data.formats.m3d_refseg import read_m3d_refseg
from segrl.data.formats.medsegbench import read_medsegbench, read_medsegbench_folder
from segrl.data.formats.mmr import read_mmr, read_mmr_folder
from segrl.data.formats.nnunet import read_nnunet, write_nnunet
from segrl.data.formats.own_folder import read_rows
from segrl.data.formats.pairs import read_pairs, write_pairs
from segrl.data.formats.reasonseg import read_reasonseg, reasonseg_mask
from segrl.data.formats.refcoco import read_pickled_lists, read_refcoco, read_refcoco_folder
from segrl.data.formats.rows import FormatRow, ScanRow, write_rows
from segrl.data.formats.sa_med2d import read_sa_med2d

__all__ = [
    "CocoWriter",
    "FormatRow",
    "ScanRow",
    "coco_annotations",
    "coco_mask",
    "read_biomedparse",
    "read_coco",
    "read_columns",
    "read_cvc_clinicdb",
    "read_imed_361m",
    "read_ispy1",
    "read_m3d_refseg",
    "read_medsegbench",
    "read_medsegbench_folder",
    "read_mmr",
    "read_mmr_folder",
    "read_nnunet",
    "read_pairs",
    "read_pickled_lists",
    "read_reasonseg",
    "read_refcoco",
    "read_refcoco_folder",
    "read_rows",
    "read_sa_med2d",
    "reasonseg_mask",
    "write_biomedparse",
    "write_coco",
    "write_columns",
    "write_nnunet",
    "write_pairs",
    "write_rows",
]
