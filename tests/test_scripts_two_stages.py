"""The skeleton of two-stage runs, on a small recipe: boxes without a mask head, images of 64 px."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from builders import tiny_headed_model, tiny_model
from datasets import Dataset, DatasetDict
from marks import slow_to_build
from public_names import BLOCKS
from safetensors.torch import load_file
from script_modules import ROOT, contents, read_json

from segrl.data import make_synthetic, prepare, write_folder
from segrl.errors import SegRLError, UnknownNameError
from segrl.inference import load
from segrl.predictions import ImagePromptSettings
from segrl.scripts import Recipe, TwoStageArguments, TwoStageRun
from segrl.scripts.stages import steps_as_long
from segrl.trainers import SegGRPOConfig, SegSFTConfig

RESULTS = {"config", "versions"}  # of every run
ON_CPU = {"bf16": False, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
RECIPES = {
    "tiny": Recipe(
        build=lambda rows, model: tiny_model(),
        prompt=ImagePromptSettings(instruction="", max_new_tokens=8),
        sft={**ON_CPU, "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-3, "max_length": None},
        grpo={
            **{**ON_CPU, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 8},
            **{"per_device_train_batch_size": 4, "num_generations": 2, "learning_rate": 1e-4},
        },
        rewards=("format", "box_f1"),
        fill_to=8,
        synthetic={"train": 4, "test": 2},
    ),
}


@dataclass
class Flags(TwoStageArguments):
    head: str | None = field(default=None, metadata={"help": "A part of the model."})
    late: bool = field(default=False, metadata={"help": "Whether data is made when the folder is claimed."})


class BoxRun(TwoStageRun):
    """No mask head: rewards on text and boxes."""

    name = "boxes"
    recipes = RECIPES
    training_flags = Flags
    stage1_flags = ("head",)
    baseline_splits = ("train",)
    prompt: ImagePromptSettings

    def load(self, split: str) -> Dataset | None:
        if self.arguments.data is not None:
            return self.arguments.limited(self.read(split), split)
        self.check_synthetic(split)
        return None if getattr(self.arguments, "late", False) else self.made(split)

    def synthesize(self, split: str) -> Dataset:
        assert (self.folder / "segrl_run.json").is_file()
        return self.made(split)

    def made(self, split: str) -> Dataset:
        return make_synthetic(self.count(split), size=64, seed=self.seed + (split == "test"))

    def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
        assert self.copies() == 8 // len(self.train_rows)
        return prepare(self.train_rows, processor, self.prompt, completions=completions, brief=True)

    def baselines(self, segmenter: Any, rows: Dataset) -> dict[str, list[dict[str, Any]]]:
        train = self.rows.get("train")
        return {} if train is None else {"baseline": [{"dice": 0.5, "iou": 0.5, "fail": False}] * len(rows)}


def run(check: Any, *flags: object) -> None:
    check([str(flag) for flag in flags])()


def refused(check: Any, *flags: object, error: type[SegRLError] = SegRLError) -> str:
    with pytest.raises(error) as caught:
        check([str(flag) for flag in flags])
    return str(caught.value)


@pytest.fixture(scope="module")
@slow_to_build
def whole(tmp_path_factory) -> Path:
    """Both stages by one command."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(BoxRun.check_grpo, "--output_dir", folder)
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_json(folder / "log_history.json") if "reward" in entry]


def settings_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "segrl.json")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_both_stages_are_trained_evaluated_and_written(whole):
    results = read_json(whole / "results.json")
    assert set(results) == {
        "baseline",
        "stage1",
        "stage2",
        "gain",
        "gain_over_baseline",
        "zero_spread",
        "config",
        "versions",
    }
    assert results["stage1"]["n"] == results["stage2"]["n"] == 2
    config = results["config"]
    assert (config["preset"], config["rewards"]) == ("tiny", ["format", "box_f1"])
    assert (config["sft"]["max_steps"], config["grpo"]["max_steps"]) == (1, 2)
    assert config["sft"]["output_dir"] == str(whole / "stage1")
    assert [entry["step"] for entry in steps_of(whole)] == [1, 2]
    assert len(read_json(whole / "predictions.json")) == 2
    assert {"predictions.png", "model.safetensors", "segrl.json", "stage1", "checkpoint-1", "cases"} <= {
        path.name for path in whole.iterdir()
    }
    marker = read_json(whole / "segrl_run.json")["arguments"]
    assert marker["rewards"] == ["format", "box_f1"]


