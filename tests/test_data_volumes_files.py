"""Files of volumes: every byte is read and checked, what they claim is judged first, and other formats are named."""

import bz2
import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import sparse

from segrl.data import label_values, read_label, read_labels, read_volume
from segrl.data.volumes import limits
from segrl.errors import DataError

nib: Any = nibabel
SHAPE = (12, 11, 10)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])  # the order that segrl reads in
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-1000, 1000, SHAPE).astype(np.int16)
CHANNELS = np.zeros((3, *SHAPE), np.int32)
CHANNELS[0, :3], CHANNELS[1, 5:8], CHANNELS[2, 9, 9, 9] = 1, 1, 1


def write(path: Path) -> Path:
    """Write a file of the kind that its name says."""
    if path.suffix == ".npz":
        sparse.save_npz(path, sparse.csr_matrix(CHANNELS.reshape(3, -1)))
    elif path.suffix == ".npy":
        np.save(path, VOXELS)
    else:
        kind = nib.Nifti1Pair if ".img" in path.name else nib.Nifti1Image
        nib.save(kind(VOXELS, AFFINE), path)
    return path


def everything(path: Path) -> list[float]:
    """All that is read of a scan, or of all structures of a label."""
    if path.suffix == ".npz":
        labels = read_labels(path)
        return np.concatenate([labels.mask(value, allow_empty=True).ravel() for value in (1, 2, 3)]).tolist()
    volume = read_volume(path)
    assert volume.affine is not None
    return [*volume.voxels.ravel().tolist(), *volume.affine.ravel().tolist(), *(volume.spacing_mm or ())]


CHECKED = {
    "scan.nii.gz": "scan.nii.gz",
    "scan.img.gz": "scan.img.gz",
    "the header of a pair": "scan.hdr.gz",
    "scan.nii.bz2": "scan.nii.bz2",
    "mask_(3, 12, 11, 10).npz": "mask_(3, 12, 11, 10).npz",
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of nibabel, about the header that the flip made
@pytest.mark.parametrize("case", CHECKED)
def test_each_of_150_flipped_bits_is_found_or_changes_nothing(tmp_path, case):
    damaged = tmp_path / CHECKED[case]
    path = write(tmp_path / damaged.name.replace(".hdr", ".img"))
    expected, content = everything(path), damaged.read_bytes()
    found = 0
    for bit in np.random.default_rng(1).choice(8 * len(content), 150, replace=False):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << (bit % 8)
        damaged.write_bytes(changed)
        try:
            assert everything(path) == expected, bit
        except DataError:
            found += 1
            continue
        if damaged.suffix == ".gz":  # the flip is in what gzip says of itself, or in bits that it does not use
            assert gzip.decompress(changed) == gzip.decompress(content)
    assert found > 100


@pytest.mark.parametrize("name", [*CHECKED.values(), "scan.nii", "scan.npy", "scan.img"])
def test_a_file_cut_anywhere_or_with_more_behind_it(tmp_path, name):
    if name == "scan.hdr.gz":
        name = "scan.img.gz"
    path = write(tmp_path / name)
    content = path.read_bytes()
    for length in [*RNG.integers(0, len(content), 20).tolist(), len(content) - 1, len(content) - 9]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{path.name[:4]}.*: "):
            everything(path)
    # A zip file is read from its table of contents, and Python's bz2 ends at the first block that is none.
    if path.suffix not in (".npz", ".bz2"):
        for more in (b"x", content[-20:]):
            path.write_bytes(content + more)
            with pytest.raises(DataError, match=r"cannot be read"):
                everything(path)


def test_several_members_are_one_stream(tmp_path):
    raw = write(tmp_path / "scan.nii").read_bytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(raw[:2000]) + gzip.compress(raw[2000:]))
    assert everything(path) == everything(tmp_path / "scan.nii")
    path.write_bytes(gzip.compress(raw) + gzip.compress(b"more"))
    with pytest.raises(DataError, match=r"scan\.nii\.gz: goes on behind the 1320 voxels of its header; .* replace it"):
        read_volume(path)
    bad = bytearray(gzip.compress(raw[:2000]) + gzip.compress(raw[2000:]))
    bad[len(gzip.compress(raw[:2000])) - 6] ^= 1  # the checksum of the first
    path.write_bytes(bad)
    with pytest.raises(DataError, match=r"the voxels cannot be read \(CRC check failed"):
        read_volume(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.int32, np.float32, ">f8"])
