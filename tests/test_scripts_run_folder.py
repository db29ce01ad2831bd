"""Output folders: nothing that stands there is lost unasked, and what a finished stage leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import sft_args
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl.errors import CheckpointError, DataError, SegRLError
from segrl.models import tiny_causal_lm
from segrl.scripts import check_batches, check_output, claim_output, find_stage1, is_finished, train_and_save


def make_checkpoint(folder: Path, step: int = 1) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def make_run(folder: Path, **arguments: Any) -> Path:
    """A run with two checkpoints."""
    claim_output(folder, arguments)
    for step in (1, 10):
        make_checkpoint(folder, step)
    return folder


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(folder: Path, error: type[SegRLError] = SegRLError, **settings: Any) -> str:
    """The message of a folder that must be refused; nothing changes."""
    before = contents(folder.parent)
    with pytest.raises(error) as caught:
        check_output(folder, **settings)
    assert contents(folder.parent) == before
    return str(caught.value)


# ---- checking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_absent_and_empty_folders_are_free(tmp_path, overwrite):
    assert check_output(tmp_path / "new" / "run", overwrite=overwrite) is None
    assert not (tmp_path / "new").exists()
    assert check_output(tmp_path, overwrite=overwrite, resume="false") is None


def test_a_run_is_replaced_only_when_asked(tmp_path):
    run = make_run(tmp_path / "run")
    assert refused(run).startswith(f"output_dir {str(run)!r} is not empty; pass another --output_dir,")
    assert check_output(run, overwrite=True) is None


def test_what_no_run_has_written_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    assert "was not written by a training script" in refused(tmp_path / "thesis", overwrite=True)
    assert "is a file; pass a folder" in refused(tmp_path / "thesis" / "chapter1.tex", overwrite=True)


def test_inputs_inside_the_folder_are_never_replaced(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    for path in (run, run / "stage1", tmp_path / "link", tmp_path / "other" / ".." / "run"):
        said = refused(run, overwrite=True, inputs={"data": None, "model": str(path)})
        assert said == f"--overwrite would remove --model {str(path)!r}; pass another --output_dir"
    assert check_output(run, overwrite=True, inputs={"data": None, "model": str(tmp_path / "run2")}) is None


@pytest.mark.parametrize("last", ["last", "true", True])
def test_the_newest_checkpoint(tmp_path, last):
    run = make_run(tmp_path / "run")
    assert check_output(run, resume=last) == str(run / "checkpoint-10")
    assert check_output(run, resume=str(run / "checkpoint-1")) == str(run / "checkpoint-1")
    assert "pass one of them" in refused(run, overwrite=True, resume=last)


def test_checkpoints_of_another_run(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    checkpoint = str(other / "checkpoint-1")
    assert check_output(tmp_path / "new", resume=checkpoint) == checkpoint
    assert "is not empty" in refused(run, resume=checkpoint)
    assert check_output(run, overwrite=True, resume=checkpoint) == checkpoint


def test_no_such_checkpoint(tmp_path):
    for folder in (tmp_path / "run", tmp_path):
        assert f"--resume_from_checkpoint last: no checkpoint in {str(folder)!r}" in refused(folder, resume="last")
    said = refused(tmp_path, CheckpointError, resume="no/checkpoint-1")
    assert said.startswith("--resume_from_checkpoint 'no/checkpoint-1': no checkpoint there (no trainer_state.json)")


# ---- claiming --------------------------------------------------------------------------------------------------------


def test_a_claimed_folder_holds_only_what_was_asked(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("words")
    run = make_run(tmp_path / "deep" / "run", preset="old")
    (run / "link").symlink_to(outside)
    claim_output(run, {"preset": "new", "model": None})
    assert [path.name for path in run.iterdir()] == ["segrl_run.json"]
    marker = json.loads((run / "segrl_run.json").read_text())
    assert marker["arguments"] == {"preset": "new", "model": None}
    assert "torch" in marker["versions"]
    assert (outside / "precious").read_text() == "words"


def test_a_continued_run_is_left_as_it_is(tmp_path):
    run = make_run(tmp_path / "run", preset="old")
    before = contents(run)
    claim_output(run, {"preset": "new"}, str(run / "checkpoint-1"))
    assert contents(run) == before
    claim_output(tmp_path / "new", {"preset": "new"}, str(run / "checkpoint-1"))
    assert contents(run) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["segrl_run.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SegRLError, match=r"output_dir '.*file/run' cannot be written: .*; pass another"):
        claim_output(tmp_path / "file" / "run", {})


# ---- training --------------------------------------------------------------------------------------------------------


class LogNothing(TrainerCallback):
    """Logs what a reward that applied to no row is logged as."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history.append({"rewards/none/mean": float("nan"), "most": float("inf"), "note": "x", "step": 2})


@pytest.mark.slow
def test_a_stage_is_saved_continued_and_finished(tmp_path):
    text = Dataset.from_dict({"text": [f"Find every lesion, number {number}." for number in range(8)]})

    def trainer(folder: Path, **settings: Any) -> SFTTrainer:
        model, tokenizer = tiny_causal_lm()
        args = sft_args(
            folder, SFTConfig, **{"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, **settings}
        )
        callbacks: list[Any] = [LogNothing()]
        return SFTTrainer(model, args, train_dataset=text, processing_class=tokenizer, callbacks=callbacks)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert not is_finished(whole)
    train_and_save(trainer(whole))
    assert is_finished(whole)
    assert (whole / "model.safetensors").is_file()
    history = json.loads((whole / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert history[-1] == {"rewards/none/mean": None, "most": None, "note": "x", "step": 2}

    train_and_save(trainer(resumed, resume_from_checkpoint=str(whole / "checkpoint-1")))
    again = json.loads((resumed / "log_history.json").read_text())
    assert again[0] == history[0]
    assert again[1]["loss"] == pytest.approx(history[1]["loss"], abs=1e-4)


@given(batch=st.integers(1, 64), generations=st.integers(1, 8), rows=st.integers(0, 70))
def test_rows_for_one_batch(batch, generations, rows):
    config = SimpleNamespace(generation_batch_size=batch, num_generations=generations)
    questions = len(range(generations, batch + 1, generations))
    if rows >= questions:
        check_batches(config, range(rows))
    else:
        with pytest.raises(DataError, match=f"^{rows} training rows, expected at least {questions}: one batch holds"):
            check_batches(config, range(rows))


# ---- stage 1 of a run ------------------------------------------------------------------------------------------------


def test_where_stage1_is(tmp_path):
    run = make_run(tmp_path / "run")
    checkpoint = str(run / "checkpoint-1")
    assert find_stage1(None, None) is None
    assert find_stage1("runs/sft", checkpoint) == Path("runs/sft")
    assert find_stage1("base", checkpoint, skip=True) is None
    (run / "stage1").mkdir()
    with pytest.raises(SegRLError, match=r"holds no stage 1; pass --model \.\.\. or --skip_stage1"):
        find_stage1(None, checkpoint)
    (run / "stage1" / "log_history.json").write_text("[]")
    assert find_stage1(None, checkpoint) == run / "stage1"


def test_the_model_of_a_run_that_is_continued_is_named(tmp_path):
    run = make_run(tmp_path / "run", model="runs/sft")
    with pytest.raises(SegRLError, match=r"'.*run' holds no stage 1; pass --model runs/sft or --skip_stage1"):
        find_stage1(None, str(run / "checkpoint-1"))
    lonely = make_checkpoint(tmp_path / "alone")
    with pytest.raises(SegRLError, match=r"pass --model \.\.\. or --skip_stage1, whichever the run began with"):
        find_stage1(None, str(lonely))
