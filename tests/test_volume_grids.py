"""What is known of a scan's grid, and what follows: millimetres, sides of the patient, the aspect of shown slices."""

# D slices, H/W pixels of a slice; X/Y/Z voxels along the axes of a file

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from builders import tiny_model, tiny_segmenter
from datasets import Dataset
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation
from volume_builders import blocks, row_of

from segrl.data import (
    CaseReader,
    Volume,
    check_volumes,
    load_volumes,
    prepare_volumes,
    read_case,
    read_label,
    read_volume,
    render_slices,
    write_manifest,
    write_mask,
    write_volume,
)
from segrl.errors import DataError, RewardError
from segrl.evaluation import evaluate_oracle_boxes, evaluate_volumes
from segrl.inference import VolumeSegmenter
from segrl.metrics import make_metric
from segrl.predictions import VolumePromptSettings, VolumeTarget
from segrl.rewards import make_reward, register_reward
from segrl.segmenters import VolumePropagator
from segrl.tasks import VolumeTask

nib: Any = nibabel  # its functions are typed as base classes, which lack what NIfTI images have
VOLUMES3D = Path(__file__).parents[2] / "shared" / "data" / "volumes3d"
SHAPE = (5, 6, 7)
SETTINGS = VolumePromptSettings(slices=3, size=64, frame_kind="original_px", max_new_tokens=2)


def save(path, array, affine=None, *, unit=0, sform=2):
    affine = np.eye(4) if affine is None else affine
    header = nib.Nifti1Header()
    header.set_data_shape(np.shape(array))
    header.set_zooms(nib.affines.voxel_sizes(affine))
    image = nib.Nifti1Image(np.asarray(array), affine if sform else None, header)  # None leaves the codes at 0
    image.header["xyzt_units"] = unit
    if sform:
        image.header["sform_code"] = sform
    nib.save(image, path)
    return path


def tilted(angle, spacing=(1.0, 1.0, 1.0), axis=0):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.eye(3)[axis] * angle).as_matrix() @ np.diag([*spacing])
    affine[:3, 3] = 10, -20, 30
    return affine