def test_stage1_continued_for_as_long_as_stage2_took(whole, tmp_path, capsys):
    """The control: trained once, from stage 1, with its settings, and compared with stage 2."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {name: (folder / name).read_bytes() for name in ("model.safetensors", "stage1/model.safetensors")}
    for name, seconds in (("stage1/log_history.json", 2.0), ("log_history.json", 5.0)):
        history = json.loads((folder / name).read_text())
        history[-1]["train_runtime"] = seconds  # stage 1 had 1 step
        (folder / name).write_text(json.dumps(history))
    run(BoxRun.check_grpo, "--output_dir", folder, "--resume_from_checkpoint", "last", "--control")
    results = json.loads((folder / "results.json").read_text())
    assert read_json(folder / "control" / "log_history.json")[-1]["step"] == 2  # 2.5 rounded to even
    assert set(results["gain"]) == set(results["gain_over_control"]) == {"dice", "box_f1"}
    assert results["control"]["n"] == 2
    printed = capsys.readouterr().out
    assert "stage 2 - stage 1 continued for the same time, dice:" in printed
    assert "control: 2 of 2 answers are invalid (100.0 %):" in printed
    assert "of the groups had no spread in reward" in printed
    assert before == {name: (folder / name).read_bytes() for name in before}
    weights = (folder / "control" / "model.safetensors").read_bytes()
    assert weights not in before.values()
    run(BoxRun.check_grpo, "--output_dir", folder, "--resume_from_checkpoint", "last", "--control")
    assert weights == (folder / "control" / "model.safetensors").read_bytes()


def test_a_control_needs_the_times_of_both_stages(tmp_path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
    (tmp_path / "stage1" / "log_history.json").write_text(json.dumps([{"train_runtime": 3.0, "step": 30}]))
    with pytest.raises(SegRLError, match=r"--control: '.*stage2' does not say how long it took"):
        steps_as_long(tmp_path / "stage1", tmp_path / "stage2")
    (tmp_path / "stage2" / "log_history.json").write_text(json.dumps([{"loss": 1}, {"train_runtime": 0.01, "step": 9}]))
    assert steps_as_long(tmp_path / "stage1", tmp_path / "stage2") == 1
    (tmp_path / "stage1" / "log_history.json").write_text("{}")
    with pytest.raises(SegRLError, match=r"log_history.json: expected a list of objects"):
        steps_as_long(tmp_path / "stage1", tmp_path / "stage2")


def test_a_run_is_continued_after_its_stage1(whole, tmp_path):
    again = shutil.copytree(whole, tmp_path / "run")
    for path in again.iterdir():  # what a run holds that was killed after its first checkpoint
        if path.name not in ("checkpoint-1", "stage1", "segrl_run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage1 = contents(again / "stage1")
    run(BoxRun.check_grpo, "--output_dir", again, "--resume_from_checkpoint", "last")
    assert contents(again / "stage1") == stage1
    for old, new in zip(steps_of(whole), steps_of(again), strict=True):
        assert (old["step"], old["reward"]) == (new["step"], new["reward"])
        assert new["loss"] == pytest.approx(old["loss"], abs=1e-4)
    old, new = (load_file(folder / "model.safetensors") for folder in (whole, again))
    for key, value in old.items():
        torch.testing.assert_close(new[key], value, rtol=0, atol=1e-5)


def test_data_that_is_made_late_gives_the_same_run(whole, tmp_path):
    torch.manual_seed(999)  # what was drawn before does not matter
    run(BoxRun.check_grpo, "--output_dir", tmp_path / "run", "--late")
    for part in ("stage1", "."):
        old, new = (folder / part / "model.safetensors" for folder in (whole, tmp_path / "run"))
        assert old.read_bytes() == new.read_bytes()


def test_stage2_asks_in_another_way_and_with_fewer_rewards(whole, tmp_path):
    """Reasoning may change between the stages; each run keeps its own settings."""
    folder = tmp_path / "run"
    flags = ("--no_reasoning", "--drop_rewards", "box_f1", "--max_steps", 1)
    run(BoxRun.check_grpo, "--model", whole / "stage1", *flags, "--output_dir", folder)
    assert settings_of(whole / "stage1")["reasoning"] is True
    assert settings_of(folder)["reasoning"] is False
    assert not (folder / "stage1").exists()
    (entry,) = steps_of(folder)
    assert "rewards/format/mean" in entry
    assert "rewards/box_f1/mean" not in entry
    results = read_json(folder / "results.json")
    assert results["config"]["rewards"] == ["format"]
    assert "sft" not in results["config"]
    assert results["stage1"] == read_json(whole / "results.json")["stage1"]


@pytest.mark.slow
def test_stage1_alone_with_another_frame(tmp_path):
    folder = tmp_path / "run"
    run(BoxRun.check_sft, "--frame_kind", "relative_1000", "--output_dir", folder)
    assert set(read_json(folder / "results.json")) == {*RESULTS, "baseline", "stage1", "gain_over_baseline"}
    assert settings_of(folder)["frame_kind"] == "relative_1000"
    assert "was trained with frame_kind='relative_1000', here it is 'original_px'; use the same" in refused(
        BoxRun.check_grpo, "--model", folder, "--frame_kind", "original_px", "--output_dir", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_stage2_alone(tmp_path):
    run(BoxRun.check_grpo, "--skip_stage1", "--max_steps", 1, "--output_dir", tmp_path / "run")
    assert set(read_json(tmp_path / "run" / "results.json")) == {
        *RESULTS,
        "baseline",
        "stage2",
        "gain_over_baseline",
        "zero_spread",
    }
    assert not (tmp_path / "run" / "stage1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("head", [False, True])
def test_stage2_alone_with_a_reference_of_a_model_from_no_folder(head, tmp_path):
    """TRL loads the reference model of the KL term by the policy's name, which a new model does not have."""

    class Headed(BoxRun):
        def build(self) -> Any:
            return tiny_headed_model() if head else super().build()

    run(Headed.check_grpo, "--skip_stage1", "--max_steps", 1, "--beta", 0.04, "--output_dir", tmp_path / "run")
    assert all("kl" in entry for entry in steps_of(tmp_path / "run"))
    assert (tmp_path / "run" / "mask_head.json").is_file() is head


