"""Masks in files of many kinds, read alike by every door: colours, not indices; nothing that is not read passes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from segrl.data import augment, check_rows, load_folder, prepare
from segrl.errors import DataError
from segrl.evaluation import evaluate_constant_mask
from segrl.geometry import binarize
from segrl.inference import ReasoningSegmenter
from segrl.predictions import ImagePromptSettings, Target, read_target
from segrl.tasks import ImageTask

SHAPE = np.zeros((20, 30), dtype=bool)
SHAPE[4:10, 5:20] = True  # 90 pixels
GREY = Image.fromarray(SHAPE.astype(np.uint8) * 255)
PICTURE = Image.fromarray((np.arange(600) % 251).astype(np.uint8).reshape(20, 30)).convert("RGB")
SETTINGS = ImagePromptSettings(frame_kind="original_px", reasoning=False)


def coloured(
    lesion: tuple[int, int, int], background: tuple[int, int, int] = (0, 0, 0), first: bool = True
) -> Image.Image:
    """A palette image, whose background has index 0 (`first`) or 1."""
    image = Image.fromarray((SHAPE if first else ~SHAPE).astype(np.uint8), mode="P")
    image.putpalette([*background, *lesion] if first else [*lesion, *background])
    return image


READ = {
    "grey": GREY,
    "one bit": GREY.convert("1"),
    "quantize": GREY.convert("RGB").quantize(2),
    "adaptive": GREY.convert("P", palette=Image.Palette.ADAPTIVE),
    "palette": coloured((255, 255, 255)),
    "palette upside down": coloured((255, 255, 255), first=False),
    "red lesion": coloured((200, 0, 0), first=False),
    "opaque RGBA": GREY.convert("RGBA"),
    "opaque LA": GREY.convert("LA"),
    "16 bit": Image.fromarray(SHAPE.astype(np.uint16) * 700),
    "label value 3": Image.fromarray(SHAPE.astype(np.uint8) * 3),
}


def transparent() -> Image.Image:
    image = GREY.convert("RGBA")
    image.putalpha(GREY)
    return image


def three_colours() -> Image.Image:
    values = SHAPE.astype(np.uint8)
    values[12:15, 3:6] = 2
    image = Image.fromarray(values, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return image


REFUSED = {
    "transparent": (transparent(), "has transparent pixels"),
    "three colours": (three_colours(), r"a palette with 3 colours in use .*one mask per lesion type"),
    "no black": (coloured((255, 0, 0), (0, 255, 0)), r"a palette with 2 colours in use .*expected black and one other"),
    "grey edges": (GREY.resize((30, 20), Image.Resampling.BILINEAR, box=(0.3, 0.3, 29, 19)), "threshold it first"),
}


def as_bytes(mask: Image.Image) -> bytes:
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    return buffer.getvalue()


def row_of(mask: Image.Image) -> Dataset:
    texts = {name: "x" for name in ("query", "modality", "anatomy", "lesion", "name")}
    row: dict[str, Any] = {
        "image": {"bytes": as_bytes(PICTURE)},
        "mask": {"bytes": as_bytes(mask)},
        **texts,
    }
    features = {"image": ImageFeature(), "mask": ImageFeature(), **{name: Value("string") for name in texts}}
    return Dataset.from_list([row], features=Features(features))


def mask_of(target: Any) -> Any:
    return target.mask


def by_folder(mask: Image.Image, folder: Path) -> Any:
    for name, image in (("images", PICTURE), ("masks", mask)):
        (folder / name).mkdir()
        image.save(folder / name / "a.png")
    (folder / "manifest.csv").write_text("image,mask,query,lesion\nimages/a.png,masks/a.png,Where?,cyst\n")
    return binarize(load_folder(folder)[0]["mask"])


def by_rows(mask: Image.Image, folder: Path) -> Any:
    check_rows(row_of(mask))
    return binarize(row_of(mask)[0]["mask"])


def by_prepare(mask: Image.Image, folder: Path) -> Any:
    text = prepare(row_of(mask), None, SETTINGS, completions=True)[0]["completion"][0]["content"]
    assert "[5, 4, 20, 10]" in text
    return SHAPE


def by_record(mask: Image.Image, folder: Path) -> Any:
    mask.save(folder / "mask.png")
    return mask_of(read_target({"mask": str(folder / "mask.png")}))


DOORS: dict[str, Any] = {
    "folder": by_folder,
    "rows": by_rows,
    "prepare": by_prepare,
    "record of a file": by_record,
    "record of bytes": lambda mask, folder: mask_of(read_target({"mask": {"bytes": as_bytes(mask), "path": None}})),
    "trainer": lambda mask, folder: mask_of(ImageTask(None, SETTINGS).read([row_of(mask)[0]])[0].target),
    "augment": lambda mask, folder: binarize(augment(row_of(mask), 0)[0]["mask"]),
    "target": lambda mask, folder: Target.from_mask(mask).mask,
    "evaluation": lambda mask, folder: (
        SHAPE if evaluate_constant_mask(row_of(GREY), row_of(mask))[0]["dice"] == 1.0 else None
    ),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_is_what_its_colours_show(door, kind, tmp_path):
    assert np.array_equal(DOORS[door](READ[kind], tmp_path), SHAPE)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_a_mask_with_more_in_it_is_refused(door, kind, tmp_path):
    mask, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        DOORS[door](mask, tmp_path)


def test_several_pages_are_refused(tmp_path):
    path = tmp_path / "mask.tif"
    GREY.save(path, save_all=True, append_images=[GREY])
    with pytest.raises(DataError, match="has 2 pages, expected one"), Image.open(path) as image:
        binarize(image)
    with pytest.raises(DataError, match="has 2 pages, expected one"):
        read_target({"mask": str(path)})


def test_images_of_several_pages_are_refused(tmp_path):
    (tmp_path / "manifest.csv").write_text("image,mask,query\na.tif,m.png,Where?\n")
    GREY.save(tmp_path / "m.png")
    GREY.convert("RGB").save(tmp_path / "a.tif", save_all=True, append_images=[GREY.convert("RGB")])
    with pytest.raises(DataError, match=r"image: has 2 pages, expected one"):
        load_folder(tmp_path)
    with pytest.raises(DataError, match=r"has 2 pages, expected one"), Image.open(tmp_path / "a.tif") as image:
        ReasoningSegmenter(None, None).predict(image, "Where?")
