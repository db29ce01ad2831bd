"""Output folders: nothing that stands there is lost unasked, and what a finished stage leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import sft_args
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from segrl.errors import CheckpointError, DataError, SegRLError
from segrl.models import tiny_causal_lm
from segrl.scripts import Progress, check_batches, check_output, claim_output, find_stage1, is_finished, train_and_save
from segrl.trainers.checkpoints import checkpoint_problem, newest_checkpoint, write_manifest


def make_checkpoint(folder: Path, step: int = 1) -> Path:
    """A checkpoint as the trainers write it, of a very small model."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, checkpoint / name)
    write_manifest(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 10}))
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
    assert check_output(tmp_path / "new" / "run", overwrite=overwrite) == Progress()
    assert not (tmp_path / "new").exists()
    assert check_output(tmp_path, overwrite=overwrite, resume="false") == Progress()


def test_a_run_is_replaced_only_when_asked(tmp_path):
    run = make_run(tmp_path / "run")
    assert refused(run).startswith(f"output_dir {str(run)!r} is not empty; pass another --output_dir,")
    assert check_output(run, overwrite=True) == Progress()


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
    assert check_output(run, overwrite=True, inputs={"data": None, "model": str(tmp_path / "run2")}) == Progress()


@pytest.mark.parametrize("last", ["last", "true", True])
def test_the_newest_checkpoint(tmp_path, last):
    run = make_run(tmp_path / "run")
    for resume, name in ((last, "checkpoint-10"), (str(run / "checkpoint-1"), "checkpoint-1")):
        assert check_output(run, resume=resume) == Progress(str(run / name), inside=True)
    assert "pass one of them" in refused(run, overwrite=True, resume=last)


