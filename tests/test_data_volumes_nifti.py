import csv
import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial.transform import Rotation

from segrl.data import Volume, label_values, read_label, read_volume, write_mask, write_volume
from segrl.errors import DataError

nib: Any = nibabel  # its functions are typed as base classes, which lack what NIfTI images have
VOLUMES3D = Path(__file__).parents[2] / "shared" / "data" / "volumes3d"
SHAPE = (5, 6, 7)


def save(path, array, affine=None, header=None, kind=nib.Nifti1Image):
    nib.save(kind(array, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine, header), path)
    return path


@pytest.fixture
def scan(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    return save(tmp_path / "scan.nii.gz", voxels)


def label_of(tmp_path, array, **settings):
    return save(tmp_path / "label.nii.gz", np.asarray(array), **settings)


@st.composite
def affines(draw):
    """Any permutation and flip of the axes, turned by up to 40 degrees, with any spacing and origin."""
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
    axes = np.diag(signs)[list(draw(st.permutations(range(3))))]
    turn = Rotation.from_rotvec(draw(st.sampled_from(list(np.eye(3)))) * draw(st.floats(-0.7, 0.7))).as_matrix()
    spacing = draw(st.lists(st.floats(0.3, 8.0), min_size=3, max_size=3))
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag(spacing)
    affine[:3, 3] = draw(st.lists(st.floats(-300, 300), min_size=3, max_size=3))
    return affine


@settings(max_examples=60)
@given(affines(), st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6)), st.integers(1, 4))
def test_a_marked_voxel_comes_back_to_its_place(tmp_path_factory, affine, marked, codes):
    folder = tmp_path_factory.mktemp("grid")
    voxels = np.zeros(SHAPE, np.float32)
    voxels[marked] = 1
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=codes)
    image.set_qform(affine, code=5 - codes)
    nib.save(image, folder / "scan.nii")

    volume = read_volume(folder / "scan.nii")
    found = np.argwhere(volume.voxels > 0)
    assert len(found) == 1
    mask = np.zeros(volume.voxels.shape, bool)
    mask[tuple(found[0])] = True
    write_mask(folder / "mask.nii.gz", mask, volume)

    written, scan = nib.load(folder / "mask.nii.gz"), nib.load(folder / "scan.nii")
    assert np.argwhere(np.asanyarray(written.dataobj)).tolist() == [list(marked)]
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, scan.affine)
    for form in ("get_sform", "get_qform"):
        (one, code), (other, other_code) = (getattr(image, form)(coded=True) for image in (written, scan))
        np.testing.assert_array_equal(one, other)
        assert code == other_code
    np.testing.assert_array_equal(read_label(folder / "mask.nii.gz", volume), mask)


@settings(max_examples=60)
@given(affines())
def test_the_order_is_inferior_to_superior_anterior_to_posterior_right_to_left(tmp_path_factory, affine):
    path = tmp_path_factory.mktemp("order") / "scan.nii"
    world = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1))
    for axis, patient, sign in ((2, 0, -1), (1, 1, -1), (0, 2, 1)):  # NIfTI's world is right, anterior, superior
        save(path, world[..., patient].astype(np.float32), affine)
        volume = read_volume(path)
        along = np.diff(volume.voxels, axis=axis)
        assert (sign * along > 0).all()
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    assert volume.spacing_mm is not None
    assert sorted(volume.spacing_mm) == pytest.approx(sorted(steps), rel=1e-5)
    for edge, length in zip(volume.spacing_mm, volume.voxels.shape, strict=True):
        assert edge == pytest.approx(steps[SHAPE.index(length)], rel=1e-5)