@pytest.mark.parametrize("slope", [None, (2.5, -1024)])
def test_voxels_are_those_that_nibabel_reads(tmp_path, dtype, slope, monkeypatch):
    monkeypatch.setattr("segrl.data.volumes.voxel_files._SECTION_BYTES", 500)  # several sections
    array = np.abs(VOXELS).astype(dtype)
    image = nib.Nifti1Image(array, AFFINE, nib.Nifti1Header(endianness=">" if str(dtype)[0] == ">" else "<"))
    image.header.set_data_dtype(dtype)
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    if slope:
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[112:120] = np.array(slope, str(dtype)[0] + "f4" if str(dtype)[0] == ">" else "<f4").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    expected = np.asarray(nib.load(path).dataobj, dtype=np.float32).transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(path).voxels, expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_in_sections_whatever_its_order(tmp_path, order, monkeypatch):
    monkeypatch.setattr("segrl.data.volumes.voxel_files._SECTION_BYTES", 500)
    np.save(tmp_path / "scan.npy", np.asarray(VOXELS, order=order))
    expected = VOXELS[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.npy").voxels, expected)


class TestClaims:
    """A header may claim anything; memory is asked for after what it claims was judged."""

    def claim(self, path: Path, *dimensions: int) -> Path:
        raw = bytearray(write(path.with_name("whole.nii")).read_bytes())
        raw[42:48] = np.array(dimensions, "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
        return path

    @pytest.mark.parametrize("read", [read_volume, read_label, label_values])
    def test_more_voxels_than_the_cap(self, tmp_path, read, monkeypatch):
        path = self.claim(tmp_path / "scan.nii.gz", 32767, 32767, 32767)
        with pytest.raises(DataError, match=r"has 32767 x 32767 x 32767 voxels, expected at most 1073741824; replace"):
            read(path)
        whole = write(tmp_path / "whole.nii.gz")
        monkeypatch.setattr(limits, "MAX_VOXELS", 1319)
        with pytest.raises(DataError, match=r"has 12 x 11 x 10 voxels, expected at most 1319; .* set segrl\.data\.vol"):
            read_volume(whole)
        monkeypatch.setattr(limits, "MAX_VOXELS", 1320)
        read_volume(whole)

    def test_more_than_a_compressed_file_can_hold(self, tmp_path):
        path = self.claim(tmp_path / "scan.nii.gz", 1000, 1000, 1000)
        with pytest.raises(DataError, match=r"header asks for 2000000352 bytes, which \d+ compressed ones cannot hold"):
            read_volume(path)

    @pytest.mark.parametrize("dimensions", [(12, 11, 11), (12, 11, 9), (12, 11, 300)])
    def test_a_plain_file_has_the_length_of_its_header(self, tmp_path, dimensions):
        path = self.claim(tmp_path / "scan.nii", *dimensions)
        with pytest.raises(DataError, match=r"the header says that the file has \d+ bytes, and it has 2992\)"):
            read_volume(path)

    @pytest.mark.parametrize("dimensions", [(12, -11, 10), (0, 11, 10)])
    def test_no_voxels(self, tmp_path, dimensions):
        with pytest.raises(DataError, match=r"scan\.nii"):
            read_volume(self.claim(tmp_path / "scan.nii", *dimensions))

    def test_a_sparse_label(self, tmp_path, monkeypatch):
        path = write(tmp_path / "mask_(3, 12, 11, 10).npz")
        monkeypatch.setattr(limits, "MAX_VOXELS", 1319)
        with pytest.raises(DataError, match=r"has 12 x 11 x 10 voxels, expected at most 1319"):
            read_labels(path)

    def test_memory_that_is_not_there(self, tmp_path, monkeypatch):
        path = write(tmp_path / "scan.nii.gz")

        def empty(*_: Any) -> None:
            raise MemoryError("Unable to allocate 9 EiB")

        monkeypatch.setattr("segrl.data.volumes.voxel_files.np.empty", empty)
        with pytest.raises(DataError, match=r"not enough memory for 12 x 11 x 10 voxels \(Unable to allocate 9 EiB\)"):
            read_volume(path)


OTHERS = {
    "scan.nrrd": b"NRRD0004\ntype: short\n",
    "scan.seg": b"NRRD0005\ntype: short\n",
    "scan.mha": b"ObjectType = Image\nNDims = 3\n",
    "scan.mhd": b"NDims = 3\nDimSize = 4 4 4\n",
    "scan.dcm": b"\0" * 128 + b"DICM" + b"\0" * 900,
    "IM000001": b"\0" * 128 + b"DICM" + b"\0" * 900,
    "old.ima": b"\x08\0\x05\0" * 300,
}


class TestOtherFormats:
    @pytest.mark.parametrize("name", OTHERS)
    @pytest.mark.parametrize("read", [read_volume, read_label])
    def test_the_format_is_named_with_the_fix(self, tmp_path, name, read):
        (tmp_path / name).write_bytes(OTHERS[name])
        text = {"n": "NRRD", "s": "NRRD", "m": r"MetaImage \(MHA, MHD\)"}.get(name.split(".")[-1][0], "DICOM")
        message = rf"{name}: is {text}, which is not read; export .* as NIfTI"
        if text == "DICOM":  # a scan is read, and these are no more than their first bytes
            message = (
                r"as a scan only; export .* as NIfTI" if read is read_label else f"{name}: cannot be read as DICOM"
            )
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)

    def test_a_folder_with_a_dicom_series(self, tmp_path):
        for number in range(3):
            (tmp_path / f"IM{number}").write_bytes(OTHERS["scan.dcm"])
        with pytest.raises(DataError, match=r"is a folder with DICOM files, which are read as a scan only; export it"):
            read_label(tmp_path)

    def test_a_fifo_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "scan.nii")
        with pytest.raises(DataError, match=r"scan\.nii: is no regular file; give the path of the scan"):
            read_volume(tmp_path / "scan.nii")


