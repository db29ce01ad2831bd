import hashlib
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segrl.data import LESIONS, check_rows, load_folder, make_scene, make_synthetic, write_folder
from segrl.errors import DataError, UnknownNameError
from segrl.geometry import boxes_from_mask


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return [dataset[index] for index in range(len(dataset))]


scenes = st.builds(make_scene, st.integers(0, 10_000), seed=st.integers(0, 1000))


def test_same_seed_and_index_give_the_same_row_whatever_the_length():
    short, long = make_synthetic(3, size=64, seed=7), make_synthetic(6, size=64, seed=7)
    for a, b in zip(rows(short), rows(long)[:3], strict=True):
        assert {k: np.asarray(v).tolist() for k, v in a.items()} == {k: np.asarray(v).tolist() for k, v in b.items()}


def test_seeds_share_no_scene():
    images = [make_scene(index, size=64, seed=seed).image.tobytes() for seed in (0, 1) for index in range(20)]
    assert len(set(images)) == 40


def test_columns_and_values():
    dataset = make_synthetic(8)
    assert dataset.column_names == ["image", "mask", "query", "modality", "anatomy", "lesion", "name"]
    assert set(dataset["modality"]) == {"Dermoscopy", "Ultrasound", "MRI", "CT"}
    for index, row in enumerate(rows(dataset)):
        assert (row["image"].size, row["image"].mode, row["mask"].mode) == ((112, 112), "RGB", "L")
        assert np.unique(np.asarray(row["mask"])).tolist() == [0, 255]
        np.testing.assert_array_equal(np.asarray(row["image"]), make_scene(index).image)
        np.testing.assert_array_equal(np.asarray(row["mask"]) > 0, make_scene(index).mask())
        assert row["lesion"] in row["query"]
    check_rows(dataset)


def test_queries_are_short_and_use_few_words():
    queries = make_synthetic(60, size=32)["query"]
    assert all(8 <= len(query.split()) <= 14 for query in queries)
    assert len({word for query in queries for word in query.split()}) < 40


@settings(max_examples=60)
@given(scenes)
def test_one_to_three_asked_lesions_and_up_to_three_others_without_contact(scene):
    counts = {kind: len(boxes_from_mask(scene.mask(kind))) for kind in LESIONS}
    assert 1 <= counts[scene.lesion] <= 3
    assert sum(counts.values()) - counts[scene.lesion] <= 3
    assert len(boxes_from_mask(scene.labels > 0)) == sum(counts.values())
    sizes = boxes_from_mask(scene.labels > 0)[:, 2:] - boxes_from_mask(scene.labels > 0)[:, :2]
    assert sizes.min() >= 6
    assert sizes.max() <= 36


@given(scenes)
def test_the_query_decides_what_counts(scene):
    masks = [scene.mask(kind) for kind in LESIONS]
    assert (np.sum(masks, axis=0) <= 1).all()  # no pixel answers two queries
    np.testing.assert_array_equal(np.any(masks, axis=0), scene.labels > 0)


def test_most_scenes_hold_a_distractor():
    kinds = np.array([[make_scene(index).mask(kind).any() for kind in LESIONS] for index in range(80)])
    assert (kinds.sum(axis=1) >= 2).mean() > 0.6


@pytest.mark.parametrize("look", range(4))
def test_every_lesion_shows_its_kind_against_the_tissue_around_it(look):
    for index in range(look, 80, 4):
        scene = make_scene(index)
        grey = scene.image.mean(axis=2) / 255
        tissue = scene.labels == 0
        for kind, name in enumerate(LESIONS):
            components, count = ndimage.label(scene.mask(name))  # pyright: ignore[reportGeneralTypeIssues]
            for component in range(1, count + 1):
                lesion = components == component
                around = grey[ndimage.binary_dilation(lesion, iterations=5) & tissue].mean()
                depth = np.asarray(ndimage.distance_transform_edt(lesion))
                core, rim = grey[depth > 0.75 * depth.max()].mean(), grey[lesion & (depth < 0.35 * depth.max())].mean()
                assert (core > around + 0.1) == (kind == 0)
                assert (core < around - 0.1) == (kind != 0)
                assert (rim > around) == (kind != 1)


def test_radii_scale_with_the_image():
    small, large = (np.mean([make_scene(i, size=size).mask().mean() for i in range(40)]) for size in (56, 224))
    assert small == pytest.approx(large, rel=0.25)


