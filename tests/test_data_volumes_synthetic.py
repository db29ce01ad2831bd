"""Synthetic volumes: what a caller may rely on, whatever they look like."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segrl.data import (
    VOLUME_LESIONS,
    check_volumes,
    load_volumes,
    make_synthetic_volumes,
    make_volume,
    read_label,
    read_volume,
)
from segrl.errors import DataError

SMALL: dict[str, Any] = {"depth": 8, "size": 32}


class TestMakeVolume:
    def test_shapes_and_the_lesion_that_is_asked_for(self):
        for index in range(12):
            volume = make_volume(index, **SMALL)
            assert volume.voxels.shape == volume.labels.shape == (8, 32, 32)
            assert (volume.voxels.dtype, volume.labels.dtype) == (np.float32, np.uint8)
            assert np.isfinite(volume.voxels).all()
            assert set(np.unique(volume.labels)) <= {0, 1, 2}
            assert (volume.labels == 1 + VOLUME_LESIONS.index(volume.lesion)).any()
            assert len(volume.spacing_mm) == 3

    def test_some_slices_show_a_lesion_better_than_others(self):
        for index in range(6):
            volume = make_volume(index, depth=16, size=48)
            areas = (volume.labels == 1 + VOLUME_LESIONS.index(volume.lesion)).sum(axis=(1, 2))
            assert areas.max() > 0
            assert len(set(areas.tolist())) > 2
            assert (areas == 0).any()

    def test_a_lesion_differs_from_what_surrounds_it(self):
        for index in range(6):
            volume = make_volume(index, depth=16, size=48, distractors=False)
            inside = volume.labels > 0
            tissue = volume.voxels[(volume.labels == 0) & (volume.voxels > np.median(volume.voxels) / 2)]
            brighter = volume.voxels[inside].mean() > tissue.mean()
            assert brighter == (volume.lesion == "bright nodule")

    def test_the_same_arguments_give_the_same_voxels_and_others_do_not(self):
        one, again = (make_volume(3, **SMALL, seed=1) for _ in range(2))
        assert np.array_equal(one.voxels, again.voxels)
        assert np.array_equal(one.labels, again.labels)
        for other in (make_volume(4, **SMALL, seed=1), make_volume(3, **SMALL, seed=2)):
            assert not np.array_equal(one.voxels, other.voxels)

    def test_both_kinds_are_asked_for_and_distractors_can_be_left_out(self):
        volumes = [make_volume(n, **SMALL) for n in range(20)]
        assert {volume.lesion for volume in volumes} == set(VOLUME_LESIONS)
        assert 0 < sum(len(np.unique(volume.labels)) == 3 for volume in volumes) < 20
        assert all(len(np.unique(make_volume(n, **SMALL, distractors=False).labels)) == 2 for n in range(20))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"depth": 3}, r"depth=3, size=32: expected at least 4 slices of 32 px"),
            ({"size": 31}, r"depth=8, size=31: expected at least 4 slices"),
            ({"index": -1}, r"index=-1, seed=0: expected both to be 0 or more"),
            ({"seed": -1}, r"index=0, seed=-1: expected both"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(DataError, match=message):
            make_volume(**{"index": 0, **SMALL, **settings})


class TestFiles:
    def test_files_hold_what_was_rendered(self, tmp_path):
        rows = make_synthetic_volumes(3, tmp_path, **SMALL, seed=5)
        check_volumes(rows)
        for index, row in enumerate(rows):
            assert isinstance(row, dict)
            made, read = make_volume(index, **SMALL, seed=5), read_volume(row["scan"])
            assert read.spacing_mm == made.spacing_mm
            assert np.abs(read.voxels - made.voxels).max() <= 0.5
            label = read_label(row["label"], read, row["label_value"])
            assert np.array_equal(label, made.labels == 1 + VOLUME_LESIONS.index(made.lesion))
            assert row["lesion"] == made.lesion
            assert made.lesion in row["query"]
        assert len(set(rows["name"])) == 3
        assert list(load_volumes(tmp_path)["name"]) == list(rows["name"])

    def test_files_that_are_there_are_used(self, tmp_path):
        first = make_synthetic_volumes(2, tmp_path, **SMALL)
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
        assert len(written) == 4
        again = make_synthetic_volumes(3, tmp_path, **SMALL)
        assert list(again["scan"])[:2] == list(first["scan"])
        assert {path: path.stat().st_mtime_ns for path in written} == written
        assert len(list(tmp_path.rglob("*.nii.gz"))) == 6

    def test_other_settings_have_files_of_their_own(self, tmp_path):
        sets = [
            make_synthetic_volumes(1, tmp_path, **{**SMALL, **other})
            for other in ({}, {"seed": 1}, {"depth": 9}, {"size": 40}, {"distractors": False})
        ]
        assert len({rows["scan"][0] for rows in sets}) == 5
        assert all(Path(rows["scan"][0]).is_file() for rows in sets)

    def test_none(self, tmp_path):
        with pytest.raises(DataError, match="n=0: expected the number of volumes, 1 or more"):
            make_synthetic_volumes(0, tmp_path)