class TestWhatAFileSays:
    @pytest.mark.parametrize(
        ("affine", "unit", "sform", "spacing", "edges"),
        [
            (np.eye(4), 0, 2, None, None),  # what one gets who saves an array and knows nothing
            (np.diag([-1.0, -1.0, 1.0, 1.0]), 0, 1, None, None),
            (np.eye(4), 2, 2, (1.0, 1.0, 1.0), ("R", "L", "A", "P")),  # the unit is named, so 1 mm is meant
            (np.eye(4) + np.eye(4, k=3), 0, 2, (1.0, 1.0, 1.0), ("R", "L", "A", "P")),  # as atlases are
            (np.diag([0.5, 0.5, 3.0, 1.0]), 0, 2, (3.0, 0.5, 0.5), ("R", "L", "A", "P")),
            (np.diag([0.5, 0.5, 3.0, 1.0]), 0, 0, (3.0, 0.5, 0.5), None),  # sizes of voxels, but no orientation
            (np.diag([-1.0, 1.0, 1.0, 1.0]), 0, 0, None, None),
            (np.diag([-1.0, 1.0, 1.0, 1.0]), 2, 0, (1.0, 1.0, 1.0), None),
        ],
    )
    def test_spacing_and_orientation(self, tmp_path, affine, unit, sform, spacing, edges):
        volume = read_volume(save(tmp_path / "scan.nii", np.ones(SHAPE), affine, unit=unit, sform=sform))
        assert (volume.spacing_mm, volume.edges) == (spacing, edges)
        assert volume.oriented == (edges is not None)
        assert (volume.z_mm(2) is None) == (edges is None)

    def test_arrays_say_nothing_and_an_argument_does(self, tmp_path):
        np.save(tmp_path / "scan.npy", np.ones(SHAPE))
        for given in (None, ""):
            assert read_volume(tmp_path / "scan.npy", given).spacing_mm is None
        for given in ((5, 0.7, 0.7), "[5, 0.7, 0.7]", np.array([5, 0.7, 0.7])):
            volume = read_volume(tmp_path / "scan.npy", given)
            assert (volume.spacing_mm, volume.oriented, volume.z_mm(1)) == ((5, 0.7, 0.7), False, None)
        for bad in ("5x0.7x0.7", [5, 0.7], [5, 0.7, -1], 3):
            with pytest.raises(DataError, match=r"scan\.npy: spacing_mm: .*expected (three positive )?millimetres"):
                read_volume(tmp_path / "scan.npy", bad)
        known = save(tmp_path / "scan.nii", np.ones(SHAPE), np.diag([2.0, 3.0, 4.0, 1.0]))
        assert read_volume(known, (9, 9, 9)).spacing_mm == (4, 3, 2)  # the file says it

    def test_files_that_are_written_claim_no_more_than_is_known(self, tmp_path):
        np.save(tmp_path / "scan.npy", np.ones(SHAPE))
        array = read_volume(tmp_path / "scan.npy")
        write_mask(tmp_path / "mask.nii", array.voxels > 0, array)
        write_volume(tmp_path / "copy.nii", Volume(np.ones((2, 3, 4), np.float32)))
        for name in ("mask.nii", "copy.nii"):
            again = read_volume(tmp_path / name)
            assert (again.spacing_mm, again.edges) == (None, None)

    @pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
    def test_every_real_file_says_both(self):
        files = sorted(VOLUMES3D.glob("images/*.nii.gz"))
        assert len(files) == 7
        for file in files:
            volume = read_volume(file)
            assert volume.spacing_mm is not None
            assert volume.edges == ("R", "L", "A", "P")
            axis, index = volume.file_slice(3)
            assert axis == 2
            at = nib.load(file)
            middle = [(edge - 1) / 2 for edge in at.shape[:2]]
            assert volume.z_mm(3) == pytest.approx(nib.affines.apply_affine(at.affine, [*middle, index])[2])

    @pytest.mark.parametrize("kind", ["npy", "nifti", "m3d"])
    @pytest.mark.parametrize("given", [None, "[5.0, 1.0, 0.5]"])
    def test_every_door_of_rows(self, kind, given, tmp_path):
        """Three slices of 5 mm apart are 15 mm, or nothing; 3.0 is the count of slices."""
        scan, label = tmp_path / "scan", tmp_path / "label"
        voxels, mask = np.random.default_rng(0).normal(size=(8, 9, 10)), np.zeros((8, 9, 10), np.uint8)
        mask[2:5, 2:5, 2:4] = 1
        if kind == "nifti":
            files = save(Path(f"{scan}.nii.gz"), voxels), save(Path(f"{label}.nii.gz"), mask)
        else:
            files = Path(f"{scan}.npy"), Path(f"{label}.npy")
            np.save(files[0], voxels[None] if kind == "m3d" else voxels)
            np.save(files[1], mask)
        row = {"image": files[0].name, "label": files[1].name, "lesion": "cyst", "modality": "CT"}
        write_manifest(tmp_path, [{**row, **({} if given is None else {"spacing_mm": given})}])
        rows = load_volumes(tmp_path)
        spacing = None if given is None else (5.0, 1.0, 0.5)
        assert read_case(rows[0]).scan.spacing_mm == spacing
        (prepared,) = list[Any](prepare_volumes(rows, None, SETTINGS, completions=False))
        assert prepared["images"][0].size == ((57, 64) if given is None else (28, 64))
        (read,) = VolumeTask(None, SETTINGS).read([prepared])
        assert read.target is not None
        assert read.target.spacing_mm == spacing
        model = VolumeSegmenter(*tiny_model("qwen3_vl", min_pixels=32 * 32, max_pixels=32 * 32), SETTINGS)
        seen: list[Any] = []
        (record,) = evaluate_volumes(model, rows, progress=False, on_answer=lambda *answer: seen.append(answer))
        ((_, case, _, target),) = seen
        assert (case.scan.spacing_mm, target.spacing_mm, case.scan.edges) == (spacing, spacing, None)
        assert (record["hd95_mm"], record["nsd"]) == (None, None if given is None else 0.0)
        moved = SimpleNamespace(mask=np.roll(target.mask, 3, axis=0))
        assert make_metric("hd95")(moved, target) == (None if given is None else 15.0)

    def test_a_bad_spacing_in_a_row_is_named(self, tmp_path):
        np.save(tmp_path / "scan.npy", np.random.default_rng(0).normal(size=SHAPE))
        np.save(tmp_path / "label.npy", np.ones(SHAPE, np.uint8))
        row = {"scan": str(tmp_path / "scan.npy"), "label": str(tmp_path / "label.npy"), "query": "Where?"}
        check_volumes(Dataset.from_list([{**row, "spacing_mm": "[5, 1, 1]"}]))
        with pytest.raises(DataError, match=r"row 0: spacing_mm: '5x1x1'; expected millimetres \[z, y, x\]"):
            check_volumes(Dataset.from_list([{**row, "spacing_mm": "5x1x1"}]))
        with pytest.raises(DataError, match=r"scan\.npy: spacing_mm: '5x1x1'"):
            read_case({**row, "spacing_mm": "5x1x1"}, label=False)
        known = save(tmp_path / "scan.nii", np.ones(SHAPE), np.diag([2.0, 3.0, 4.0, 1.0]))
        assert read_case({"scan": str(known), "spacing_mm": "2x3x4"}, label=False).scan.spacing_mm == (4, 3, 2)

    def test_one_reader_keeps_the_spacings_of_rows_apart(self, tmp_path):
        np.save(tmp_path / "scan.npy", np.random.default_rng(0).normal(size=SHAPE))
        read, row = CaseReader(), {"scan": str(tmp_path / "scan.npy")}
        found = [read({**row, "spacing_mm": s}, label=False).scan.spacing_mm for s in (None, [5, 1, 1], "[4, 1, 1]")]
        assert found == [None, (5, 1, 1), (4, 1, 1)]

    def test_columns_of_a_trainer(self):
        @register_reward("spacing_seen", volume=True, range=(0, 100))
        def spacing_seen(prediction: Any, target: VolumeTarget) -> float | None:
            return None if target.spacing_mm is None else target.spacing_mm[0]

        reward, call = (
            make_reward("spacing_seen"),
            {"completions": ["a", "b"], "volume": [np.ones((2, 3, 4), bool)] * 2},
        )
        assert reward(**call) == [None, None]
        assert reward(**call, spacing_mm=[None, "[5, 1, 1]"]) == [None, 5.0]
        with pytest.raises(RewardError, match="spacing_mm: 'x'"):
            reward(**call, spacing_mm=["x", None])