def test_no_rows_keep_the_columns():
    assert make_synthetic(0).features == make_synthetic(1, size=32).features
    assert len(make_synthetic(0)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_synthetic(-1), r"n=-1: expected the number of rows, 0 or more"),
        (lambda: make_synthetic(1, size=16), r"size=16: expected at least 32 px.*pass a larger size"),
        (lambda: make_scene(0, seed=-3), r"seed=-3: expected both to be 0 or more"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_unknown_kind_suggests_a_known_one():
    with pytest.raises(UnknownNameError, match=r"unknown synthetic lesion 'dark cist'.*did you mean 'dark cyst'"):
        make_scene(0).mask("dark cist")


def test_write_folder_round_trip(tmp_path):
    dataset = make_synthetic(4, size=48)
    folder = write_folder(dataset, tmp_path / "set", split=["train", "train", "test", "test"])
    assert load_folder(folder, "test")["name"] == dataset["name"][2:]
    loaded = load_folder(folder)
    assert set(loaded.column_names) == {*dataset.column_names, "split"}
    for before, after in zip(rows(dataset), rows(loaded), strict=True):
        for column in dataset.column_names:
            np.testing.assert_array_equal(np.asarray(before[column]), np.asarray(after[column]))


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (lambda d: d.remove_columns("mask"), None, r"no column \['mask'\]: expected image, mask and name"),
        (lambda d: d.select([0, 1, 0]), None, r"repeats \['synthetic_0_00000'\]: expected one name per row"),
        (lambda d: d, ["train"], r"split has 1 values for 2 rows: pass one string or one value per row"),
    ],
)
def test_write_folder_refuses(change, split, message, tmp_path):
    dataset: Dataset = change(make_synthetic(2, size=32))
    with pytest.raises(DataError, match=message):
        write_folder(dataset, tmp_path, split=split)
    assert not list(tmp_path.iterdir())


def test_write_folder_keeps_an_existing_manifest(tmp_path):
    write_folder(make_synthetic(1, size=32), tmp_path)
    with pytest.raises(DataError, match=r"manifest\.csv exists already: write into another folder"):
        write_folder(make_synthetic(1, size=32, seed=1), tmp_path)


@settings(max_examples=60)
@given(st.builds(make_scene, st.integers(0, 10_000), seed=st.integers(0, 1000), hard=st.just(True)))
def test_a_hard_scene_asks_for_all_of_a_kind_or_for_one_of_several_or_for_none(scene):
    mask, every = scene.mask(), scene.mask(scene.lesion)
    assert 1 <= len(boxes_from_mask(scene.labels > 0)) <= 3
    assert (scene.labels > 0).tolist() == (scene.instances > 0).tolist()
    findings = scene.picture().findings
    assert [finding.kind for finding in findings].count(scene.lesion) == len(boxes_from_mask(every))
    if not scene.choice:
        assert np.array_equal(mask, every)
        return
    masks = [finding.mask for finding in findings if finding.kind == scene.lesion]
    assert len(masks) > 1
    size = [one.sum() for one in masks]
    y, x = np.array([[axis.mean() for axis in np.nonzero(one)] for one in masks]).T
    best = {"largest": np.argmax(size), "smallest": np.argmin(size)}
    best |= {"leftmost": np.argmin(x), "rightmost": np.argmax(x), "uppermost": np.argmin(y), "lowest": np.argmax(y)}
    assert np.array_equal(mask, masks[best[scene.choice]])


def test_shares_of_hard_rows_and_their_questions():
    rows = make_synthetic(400, size=48, seed=1, hard=True)
    scenes = [make_scene(index, size=48, seed=1, hard=True) for index in range(400)]
    assert 0.1 < np.mean([not scene.mask().any() for scene in scenes]) < 0.2
    assert 0.1 < np.mean([bool(scene.choice) for scene in scenes]) < 0.3
    for scene, query in zip(scenes, rows["query"], strict=True):
        asked = f" {scene.choice} {scene.lesion} " if scene.choice else f" {scene.lesion} "
        assert asked in query.replace("?", " ")
        assert not (scene.choice and "every" in query)


def test_scenes_are_what_they_were():
    """Those that are not hard have the pixels of version 0.1.0's first scenes."""
    digest = hashlib.md5(b"".join(make_scene(n, size=64, seed=3).image.tobytes() for n in range(50)))
    assert digest.hexdigest() == "ec19065d2bb13251545e8f378f1121e6"