class TestShapesAndForms:
    @pytest.mark.parametrize("shape", [(12, 11, 1, 10), (1, 12, 11, 10), (12, 1, 11, 1, 10)])
    @pytest.mark.parametrize("read", [read_volume, read_label])
    def test_an_axis_of_length_one_before_the_last(self, tmp_path, shape, read):
        path = tmp_path / "scan.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), AFFINE), path)
        squeezed = str(tuple(edge for edge in shape if edge > 1)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(
            DataError,
            match=rf"an axis of length 1 before the last; expected .* numpy\.squeeze .*, {squeezed}",
        ):
            read(path)

    def test_four_axes(self, tmp_path):
        nib.save(nib.Nifti1Image(np.zeros((5, 6, 7, 2), np.uint8), AFFINE), tmp_path / "scan.nii.gz")
        with pytest.raises(DataError, match=r"has the shape \(5, 6, 7, 2\), expected 3D; save one of its volumes"):
            read_volume(tmp_path / "scan.nii.gz")

    def empty_sform(self, path: Path, qform_code: int) -> Path:
        image = nib.Nifti1Image(VOXELS, AFFINE)
        image.set_qform(AFFINE, code=qform_code)
        nib.save(image, path)
        raw = bytearray(path.read_bytes())
        raw[280:328] = bytes(48)
        path.write_bytes(raw)
        return path

    def test_an_empty_sform_beside_a_valid_qform(self, tmp_path):
        path = self.empty_sform(tmp_path / "scan.nii", 1)
        with pytest.raises(
            DataError, match=r"the affine .* has no inverse; the qform beside it is valid: use it, with image\.set_sf"
        ):
            read_volume(path)
        image = nib.load(path)
        image.set_sform(None, 0)  # as the error says
        nib.save(image, tmp_path / "fixed.nii")
        volume = read_volume(tmp_path / "fixed.nii")
        assert volume.affine is not None
        np.testing.assert_allclose(volume.affine, AFFINE)
        assert volume.spacing_mm == (2, 1, 1)

    def test_an_empty_sform_alone(self, tmp_path):
        with pytest.raises(DataError, match=r"has no inverse; set sform or qform of the header"):
            read_volume(self.empty_sform(tmp_path / "scan.nii", 0))


class TestLabelsThatNameNoStructure:
    """Negative and fractional values are no foreground, through every kind of file."""

    def save(self, folder: Path, kind: str, value: float) -> Path:
        array = np.zeros((2, *SHAPE), np.float32)
        array[0, 1, 2, 3], array[1, 3, 3, 3] = 1, value
        if kind == "npz":
            path = folder / f"mask_{array.shape}.npz"
            sparse.save_npz(path, sparse.csr_matrix(array.reshape(2, -1)))
            return path
        path = folder / f"label.{kind}"
        dtype = np.int16 if float(value).is_integer() else np.float64
        whole = array.max(axis=0).astype(dtype) + array.min(axis=0).astype(dtype)
        np.save(path, whole) if kind == "npy" else nib.save(nib.Nifti1Image(whole, AFFINE), path)
        return path

    @pytest.mark.parametrize("kind", ["nii.gz", "nii", "npy", "npz"])
    @pytest.mark.parametrize("read", [read_label, label_values])
    def test_negative(self, tmp_path, kind, read):
        path = self.save(tmp_path, kind, -1)
        with pytest.raises(DataError, match=r": 1 voxels of the label are negative, down to -1; expected 0 for the"):
            read(path)

    @pytest.mark.parametrize("kind", ["nii.gz", "nii", "npy", "npz"])
    @pytest.mark.parametrize("value", [0.5, -0.5, np.nan])
    def test_fraction(self, tmp_path, kind, value):
        path = self.save(tmp_path, kind, value)
        with pytest.raises(DataError, match=r": 1 voxels of the label are not whole numbers, such as (-?0\.5|nan)"):
            read_label(path, value=1)

    def test_a_zero_that_is_stored_is_no_structure(self, tmp_path):
        matrix = sparse.csr_matrix(CHANNELS.reshape(3, -1))
        matrix.data[matrix.indptr[1] : matrix.indptr[2]] = 0
        path = tmp_path / f"mask_{CHANNELS.shape}.npz"
        sparse.save_npz(path, matrix)
        assert label_values(path) == (1, 3)


class TestUnions:
    @pytest.mark.parametrize("value", ["1,3", " 3 , 1 ", [1, 3], (3, 1.0), np.array([1, 3]), "1;3"])
    def test_dense_and_sparse(self, tmp_path, value):
        dense = tmp_path / "label.npy"
        np.save(dense, np.einsum("c,cxyz->xyz", [1, 2, 3], CHANNELS).astype(np.uint8))
        expected = (CHANNELS[0] | CHANNELS[2]).astype(bool)[::-1, ::-1].transpose(2, 1, 0)
        for path in (dense, write(tmp_path / f"mask_{CHANNELS.shape}.npz")):
            np.testing.assert_array_equal(read_label(path, value=value), expected)

    def test_absent_values(self, tmp_path):
        path = write(tmp_path / f"mask_{CHANNELS.shape}.npz")
        assert read_label(path, value="3,8").sum() == 1
        with pytest.raises(DataError, match=r"has no voxel with the values 7, 8, only 1, 2, 3; correct label_value"):
            read_label(path, value="8,7")

    @pytest.mark.parametrize("value", ["1,a", "1,-2", "0,1", "1.5", "liver", [1, -1], True, "1 2"])
    def test_others(self, tmp_path, value):
        with pytest.raises(DataError, match=r"label_value .*: expected a whole number, 0 for every voxel that"):
            read_label(write(tmp_path / f"mask_{CHANNELS.shape}.npz"), value=value)

    @pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (256, np.uint16), (70000, np.uint32)])
    def test_values_take_the_bytes_they_need(self, tmp_path, top, dtype, monkeypatch):
        monkeypatch.setattr("segrl.data.volumes.voxel_files._SECTION_BYTES", 500)
        array = np.zeros(SHAPE)
        array[..., 0], array[..., 8] = 7, top  # the larger one comes later
        nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "label.nii.gz")
        labels = read_labels(tmp_path / "label.nii.gz")
        assert labels.values is not None
        assert (labels.values.dtype, labels.present) == (dtype, (7, top))
        np.testing.assert_array_equal(labels.mask([7, top]), (array > 0).transpose(2, 1, 0))


PEAK = """
import resource, sys
from segrl.data import read_label
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_label(sys.argv[1])
before = peak()
print(read_label(sys.argv[2]).sum(), peak() - before)
"""


@pytest.mark.slow
def test_a_label_in_float64_takes_no_copy_of_the_file(tmp_path):
    small, large = tmp_path / "small.nii.gz", tmp_path / "large.nii.gz"
    array = np.zeros((256, 256, 200))  # 100 MiB in the file, 12.5 as a mask and as values
    array[:9] = 3
    nib.save(nib.Nifti1Image(array[..., :2], AFFINE), small)
    nib.save(nib.Nifti1Image(array, AFFINE), large)
    ran = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True)
    voxels, kibibytes = map(int, ran.stdout.split())
    assert voxels == 9 * 256 * 200
    assert kibibytes < 60 * 1024


def test_bz2_is_what_it_says(tmp_path):
    path = write(tmp_path / "scan.nii.bz2")
    assert len(bz2.decompress(path.read_bytes())) == 2992
    assert everything(path) == everything(write(tmp_path / "scan.nii"))