def test_evaluation_repeats_what_training_found(whole, tmp_path):
    flags = ("--model", whole, "--output_dir", tmp_path / "out")
    run(BoxRun.check_evaluation, *flags)
    results = read_json(tmp_path / "out" / "results.json")
    assert set(results) == {"baseline", "model", "gain_over_baseline", "config", "versions"}
    assert results["model"] == read_json(whole / "results.json")["stage2"]
    assert (tmp_path / "out" / "predictions.png").is_file()
    assert "is not empty" in refused(BoxRun.check_evaluation, *flags)
    run(BoxRun.check_evaluation, *flags, "--overwrite", "--split", "train", "--pictures", 0, "--train_limit", 1)
    (record,) = read_json(tmp_path / "out" / "predictions.json")
    assert record["name"] == "synthetic_42_00000"
    assert not (tmp_path / "out" / "predictions.png").exists()


def test_evaluation_on_data_that_has_no_training_split(whole, tmp_path):
    folder = write_folder(make_synthetic(3, size=64, seed=5), tmp_path / "data", split="test")
    run(BoxRun.check_evaluation, "--model", whole, "--data", folder, "--output_dir", tmp_path / "out")
    assert set(read_json(tmp_path / "out" / "results.json")) == {*RESULTS, "model"}


@pytest.mark.slow
def test_data_is_divided_anew(tmp_path):
    rows = make_synthetic(9, size=64).add_column("source", ["north", "south", "east"] * 3)
    folder = write_folder(rows, tmp_path / "data", split=["train"] * 8 + ["test"])
    run(BoxRun.check_grpo, "--data", folder, "--hold_out_source", "south", "--output_dir", tmp_path / "run")
    names = [record["name"] for record in read_json(tmp_path / "run" / "predictions.json")]
    assert names == rows["name"][1::3]
    tested = []
    for fold in ("1", "2"):
        flags = ("--data", folder, "--folds", 2, "--fold", fold, "--output_dir", tmp_path / fold)
        run(BoxRun.check_evaluation, "--model", tmp_path / "run", *flags)
        tested += [record["name"] for record in read_json(tmp_path / fold / "predictions.json")]
    assert sorted(tested) == sorted(rows["name"])
    assert "--folds divides the rows of --data; pass --data, or drop the flag" in refused(
        BoxRun.check_grpo, "--folds", 2, "--fold", 1, "--output_dir", tmp_path / "x"
    )
    flags = ("--model", tmp_path / "run", "--data", folder, "--folds", 2, "--fold", 1, "--output_dir", tmp_path / "x")
    assert "unknown split of data that is divided anew 'validation'" in refused(
        BoxRun.check_evaluation, *flags, "--split", "validation"
    )
    assert not (tmp_path / "x").exists()