@pytest.mark.parametrize("codes", list(itertools.product("LR", "AP", "IS")))
def test_axis_codes_of_known_files(tmp_path, codes):
    start = nib.orientations.axcodes2ornt(codes)
    affine = nib.orientations.inv_ornt_aff(start, SHAPE)
    voxels = np.arange(210, dtype=np.float32).reshape(SHAPE)
    volume = read_volume(save(tmp_path / "scan.nii", voxels, affine))
    flips = tuple(slice(None, None, 1 if code in "LPS" else -1) for code in codes)
    np.testing.assert_array_equal(volume.voxels, voxels[flips].transpose(2, 1, 0))
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.flags.c_contiguous


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(np.full(SHAPE, 10, np.int16), np.eye(4))
    image.header.set_slope_inter(2.5, -1024)
    image.header.set_data_dtype(np.int16)
    path = tmp_path / "scan.nii.gz"
    nib.save(image, path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[352:] = np.full(210, 10, "<i2").tobytes()
    raw[112:120] = np.array([2.5, -1024], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    volume = read_volume(path)
    assert np.unique(volume.voxels).tolist() == [-999]
    write_mask(tmp_path / "mask.nii.gz", volume.voxels < 0, volume)
    assert np.unique(np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj)).tolist() == [1]


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_spacing_is_in_millimetres_whatever_the_unit(tmp_path, unit, factor):
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    assert read_volume(tmp_path / "scan.nii").spacing_mm == pytest.approx((4 * factor, 3 * factor, 2 * factor))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("order", ["<", ">"])
def test_version_and_byte_order(tmp_path, kind, order):
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    path = save(tmp_path / ("scan.img" if kind is nib.Nifti1Pair else "scan.nii"), voxels, header=header, kind=kind)
    volume = read_volume(path)
    write_mask(tmp_path / "mask.nii", volume.voxels > 4, volume)
    written = nib.load(tmp_path / "mask.nii")
    assert type(written) is (nib.Nifti2Image if kind is nib.Nifti2Image else nib.Nifti1Image)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), voxels > 4)


def test_texts_and_extensions_of_the_scan_stay_out_of_the_mask(tmp_path):
    header = nib.Nifti1Header()
    header["descrip"], header["db_name"], header["aux_file"] = b"Jane Doe", b"Jane Doe", b"Jane Doe"
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    volume = read_volume(save(tmp_path / "scan.nii", np.zeros(SHAPE, np.int16), header=header))
    assert b"Jane Doe" in (tmp_path / "scan.nii").read_bytes()
    write_mask(tmp_path / "mask.nii", np.zeros(volume.voxels.shape, bool), volume)
    assert b"Jane Doe" not in (tmp_path / "mask.nii").read_bytes()
    assert volume.header["descrip"] == b"Jane Doe"  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_length_one_are_dropped_and_written_again(tmp_path, extra):
    voxels = np.random.default_rng(0).integers(0, 2, SHAPE + extra).astype(np.uint8)
    path = save(tmp_path / "scan.nii.gz", voxels)
    volume = read_volume(path)
    assert volume.voxels.shape == SHAPE[::-1]
    write_mask(tmp_path / "mask.nii.gz", volume.voxels > 0, volume)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj), voxels)
    # a 3D label fits a scan with a trailing axis
    assert read_label(save(tmp_path / "label.nii.gz", voxels.reshape(SHAPE)), volume).sum() == voxels.sum()


def test_one_slice(tmp_path):
    voxels = np.arange(30, dtype=np.float32).reshape(5, 6, 1)
    volume = read_volume(save(tmp_path / "scan.nii.gz", voxels))
    assert volume.voxels.shape == (1, 6, 5)
    write_mask(tmp_path / "mask.nii.gz", volume.voxels > 7, volume)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj), voxels > 7)


def test_a_file_without_orientation_keeps_its_codes(tmp_path):
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None)
    image.header.set_zooms((2, 3, 4))
    nib.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.spacing_mm == (4, 3, 2)
    write_mask(tmp_path / "mask.nii", np.ones(volume.voxels.shape, bool), volume)
    written = nib.load(tmp_path / "mask.nii")
    assert (written.header["sform_code"], written.header["qform_code"]) == (0, 0)
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "scan.nii").affine)


