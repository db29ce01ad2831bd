"""Images in files of many kinds, and pairs of image and mask: what has no one reading is refused at every door."""

import io
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_segmenter
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from segrl.data import augment, check_rows, load_folder, prepare
from segrl.errors import DataError, RewardError
from segrl.geometry import binarize, open_image, read_image
from segrl.heads import MaskHead
from segrl.heads.probes import SegTokenProbe
from segrl.inference import ReasoningSegmenter
from segrl.predictions import ImagePromptSettings, Target, read_mask, read_target
from segrl.rewards import make_reward
from segrl.tasks import ImageTask

SETTINGS = ImagePromptSettings(frame_kind="original_px", reasoning=False)
PIXELS = np.random.default_rng(0).integers(1, 255, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
MASK = np.zeros((20, 30), dtype=bool)
MASK[4:10, 5:20] = True
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    """The image as stored, with a tag that turns it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, exif=exif)


def half_transparent() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(MASK, 255, 100).astype(np.uint8)))
    return image


def rows_of(image: bytes, mask: bytes | None = None) -> Dataset:
    texts = {name: "x" for name in ("query", "modality", "anatomy", "lesion", "name")}
    row = {"image": {"bytes": image}, "mask": {"bytes": mask or encoded(Image.fromarray(MASK))}, **texts}
    features = {"image": ImageFeature(), "mask": ImageFeature(), **{name: Value("string") for name in texts}}
    return Dataset.from_list([row], features=Features(features))


def by_folder(image: bytes, folder: Path) -> Any:
    (folder / "a").write_bytes(image)
    Image.fromarray(MASK).save(folder / "m.png")
    (folder / "manifest.csv").write_text("image,mask,query\na,m.png,Where?\n")
    return read_image(load_folder(folder)[0]["image"])


def by_rows(image: bytes, folder: Path) -> Any:
    check_rows(rows_of(image))
    return read_image(rows_of(image)[0]["image"])


def by_prepare(image: bytes, folder: Path) -> Any:
    settings = ImagePromptSettings(frame_kind="original_px", reasoning=False, max_edge=15)
    (row,) = prepare(rows_of(image), None, settings, completions=True)
    assert row["image"].size == (15, 10)  # type: ignore[index]
    return read_image(row["full_image"])  # type: ignore[index]


def by_trainer(image: bytes, folder: Path) -> Any:
    segmenter = tiny_segmenter()
    head = MaskHead(SegTokenProbe(5), torch.nn.Linear(4, 4), segmenter)
    (row,) = ImageTask(None, SETTINGS, head).read([dict(rows_of(image)[0])])
    assert torch.equal(row.seg_input.pixels, segmenter.preprocess(PICTURE))  # type: ignore[union-attr]
    return PICTURE


def by_inference(image: bytes, folder: Path) -> Any:
    model, processor = tiny_model()
    settings = ImagePromptSettings(max_new_tokens=1)
    with Image.open(io.BytesIO(image)) as opened:
        ReasoningSegmenter(model, processor, settings).predict(opened, "Where?")
        return read_image(opened)


DOORS: dict[str, Any] = {
    "folder": by_folder,
    "rows": by_rows,
    "prepare": by_prepare,
    "trainer": by_trainer,
    "inference": by_inference,
    "augment": lambda image, folder: read_image(augment(rows_of(image), 0)[0]["image"]),
    "path": lambda image, folder: ((folder / "a").write_bytes(image), read_image(folder / "a"))[1],
}
READ = {
    "opaque RGBA": encoded(PICTURE.convert("RGBA")),
    "opaque TIFF": encoded(PICTURE, "TIFF"),
    "turned": turned(PICTURE.transpose(Image.Transpose.ROTATE_90), 6),
    "turned by a half": turned(PICTURE.transpose(Image.Transpose.ROTATE_180), 3),
}
REFUSED = {
    "transparent": (encoded(half_transparent()), "has transparent pixels, and what is under them is not known"),
    "pages": (encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]), "has 2 pages, expected one"),
    "GIF": (encoded(PICTURE, "GIF", save_all=True, append_images=[Image.fromarray(MASK)]), "has 2 pages"),
    "APNG": (encoded(PICTURE, save_all=True, append_images=[PICTURE.rotate(90)]), "has 2 pages, expected one"),
    "16 bit": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 9)), "has I;16 pixels, expected 8 bits"),
}


# A check of image and mask refuses the picture that is turned by a half: its mask may be turned or not.
PAIRS = [
    (door, kind) for door in DOORS for kind in READ if kind != "turned by a half" or door not in ("folder", "rows")
]


@pytest.mark.parametrize(("door", "kind"), PAIRS)
def test_an_image_is_read_upright(door, kind, tmp_path):
    np.testing.assert_array_equal(np.asarray(DOORS[door](READ[kind], tmp_path)), PIXELS)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_an_image_with_more_in_it_is_refused(door, kind, tmp_path):
    image, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        DOORS[door](image, tmp_path)


def test_a_preview_behind_a_photo_is_no_page():
    photo = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.resize((15, 10))])
    assert read_image(photo).size == (30, 20)


# ---- what a file declares --------------------------------------------------------------------------------------------


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes that declares `side` x `side` pixels."""
    content = bytearray(encoded(Image.new("L", (1, 1))))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_000, 100_000])