class TestNear45Degrees:
    @settings(max_examples=60)
    @drawn(
        axis=st.integers(0, 2),
        quarter=st.sampled_from([1, 3, -1, -3]),
        nudge=st.sampled_from([0.0, 1e-9, 1e-7, 1e-5]),
        order=st.permutations(range(3)),
        flips=st.tuples(*[st.booleans()] * 3),
    )
    def test_a_label_is_turned_as_its_scan(self, tmp_path_factory, axis, quarter, nudge, order, flips):
        """The two affines are at either side of 45 degrees, and the label's axes may be in another order."""
        folder = tmp_path_factory.mktemp("near")
        voxels = np.random.default_rng(axis).integers(0, 2, SHAPE).astype(np.int16)
        angle, spacing = quarter * np.pi / 4, (0.8, 1.1, 2.5)
        save(folder / "scan.nii", voxels, tilted(angle + nudge, spacing, axis), sform=1)
        ornt = np.array([(out, -1 if flip else 1) for out, flip in zip(order, flips, strict=True)])
        label = nib.orientations.apply_orientation(voxels.astype(np.uint8), ornt)
        moved = tilted(angle - nudge, spacing, axis) @ nib.orientations.inv_ornt_aff(ornt, SHAPE)
        save(folder / "label.nii", label, moved, sform=1)
        volume = read_volume(folder / "scan.nii")
        for scan in (volume, folder / "scan.nii", str(folder / "scan.nii")):
            assert np.array_equal(read_label(folder / "label.nii", scan), volume.voxels > 0)
        row = {"scan": str(folder / "scan.nii"), "label": str(folder / "label.nii")}
        mask = CaseReader()(row).mask
        assert mask is not None
        assert np.array_equal(mask, volume.voxels > 0)
        write_mask(folder / "mask.nii", volume.voxels > 0, volume)
        assert np.array_equal(np.asanyarray(nib.load(folder / "mask.nii").dataobj), voxels)

    def test_the_two_affines_by_themselves_are_turned_differently(self, tmp_path):
        """Otherwise the test above would test nothing."""
        shapes = set()
        for nudge in (1e-5, -1e-5):
            path = save(tmp_path / "scan.nii", np.ones(SHAPE), tilted(np.pi / 4 + nudge), sform=1)
            shapes.add(read_volume(path).voxels.shape)
        assert shapes == {(7, 6, 5), (6, 7, 5)}

    def test_another_grid_is_still_an_error(self, tmp_path):
        save(tmp_path / "scan.nii", np.ones(SHAPE), tilted(np.pi / 4), sform=1)
        save(tmp_path / "label.nii", np.ones(SHAPE, np.uint8), tilted(np.pi / 4 + 0.1), sform=1)
        save(tmp_path / "small.nii", np.ones((5, 6, 6), np.uint8), tilted(np.pi / 4), sform=1)
        for scan in (read_volume(tmp_path / "scan.nii"), tmp_path / "scan.nii"):
            with pytest.raises(DataError, match=r"voxels away from .*scan.nii: their affines differ"):
                read_label(tmp_path / "label.nii", scan)
            with pytest.raises(
                DataError, match=r"small.nii: the label has the shape \(.*\) as \(D, H, W\), .*scan.nii"
            ):
                read_label(tmp_path / "small.nii", scan)

    @pytest.mark.parametrize(
        ("angle", "edges"),
        [
            (0.3, ("R", "L", "A", "P")),
            (0.7, ("R", "L", "AS", "PI")),
            (-0.7, ("R", "L", "AI", "PS")),
        ],
    )
    def test_oblique_slices_have_two_letters(self, tmp_path, angle, edges):
        assert read_volume(save(tmp_path / "scan.nii", np.ones(SHAPE), tilted(angle), sform=1)).edges == edges


