"""Groups of answers that stage 2 keeps: what they hold, how many, and that reporters get them as pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_headed_model, tiny_rows
from PIL import Image

from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer
from segrl.errors import DataError
from segrl.geometry import rle_to_mask
from segrl.predictions import Frame, Target, VolumeTarget, parse_completion
from segrl.reports.groups import group_answer, group_header, group_picture, read_groups, write_group

HOSTILE = "<script>alert(1)</script> & <b>bold</b>"


def record(step: int = 3, answers: int = 2, side: int = 600) -> dict[str, Any]:
    """A group about a lesion in a corner; only the first answer has a mask."""
    mask = np.zeros((side, side // 2), dtype=bool)
    mask[: side // 4, : side // 4] = True
    target = Target.from_mask(mask, query=f"Where? {HOSTILE}", lesion="cyst")
    frame = Frame("original_px", (side // 2, side))
    made = []
    for number in range(answers):
        text = f"<think>{HOSTILE} {number}</think><answer>The cyst is at [0, 0, 9, 9].<seg></answer>"
        answer = parse_completion(text, frame)
        answer = answer.with_mask(np.roll(mask, 40 * number, 0)) if number == 0 else answer
        advantage = 1.0 - 2 * number
        scores = {"rewards": {"format": 1.0, "box_f1": None}, "reward": 0.5 * number, "advantage": advantage}
        made.append({**group_answer(answer, target, None), **scores})
    image = Image.new("RGB", (side // 2, side), (40, 60, 80))
    return {"step": step, **group_header(image, target, None), "answers": made}


def test_a_group_is_small_whatever_the_image(tmp_path):
    found = record(side=4000)
    assert found["size"] == [128, 256]
    assert found["pixels"] == [2000, 4000]
    write_group(tmp_path / "groups", "00003", found, Image.new("RGB", (2000, 4000)))
    assert sum(path.stat().st_size for path in (tmp_path / "groups").iterdir()) < 20_000
    ((again, image),) = read_groups(tmp_path)
    assert image is not None
    assert image.size == (128, 256)
    assert rle_to_mask(again["target"]).sum() == 64 * 64
    assert rle_to_mask(again["answers"][0]["mask"]).sum() == 64 * 64
    assert again["answers"][1]["mask"] is None
    assert group_picture(again, image).size[0] == 2 * 220 + 3 * 12
    long = group_answer(
        parse_completion("a" * 10_000, Frame("original_px", (4, 4))), Target.from_mask(np.eye(4) > 0), None
    )
    assert len(long["text"]) == 4000


def test_a_group_about_a_volume_is_that_of_one_slice():
    mask = np.zeros((3, 8, 8), dtype=bool)
    mask[1, :4] = True
    target = VolumeTarget.from_mask(mask)
    header = group_header(Image.new("L", (8, 8)), target, 1)
    assert (header["slice"], header["depth"], rle_to_mask(header["target"]).sum()) == (1, 3, 32)
    answer = parse_completion("nothing", Frame("original_px", (8, 8), slices=(0, 1, 2))).with_mask(mask)
    found = group_answer(answer, target, 1)
    assert (found["dice"], found["boxes"], rle_to_mask(found["mask"]).sum()) == (1.0, [], 32)


def test_a_damaged_group_is_named(tmp_path):
    write_group(tmp_path / "groups", "00003", record(), None)
    (tmp_path / "groups" / "00004.json").write_text("{")
    with pytest.raises(DataError, match=r"00004\.json: not a group of answers"):
        read_groups(tmp_path)


@pytest.mark.slow
def test_a_training_keeps_groups_and_sends_them(tmp_path):
    """Four steps, two groups, each with the rewards that TRL logs and advantages that add up to nothing."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, processor = tiny_headed_model()
    args = SegGRPOConfig(
        str(tmp_path), max_steps=4, kept_groups=2, report_to="tensorboard", use_cpu=True, bf16=False, num_generations=2,
        per_device_train_batch_size=4, max_completion_length=8, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SegGRPOTrainer(
        model, ["format", "dual_granularity_mask"], args, train_dataset=tiny_rows(8, processor, completions=False),
        processing_class=processor, dense_losses=[DenseLoss("dice_ce")],
    )  # fmt: skip
    trainer.train()
    assert "groups" in {path.name for path in tmp_path.iterdir()}
    groups = read_groups(tmp_path)
    assert [found["step"] for found, _ in groups] == [0, 2]
    assert sorted(path.name for path in (tmp_path / "groups").iterdir()) == [
        "00000.json", "00000.png", "00002.json", "00002.png"
    ]  # fmt: skip
    for found, image in groups:
        assert image is not None
        assert len(found["answers"]) == 2
        assert sum(answer["advantage"] for answer in found["answers"]) == pytest.approx(0, abs=1e-4)
        for answer in found["answers"]:
            assert answer["reward"] == pytest.approx(sum(answer["rewards"].values()))
            assert set(answer["rewards"]) == {"format", "dual_granularity_mask"}
            assert answer["status"] == "no_answer"  # of a random model
    (events,) = (tmp_path / "runs").glob("*/events*") if (tmp_path / "runs").is_dir() else tmp_path.rglob("events*")
    read = EventAccumulator(str(events), size_guidance={"images": 0})
    read.Reload()
    assert [item.step for item in read.Images("groups")] == [0, 2]
    assert read.Images("groups")[0].width == 2 * 220 + 3 * 12


def test_settings_of_trl_keep_none():
    assert SegGRPOConfig("run", use_cpu=True, bf16=False, report_to="none").kept_groups == 0
    assert read_groups(Path("no/such/run")) == []
