"""DICOM: one grey image, a series as a volume, and masks as DICOM Segmentation objects (extra `dicom`)."""

from segrl.data.dicom.files import DicomImage, is_dicom, read_dicom_image
from segrl.data.dicom.segmentation import write_dicom_seg
from segrl.data.dicom.series import DicomSeries, open_dicom_series, open_dicom_volumes

__all__ = [
    "DicomImage",
    "DicomSeries",
    "is_dicom",
    "open_dicom_series",
    "open_dicom_volumes",
    "read_dicom_image",
    "write_dicom_seg",
]