def test_a_volume_without_a_file_is_written_and_read_back(tmp_path):
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    volume = Volume(voxels, (6.5, 0.5, 0.25))
    write_volume(tmp_path / "scan.nii.gz", volume)
    write_mask(tmp_path / "label.nii.gz", voxels > 0, volume)
    read = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read.voxels, voxels)
    assert read.spacing_mm == volume.spacing_mm
    assert read.name == str(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz", read), voxels > 0)
    write_volume(tmp_path / "again.nii.gz", read)
    np.testing.assert_array_equal(read_volume(tmp_path / "again.nii.gz").voxels, voxels)


@pytest.mark.parametrize(
    ("voxels", "spacing", "message"),
    [
        (np.zeros((3, 4)), (1, 1, 1), r"Volume.voxels of 'x': shape \(3, 4\); expected \(D, H, W\)"),
        (np.zeros((3, 0, 4)), (1, 1, 1), r"Volume.voxels of 'x': shape \(3, 0, 4\); expected"),
        (np.zeros((3, 4, 5)), (1, 0, 1), r"Volume.spacing_mm of 'x': \(1, 0, 1\); expected three positive"),
        (np.zeros((3, 4, 5)), (1, 1), r"Volume.spacing_mm of 'x': \(1, 1\); expected three positive"),
    ],
)
def test_bad_volumes(voxels, spacing, message):
    with pytest.raises(DataError, match=message):
        Volume(voxels, spacing, "x")


def noise(path):
    """A scan that takes more than the kilobyte by which nibabel knows a format."""
    return save(path, np.random.default_rng(0).integers(-1000, 1000, (16, 16, 16)).astype(np.int16))


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def mgh(path):
    nib.save(nib.MGHImage(np.zeros(SHAPE, np.float32), np.eye(4)), path.with_name("scan.mgz"))
    return path.with_name("scan.mgz")


def spoilt_affine(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:296] = np.full(4, np.nan, "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))


def not_finite(value):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[1, 2, :3] = value
    return voxels


RGB = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
BAD_SCANS = {
    "missing": (lambda p: p.unlink(), r"scan\.nii\.gz: no such file; give the path of the scan"),
    "a folder": (
        lambda p: (p.unlink(), p.mkdir()),
        r"is a folder without DICOM files, expected a scan file or the folder of",
    ),
    "cut in the voxels": (
        lambda p: cut(noise(p), 0.7),
        r"the voxels cannot be read \(.*\); the file is damaged or cut off",
    ),
    "cut in the header": (lambda p: cut(p, 0.03), r"cannot be read as NIfTI \(.*\): damaged, cut off, or an"),
    "empty file": (lambda p: p.write_bytes(b""), r"cannot be read as NIfTI \(.*\): damaged, .*; replace the file"),
    "text": (lambda p: p.write_text("not a scan " * 99), r"cannot be read as NIfTI"),
    "text in gzip": (lambda p: p.write_bytes(gzip.compress(b"not a scan " * 99)), r"cannot be read as NIfTI"),
    "another format": (mgh, r"scan\.mgz: is MGHImage, expected NIfTI; convert it to \.nii\.gz"),
    "4D": (
        lambda p: save(p, np.zeros((*SHAPE, 2), np.uint8)),
        r"has the shape \(5, 6, 7, 2\), expected 3D; save one of its volumes, as image\.slicer\[\.\.\., 0\]",
    ),
    "2D": (lambda p: save(p, np.zeros((5, 6), np.uint8)), r"has the shape \(5, 6\), expected three axes; save one"),
    "complex": (lambda p: save(p, np.zeros(SHAPE, np.complex64)), r"has complex64 voxels, expected one real number"),
    "colour": (lambda p: save(p, RGB), r"has .* voxels, expected one real number each; convert it to grey values"),
    "NaN": (lambda p: save(p, not_finite(np.nan)), r"3 of 210 voxels are NaN or infinite; fix the conversion, or"),
    "infinite": (lambda p: save(p, not_finite(-np.inf)), r"3 of 210 voxels are NaN or infinite"),
    "beyond float32": (lambda p: save(p, np.full(SHAPE, 1e300)), r"210 of 210 voxels are NaN or infinite"),
    "no affine": (spoilt_affine, r"the affine .* has no inverse; set sform or qform of the header"),
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_a_bad_scan_is_named_with_the_fix(scan, case):
    spoil, message = BAD_SCANS[case]
    made = spoil(scan)
    with pytest.raises(DataError, match=message) as caught:
        read_volume(made if case == "another format" else scan)
    assert str(scan.parent) in str(caught.value)


@settings(max_examples=40)
@given(share=st.floats(0, 0.99))
def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path_factory, share):
    path = noise(tmp_path_factory.mktemp("cut") / "scan.nii.gz")
    cut(path, share)
    with pytest.raises(DataError, match=r"scan\.nii\.gz: (cannot be read|the voxels cannot be read)"):
        read_volume(path)


def test_label_values(tmp_path, scan):
    array = np.zeros(SHAPE, np.uint8)
    array[0], array[1, 2, 3] = 3, 7
    path = label_of(tmp_path, array)
    volume = read_volume(scan)
    assert label_values(path) == (3, 7)
    assert read_label(path, volume).sum() == 43
    assert read_label(path, volume, 3).sum() == 42
    assert np.argwhere(read_label(path, volume, 7)).tolist() == [[3, 3, 3]]  # R, A, S: rows and columns turn
    assert read_label(path, volume, 7).dtype == bool
    with pytest.raises(
        DataError, match=r"label\.nii\.gz: the label has no voxel with the value 2, only 3, 7; correct label_value, rem"
    ):
        read_label(path, volume, 2)
    assert not read_label(path, volume, 2, allow_empty=True).any()


def test_an_empty_label(tmp_path, scan):
    path = label_of(tmp_path, np.zeros(SHAPE, np.uint8))
    with pytest.raises(DataError, match=r"the label has no foreground; remove the row, or set allow_empty=True"):
        read_label(path)
    with pytest.raises(DataError, match=r"has no voxel with the value 2, only no foreground; correct"):
        read_label(path, value=2)
    assert not read_label(path, read_volume(scan), allow_empty=True).any()
    assert label_values(path) == ()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64, np.int8])
