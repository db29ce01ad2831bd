"""Evaluation of a model and of the best constant mask, against slow recomputations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_headed_model
from datasets import Dataset
from PIL import Image

from segrl import ReasoningSegmenter
from segrl.data import load_folder, make_synthetic, write_folder
from segrl.data.images.kept import KeptPixels
from segrl.errors import DataError, SegRLError
from segrl.evaluation import evaluate, evaluate_constant_mask
from segrl.metrics import iou, register_metric, summarise
from segrl.predictions import ImagePromptSettings, Prediction, Status

LESIONS2D = Path(__file__).parents[2] / "shared" / "data" / "lesions2d"


class Thresholding(ReasoningSegmenter):
    """Segments what is bright, in words that are valid for one question and not for the next."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict_batch(self, images, queries, *, sizes=None, **generation) -> list[Prediction]:
        self.batches.append(len(images))
        assert sizes is not None
        return [self.answer(*each) for each in zip(images, queries, sizes, strict=True)]

    def answer(self, image: Image.Image, query: str, size: tuple[int, int]) -> Prediction:
        grey = np.asarray(image.convert("L").resize(size))
        status = [Status.VALID, Status.VALID, Status.NO_REASONING, Status.NO_SEG_TOKEN][len(query) % 4]
        mask = None if status is Status.NO_SEG_TOKEN else grey > np.quantile(grey, 0.9)
        boxes = np.array([[1.0, 2.0, 3.0, 4.0]])
        return Prediction(
            text=f"{query}!",
            reasoning=None,
            answer=None,
            boxes=boxes,
            status=status,
            has_seg=mask is not None,
            mask=mask,
        )


