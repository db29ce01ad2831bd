"""DICOM images and series, real files of pydicom and written ones; masks back on their grids."""

import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_builders import dataset, file_of, write, write_series
from PIL import Image
from pydicom.uid import JPEGLosslessSV1

from segrl.data import (
    grey_values,
    load_image,
    load_volumes,
    read_label,
    read_volume,
    write_manifest,
    write_mask,
    write_volume,
)
from segrl.data.dicom import is_dicom, open_dicom_series, read_dicom_image, write_dicom_seg
from segrl.data.volumes.case import read_case
from segrl.errors import DataError, SegRLError

RNG = np.random.default_rng(0)
PIXELS = np.arange(1200, dtype=np.int16).reshape(30, 40)
PLAIN: Any = {"RescaleSlope": 1, "RescaleIntercept": 0}


def grey(path, **settings):
    loaded = load_image(path, **settings)
    return np.asarray(loaded.image)[..., 0], loaded.intensity


def voxels(shape=(4, 5, 6), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape, dtype=np.int16)


class TestImage:
    def test_slope_and_intercept_give_hounsfield_units(self):
        image = read_dicom_image(file_of("CT_small.dcm"))
        stored = pydicom.dcmread(file_of("CT_small.dcm"))
        assert np.array_equal(image.pixels, stored.pixel_array * float(stored.RescaleSlope) + stored.RescaleIntercept)
        assert (image.modality, image.window, image.inverted) == ("CT", None, False)
        assert grey(file_of("CT_small.dcm"))[1] == "window:-160:240"  # by its modality

    @pytest.mark.parametrize(
        ("function", "expected"),
        [(None, (300, 499)), ("LINEAR", (300, 499)), ("LINEAR_EXACT", (300, 500)), ("SIGMOID", (300, 500))],
    )
    def test_the_window_of_the_file(self, tmp_path, function, expected):
        changes = {"WindowCenter": ["400", "10"], "WindowWidth": ["200", "20"], **PLAIN}
        path = write(tmp_path / "a.dcm", PIXELS, **changes, **({"VOILUTFunction": function} if function else {}))
        assert read_dicom_image(path).window == expected
        values, intensity = grey(path)
        low, high = expected
        assert np.allclose(values, np.clip((PIXELS - low) / (high - low), 0, 1) * 255, atol=0.51)
        assert intensity == f"window:{low:g}:{high:g}"
        assert grey(path, intensity="window:0:1000")[1] == "window:0:1000"

    def test_low_values_shown_white(self, tmp_path):
        window = {"WindowCenter": 400, "WindowWidth": 400, **PLAIN}
        one = grey(write(tmp_path / "a.dcm", PIXELS, **window))[0]
        other = grey(write(tmp_path / "b.dcm", PIXELS, PhotometricInterpretation="MONOCHROME1", **window))[0]
        assert np.array_equal(other, 255 - one)

    def test_eight_bits_without_a_window_stay_as_they_are(self, tmp_path):
        pixels = np.array([[0, 7], [100, 255]], dtype=np.uint8)
        assert np.array_equal(grey(write(tmp_path / "a.dcm", pixels, **PLAIN))[0], pixels)

    @pytest.mark.parametrize(
        "name",
        ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_implicit.dcm"],
    )
    def test_compressed_and_other_syntaxes_are_read(self, name):
        assert np.array_equal(grey(file_of(name))[0], grey(file_of("MR_small.dcm"))[0])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("rtdose.dcm", r"rtdose\.dcm: has 15 frames, expected one image; save the frame as a file of its own"),
            ("SC_rgb_small_odd.dcm", r"SC_rgb_small_odd\.dcm: is a colour image \(RGB\).* save it as PNG"),
            ("examples_palette.dcm", r"is a colour image \(PALETTE COLOR\)"),
            ("rtplan.dcm", r"rtplan\.dcm: holds no pixels \(RT Plan Storage\)"),
            ("reportsi.dcm", r"holds no pixels \(Basic Text SR Storage\)"),
            ("MR_truncated.dcm", r"the pixels cannot be decoded \(.*\); copy the file again"),
            ("JPGExtended.dcm", r"is compressed as JPEG Extended.*no decoder .* is installed; decompress it, as with"),
        ],
    )
    def test_what_is_no_grey_image(self, name, message):
        with pytest.raises(DataError, match=message):
            load_image(file_of(name))

    def test_a_syntax_without_a_decoder(self, tmp_path):
        made = pydicom.dcmread(file_of("MR_small_jpeg_ls_lossless.dcm"))
        made.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        made.save_as(tmp_path / "a.dcm")
        with pytest.raises(DataError, match=r"a\.dcm: is compressed as JPEG Lossless.*no decoder for it is installed"):
            load_image(tmp_path / "a.dcm")

    def test_pixels_that_were_taken_out(self, tmp_path):
        with pytest.raises(DataError, match=r"a\.dcm: holds no pixels \(CT Image Storage\)"):
            load_image(write(tmp_path / "a.dcm", PIXELS, PixelData=None))

    def test_damage(self, tmp_path):
        (tmp_path / "a.dcm").write_bytes(b"no DICOM at all" * 20)
        with pytest.raises(DataError, match=r"a\.dcm: cannot be read as DICOM"):
            load_image(tmp_path / "a.dcm")
        (tmp_path / "b").write_bytes(bytes(128) + b"DICM" + b"x" * 40)
        with pytest.raises(DataError, match=r"b: cannot be read as DICOM"):
            load_image(tmp_path / "b")

    def test_a_declared_size_beyond_the_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
        with pytest.raises(DataError, match=r"declares 40 x 30 px, expected at most 11 pixels"):
            load_image(write(tmp_path / "a.dcm", PIXELS))

    def test_a_window_without_width(self, tmp_path):
        path = write(tmp_path / "a.dcm", PIXELS, WindowCenter=5, WindowWidth=0)
        with pytest.raises(DataError, match=r"a window of centre 5.0 and width 0.0; pass intensity="):
            load_image(path)

    def test_dicom_by_its_content(self, tmp_path):
        path = write(tmp_path / "IM0001", PIXELS)
        assert is_dicom(path)
        assert load_image(path).image.size == (40, 30)
        assert not is_dicom(tmp_path)

    def test_without_pydicom_the_extra_is_named(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a.dcm", PIXELS)
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(SegRLError, match=r'cannot be imported .*: pip install "segrl\[dicom\]"'):
            load_image(path)


ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "turned": (-1, 0, 0, 0, -1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "oblique": (0.96, 0.28, 0, -0.28, 0.96, 0),
}


class TestSeries:
    @pytest.mark.parametrize("name", ORIENTATIONS)
    def test_the_grid_is_that_of_the_same_scan_as_nifti(self, tmp_path, name):
        """Every voxel lies where its file says, and a NIfTI file with this affine gives the same volume."""
        values, directions = voxels(), np.array(ORIENTATIONS[name], dtype=float)
        write_series(tmp_path / "series", values, directions=tuple(directions), **PLAIN)
        volume: Any = read_volume(tmp_path / "series")
        normal = np.cross(directions[:3], directions[3:])
        affine = np.eye(4)
        affine[:3, :3] = np.stack([directions[:3] * 1.0, directions[3:] * 2.0, normal * 5.0], axis=1)
        affine[:3, 3] = -10, -20, 30
        affine = np.diag([-1, -1, 1, 1]) @ affine  # LPS to RAS
        nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), tmp_path / "scan.nii.gz")
        expected: Any = read_volume(tmp_path / "scan.nii.gz")
        assert np.array_equal(volume.voxels, expected.voxels)
        assert np.allclose(volume.affine, expected.affine, atol=1e-5)
        assert volume.spacing_mm == pytest.approx(expected.spacing_mm, abs=1e-5)
        assert volume.edges == expected.edges
        assert volume.z_mm(1) == pytest.approx(expected.z_mm(1), abs=1e-4)

    def test_nifti_masks_on_a_dicom_grid(self, tmp_path):
        write_series(tmp_path / "series", voxels())
        volume = read_volume(tmp_path / "series")
        mask = volume.voxels > np.median(volume.voxels)
        write_mask(tmp_path / "mask.nii.gz", mask, volume)
        for scan in (volume, tmp_path / "series"):
            assert np.array_equal(read_label(tmp_path / "mask.nii.gz", scan), mask)
        write_series(tmp_path / "other", voxels(), origin=(0.0, 0.0, 0.0))
        with pytest.raises(DataError, match=r"the label lies up to .* voxels away from .*other"):
            read_label(tmp_path / "mask.nii.gz", tmp_path / "other")

    def test_a_manifest_names_the_folder_of_a_series(self, tmp_path):
        write_series(tmp_path / "scans" / "one", voxels(), **PLAIN)
        volume = read_volume(tmp_path / "scans" / "one")
        write_mask(tmp_path / "mask.nii.gz", volume.voxels > 0, volume)
        row = {"image": "scans/one", "label": "mask.nii.gz", "query": "Find it.", "split": "test", "modality": "CT"}
        write_manifest(tmp_path, [row])
        assert len(load_volumes(tmp_path, "test")) == 1

    def test_one_file_names_its_series(self, tmp_path):
        files = write_series(tmp_path, voxels(), order=range(4))
        write_series(tmp_path, voxels((2, 5, 6), 1), order=(10, 11), SeriesDescription="scout")
        (tmp_path / "notes.txt").write_text("no DICOM")
        assert open_dicom_series(files[2]).files == tuple(files)
        with pytest.raises(DataError, match=r"holds 2 series, expected one: .*\(4 files.*'scout' \(2 files, such as I"):
            read_volume(tmp_path)

    def test_rescaled_slice_by_slice(self, tmp_path):
        """As in PET, where every slice has a slope of its own."""
        values = voxels((2, 3, 4))
        for n, (pixels, slope) in enumerate(zip(values, (1.0, 2.5), strict=True)):
            position = [0.0, 0.0, float(n)]
            write(tmp_path / f"{n}.dcm", pixels, ImagePositionPatient=position, RescaleSlope=slope, RescaleIntercept=0)
        series = open_dicom_series(tmp_path)
        assert [np.array_equal(s, v.T * k) for s, v, k in zip(series.slices(), values, (1.0, 2.5), strict=True)]

    def test_one_slice(self, tmp_path):
        write_series(tmp_path, voxels((1, 5, 6)))
        assert read_volume(tmp_path).spacing_mm == (5.0, 2.0, 1.0)

    def test_low_values_shown_white(self, tmp_path):
        """A series is shown as an image of one of its slices is: dark where MONOCHROME2 is bright."""
        values, given = voxels(), {"intensity": "window:-1000:1000"}
        write_series(tmp_path / "plain", values, order=range(4), **PLAIN)
        files = write_series(
            tmp_path / "white", values, order=range(4), PhotometricInterpretation="MONOCHROME1", **PLAIN
        )
        plain, white = (read_volume(tmp_path / name) for name in ("plain", "white"))
        assert np.array_equal(plain.voxels, white.voxels)  # values have their unit
        assert (plain.inverted, white.inverted) == (False, True)
        shown = grey_values(white, **given)
        assert np.array_equal(shown, 255 - grey_values(plain, **given))
        row = {"scan": str(tmp_path / "white"), **given}
        assert np.array_equal(read_case(row, label=False).grey, shown)
        for section, file in zip(shown, files, strict=True):
            assert np.array_equal(grey(file, **given)[0], section)
        with pytest.raises(
            DataError, match=r"a.nii: low values of .*white are shown white \(MONOCHROME1\), which NIfTI"
        ):
            write_volume(tmp_path / "a.nii", white)

    def test_slices_of_which_some_are_inverted(self, tmp_path):
        files = write_series(tmp_path, voxels((3, 4, 4)), order=range(3), SeriesInstanceUID="1.2.3")
        made = pydicom.dcmread(files[1])
        made.PhotometricInterpretation = "MONOCHROME1"
        made.save_as(files[1])
        with pytest.raises(DataError, match=r"IM001.dcm: is MONOCHROME1, and IM000.dcm MONOCHROME2: low values are wh"):
            read_volume(tmp_path)

    def test_the_modality_of_the_files(self, tmp_path):
        """Without a column modality a CT series has the window that an image of it has."""
        write_series(tmp_path / "ct", voxels((4, 20, 30)), order=range(4), **PLAIN)
        volume = read_volume(tmp_path / "ct")
        assert volume.modality == "CT"
        case = read_case({"scan": str(tmp_path / "ct")}, label=False)
        assert case.intensity == grey(tmp_path / "ct" / "IM000.dcm")[1] == "window:-160:240"
        assert read_case({"scan": str(tmp_path / "ct"), "modality": "MRI"}, label=False).intensity != case.intensity

    def test_slices_that_are_missing_double_or_elsewhere(self, tmp_path):
        files = write_series(tmp_path / "a", voxels((5, 3, 4)), order=range(5))
        files[2].unlink()
        with pytest.raises(DataError, match=r"IM001.dcm and IM003.dcm are 10 mm apart, most neighbours 5 mm; slices"):
            read_volume(tmp_path / "a")
        write_series(tmp_path / "b", voxels((2, 3, 4)), order=(0, 1), SeriesInstanceUID="1.2.3")
        write_series(tmp_path / "b", voxels((2, 3, 4)), order=(2, 3), SeriesInstanceUID="1.2.3")
        with pytest.raises(DataError, match=r"lie at one position, so the series holds several volumes .*2 such pairs"):
            read_volume(tmp_path / "b")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ImagePositionPatient": None}, r"ImagePositionPatient is None, expected 3 numbers.* as an image"),
            ({"PixelSpacing": None}, r"PixelSpacing is None, expected 2 numbers"),
            ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "has another direction than"),
            ({"PixelSpacing": [3, 3]}, "has another pixel spacing than"),
            ({"NumberOfFrames": 3}, "has 3 frames"),
            ({"PixelData": None}, r"holds no pixels \(CT Image Storage\)"),
        ],
    )
    def test_a_file_that_does_not_fit(self, tmp_path, change, message):
        write_series(tmp_path, voxels((3, 4, 4)), order=range(3), SeriesInstanceUID="1.2.3")
        fourth = {"ImagePositionPatient": [-10.0, -20.0, 45.0], "PixelSpacing": [2.0, 1.0]}
        write(tmp_path / "x.dcm", voxels((4, 4)), **{**fourth, "SeriesInstanceUID": "1.2.3", **change})
        with pytest.raises(DataError, match=message):
            read_volume(tmp_path)

    def test_other_sizes(self, tmp_path):
        write_series(tmp_path, voxels((3, 4, 4)), order=range(3), SeriesInstanceUID="1.2.3")
        write(tmp_path / "x.dcm", voxels((5, 4)), SeriesInstanceUID="1.2.3")
        with pytest.raises(DataError, match=r"x.dcm: has 4 x 5 px, and IM000.dcm 4 x 4; expected one size"):
            read_volume(tmp_path)