def test_whole_numbers_in_any_type(tmp_path, dtype):
    array = np.zeros(SHAPE, dtype)
    array[2, 3, 4] = 5
    assert np.argwhere(read_label(label_of(tmp_path, array), value=5)).tolist() == [[4, 2, 2]]


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf"), (2.01, "2.01")])
def test_labels_that_are_not_whole_numbers(tmp_path, value, shown):
    array = np.zeros(SHAPE, np.float32)
    array[2, 3, 4] = value
    with pytest.raises(
        DataError, match=rf"label\.nii\.gz: 1 voxels of the label are not whole numbers, such as {shown}; save the"
    ):
        read_label(label_of(tmp_path, array))


def test_a_label_of_another_shape(tmp_path, scan):
    with pytest.raises(
        DataError,
        match=r"has the shape \(7, 6, 4\) as \(D, H, W\), \S*scan\.nii\.gz has \(7, 6, 5\); expected the same",
    ):
        read_label(label_of(tmp_path, np.ones((4, 6, 7), np.uint8)), read_volume(scan))


def moved(column, by):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, column] += by
    return affine


@pytest.mark.parametrize(
    ("affine", "shift"),
    [
        (moved(3, [2, 0, 0]), "1"),
        (moved(3, [0, 0, -0.2]), "0.1"),
        (moved(0, [0.5, 0, 0]), "1"),
        (np.diag([-2.0, 3.0, 4.0, 1.0]), "4"),
    ],
)
def test_a_label_with_another_affine(tmp_path, scan, affine, shift):
    with pytest.raises(
        DataError,
        match=rf"the label lies up to {shift} voxels away from \S*scan\.nii\.gz: their affines differ; .*copy the aff",
    ):
        read_label(label_of(tmp_path, np.ones(SHAPE, np.uint8), affine=affine), read_volume(scan))


def test_affines_may_differ_by_the_rounding_of_headers(tmp_path, scan):
    label = label_of(tmp_path, np.ones(SHAPE, np.uint8), affine=moved(3, [0.05, 0.05, 0.001]))
    assert read_label(label, read_volume(scan)).all()


def test_a_label_whose_axes_are_in_another_order_fits_where_it_lies(tmp_path, scan):
    image = nib.Nifti1Image((np.asanyarray(nib.load(scan).dataobj) > 0).astype(np.uint8), nib.load(scan).affine)
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SLP"))
    nib.save(turned, tmp_path / "label.nii.gz")
    assert turned.shape != image.shape
    volume = read_volume(scan)
    np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz", volume), volume.voxels > 0)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("mask.nii", np.zeros((7, 6, 4), bool), r"shape \(7, 6, 4\), but the scan \S*scan\.nii\.gz has \(7, 6, 5\)"),
        ("mask.nii", np.zeros((7, 6), bool), r"mask\.nii: expected 3 dimensions"),
        ("mask.nii", np.zeros((7, 6, 5)), r"expected a bool or integer mask, got float64"),
        ("mask.png", np.zeros((7, 6, 5), bool), r"mask\.png: expected a name that ends in \.nii or \.nii\.gz"),
        ("no/mask.nii", np.zeros((7, 6, 5), bool), r"no/mask\.nii: there is no folder \S*no; create it first"),
    ],
)
def test_masks_that_cannot_be_written(tmp_path, scan, name, mask, message):
    with pytest.raises(DataError, match=message):
        write_mask(tmp_path / name, mask, read_volume(scan))
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_numpy_arrays(tmp_path):
    voxels = np.random.default_rng(0).normal(size=SHAPE)
    np.save(tmp_path / "scan.npy", voxels)
    volume = read_volume(tmp_path / "scan.npy")
    assert (volume.spacing_mm, volume.oriented, volume.edges) == (None, False, None)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    np.testing.assert_array_equal(volume.voxels, voxels.astype(np.float32)[::-1, ::-1].transpose(2, 1, 0))
    np.save(tmp_path / "label.npy", (voxels > 0).astype(np.uint8))
    np.testing.assert_array_equal(read_label(tmp_path / "label.npy", volume), volume.voxels > 0)
    write_mask(tmp_path / "mask.nii.gz", volume.voxels > 0, volume)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj), voxels > 0)