def test_a_run_knows_whether_its_model_was_given(whole, tmp_path):
    """What the preset's own model learned in place of pretraining holds for stage 2 alone, and for no other model."""

    def own(config: Any, **flags: Any) -> bool:
        made = BoxRun(Flags(**flags), 0, tmp_path)
        made.config = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        return made.own_model

    given = shutil.copytree(whole / "stage1", tmp_path / "given")  # of which nobody knows how it began
    assert own(SegSFTConfig)
    assert own(SegGRPOConfig)
    assert own(SegGRPOConfig, model=str(whole / "stage1"))
    assert not own(SegGRPOConfig, model=str(given))
    assert not own(SegSFTConfig, model=str(whole / "stage1"))
    assert not own(SegGRPOConfig, model=str(whole), skip_stage1=True)
    assert not own(SegGRPOConfig, skip_stage1=True)
    (given / "segrl_run.json").write_text(json.dumps({"arguments": {"model": "base"}}))
    assert not own(SegGRPOConfig, model=str(given))


def test_a_run_is_loaded_as_it_was_asked(whole):
    segmenter = load(whole, device="cpu")
    assert segmenter.settings == ImagePromptSettings(instruction="", max_new_tokens=8)


def test_a_run_is_replaced_only_when_asked(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = contents(folder)
    assert "is not empty" in refused(BoxRun.check_sft, "--output_dir", folder)
    for flags, message in [
        (["--model", folder], f"--overwrite would remove --model {str(folder)!r}"),
        (["--data", "no_such_folder"], "no such folder"),
        (["--resume_from_checkpoint", "last"], "pass one of them"),
    ]:
        assert message in refused(BoxRun.check_sft, "--output_dir", folder, "--overwrite", *flags)
    assert contents(folder) == before
    run(BoxRun.check_sft, "--output_dir", folder, "--overwrite")
    assert not (folder / "checkpoint-2").exists()
    assert set(read_json(folder / "results.json")) == {*RESULTS, "baseline", "stage1", "gain_over_baseline"}


@pytest.mark.slow
def test_the_run_of_the_documentation(tmp_path, monkeypatch):
    recipe = dict(BLOCKS[ROOT / "docs" / "how-to" / "write-a-training-script.md"])["recipe.py"]
    monkeypatch.chdir(tmp_path)
    module: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(recipe, "recipe.py", "exec", dont_inherit=True), module)
    run(module["MyRun"].check_grpo, "--output_dir", "runs/mine", "--use_cpu", "true")
    found = set(read_json(Path("runs/mine/results.json")))
    assert found == {*RESULTS, "stage1", "stage2", "gain", "zero_spread"}


@pytest.mark.slow
def test_stage1_on_answers_alone_before_stage2_with_reasoning(tmp_path):
    """The rows of stage 1 have no think block, those of stage 2 ask for one, and each stage saves its own settings."""
    seen = []

    class Watched(BoxRun):
        def prepare(self, model: Any, processor: Any, *, completions: bool) -> Dataset:
            rows = super().prepare(model, processor, completions=completions)
            seen.append((self.prompt.reasoning, rows[0].get("completion", [{"content": None}])[0]["content"]))
            return rows

    run(Watched.check_grpo, "--sft_reasoning", "false", "--max_steps", 1, "--output_dir", tmp_path / "run")
    (first, answer), (second, nothing) = seen
    assert (first, second, nothing) == (False, True, None)
    assert answer.startswith("<answer>")
    assert settings_of(tmp_path / "run" / "stage1")["reasoning"] is False
    assert settings_of(tmp_path / "run")["reasoning"] is True


# ---- refusals: before anything is written ----------------------------------------------------------------------------

