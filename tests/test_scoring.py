"""Files of completions, scored: against row-by-row scoring, in every format, and with every broken file."""

from __future__ import annotations

import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reward_cases import EMPTY, GOOD, HEIGHT, TARGET, TRUE_BOXES, WIDTH, mask_of, read

from segrl.errors import DataError, RewardError, SegRLError
from segrl.geometry import mask_to_rle
from segrl.models import tiny_causal_lm
from segrl.predictions import Frame, VolumeTarget, answer_record
from segrl.rewards import CompletionFormat, make_reward, register_reward, registry, weighted_sum
from segrl.scoring import histogram, score_file, scores, statistics
from segrl.scoring.scores import CHUNK

READ = CompletionFormat(frame="original_px")
BOXES = make_reward("box_f1", frame="original_px")
SUM = weighted_sum([(make_reward(name, frame="original_px"), weight) for name, weight in
                    {"format": 1.0, "box_f1": 2.0, "dual_granularity_mask": 0.5}.items()], "mine")  # fmt: skip
EMPTY_ANSWER = "<think>Nothing.</think><answer>No cyst is visible.<seg></answer>"
ONE = "<think>One.</think><answer>The cyst is located at [4, 4, 16, 13].<seg></answer>"
TEXTS = [GOOD, ONE, EMPTY_ANSWER, "", GOOD.replace("<seg>", "")]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    """Answers about the scene of `reward_cases`, and about an empty image, with masks as run lengths."""
    rows = []
    for name, target in (("a.png", TARGET), ("b.png", EMPTY)):
        for n, text in enumerate(texts):
            mask = mask_of(*TRUE_BOXES[: n % 3])
            rows.append(
                {
                    "completion": text,
                    "name": name,
                    "query": "Where is the cyst?",
                    "mask": mask_to_rle(target.mask),
                    "predicted_mask": mask_to_rle(mask) if "<seg>" in text else None,
                }
            )
    return rows


def slow_scores(reward) -> list[float | None]:
    """Every row on its own."""
    scores = []
    for target in (TARGET, EMPTY):
        for n, text in enumerate(TEXTS):
            prediction = read(text)
            if "<seg>" in text:
                prediction = prediction.with_mask(mask_of(*TRUE_BOXES[: n % 3]))
            scores.append(reward.score(prediction, target))
    return scores


# --- scores


def test_scores_equal_scoring_row_by_row(tmp_path):
    scores = score_file(SUM, write(tmp_path / "p.jsonl", rows_of()))
    assert list(scores.columns) == ["format", "box_f1", "dual_granularity_mask", "total"]
    for name, column in scores.columns.items():
        assert column == slow_scores(SUM if name == "total" else make_reward(name))
    assert scores.rows[1]["name"] == "a.png"
    assert scores.rows[1]["where"] == "p.jsonl, line 2"
    assert scores.statuses == {"valid": 6, "no_answer": 2, "no_seg_token": 2}
    assert scores.bounds == {"format": (0, 1), "box_f1": (0, 1), "dual_granularity_mask": (-1, 3), "total": SUM.range}


def test_a_single_reward_is_one_column_under_its_name(tmp_path):
    scores = score_file(BOXES, write(tmp_path / "p.jsonl", rows_of()))
    assert scores.columns == {"box_f1": slow_scores(BOXES)}


def test_messages_and_blank_lines_and_a_byte_order_mark(tmp_path):
    row = {**rows_of()[0], "completion": [{"role": "user", "content": "?"}, {"role": "assistant", "content": GOOD}]}
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n" + json.dumps(row).encode())
    scores = score_file(BOXES, path)
    assert scores.columns["box_f1"] == [1.0, 1.0]
    assert [row["where"] for row in scores.rows] == ["p.jsonl, line 1", "p.jsonl, line 3"]