@settings(max_examples=40)
@drawn(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1, 1])] * 3), st.floats(-0.7, 0.7), st.integers(0, 2))
def test_the_files_own_index_and_height_of_a_slice(tmp_path_factory, order, signs, angle, axis):
    affine = tilted(angle, (0.8, 1.1, 2.5), axis)
    affine[:3, :3] = affine[:3, :3] @ np.diag(signs)[:, list(order)]
    array = np.arange(210, dtype=np.float32).reshape(SHAPE)
    path = save(tmp_path_factory.mktemp("index") / "scan.nii", array, affine, sform=1)
    volume = read_volume(path)
    for index in range(len(volume.voxels)):
        along, own = volume.file_slice(index)
        section = np.take(array, own, along)
        assert sorted(section.ravel()) == sorted(volume.voxels[index].ravel())
        centre = np.array([(edge - 1) / 2 for edge in SHAPE])
        centre[along] = own
        assert volume.z_mm(index) == pytest.approx(nib.affines.apply_affine(nib.load(path).affine, centre)[2], abs=1e-4)


class TestShownAspect:
    SAGITTAL = (256, 256, 24)  # (D, H, W) of a sagittal scan as it is read: 24 columns of 3.9 mm, rows of 0.8 mm

    @pytest.mark.parametrize(
        ("shape", "spacing", "expected"),
        [
            ((256, 24), (0.8, 3.9), (117, 256)),
            ((256, 24), None, (24, 256)),
            ((24, 256), (3.9, 0.8), (256, 117)),
            ((100, 100), (1.0, 2.0), (256, 128)),
            ((512, 512), (0.7, 0.7), (256, 256)),
        ],
    )
    def test_sizes(self, shape, spacing, expected):
        mm = None if spacing is None else (5.0, *spacing)
        (image,) = render_slices(np.zeros((1, *shape), np.uint8), [0], 256, mm)
        assert image.size == expected

    @drawn(st.integers(1, 40), st.integers(1, 40), st.integers(8, 80), st.floats(0.2, 5), st.floats(-2e-4, 2e-4))
    def test_square_pixels_are_shown_as_before(self, height, width, size, edge, rounding):
        grey = np.random.default_rng(height).integers(0, 255, (1, height, width), np.uint8)
        scale = size / max(width, height)
        shown = max(1, round(width * scale)), max(1, round(height * scale))
        expected = Image.fromarray(grey[0]).resize(shown, Image.Resampling.BICUBIC).convert("RGB")
        for spacing in (None, (9.0, edge, edge), (9.0, edge, edge * (1 + rounding))):
            (image,) = render_slices(grey, [0], size, spacing)
            assert image.size == expected.size
            assert image.tobytes() == expected.tobytes()

    def row(self, folder) -> dict[str, Any]:
        """A sagittal scan: the file's axes run down, to the back and to the left, the last in steps of 3.9 mm."""
        mask = blocks([0, 9, 9, 0], 32, 12)  # (D, H, W)
        affine = np.zeros((4, 4))
        affine[[2, 1, 0], [0, 1, 2]] = -0.8, -0.8, -3.9
        affine[3, 3] = 1
        voxels = np.random.default_rng(0).uniform(20, 40, mask.shape) + 60 * mask
        for name, array in (("scan", voxels), ("label", mask.astype(np.uint8))):
            save(folder / f"{name}.nii.gz", array[::-1], affine, sform=1)
        fields = {"query": "Where is it?", "modality": "MRI", "anatomy": "Knee", "lesion": "cyst", "name": "knee"}
        files = {name: str(folder / f"{name}.nii.gz") for name in ("scan", "label")}
        return {**files, "label_value": 0, "intensity": "", **fields}

    def test_training_and_inference_show_the_same_and_boxes_come_back(self, tmp_path):
        row = self.row(tmp_path)
        case = read_case(row)
        assert case.mask is not None
        assert (case.grey.shape, case.scan.spacing_mm) == ((4, 32, 12), pytest.approx((0.8, 0.8, 3.9)))
        model, processor = tiny_model("qwen2_5_vl")  # which writes boxes in pixels of the resized picture
        asked = VolumePromptSettings(slices=4, size=112)
        (prepared,) = list[Any](prepare_volumes(Dataset.from_list([row]), processor, asked, completions=True))
        assert [image.size for image in prepared["images"]] == [(112, 61)] * 4  # 46.8 x 25.6 mm
        (read,) = VolumeTask(processor, asked).read([prepared])
        assert read.target is not None
        conversation, mine = VolumeSegmenter(model, processor, asked)._ask(read_case(row, label=False), row["query"])
        shown = [block["image"] for block in conversation[0]["content"] if block["type"] == "image"]
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in prepared["images"]]
        assert mine.frame == read.frame
        assert (read.frame.original_size, read.frame.resized_size) == ((12, 32), (112, 56))
        boxes = [[2, 3, 7, 30], [0, 0, 12, 32]]
        there = read.frame.from_original(boxes, rounding=False)
        np.testing.assert_allclose(read.frame.to_original(there), boxes)
        np.testing.assert_allclose(there[1], [0, 0, 112, 56])
        assert read.case.grey.shape == read.target.mask.shape  # SAM and the masks stay on the scan's own pixels
        key, text = prepared["key_slice"], prepared["completion"][0]["content"]
        answer = asked.completion_format.parse(text, read.frame)
        unit = np.array([12, 32] * 2) / np.array([*read.frame.size] * 2)
        true = np.array(sorted(read.target.at(key).boxes.tolist()))
        assert (np.abs(np.array(sorted(answer.boxes.tolist())) - true) <= unit).all()

    def test_paths_volumes_and_cases_are_shown_alike_and_arrays_as_squares(self, tmp_path):
        row = self.row(tmp_path)
        segmenter = VolumeSegmenter(*tiny_model("qwen3_vl"), SETTINGS)
        sizes = []
        for given in (row["scan"], read_volume(row["scan"]), read_case(row), read_case(row).grey):
            conversation, _ = segmenter._ask(segmenter.read_case(given, "MRI", ""), "Where?")
            sizes.append(conversation[0]["content"][1]["image"].size)
        assert sizes == [(64, 35)] * 3 + [(24, 64)]

    @pytest.mark.skipif(not VOLUMES3D.is_dir(), reason="the real data set is not on this machine")
    def test_real_slices_have_square_pixels(self):
        for row in load_volumes(VOLUMES3D, validate=False):
            case = read_case(dict(row), label=False)
            index = len(case.grey) // 2
            one, other = (render_slices(case.grey, [index], 256, mm)[0] for mm in (case.scan.spacing_mm, None))
            assert one.size == other.size
            assert one.tobytes() == other.tobytes()


def test_the_oracle_reads_rows_of_arrays(tmp_path):
    row = row_of(tmp_path, blocks([0, 4, 4]))
    volume, mask = read_volume(row["scan"]), read_case(row).mask
    assert mask is not None
    np.save(tmp_path / "scan.npy", volume.voxels.transpose(2, 1, 0)[::-1, ::-1])
    np.save(tmp_path / "label.npy", mask.transpose(2, 1, 0)[::-1, ::-1].astype(np.uint8))
    arrays = {**row, "scan": str(tmp_path / "scan.npy"), "label": str(tmp_path / "label.npy")}
    propagator = VolumePropagator(tiny_segmenter(), reach=None)
    known, unknown, given = evaluate_oracle_boxes(
        propagator,
        Dataset.from_list(
            [{**row, "spacing_mm": ""}, {**arrays, "spacing_mm": ""}, {**arrays, "spacing_mm": "[3, 1, 1]"}]
        ),
        progress=False,
    )
    assert known == given
    assert known["nsd"] is not None
    assert {**known, "hd95_mm": None, "nsd": None, "spacing_mm": None} == unknown
    assert json.loads(json.dumps(unknown)) == unknown