REFUSED: list[tuple[str, Sequence[object], str]] = [
    ("sft", ["--preset", "tyny"], "unknown preset 'tyny'; did you mean 'tiny'? Known: tiny"),
    ("sft", ["--rewards", "format"], "--rewards is for train_grpo.py; drop it"),
    ("sft", ["--skip_stage1"], "--skip_stage1 is for train_grpo.py; drop it"),
    ("sft", ["--control"], "--control is for train_grpo.py; drop it"),
    ("sft", ["--pretrain_steps", "0"], "--pretrain_steps 0: expected 1 or more"),
    ("grpo", ["--control", "--skip_stage1"], "--control continues stage 1, and --skip_stage1 has none; drop one"),
    ("sft", ["--drop_rewards", "format"], "--drop_rewards is for train_grpo.py; drop it"),
    ("sft", ["--model", "no_such_model"], "--model 'no_such_model': no such folder, nor a model name owner/name"),
    ("sft", ["--frame_kind", "px"], "argument --frame_kind/--frame-kind: invalid choice: 'px'"),
    ("grpo", ["--rewards", "box_f2"], "unknown reward 'box_f2'; did you mean 'box_f1'?"),
    ("grpo", ["--drop_rewards", "box_f2"], "unknown reward for --drop_rewards 'box_f2'; did you mean 'box_f1'?"),
    ("grpo", ["--drop_rewards", "box_f1", "format"], "--drop_rewards box_f1 format: no reward is left"),
    ("grpo", ["--use_vllm", "true"], "--use_vllm: vLLM is not installed; pip install 'trl[vllm]', or drop the flag"),
    ("grpo", ["--model", "no_such_run"], "--model 'no_such_run': no such folder; pass the output_dir of a run"),
    ("grpo", ["--model", "."], "--model '.' holds no model; pass the output_dir of a finished run"),
    ("grpo", ["--train_limit", "1", "--per_device_train_batch_size", "20"], "8 training rows, expected at least 10"),
    ("grpo", ["--late", "--per_device_train_batch_size", "20"], "8 training rows, expected at least 10"),
    ("grpo", ["--data", "no_such_folder"], "--data 'no_such_folder': no such folder"),
    ("grpo", ["--resume_from_checkpoint", "last"], "--resume_from_checkpoint last: no checkpoint in"),
    ("evaluation", [], "--model is missing: pass the folder of a run, such as runs/boxes"),
    ("evaluation", ["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
    ("evaluation", ["--model", "x", "--pictures", "-1"], "--pictures -1: expected 0 or more"),
    ("evaluation", ["--model", "x", "--split", "tset"], "unknown split of the synthetic images 'tset'; did you mean"),
]


@pytest.mark.parametrize(("script", "flags", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(tmp_path, script, flags, message):
    folder = tmp_path / "run"
    assert message in refused(getattr(BoxRun, f"check_{script}"), *flags, "--output_dir", folder)
    assert not folder.exists()


def test_a_control_of_a_stage1_that_logged_no_time(whole, tmp_path):
    stage1 = shutil.copytree(whole / "stage1", tmp_path / "stage1")
    (stage1 / "log_history.json").unlink()
    flags = ("--control", "--model", stage1, "--output_dir", tmp_path / "run")
    assert "does not say how long it took" in refused(BoxRun.check_grpo, *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_trained_further_with_other_parts(whole, tmp_path):
    flags = ("--model", whole / "stage1", "--head", "other", "--output_dir", tmp_path / "run")
    assert "--head belongs to stage 1; --model" in refused(BoxRun.check_grpo, *flags)
    assert not (tmp_path / "run").exists()


def test_a_preset_with_a_setting_that_no_trainer_has():
    class Mistyped(BoxRun):
        recipes: ClassVar = {"tiny": replace(RECIPES["tiny"], sft={"max_stps": 1})}

    with pytest.raises(UnknownNameError, match="unknown setting of SegSFTConfig 'max_stps'; did you mean 'max_steps'"):
        Mistyped.check_sft([])


def test_settings_of_another_task_are_refused(whole, tmp_path):
    run_folder = shutil.copytree(whole / "stage1", tmp_path / "sft")
    shared = {name: value for name, value in settings_of(whole).items() if not name.startswith("answer_")}
    (run_folder / "segrl.json").write_text(json.dumps({**shared, "task": "volumes", "max_edge": 3}))
    said = refused(BoxRun.check_grpo, "--model", run_folder, "--output_dir", tmp_path / "run")
    assert "segrl.json: unknown key 'max_edge'" in said


# ---- what the data holds ---------------------------------------------------------------------------------------------


def test_files_outside_the_folder_need_a_flag(tmp_path):
    folder = write_folder(make_synthetic(8, size=64), tmp_path / "data", split=["train"] * 4 + ["test"] * 4)
    image = next((folder / "images").iterdir())
    image.rename(tmp_path / image.name)
    image.symlink_to(tmp_path / image.name)
    flags = ("--data", folder, "--output_dir", tmp_path / "run")
    for check in (BoxRun.check_sft, BoxRun.check_grpo):
        assert "(--allow_outside) if you trust the table" in refused(check, *flags)
        check([*map(str, flags), "--allow_outside"])
    assert not (tmp_path / "run").exists()


def test_splits_that_share_images_are_said_before_training(tmp_path):
    rows = make_synthetic(8, size=64)
    splits: Any = {"train": rows, "test": rows.select([1, 2])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    for check in (BoxRun.check_sft, BoxRun.check_grpo):
        with pytest.warns(UserWarning, match="2 images are in the splits 'train' and 'test'"):
            check(["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")])