class TestSegmentation:
    def pixels(self, path, sources):
        import highdicom

        read = highdicom.seg.segread(path)
        uids = [pydicom.dcmread(source, stop_before_pixels=True).SOPInstanceUID for source in sources]
        return read, read.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)[..., 0] > 0

    def test_of_an_image(self, tmp_path):
        source = write(tmp_path / "a.dcm", voxels((7, 9)))
        mask = RNG.random((7, 9)) < 0.5
        write_dicom_seg(tmp_path / "mask.dcm", mask, [source], label="Where is the cyst?")
        read, found = self.pixels(tmp_path / "mask.dcm", [source])
        assert np.array_equal(found[0], mask)
        assert read.PatientID == pydicom.dcmread(source).PatientID
        assert read.SegmentSequence[0].SegmentLabel == "Where is the cyst?"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dcm", "mask.dcm"]

    @pytest.mark.parametrize("empty", [False, True])
    def test_of_a_series(self, tmp_path, empty):
        sources = write_series(tmp_path, voxels())
        mask = np.zeros((4, 5, 6), dtype=bool)
        mask[1:3, 2:] = not empty
        write_dicom_seg(tmp_path / "mask.dcm", mask, sources)
        assert np.array_equal(self.pixels(tmp_path / "mask.dcm", sources)[1], mask)

    def test_what_cannot_be_written(self, tmp_path):
        source = write(tmp_path / "a.dcm", voxels((7, 9)))
        with pytest.raises(DataError, match="a mask with 2 frames for 1 source images"):
            write_dicom_seg(tmp_path / "m.dcm", np.zeros((2, 7, 9), dtype=bool), [source])
        with pytest.raises(DataError, match=r"a frame of 7 x 9 px, and .*a.dcm has 9 x 7; put the mask on the grid"):
            write_dicom_seg(tmp_path / "m.dcm", np.zeros((9, 7), dtype=bool), [source])
        before = source.read_bytes()
        with pytest.raises(DataError, match=r"a.dcm: is a source image, and nothing replaces an input"):
            write_dicom_seg(tmp_path / "a.dcm", np.zeros((7, 9), dtype=bool), [source])
        assert source.read_bytes() == before
        bare = dataset(voxels((7, 9)), StudyInstanceUID=None)
        bare.save_as(tmp_path / "bare.dcm")
        with pytest.raises(DataError, match=r"m.dcm: the source images lack what a segmentation has to repeat .*Stud"):
            write_dicom_seg(tmp_path / "m.dcm", np.zeros((7, 9), dtype=bool), [tmp_path / "bare.dcm"])
        assert not Path(tmp_path / "m.dcm").exists()
