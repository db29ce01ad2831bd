"""Validation while training: by a function of the trainer, and Dice on held-out rows in the scripts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_headed_model, tiny_rows
from safetensors.torch import load_file
from script_modules import read_json
from test_checkpoints import sft
from test_scripts_two_stages import BoxRun, refused, run
from transformers import EarlyStoppingCallback

from segrl.data import load_folder, make_synthetic, write_folder
from segrl.evaluation import evaluate
from segrl.inference import ReasoningSegmenter, load
from segrl.metrics import summarise

BEST = ("--load_best_model_at_end", "True", "--eval_steps", 1)


class Scores:
    """Measures that are known beforehand; what it sees of the trainer must not change what is trained."""

    def __init__(self, *values: float) -> None:
        self.values, self.steps = list(values), []

    def __call__(self, trainer: Any) -> dict[str, float]:
        assert not trainer.model.training
        self.steps.append(trainer.state.global_step)
        trainer.processing_class.tokenizer.padding_side = "left"
        torch.rand(3)
        return {"dice": self.values[len(self.steps) - 1]}


def settings(**more: Any) -> dict[str, Any]:
    return {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "dice", **more}


def test_the_best_checkpoint_by_a_function_and_training_as_without_it(tmp_path):
    def trained(name: str, validate: Any, **more: Any) -> Any:
        model, processor = tiny_headed_model()
        trainer = sft(tmp_path / name, model, processor, validate=validate, max_steps=3, **more)
        trainer.train()
        return trainer

    scores = Scores(0.1, 0.7, 0.4)
    best = trained("best", scores, **settings(load_best_model_at_end=True))
    assert scores.steps == [1, 2, 3]
    assert [entry["eval_dice"] for entry in best.state.log_history if "eval_dice" in entry] == [0.1, 0.7, 0.4]
    assert Path(best.state.best_model_checkpoint).name == "checkpoint-2"
    plain = trained("plain", None, save_steps=1)
    for step in (1, 2, 3):  # nothing that was measured changed what was learned
        for name in ("model.safetensors", "mask_head.safetensors"):
            ours, theirs = (load_file(tmp_path / run / f"checkpoint-{step}" / name) for run in ("best", "plain"))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    second = load_file(tmp_path / "plain" / "checkpoint-2" / "mask_head.safetensors")
    assert all(torch.equal(value, second[key]) for key, value in best.mask_head.state_dict().items())
    assert plain.processing_class.tokenizer.padding_side == best.processing_class.tokenizer.padding_side


@pytest.mark.slow
@pytest.mark.long
def test_early_stopping_by_a_function(tmp_path):
    model, processor = tiny_headed_model()
    trainer = sft(
        *(tmp_path, model, processor),
        validate=Scores(0.5, 0.4, 0.3, 0.9),
        max_steps=4,
        callbacks=[EarlyStoppingCallback(2)],
        **settings(load_best_model_at_end=True),
    )
    assert trainer.train().global_step == 3
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert trainer.evaluate(tiny_rows(2, processor))["eval_loss"] > 0  # rows that are passed are measured as ever


def live(folder: Path) -> list[float]:
    return [entry["eval_dice"] for entry in read_json(folder / "log_history.json") if "eval_dice" in entry]


@pytest.mark.slow
def test_a_run_with_a_validation_split(tmp_path, capsys):
    """Both stages are measured on held-out rows; the last Dice is that of the saved model asked again."""
    folder = tmp_path / "run"
    run(BoxRun.check_grpo, "--output_dir", folder, "--val_fraction", 0.5, *BEST, "--sft_max_steps", 2)
    out = capsys.readouterr().out
    assert "phase 1 of 3, stage 1: about" in out
    assert len(live(folder)) == len(live(folder / "stage1")) == 2
    for part in (folder, folder / "stage1"):
        assert (part / "curves.png").is_file()
        table = (part / "results.csv").read_text().splitlines()
        assert "eval_dice" in table[0].split(",")
        assert len(table) == 3
    names = {record["name"] for record in read_json(folder / "predictions.json")}
    rows = make_synthetic(4, size=64, seed=42)
    held = (tmp_path / "run" / "config.yaml").read_text()
    assert "\nval_fraction: 0.5\n" in held
    assert "\n# rewards:\n" in held
    assert not names & set(rows["name"])
    state = read_json(folder / "checkpoint-2" / "trainer_state.json")
    assert state["best_metric"] == max(live(folder))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*was a sorted table cut in two:UserWarning")  # two rows each
def test_a_named_split_is_measured_as_after_training(tmp_path):
    rows = make_synthetic(8, size=64)
    data = write_folder(rows, tmp_path / "data", split=["train"] * 4 + ["val"] * 2 + ["test"] * 2)
    folder = tmp_path / "run"
    run(BoxRun.check_sft, "--data", data, "--val_split", "val", "--output_dir", folder, *BEST, "--max_steps", 2)
    scores = live(folder)
    asked = load(folder, device="cpu")
    assert isinstance(asked, ReasoningSegmenter)
    records = evaluate(asked, load_folder(data, "val"), progress=False)
    assert summarise(records)["mdice"] == pytest.approx(max(scores))
    again = shutil.copytree(folder, tmp_path / "again")
    for path in again.iterdir():
        if path.name not in ("checkpoint-1", "segrl_run.json", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = ("--data", data, "--val_split", "val", *BEST, "--max_steps", 2)
    run(BoxRun.check_sft, *flags, "--output_dir", again, "--resume_from_checkpoint", "last")
    for name in ("model.safetensors", "config.yaml"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    alone, resumed = ([line.split(",") for line in (part / "results.csv").read_text().splitlines()]
                      for part in (folder, again))  # fmt: skip
    counted = alone[0].index("num_tokens")  # which TRL counts from the beginning of a process
    assert [row[:counted] + row[counted + 1 :] for row in alone] == [
        row[:counted] + row[counted + 1 :] for row in resumed
    ]


def test_validation_that_cannot_be(tmp_path):
    flags = ("--output_dir", tmp_path / "run")
    for check in (BoxRun.check_grpo, BoxRun.check_sft):
        assert "--load_best_model_at_end: there are no rows to choose by" in refused(check, *flags, *BEST[:2])
        assert "--val_fraction 0.1 of 4 training rows is 0" in refused(check, *flags, "--val_fraction", 0.1)
    assert "--val_fraction 0.1 of 4 training rows" in refused(
        BoxRun.check_grpo, *flags, "--late", "--val_fraction", 0.1
    )
    data = write_folder(make_synthetic(4, size=64), tmp_path / "data", split=["train"] * 2 + ["test"] * 2)
    assert "'valid'" in refused(BoxRun.check_grpo, *flags, "--data", data, "--val_split", "valid")
    path = tmp_path / "my.yaml"
    path.write_text("max_stps: 3\n")
    said = refused(BoxRun.check_grpo, *flags, "--config", path)
    assert said.startswith(f"--config {path}: unknown flag '--max_stps'; did you mean '--max_steps'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_look_and_a_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(BoxRun.check_grpo, "--dry_run", "--val_fraction", 0.5)
    out = capsys.readouterr().out
    assert "rows: 2 training, 2 validation, 2 test; 8 are trained on with all copies" in out
    assert "stage 1: 1 steps of 2 rows" in out
    assert "stage 2: 2 steps of 4 answers" in out
    assert "stage 2: longest answer (max_completion_length) 8 tokens; memory on a GPU about 0.0 GB" in out
    assert "prompts: " in out
    assert not any(path.name != "my.yaml" for path in tmp_path.iterdir())
    for _ in range(2):  # the second look replaces the first
        run(BoxRun.check_grpo, "--quick", "--max_steps", 1)
        assert [entry["step"] for entry in read_json(Path("runs/boxes_quick/log_history.json"))][-1] == 1