def slow_scores(prediction: np.ndarray | None, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU by counting pixels one by one; both empty is 1."""
    both = either = painted = 0
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            p, t = prediction is not None and bool(prediction[y, x]), bool(truth[y, x])
            both, either, painted = both + (p and t), either + (p or t), painted + p + t
    return (2 * both / painted, both / either) if painted else (1.0, 1.0)


def with_masks(rows: Dataset, masks: list[np.ndarray]) -> Dataset:
    pictures = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    return Dataset.from_list(
        [{**dict(row), "mask": mask} for row, mask in zip(rows, pictures, strict=True)], rows.features
    )


def evaluated(segmenter: Any, rows: Dataset, **settings: Any) -> tuple[list[Any], list[Prediction], list[Any]]:
    """Records, predictions and targets."""
    seen: list[tuple[int, Any, Prediction, Any]] = []
    records = evaluate(segmenter, rows, progress=False, on_answer=lambda *answer: seen.append(answer), **settings)
    assert [number for number, *_ in seen] == list(range(len(rows)))
    return records, [prediction for _, _, prediction, _ in seen], [target for *_, target in seen]


def test_records_equal_a_slow_recomputation():
    rows = make_synthetic(10, size=32)
    masks = [np.asarray(mask) > 0 for mask in rows["mask"]]
    masks[4] = np.zeros_like(masks[4])  # a truth without a lesion
    rows = with_masks(rows, masks)
    segmenter = Thresholding()
    records, predictions, targets = evaluated(segmenter, rows, batch_size=4)
    assert segmenter.batches == [4, 4, 2]
    assert {prediction.status for prediction in predictions} == {Status.VALID, Status.NO_REASONING, Status.NO_SEG_TOKEN}
    assert len(records) == len(predictions) == len(targets) == 10
    for row, mask, record, prediction, target in zip(rows, masks, records, predictions, targets, strict=True):
        assert isinstance(row, dict)
        assert np.array_equal(target.mask, mask)
        dice, iou = slow_scores(prediction.mask, mask)
        assert record["dice"] == pytest.approx(dice)
        assert record["iou"] == pytest.approx(iou)
        assert record["fail"] == (prediction.status is not Status.VALID or dice == 0)
        assert record["text"] == prediction.text == f"{row['query']}!"
        assert record["status"] == prediction.status.value
        assert record["boxes"] == [[1.0, 2.0, 3.0, 4.0]]
        assert {name: record[name] for name in ("query", "modality", "anatomy", "lesion", "name")} == {
            name: row[name] for name in ("query", "modality", "anatomy", "lesion", "name")
        }
    summary = summarise(records)
    assert summary["n"] == 10
    assert summary["mdice"] == pytest.approx(np.mean([record["dice"] for record in records]))


def test_scores_are_taken_at_the_size_of_the_mask():
    small = make_synthetic(2, size=32)
    masks = [np.kron(np.asarray(mask) > 0, np.ones((2, 3), dtype=bool)) for mask in small["mask"]]  # 96 x 64 pixels
    _, predictions, targets = evaluated(Thresholding(), with_masks(small, masks))
    for prediction, target, mask in zip(predictions, targets, masks, strict=True):
        assert target.mask.shape == mask.shape == (64, 96)
        assert prediction.mask is None or prediction.mask.shape == (64, 96)


def test_rows_without_texts_are_evaluated():
    rows = make_synthetic(2, size=32).select_columns(["image", "mask", "query"])
    records = evaluate(Thresholding(), rows, progress=False)
    assert [record["modality"] for record in records] == ["", ""]
    assert list(summarise(records)["groups"]["anatomy"]) == ["unspecified"]


def test_a_model_is_asked_greedily_about_every_row_in_order():
    model, processor = tiny_headed_model()
    segmenter = ReasoningSegmenter(model.eval(), processor, ImagePromptSettings(max_new_tokens=8))
    rows = make_synthetic(3, size=56)
    records, predictions, targets = evaluated(segmenter, rows, batch_size=2)
    for row, record, prediction, target in zip(rows, records, predictions, targets, strict=True):
        assert isinstance(row, dict)
        alone = segmenter.predict(row["image"], row["query"])
        assert record["text"] == prediction.text == alone.text
        assert target.name == row["name"]
        assert record["fail"] is True  # a model that learned nothing writes no valid text
        assert record["dice"] == slow_scores(prediction.mask, target.mask)[0]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_what_the_check_has_read_is_not_read_again(tmp_path, share):
    """Whatever the files are like; of a budget for half of the rows the others come from their files."""
    rows = make_synthetic(6, size=40)
    write_folder(rows, tmp_path)
    paths = sorted((tmp_path / "images").iterdir())
    for mode, path in zip(("L", "RGB", "RGBA", "P"), paths, strict=False):
        Image.open(path).convert(mode).save(path)
    for path in (paths[4], tmp_path / "masks" / paths[4].name):
        Image.open(path).crop((0, 0, 40, 30)).save(path)
    turned = Image.open(paths[4]).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    turned.save(paths[4], exif=turned.getexif())
    one = 40 * 40 * 4
    kept = KeptPixels(int(share * 6 * one))
    found = load_folder(tmp_path, kept=kept)
    seen: list[Any] = []
    settings: Any = {"progress": False, "batch_size": 4}
    expected = evaluate(Thresholding(), found, on_answer=lambda *answer: seen.append(answer), **settings)
    for path in (*paths, *(tmp_path / "masks").iterdir()):
        if share == 1:
            path.unlink()
    again: list[Any] = []
    records = evaluate(Thresholding(), found, kept=kept, on_answer=lambda *answer: again.append(answer), **settings)
    assert records == expected
    assert kept.take(0) is None  # nothing stays
    for (_, shown, _, target), (_, other, _, same) in zip(seen, again, strict=True):
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(other.convert("RGB")))
        assert np.array_equal(target.mask, same.mask)
        assert np.array_equal(target.boxes, same.boxes)


def test_no_rows_give_no_records_and_bad_input_is_named():
    rows = make_synthetic(2, size=32)
    assert evaluate(Thresholding(), rows.select([]), progress=False) == []
    for size in (0, -1):
        with pytest.raises(DataError, match=f"batch_size={size}: expected 1 or more"):
            evaluate(Thresholding(), rows, batch_size=size)
    grey = Dataset.from_list(
        [{**dict(row), "mask": Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))} for row in rows],
        rows.features,
    )
    with pytest.raises(DataError, match=rows[0]["name"]):
        evaluate(Thresholding(), grey, progress=False)
    with pytest.raises(DataError, match="expected at least one mask"):
        evaluate_constant_mask(rows.select([]), rows)


def test_the_constant_mask_equals_a_slow_search():
    rows = make_synthetic(12, size=32)
    train, test = rows.select(range(8)), rows.select(range(8, 12))
    masks = [np.asarray(mask) > 0 for mask in train["mask"]]
    average = np.mean(masks, axis=0)
    best = max(np.mean([slow_scores(average > level, mask)[0] for mask in masks]) for level in np.unique(average))
    records = evaluate_constant_mask(train, test, size=32)
    assert np.mean([r["dice"] for r in evaluate_constant_mask(train, train, size=32)]) == pytest.approx(best)
    guesses = [level for level in np.unique(average)]
    for index, record in enumerate(records):
        truth = np.asarray(test[index]["mask"]) > 0
        assert any(record["dice"] == pytest.approx(slow_scores(average > level, truth)[0]) for level in guesses)
        assert record["fail"] == (record["dice"] == 0)
        assert record["name"] == test[index]["name"]


@pytest.mark.skipif(not LESIONS2D.is_dir(), reason="needs the data beside the checkout")
def test_the_constant_mask_on_real_images():
    train, test = (load_folder(LESIONS2D, split, validate=False) for split in ("train", "test"))
    summary = summarise(evaluate_constant_mask(train, test, size=128))
    assert summary["n"] == len(test)
    assert 0.37 < summary["mdice"] < 0.38


def test_registered_metrics_join_the_records():
    rows = make_synthetic(2, size=32)
    records = evaluate(Thresholding(), rows, metrics=("test_metric_iou", letters), progress=False)
    assert [record["letters"] for record in records] == [len(row["query"]) + 1 for row in map(dict, rows)]
    assert [record["test_metric_iou"] for record in records] == [record["iou"] for record in records]
    with pytest.raises(SegRLError, match=r"metrics \['dice'\]"):
        evaluate(Thresholding(), rows, metrics=("dice",), progress=False)


@register_metric("test_metric_iou")
def overlap(prediction, target):
    return iou(prediction.mask if prediction.mask is not None else np.zeros_like(target.mask), target.mask)


def letters(prediction, target):
    return len(prediction.text)
