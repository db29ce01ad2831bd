"""Augmented copies: masks follow their images, sizes, names, seeds, and what is refused."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from segrl import data
from segrl.data import make_synthetic
from segrl.errors import DataError

FEATURES = Features({"image": Image(), "mask": Image(), "name": Value("string"), "reasoning": Value("string")})


def augment(*arguments: Any, **settings: Any) -> Any:
    """`segrl.data.images.augmentation`, without the types of `Dataset`, which know no rows."""
    return data.augment(*arguments, **settings)


def row(mask: np.ndarray, reasoning: str = "") -> Dataset:
    """One row whose image is bright exactly where its mask is."""
    picture = np.repeat(np.where(mask, 200, 40).astype(np.uint8)[..., None], 3, axis=2)
    values = {
        "image": [PILImage.fromarray(picture)],
        "mask": [PILImage.fromarray(mask.astype(np.uint8) * 255)],
        "name": ["a.png"],
        "reasoning": [reasoning],
    }
    return Dataset.from_dict(values, features=FEATURES)


def lesion(height: int = 60, width: int = 90) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[10:25, 30:70] = True
    return mask


def test_the_mask_of_every_copy_is_where_its_image_is_bright():
    copies = augment(row(lesion()), 12, seed=3)
    assert len(copies) == 13
    shapes = set()
    for item in copies:
        image, mask = np.asarray(item["image"].convert("L")).astype(int), np.asarray(item["mask"]) > 0
        assert image.shape == mask.shape
        assert mask.any()
        assert image[mask].min() > image[~mask].max()
        shapes.add(mask.shape)
    assert len(shapes) > 3  # crops and quarter turns


def test_rows_keep_their_texts_and_copies_get_names():
    copies = augment(row(lesion()), 2)
    assert copies["name"] == ["a.png", "a.png#1", "a.png#2"]
    assert copies.column_names == row(lesion()).column_names


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others():
    def pixels(seed):
        return [np.asarray(item["image"]).tobytes() for item in augment(row(lesion()), 3, seed=seed)]

    assert pixels(1) == pixels(1)
    assert pixels(1)[1:] != pixels(2)[1:]
    assert pixels(1)[0] == pixels(2)[0]  # the row itself is not changed


def test_a_tiny_lesion_is_never_cropped_away():
    mask = np.zeros((80, 80), dtype=bool)
    mask[0, 0] = True
    assert all((np.asarray(item["mask"]) > 0).sum() == 1 for item in augment(row(mask), 20))


def test_an_empty_mask_stays_empty_and_no_copies_is_the_data_itself():
    assert not any(np.asarray(item["mask"]).any() for item in augment(row(np.zeros((30, 30), dtype=bool)), 3))
    rows: Any = make_synthetic(3)
    same = augment(rows, 0)
    assert [np.asarray(a["image"]).tobytes() for a in same] == [np.asarray(b["image"]).tobytes() for b in rows]


def test_rows_may_have_copies_of_their_own_number():
    rows = make_synthetic(3, size=32)
    found = augment(rows, [2, 0, 1])
    one, two, three = rows["name"]
    assert found["name"][:] == [one, f"{one}#1", f"{one}#2", two, three, f"{three}#1"]
    everything = augment(rows, 2)
    assert found[5]["image"].tobytes() == everything[7]["image"].tobytes()  # a view does not depend on the others
    with pytest.raises(DataError, match="copies: expected one number for each of 3 rows, got 2"):
        augment(rows, [1, 1])
    with pytest.raises(DataError, match="copies=-2: expected 0 or more"):
        augment(rows, [1, 0, -2])


def test_negative_copies_and_rows_with_their_own_reasoning_are_refused():
    with pytest.raises(DataError, match=r"copies=-1: expected 0 or more"):
        augment(row(lesion()), -1)
    with pytest.raises(DataError, match=r"a\.png: has its own reasoning.*use copies=0"):
        augment(row(lesion(), "It is on the left."), 1)
    assert len(augment(row(lesion(), "It is on the left."), 0)) == 1