def test_truth_free_rewards_need_no_truth_and_open_no_file(tmp_path):
    rows = [{"completion": text, "mask": "lost.png"} for text in TEXTS]
    scores = score_file(make_reward("format"), write(tmp_path / "p.jsonl", rows))
    assert scores.columns["format"] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_files_longer_than_a_chunk(tmp_path):
    path = write(tmp_path / "p.jsonl", rows_of() * (2 * CHUNK // 10))
    assert score_file(SUM, path).columns["total"] == slow_scores(SUM) * (2 * CHUNK // 10)


@pytest.mark.parametrize("column", ["group", "prompt", "name"])
def test_answers_to_one_prompt_are_compared_even_across_chunks(column, tmp_path):
    ranked = BOXES.group_relative("rank")
    rows = []
    for number in range(CHUNK // 3 + 2):  # a group of 3 lies across the border of two chunks
        for text in (GOOD, ONE, ""):
            prompt = [{"role": "user", "content": str(number)}] if column == "prompt" else f"{number}"
            rows.append({"completion": text, "mask": mask_to_rle(TARGET.mask), column: prompt})
    assert score_file(ranked, write(tmp_path / "p.jsonl", rows)).columns["box_f1"] == [1.0, 0.5, 0.0] * (len(rows) // 3)


def test_groups_need_not_be_consecutive(tmp_path):
    rows = [{"completion": text, "group": group} for text in (GOOD, "") for group in (1, 2)]
    best = make_reward("format").group_relative("best")
    assert score_file(best, write(tmp_path / "p.jsonl", rows)).columns["format"] == [1.0, 1.0, 0.0, 0.0]


def test_comparing_needs_to_know_the_prompt(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"completion": GOOD}])
    with pytest.raises(DataError, match=r"p\.jsonl, line 1, no prompt, which reward 'format' needs to compare"):
        score_file(make_reward("format").group_relative(), path)


def test_progress_reaches_schedules(tmp_path):
    path = write(tmp_path / "p.jsonl", rows_of()[:1])
    reward = BOXES.schedule({0: 0, 1: 2})
    assert [score_file(reward, path, progress=share).columns["box_f1"] for share in (0.0, 0.25, 1.0)] == [
        [0.0],
        [0.5],
        [2.0],
    ]


def test_a_volume(tmp_path):
    volume = np.zeros((3, HEIGHT, WIDTH), dtype=np.uint8)
    volume[1] = TARGET.mask
    np.save(tmp_path / "v.npy", volume)
    text = '<think>There.</think><answer>{"slice": 2, "bbox_2d_list": [[4, 4, 16, 14], [22, 18, 34, 28]]}</answer>'
    reward = make_reward("slice_boxes", frame="original_px", answer_format="json", require_seg=False)
    path = write(tmp_path / "p.jsonl", [{"completion": text, "volume": "v.npy"}])
    assert score_file(reward, path).columns["slice_boxes"] == [1.0]


def volume_records(count):
    """What a run on volumes writes: here the model sees slices 1 and 3 of 5, and the last answer is not valid."""
    truth = np.zeros((5, HEIGHT, WIDTH), dtype=bool)
    truth[1] = truth[2] = TARGET.mask
    target = VolumeTarget.from_mask(truth, (5.0, 1.0, 1.0), name="ct_1")
    frame = Frame("original_px", (WIDTH, HEIGHT), slices=(1, 3))
    boxes = "[[4, 4, 16, 14], [22, 18, 34, 28]]"
    texts = [
        '{"slice": 1, "bbox_2d_list": BOXES}',
        '{"slice": 2, "bbox_2d_list": []}',
        '{"slice": 3, "bbox_2d_list": []}',
    ]
    texts = [f"<think>There.</think><answer>{text.replace('BOXES', boxes)}</answer>" for text in texts]
    completion_format = CompletionFormat(answer_format="json", require_seg=False)
    found = []
    for n in range(count):
        said = completion_format.parse([*texts, "no idea"][n % 4], frame)
        mask = truth.copy() if len(said.boxes) else truth & False
        if len(said.boxes):
            mask[2] = False
        found.append(answer_record(said.with_mask(mask), target, frame))
    return found


def test_records_of_a_run_on_volumes(tmp_path):
    path = write(tmp_path / "predictions_00010.jsonl", volume_records(4))
    columns = score_file(make_reward("medvol_r1"), path).columns
    assert columns == {
        "slice_format": [1.0, 0.0, 0.0, 0.0],
        "slice_visibility": [1.0, 0.0, 0.0, 0.0],
        "slice_boxes": [1.0, 0.0, 0.0, 0.0],
        "propagated_dice": [pytest.approx(2 / 3), 0.0, 0.0, 0.0],
        "total": [pytest.approx(3 + 2 / 3), 0.0, 0.0, 0.0],
    }
    assert score_file(make_reward("propagated_dice", delta=0), path).columns["propagated_dice"][0] == 1.0


class Together:
    """How many rows are scored, and so are in memory, at once."""

    def score_batch(self, predictions, targets):
        return [float(len(predictions)) for _ in predictions]


def test_masks_of_volumes_are_not_all_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_reward("together", needs_mask=True, volume=True, completion_format={"answer_format": "json"})(Together)
    path = write(tmp_path / "p.jsonl", volume_records(5))
    assert score_file(make_reward("together"), path).columns["together"] == [5.0] * 5
    monkeypatch.setattr(scores, "CHUNK_PIXELS", 2 * 5 * HEIGHT * WIDTH)
    assert score_file(make_reward("together"), path).columns["together"] == [2.0] * 4 + [1.0]


def test_a_mask_of_a_slice_is_no_mask_of_a_volume(tmp_path):
    record = {**volume_records(1)[0], "predicted_mask": mask_to_rle(TARGET.mask)}
    with pytest.raises(DataError, match=r"p\.jsonl, line 1, column 'predicted_mask': expected 3 dimensions, got shape"):
        score_file(make_reward("propagated_dice"), write(tmp_path / "p.jsonl", [record]))


# --- truth in a file of its own


def truths(tmp_path: Path, kind: str) -> Path:
    Image.fromarray(TARGET.mask).save(tmp_path / "a_mask.png")
    Image.fromarray(EMPTY.mask).save(tmp_path / "b_mask.png")
    if kind == "jsonl":
        return write(
            tmp_path / "t.jsonl", [{"name": "a.png", "mask": "a_mask.png"}, {"name": "b.png", "mask": "b_mask.png"}]
        )
    (tmp_path / "manifest.csv").write_text("image,mask,lesion\na.png,a_mask.png,cyst\nb.png,b_mask.png,cyst\n")
    return tmp_path if kind == "folder" else tmp_path / "manifest.csv"


def bare(column: str = "name") -> list[dict[str, Any]]:
    rows = rows_of()
    return [
        {"completion": row["completion"], column: row["name"], "predicted_mask": row["predicted_mask"]} for row in rows
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_truth_is_joined_by_name(kind, tmp_path):
    truth = truths(tmp_path, kind)
    elsewhere = tmp_path / "runs"
    elsewhere.mkdir()
    scores = score_file(SUM, write(elsewhere / "p.jsonl", bare()), ground_truth=truth)
    assert scores.columns["total"] == slow_scores(SUM)


def test_truth_is_joined_by_any_column_and_wins_over_the_predictions_own(tmp_path):
    truth = write(tmp_path / "t.jsonl", [{"id": "a.png", "mask": mask_to_rle(TARGET.mask)}])
    rows = [{"completion": GOOD, "id": "a.png", "mask": mask_to_rle(EMPTY.mask)}]
    assert score_file(BOXES, write(tmp_path / "p.jsonl", rows), ground_truth=truth, on="id").columns["box_f1"] == [1.0]


@pytest.mark.parametrize(
    ("truth", "row", "message"),
    [
        (['{"name": "a"}', '{"name": "a"}'], {"name": "a"}, r"t\.jsonl, line 2: name 'a' was there before, at .* 1"),
        (['{"mask": "m.png"}'], {"name": "a"}, r"t\.jsonl, line 1: no column 'name' to join by; expected one of mask"),
        (['{"name": "scan_12"}'], {"name": "scan_1"}, r"line 1: no ground truth with name 'scan_1' .* 'scan_12'"),
        (['{"name": "a"}'], {"id": "a"}, r"p\.jsonl, line 1: no column 'name' to join by; .*completion, id"),
        (['{"name": "a"}'], {"name": "a"}, r"p\.jsonl, line 1, no ground truth, which reward 'box_f1' needs"),
    ],
)  # fmt: skip
def test_truth_that_cannot_be_joined(truth, row, message, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"completion": GOOD, **row}])
    with pytest.raises(DataError, match=message):
        score_file(BOXES, path, ground_truth=write(tmp_path / "t.jsonl", truth))


def test_a_manifest_with_a_missing_cell(tmp_path):
    (tmp_path / "m.csv").write_text("name,mask\na\n")
    with pytest.raises(DataError, match=r"m\.csv, line 2: expected 2 cells"):
        score_file(
            BOXES, write(tmp_path / "p.jsonl", [{"completion": GOOD, "name": "a"}]), ground_truth=tmp_path / "m.csv"
        )


# --- parquet


def test_a_parquet_file_as_trl_writes_it(tmp_path):
    rows = [
        {
            "step": 10,
            "prompt": [{"role": "user", "content": "Where?"}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "box_f1": 0.5,
            "name": row["name"],
            "predicted_mask": row["predicted_mask"],
            "target_mask": row["mask"],
            "advantage": 0.0,
        }
        for row in rows_of()
    ]
    for number, part in enumerate((rows[:6], rows[6:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"completions_{number:05d}.parquet")
    scores = score_file(SUM, tmp_path)
    assert scores.columns["total"] == slow_scores(SUM)
    assert scores.rows[7]["where"] == "completions_00001.parquet, row 1"
    one = score_file(SUM, tmp_path / "completions_00000.parquet")
    assert one.columns["total"] == slow_scores(SUM)[:6]

    texts = pyarrow.Table.from_pylist([{**row, "target_mask": json.dumps(row["target_mask"])} for row in rows])
    pyarrow.parquet.write_table(texts, tmp_path / "text.parquet")
    assert score_file(SUM, tmp_path / "text.parquet").columns["total"] == slow_scores(SUM)


@pytest.mark.slow
def test_a_parquet_file_that_trl_wrote(tmp_path):
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def log_names(completions, name, log_extra, **_) -> list[float | None]:
        log_extra("name", name)
        return [float(len(completion)) for completion in completions]

    model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2,
                      max_completion_length=4, max_steps=1, logging_steps=1, report_to="none", log_completions=True,
                      save_strategy="no", disable_tqdm=True)  # fmt: skip
    rows = Dataset.from_list([{"prompt": "Where?", "name": "a.png"}, {"prompt": "There?", "name": "b.png"}])
    GRPOTrainer(model, log_names, args, train_dataset=rows, processing_class=tokenizer).train()

    scores = score_file(BOXES, tmp_path / "completions", ground_truth=truths(tmp_path, "folder"))
    assert len(scores.rows) == 4
    assert {row["name"] for row in scores.rows} == {"a.png", "b.png"}
    assert set(scores.columns["box_f1"]) == {0.0}
    with pytest.raises(
        DataError, match=r"completions_00001\.parquet, row 0, no ground truth, which reward 'box_f1' needs"
    ):
        score_file(BOXES, tmp_path / "completions")


# --- summaries

numbers = st.lists(st.one_of(st.none(), st.floats(-3, 3)), max_size=60)


@given(numbers)
def test_statistics_equal_their_definitions(scores):
    found = statistics(scores)
    present = sorted(score for score in scores if score is not None)
    assert (found["n"], found["applied"]) == (len(scores), len(present))
    if not present:
        assert all(found[key] is None for key in ("mean", "std", "min", "q25", "median", "q75", "max"))
        return
    mean = math.fsum(present) / len(present)

    def quantile(share: float) -> float:
        low = math.floor(share * (len(present) - 1))
        high = min(low + 1, len(present) - 1)
        return present[low] + (present[high] - present[low]) * (share * (len(present) - 1) - low)

    expected = {
        "mean": mean, "std": math.sqrt(math.fsum((score - mean) ** 2 for score in present) / len(present)),
        "min": present[0], "q25": quantile(0.25), "median": quantile(0.5), "q75": quantile(0.75), "max": present[-1],
    }  # fmt: skip
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)


@given(numbers, st.sampled_from([None, (0.0, 1.0), (-math.inf, 1.0), (-5.0, 5.0)]), st.integers(1, 12))
def test_histogram_counts_every_score_once(scores, bounds, bins):
    found = histogram(scores, bounds, bins)
    present = [score for score in scores if score is not None]
    assert sum(count for _, count in found) == len(present)
    if len(set(present)) <= 8:
        assert [count for _, count in found] == [present.count(value) for value in sorted(set(present))]
        return
    low, high = min(present), max(present)
    if bounds is not None and math.isfinite(bounds[0]):
        low, high = min(low, bounds[0]), max(high, bounds[1])
    edges = np.linspace(low, high, bins + 1)
    assert [count for _, count in found] == [
        sum(a <= score < b or (n == bins - 1 and score == b) for score in present)
        for n, (a, b) in enumerate(pairwise(edges))
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_output_files_hold_every_row(suffix, tmp_path):
    reward = weighted_sum({make_reward(sometimes): 1.0, "format": 1.0})
    scores = score_file(reward, write(tmp_path / "p.jsonl", rows_of()))
    path = tmp_path / "out" / f"scores{suffix}"
    scores.write(path)
    if suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
    elif suffix == ".parquet":
        found = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with path.open(newline="") as file:
            found = [
                {key: cell if key in ("where", "name", "status") else float(cell) if cell else None
                 for key, cell in row.items()} for row in csv.DictReader(file)
            ]  # fmt: skip
    assert found == scores.records()
    assert list(found[0]) == ["where", "name", "status", "sometimes", "format", "total"]
    assert found[0]["sometimes"] is None


def sometimes(prediction, target):
    """Does not apply to valid texts."""
    return None if prediction.valid else 1.0


def test_output_of_another_kind_is_refused(tmp_path):
    scores = score_file(make_reward("format"), write(tmp_path / "p.jsonl", rows_of()))
    with pytest.raises(DataError, match=r"scores\.xlsx: cannot write \.xlsx"):
        scores.write(tmp_path / "scores.xlsx")


# --- hostile files

ROW = {"completion": GOOD, "mask": mask_to_rle(TARGET.mask)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"p\.jsonl: no rows; expected at least one completion"),
        (["", "  "], r"p\.jsonl: no rows"),
        ([ROW, json.dumps(ROW)[:-20]], r"p\.jsonl, line 2: not JSON: .*; is the line cut off\?"),
        ([ROW, "[1, 2]"], r"p\.jsonl, line 2: b'\[1, 2\]\\n'; expected an object"),
        (["[" * 100_000], r"p\.jsonl, line 1: not JSON"),
        ([{"text": GOOD}], r"p\.jsonl, line 1, .*no ground truth"),
        ([{"text": GOOD, "mask": ROW["mask"]}], r"p\.jsonl, line 1, no column 'completion' \(here: mask, text\)"),
        ([ROW, {"completion": GOOD}], r"p\.jsonl, line 2, no ground truth, .* 'box_f1' needs: .* 'mask'"),
        ([ROW, {**ROW, "completion": None}], r"p\.jsonl, line 2, column 'completion': None; expected a text"),
        ([{**ROW, "mask": "lost.png"}], r"p\.jsonl, line 1, column 'mask': .*lost\.png: no such file"),
        ([{**ROW, "mask": {"size": [2, 2], "counts": [9]}}], r"line 1, column 'mask': the counts cover 9 pixels"),
        ([{**ROW, "boxes": [[5, 5, 1, 1]]}], r"line 1, column 'boxes': .*x1 <= x2"),
        ([{**ROW, "boxes": [[0, 0, 999, 999]]}], r"line 1, column 'boxes': .*leaves the image of 40 x 32 px"),
        (['{"completion": "a", "boxes": [[NaN, 0, 1, 1]], "size": [9, 9]}'], "line 1, column 'boxes'.*finite"),
    ],
)  # fmt: skip
def test_broken_lines_are_named(lines, message, tmp_path):
    with pytest.raises(SegRLError, match=message):
        score_file(BOXES, write(tmp_path / "p.jsonl", lines))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", None, r"p\.jsonl: cannot be read: No such file"),
        ("p.json", b"[]", r"p\.json: cannot read \.json; expected \.jsonl, \.parquet, \.csv"),
        ("p", b"", r"p: cannot read a file without suffix"),
        ("p.jsonl", b'{"completion": "\xff\xfe"}', r"p\.jsonl, line 1: not JSON: 'utf-8' codec"),
        ("p.parquet", b"", r"p\.parquet: not a parquet file: .*; was it written to the end\?"),
        ("p.parquet", b"PAR1" + b"x" * 100, r"p\.parquet: not a parquet file"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        score_file(BOXES, tmp_path / name)


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(DataError, match=r"neither predictions_\*\.jsonl nor completions_\*\.parquet in this folder"):
        score_file(BOXES, tmp_path)


def test_masks_must_be_there_and_of_the_right_size(tmp_path):
    mask = make_reward("dual_granularity_mask")
    with pytest.raises(DataError, match=r"line 1, no column 'predicted_mask', which reward 'dual.*write null where"):
        score_file(mask, write(tmp_path / "p.jsonl", [ROW]))
    small = {**ROW, "predicted_mask": {"size": [2, 3], "counts": [6]}}
    with pytest.raises(DataError, match="line 1, column 'predicted_mask': the mask is 3 x 2 px, the truth 40 x 32"):
        score_file(mask, write(tmp_path / "p.jsonl", [small]))
    none = {**ROW, "predicted_mask": None}
    assert score_file(mask, write(tmp_path / "p.jsonl", [none])).columns["dual_granularity_mask"] == [-1.0]


def test_a_failing_reward_names_the_line(tmp_path):
    def fails(prediction, target):
        if prediction.text == "boom":
            raise KeyError("spot")
        return 1.0

    rows = [*rows_of(), "", {**rows_of()[0], "completion": "boom"}]
    with pytest.raises(RewardError, match=r"^p\.jsonl, line 12: reward 'fails' \(a\.png\): KeyError: 'spot'$"):
        score_file(make_reward(fails), write(tmp_path / "p.jsonl", rows))
    with pytest.raises(RewardError, match=r"^p\.jsonl, line 1: reward 'fails' \(a\.png\): KeyError: 'spot'$"):
        score_file(make_reward(fails), write(tmp_path / "p.jsonl", rows[-1:]))


def test_a_completion_of_1_mb(tmp_path):
    rows = [{**ROW, "completion": text} for text in ("[" * 10**6, "<answer>" * 125_000, "é\x00" * 500_000)]
    scores = score_file(BOXES, write(tmp_path / "p.jsonl", rows))
    assert scores.columns["box_f1"] == [0.0] * 3
    assert all(len(row["text"]) <= 200 for row in scores.rows)


def test_other_columns_reach_trl_functions(tmp_path):
    def right(completions, prompts, solution, **columns):
        assert prompts == ["Where?", "Where?"]
        assert columns["hint"] == ["x", None]
        return [float(text == truth) for text, truth in zip(completions, solution, strict=True)]

    rows = [
        {"completion": "left", "solution": "left", "prompt": "Where?", "hint": "x"},
        {"completion": "left", "solution": "right", "prompt": "Where?"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score_file(make_reward(right), path).columns == {"right": [1.0, 0.0]}
    reward, both = make_reward(right), [read("a")] * 2
    with pytest.raises(RewardError, match="column 'solution' has 1 rows for 2 predictions"):
        reward.score_batch(both, [None, None], columns={"solution": ["a"]})