def test_checkpoints_of_another_run(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    checkpoint = str(other / "checkpoint-1")
    assert check_output(tmp_path / "new", resume=checkpoint) == Progress(checkpoint)
    assert "is not empty" in refused(run, resume=checkpoint)
    assert check_output(run, overwrite=True, resume=checkpoint) == Progress(checkpoint)


def test_no_such_checkpoint(tmp_path):
    for folder in (tmp_path / "run", tmp_path):
        assert f"--resume_from_checkpoint last: no checkpoint in {str(folder)!r}" in refused(folder, resume="last")
    said = refused(tmp_path, CheckpointError, resume="no/checkpoint-1")
    assert said.startswith("--resume_from_checkpoint 'no/checkpoint-1': no such folder; expected a complete folder")


TORN: list[tuple[str, bool, Any]] = [  # what is wrong, with a manifest or without, how it came
    ("no trainer_state.json", True, lambda path: (path / "trainer_state.json").unlink()),
    ("trainer_state.json: not JSON", True, lambda path: cut(path / "trainer_state.json")),
    ("trainer_state.json: holds a list", True, lambda path: (path / "trainer_state.json").write_text("[]")),
    (
        "trainer_state.json: global_step is '7'",
        True,
        lambda path: (path / "trainer_state.json").write_text('{"global_step": "7"}'),
    ),
    ("no optimizer.pt", True, lambda path: (path / "optimizer.pt").unlink()),
    ("no scheduler.pt", True, lambda path: (path / "scheduler.pt").unlink()),
    ("no rng_state.pth", True, lambda path: (path / "rng_state.pth").unlink()),
    ("optimizer.pt has ", True, lambda path: cut(path / "optimizer.pt")),
    ("rng_state.pth has ", True, lambda path: cut(path / "rng_state.pth")),
    ("model.safetensors has ", True, lambda path: cut(path / "model.safetensors")),
    ("segrl_checkpoint.json: not JSON", True, lambda path: cut(path / "segrl_checkpoint.json")),
    ("no weights", False, lambda path: (path / "model.safetensors").unlink()),
    ("no optimizer.pt", False, lambda path: (path / "optimizer.pt").unlink()),
    ("scheduler.pt: cut off", False, lambda path: cut(path / "scheduler.pt")),
    ("rng_state.pth: cut off", False, lambda path: cut(path / "rng_state.pth")),
    ("model.safetensors: cannot be read", False, lambda path: cut(path / "model.safetensors")),
    ("no mask_head.safetensors", False, lambda path: (path / "mask_head.json").write_text("{}")),
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(("problem", "manifest", "damage"), TORN, ids=[f"{case[0]} {case[1]}" for case in TORN])
def test_a_torn_checkpoint_is_left_out_and_named(problem, manifest, damage, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    newest = run / "checkpoint-10"
    if not manifest:
        (newest / "segrl_checkpoint.json").unlink()
    assert checkpoint_problem(newest) is None
    damage(newest)
    found = checkpoint_problem(newest)
    assert found is not None
    assert found.startswith(problem)
    assert newest_checkpoint(run) == (str(run / "checkpoint-1"), {"checkpoint-10": found})
    assert check_output(run, resume="last") == Progress(str(run / "checkpoint-1"), inside=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{run}: left out checkpoint-10 ({found}); goes on from checkpoint-1"
    said = refused(run, CheckpointError, resume=str(newest))
    assert said == (
        f"--resume_from_checkpoint {str(newest)!r}: {found}; expected a complete folder checkpoint-N, or 'last' for "
        "the newest in output_dir"
    )


def test_a_whole_checkpoint_of_trl_alone(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoint-10" / "segrl_checkpoint.json").unlink()
    assert newest_checkpoint(run) == (str(run / "checkpoint-10"), {})


def test_where_a_run_goes_on(tmp_path):
    """In stage 1, between the stages, in stage 2, and in the evaluation."""
    run = tmp_path / "run"
    claim_output(run, {})
    assert check_output(run, resume="last") == Progress(inside=True)
    first = make_checkpoint(run / "stage1")
    assert check_output(run, resume="last") == Progress(stage1=str(first), inside=True)
    assert check_output(run, resume=str(first)) == Progress(stage1=str(first), inside=True)
    (run / "stage1" / "log_history.json").write_text("[]")
    assert check_output(run, resume="last") == Progress(inside=True)
    assert "stage 1 is finished; pass 'last'" in refused(run, resume=str(first))
    second = make_checkpoint(run)
    assert check_output(run, resume="last") == Progress(str(second), inside=True)
    (run / "log_history.json").write_text("[]")
    assert check_output(run, resume="last") == Progress(str(second), finished=True, inside=True)


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
    claim_output(run, {"preset": "new"}, Progress(str(run / "checkpoint-1"), inside=True))
    assert contents(run) == before
    claim_output(tmp_path / "new", {"preset": "new"}, Progress(str(run / "checkpoint-1")))
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
    parameters = sum(parameter.numel() for parameter in tiny_causal_lm()[0].parameters())
    counts = dict.fromkeys(("parameters", "trainable_parameters"), parameters)
    assert history[-1] == {"rewards/none/mean": None, "most": None, "note": "x", "step": 2, **counts}

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
    assert find_stage1(None, None) is None
    assert find_stage1("runs/sft", run) == Path("runs/sft")
    assert find_stage1("base", run, skip=True) is None
    (run / "stage1").mkdir()
    assert find_stage1(None, run, needed=False) is None
    with pytest.raises(SegRLError, match=r"holds no stage 1; pass --model \.\.\. or --skip_stage1"):
        find_stage1(None, run)
    (run / "stage1" / "log_history.json").write_text("[]")
    assert find_stage1(None, run) == run / "stage1"


def test_the_model_of_a_run_that_is_continued_is_named(tmp_path):
    run = make_run(tmp_path / "run", model="runs/sft")
    with pytest.raises(SegRLError, match=r"'.*run' holds no stage 1; pass --model runs/sft or --skip_stage1"):
        find_stage1(None, run)
    lonely = make_checkpoint(tmp_path / "alone")
    with pytest.raises(SegRLError, match=r"pass --model \.\.\. or --skip_stage1, whichever the run began with"):
        find_stage1(None, lonely.parent)