def test_a_huge_declared_size_is_refused_before_it_is_decoded(side, tmp_path):
    bomb = huge_png(side)
    (tmp_path / "bomb.png").write_bytes(bomb)
    for read in (
        lambda: by_folder(bomb, tmp_path),
        lambda: by_rows(bomb, tmp_path),
        lambda: read_image(tmp_path / "bomb.png"),
        lambda: read_mask(str(tmp_path / "bomb.png")),
        lambda: read_target({"mask": {"bytes": bomb}}),
        lambda: prepare(rows_of(bomb), None, SETTINGS, completions=True),
    ):
        with pytest.raises(DataError, match=r"declares .*expected at most 89478485.*PIL\.Image\.MAX_IMAGE_PIXELS"):
            read()


def test_the_cap_is_the_setting_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(DataError, match=r"declares too many pixels|declares 30 x 20 px"):
        read_image(encoded(PICTURE))
    with pytest.raises(DataError, match="declares 30 x 20 px, expected at most 599 pixels"):
        binarize(Image.fromarray(MASK))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(encoded(PICTURE)).size == (30, 20)


def test_an_array_file_declares_more_than_it_holds(tmp_path):
    np.save(tmp_path / "mask.npy", MASK)
    content = (tmp_path / "mask.npy").read_bytes().replace(b"(20, 30), }     ", b"(200000,900000),")
    (tmp_path / "mask.npy").write_bytes(content.replace(b"(200000,900000),", b"(200000,900000)}"))
    with pytest.raises(DataError, match=r"mask\.npy: cannot be read"):
        read_mask(str(tmp_path / "mask.npy"))


@pytest.mark.parametrize("name", ["mask.png", "mask.npy"])
def test_a_fifo_or_a_device_does_not_hang(name, tmp_path):
    os.mkfifo(tmp_path / name)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for read in (
        lambda: read_mask(name, folder=tmp_path),
        lambda: read_target({"mask": name}, tmp_path),
        lambda: open_image(tmp_path / name).__enter__(),
        lambda: read_image(tmp_path / "zero.png"),
    ):
        with pytest.raises(DataError, match="is a FIFO or a device, expected a file"):
            read()


# ---- an image and its mask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("side", [20, 30])
def test_a_mask_that_may_be_turned_or_not_is_refused(orientation, side):
    """The image has an EXIF orientation, its mask none: only other sizes tell how the mask is stored."""
    stored = Image.fromarray(PIXELS[:, :side])
    mask = np.zeros((20, side), np.uint8)
    mask[2:5, 3:9] = 255
    image = turned(stored, orientation)
    as_stored, as_shown = encoded(Image.fromarray(mask)), encoded(Image.fromarray(np.ascontiguousarray(mask.T)))
    turns = orientation >= 5 and side != 20
    message = (
        "only one of the two has an EXIF rotation" if turns else f"orientation of the image is {orientation}, that"
    )
    with pytest.raises(DataError, match=message):
        check_rows(rows_of(image, as_stored))
    if turns:
        check_rows(rows_of(image, as_shown))
    check_rows(rows_of(image, turned(Image.fromarray(mask), orientation)))
    check_rows(rows_of(turned(stored, 1), as_stored))


def test_a_mask_with_a_tag_is_turned_at_every_door(tmp_path):
    stored = turned(Image.fromarray(MASK).transpose(Image.Transpose.ROTATE_90), 6)
    (tmp_path / "m.png").write_bytes(stored)
    for read in (
        read_mask({"bytes": stored}),
        read_mask("m.png", folder=tmp_path),
        binarize(rows_of(encoded(PICTURE), stored)[0]["mask"]),
        Target.from_mask(Image.open(io.BytesIO(stored))).mask,
    ):
        np.testing.assert_array_equal(read, MASK)


def test_a_palette_counts_by_its_colours_in_records_too():
    """A PIL object is not read by its indices."""
    mask = Image.fromarray((~MASK).astype(np.uint8), mode="P")
    mask.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(read_mask(mask), MASK)
    np.testing.assert_array_equal(read_target({"mask": mask}).mask, MASK)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "polygon",
    [
        [[0, 0], [0, 5], [5, 5], [5, 0]],
        [[0, 0, 0, 5, 5, 5, 5, 0]],
        [[3.5, 4.0], [9.5, 4.0], [9.5, 8.0]],
        [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]],
        [[12, 40, 60, 41, 30, 80]],
    ],
)
def test_a_polygon_is_no_mask(polygon):
    reward = make_reward("box_f1")
    for read, kind in (
        (lambda: read_mask(polygon), DataError),
        (lambda: read_target({"mask": polygon}), DataError),
        (lambda: Target.from_mask(polygon), DataError),
        (lambda: ImageTask(None, SETTINGS).read([{"mask": polygon}]), DataError),
        (lambda: reward(completions=["x"], prompts=["y"], mask=[polygon]), RewardError),
    ):
        with pytest.raises(kind, match=r"polygon.* fill it with PIL\.ImageDraw"):
            read()


def test_polygons_in_files_and_columns_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"shapes": [{"points": [[1, 2], [3, 4], [5, 1]]}]}')
    with pytest.raises(DataError, match=r"cannot be decoded .*an outline \(polygon\) is no mask"):
        read_mask("a.json", folder=tmp_path)
    rows = rows_of(encoded(PICTURE)).remove_columns("mask").add_column("mask", [[[1.0, 2.0, 3.0, 4.0, 5.0, 1.0]]])  # type: ignore[call-arg]
    with pytest.raises(DataError, match=r"column 'mask' has the type .*fill polygons with PIL\.ImageDraw"):
        check_rows(rows)


def test_an_image_that_is_its_mask():
    mask = encoded(Image.fromarray(MASK))
    with pytest.raises(DataError, match=r"row 0 .*the image is the mask itself"):
        check_rows(rows_of(encoded(Image.fromarray(MASK.astype(np.uint8) * 90)), mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = encoded(Image.new("L", (30, 20)))
        check_rows(rows_of(empty, empty))