@pytest.mark.parametrize("shape", [(1, 8, 8, 5), (8, 8, 5), (8, 8, 5, 1), (8, 8, 8)])
def test_numpy_arrays_with_their_slices_last(tmp_path, shape):
    np.save(tmp_path / "scan.npy", np.arange(np.prod(shape)).reshape(shape))
    volume = read_volume(tmp_path / "scan.npy")
    assert volume.voxels.shape == (5 if 5 in shape else 8, 8, 8)
    assert volume.voxels[0, 7, 7] == 0


@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (5, 8, 8)])
def test_numpy_arrays_with_their_slices_first_are_upright_from_the_top(tmp_path, shape):
    array = np.arange(320).reshape(shape)
    np.save(tmp_path / "scan.npy", array)
    volume = read_volume(tmp_path / "scan.npy")
    np.testing.assert_array_equal(volume.voxels, array.reshape(5, 8, 8)[::-1])
    write_mask(tmp_path / "mask.nii", volume.voxels > 9, volume)
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii").dataobj), array.reshape(5, 8, 8) > 9)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}], dtype=object), r"scan\.npy: cannot be read as a numpy array \(.*Python objects"),
        (np.zeros((2, 5, 6, 7)), r"has the shape \(2, 5, 6, 7\), expected 3D"),
        (np.zeros((5, 6)), r"has the shape \(5, 6\), expected three axes"),
        (np.zeros(SHAPE, complex), r"has complex128 voxels, expected one real number"),
        (np.zeros((5, 0, 6)), r"has the shape \(5, 0, 6\), so it has no voxels"),
    ],
)
def test_bad_numpy_arrays(tmp_path, array, message):
    np.save(tmp_path / "scan.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_volume(tmp_path / "scan.npy")


def test_a_cut_numpy_array(tmp_path):
    np.save(tmp_path / "scan.npy", np.zeros(SHAPE))
    cut(tmp_path / "scan.npy", 0.5)
    with pytest.raises(DataError, match=r"scan\.npy: cannot be read as a numpy array"):
        read_volume(tmp_path / "scan.npy")


def save_sparse(folder, channels, name=None):
    matrix = sparse.csr_matrix(channels.reshape(len(channels), -1))
    path = folder / (name or f"mask_{channels.shape}.npz")
    sparse.save_npz(path, matrix)
    return path


def test_sparse_labels(tmp_path):
    channels = np.zeros((3, *SHAPE), np.int32)
    channels[0, :2], channels[2, 1:3] = 1, 1  # they overlap; the second is absent
    path = save_sparse(tmp_path, channels)
    np.save(tmp_path / "image.npy", np.zeros((1, *SHAPE), np.float32))
    volume = read_volume(tmp_path / "image.npy")
    assert label_values(path) == (1, 3)
    for value, expected in ((0, channels.any(axis=0)), (1, channels[0]), (3, channels[2])):
        mask = read_label(path, volume, value)
        np.testing.assert_array_equal(mask, expected.astype(bool)[::-1, ::-1].transpose(2, 1, 0))
    for absent in (2, 4):
        with pytest.raises(DataError, match=rf"no voxel with the value {absent}, only 1, 3; correct label_value"):
            read_label(path, volume, absent)
        assert not read_label(path, volume, absent, allow_empty=True).any()


def test_a_sparse_label_of_another_shape(tmp_path, scan):
    path = save_sparse(tmp_path, np.ones((1, 4, 6, 7), np.int32))
    with pytest.raises(DataError, match=r"has the shape \(7, 6, 4\) as \(D, H, W\), \S*scan\.nii\.gz has \(7, 6, 5\)"):
        read_label(path, read_volume(scan))


@pytest.mark.parametrize("name", ["mask.npz", "mask_(5, 6, 7).npz", "mask_(1, 0, 6, 7).npz", "mask_(a).npz"])
def test_a_sparse_label_without_its_shape_in_the_name(tmp_path, name):
    path = save_sparse(tmp_path, np.ones((1, *SHAPE), np.int32), name)
    for read in (read_label, label_values):
        with pytest.raises(DataError, match=r"expected a name that ends in the shape of the label, as 'mask_\(1, 512"):
            read(path)


def test_a_sparse_label_of_another_size_than_its_name(tmp_path):
    path = save_sparse(tmp_path, np.ones((2, *SHAPE), np.int32), "mask_(3, 5, 6, 7).npz")
    with pytest.raises(
        DataError, match=r"the matrix is 2 x 210, but the name says 3 channels of 5 x 6 x 7 voxels; giv"
    ):
        read_label(path)
    with pytest.raises(DataError, match=r"the matrix is 2 x 210, but the name says 3 channels"):
        label_values(path)


@pytest.mark.parametrize("spoil", ["cut", "dense", "pickle", "missing"])
def test_unreadable_sparse_labels(tmp_path, spoil):
    path = save_sparse(tmp_path, np.ones((1, *SHAPE), np.int32))
    if spoil == "cut":
        cut(path, 0.6)
    elif spoil == "missing":
        path.unlink()
    else:
        array: Any = np.ones(3) if spoil == "dense" else np.array([{}], dtype=object)
        np.savez(path, **({"masks": array} if spoil == "dense" else {"format": array, "indptr": array}))
    for read in (read_label, label_values):
        with pytest.raises(DataError, match=r"npz: (cannot be read as a scipy sparse matrix|no such file)"):
            read(path)


@pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
def test_every_real_file_is_read_written_and_read_again(tmp_path):
    with (VOLUMES3D / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    for row in rows:
        volume = read_volume(VOLUMES3D / row["image"])
        mask = read_label(VOLUMES3D / row["label"], volume)
        assert mask.shape == volume.voxels.shape
        assert sorted(volume.voxels.shape) == sorted(map(int, row["shape"].split("x")))
        assert volume.spacing_mm is not None
        assert sorted(volume.spacing_mm) == pytest.approx(sorted(map(float, row["spacing_mm"].split("x"))), abs=1e-3)
        # the axes of these files are x, y, z, so slices are as many as the last number says
        assert len(volume.voxels) == int(row["shape"].split("x")[2])
        assert volume.spacing_mm[0] == pytest.approx(float(row["spacing_mm"].split("x")[2]), abs=1e-3)
        assert mask.sum() == int(row["lesion_voxels"])
        write_mask(tmp_path / "mask.nii.gz", mask, volume)
        np.testing.assert_array_equal(read_label(tmp_path / "mask.nii.gz", volume), mask)
        written, label = nib.load(tmp_path / "mask.nii.gz"), nib.load(VOLUMES3D / row["label"])
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(label.dataobj))
        np.testing.assert_array_equal(written.affine, label.affine)
        for code in ("sform_code", "qform_code"):
            assert written.header[code] == label.header[code]


# ---- damage inside a compressed file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_volume, lambda path: read_label(path, None)])
def test_damage_inside_a_compressed_file_is_found(read, tmp_path):
    """A flipped bit or a lost end: nibabel alone reads other voxels, or all of them."""
    whole, damaged = tmp_path / "whole.nii.gz", tmp_path / "damaged.nii.gz"
    rng = np.random.default_rng(0)
    voxels = (rng.random((24, 20, 12)) > 0.5).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), whole)
    expected = np.asarray(read(whole).voxels if read is read_volume else read(whole))
    content, unseen = whole.read_bytes(), 0
    for _ in range(150):
        position, bit = int(rng.integers(18, len(content))), int(rng.integers(8))  # behind gzip's own header
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        damaged.write_bytes(changed)
        try:
            found = read(damaged)
        except DataError:
            continue
        unseen += not np.array_equal(np.asarray(getattr(found, "voxels", found)), expected)
    assert unseen == 0
    for lost in (1, 4, 9, 100):
        damaged.write_bytes(content[:-lost])
        with pytest.raises(DataError, match=r"damaged\.nii\.gz: .*cut off"):
            read(damaged)
