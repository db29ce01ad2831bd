"""The examples as a user runs them: scripts, files, flags, and every bad input of the command line.

What all examples share is tested on each; the skeleton itself in `test_scripts_two_stages.py`, the own parts of
MedVol-R1 in `test_examples_medvol.py`.
"""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from marks import learned_by_heart, slow_to_build
from medvol_data import volumes
from PIL import Image
from safetensors.torch import load_file, save_file
from script_modules import ROOT, Example, phases_of, read_json
from test_models_loading import hub_key, write_hub_folder

from segrl import SegGRPOConfig, SegSFTConfig
from segrl.data import load_volumes, make_synthetic, write_folder
from segrl.errors import SegRLError
from segrl.evaluation import evaluate, evaluate_volumes
from segrl.inference import ReasoningSegmenter, load
from segrl.models import tiny_qwen2_5_vl
from segrl.predictions import ImagePromptSettings
from segrl.scripts import Parser, TwoStageRun, find_preset, parse
from segrl.scripts.results import box_f1
from segrl.segmenters import Sam2Segmenter, sam2_config

pytestmark = learned_by_heart


@dataclass(frozen=True)
class Kind:
    """An example, and what differs between them."""

    example: Example
    run_class: str
    rewards: Sequence[str]
    baseline: str
    pictures: str
    scores: set[str]
    short: Sequence[object]  # flags of a short main job
    quick: Sequence[object]  # flags of one step of stage 1 on `data`

    @property
    def runs(self) -> type[TwoStageRun]:
        return getattr(self.example.modules["recipe"], self.run_class)


PIN = ("--dataloader_pin_memory", "false")
KINDS = [
    Kind(
        Example("core_seg"),
        "CoreSegRun",
        ("format", "box_f1", "dual_granularity_mask"),
        "baseline",
        "predictions.png",
        {"mdice", "miou", "fail"},
        ("--train_limit", 32, "--eval_limit", 8),
        ("--max_steps", 1, "--train_limit", 16, "--eval_limit", 4, *PIN),
    ),
    Kind(
        Example("medvol_r1"),
        "MedVolRun",
        ("slice_format", "slice_visibility", "slice_boxes", "propagated_dice"),
        "oracle",
        "pictures",
        {"mdice", "miou", "fail", "nsd", "slice_visibility", "slice_boxes"},
        (
            *("--train_limit", 9, "--eval_limit", 2),
            *("--per_device_train_batch_size", 8, "--max_completion_length", 40),
        ),
        ("--max_steps", 1, "--eval_limit", 2, "--per_device_train_batch_size", 2, *PIN),
    ),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.example.name)
def kind(request) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def data(kind, tmp_path_factory) -> Path:
    """A folder with rows to train and to test on."""
    folder = tmp_path_factory.mktemp("data") / "data"
    return lesions(folder) if kind.example.name == "core_seg" else volumes(folder, ["train", "test"], 2)


def lesions(folder: Path) -> Path:
    return write_folder(make_synthetic(32, size=64), folder, split=["train"] * 24 + ["test"] * 8)


@pytest.fixture(scope="module")
@slow_to_build
def main_run(kind, tmp_path_factory) -> tuple[Path, str, str]:
    """The main job, shortened, with a checkpoint at each step; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("main") / "run"
    code, out, err = kind.example.run("train_grpo", *two_steps(kind, folder))
    assert code == 0, err[-3000:]
    return folder, out, err


def two_steps(kind: Kind, folder: Path) -> tuple[object, ...]:
    saved = ("--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1)
    return ("--max_steps", 2, *kind.short, *saved, *PIN, "--output_dir", folder)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What each step of stage 2 logged."""
    return [entry for entry in read_json(run / "log_history.json") if "reward" in entry]


def check_summary(kind: Kind, summary: dict[str, Any], n: int) -> None:
    """What `results.json` documents for one model."""

    boxes = {"box_f1"} if "n_scored" in summary and kind.baseline == "baseline" else set()

    def check_scores(scores: dict[str, Any]) -> None:
        for name in (*kind.scores, *boxes):
            low, high = scores["ci95"][name]
            assert 0 <= low <= scores[name] <= high <= 1

    volumes = {"hd95_mm", "n_scored"} if kind.baseline == "oracle" else set()
    answered = {"statuses"} if "statuses" in summary else set()  # neither a constant mask nor true boxes answer
    answered |= {"no_target"} & set(summary)  # where some rows have none
    assert set(summary) == {
        *kind.scores,
        *volumes,
        *boxes,
        *({"n_scored"} if boxes else ()),
        *answered,
        "n",
        "ci95",
        "groups",
    }
    assert sum(summary.get("statuses", {"valid": n}).values()) == n
    assert summary["n"] == n
    check_scores(summary)
    assert set(summary["groups"]) == ({"lesion"} if volumes else {"modality", "anatomy"})
    for groups in summary["groups"].values():
        assert sum(group["n"] for group in groups.values()) == n
        for group in groups.values():
            check_scores(group)
    if volumes:
        assert (summary["hd95_mm"] is None) == (not summary["n_scored"]["hd95_mm"])


# ---- the main job ----------------------------------------------------------------------------------------------------


def test_results_have_the_documented_layout(kind, main_run):
    run, results = main_run[0], read_json(main_run[0] / "results.json")
    more = {"gain", "zero_spread", "encoded_slices" if kind.baseline == "oracle" else "gain_over_baseline"}
    assert set(results) == {kind.baseline, "stage1", "stage2", "config", "versions", *more}
    assert len(read_json(main_run[0] / "evaluation_time.json")["seconds_per_answer"]) >= 2
    rows = results["stage2"]["n"]
    for stage in (kind.baseline, "stage1", "stage2"):
        check_summary(kind, results[stage], n=rows)
    assert results[kind.baseline]["mdice"] > 0
    assert {"torch", "transformers", "trl", "segrl", "python", "sam2"} <= set(results["versions"])
    config = results["config"]
    assert (config["preset"], config["rewards"]) == ("tiny", list(kind.rewards))
    assert config["grpo"]["max_steps"] == config["sft"]["max_steps"] == 2
    assert config["sft"]["output_dir"] == str(run / "stage1")
    assert config["sft"]["logging_steps"] == 1  # a flag of the machine holds for both stages
    assert config["sft"]["learning_rate"] > config["grpo"]["learning_rate"]  # one of the method does not
    records = read_json(run / "predictions.json")
    assert len(records) == rows
    assert {"dice", "iou", "fail", "text", "status", "boxes", "query", "modality", "name"} <= set(records[0])
    assert np.mean([record["dice"] for record in records]) == pytest.approx(results["stage2"]["mdice"])
    assert (run / kind.pictures).exists()


def test_logs_hold_every_term_of_the_objectives(kind, main_run):
    steps = steps_of(main_run[0])
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        rewards = [entry[f"rewards/{name}/mean"] for name in kind.rewards]
        assert entry["reward"] == pytest.approx(sum(rewards), abs=1e-5)
        assert {"rollout/dice", "rollout/fail", "rollout/valid"} <= set(entry)
        if kind.baseline == "baseline":
            assert entry["loss"] == pytest.approx(entry["policy"] + entry["dense/dice_ce"], abs=1e-3)
        else:
            assert {"kl", "rollout/encoded_slices"} <= set(entry)
    if kind.baseline == "baseline":
        terms = {"loss", "text", "text_weighted", "mask/dice", "dense/dice_ce", "dense/dice_ce_weighted"}
        assert terms <= set().union(*read_json(main_run[0] / "stage1" / "log_history.json"))


def test_bars_and_table_are_shown(kind, main_run):
    folder, out, err = main_run
    assert "2/2 [" in err
    bars = ["oracle"] * (kind.baseline == "oracle") + ["evaluate"] * 2
    assert re.findall(r"^(\w+) ━+ 100%", out, re.MULTILINE)[-len(bars) :] == bars
    rows = re.findall(rf"^│ ({kind.baseline}|stage1|stage2) .*│$", out, re.MULTILINE)
    assert rows == [kind.baseline, "stage1", "stage2"]
    assert f"Written to {folder}: results.json, predictions.json, {kind.pictures}" in out
    images = ["vision", "captions", "segmenter", "text alone"]
    before = images if kind.baseline == "baseline" else ["segmenter", "vision"]
    assert phases_of(out) == [*before, "stage 1", "stage 2", "evaluation"]


def test_the_run_loads_again_and_predicts_the_same(kind, main_run, tmp_path):
    run = main_run[0]
    segmenter = load(run, device="cpu")
    if isinstance(segmenter, ReasoningSegmenter):
        rows = make_synthetic(8, size=96, seed=3 * 42 + 1, hard=True)
        records = evaluate(segmenter, rows, batch_size=8, metrics=(box_f1,), progress=False)
    else:
        records = evaluate_volumes(segmenter, load_volumes(run / "data" / "test"), batch_size=2, progress=False)
    assert json.loads(json.dumps(records)) == read_json(run / "predictions.json")


@pytest.mark.long
def test_an_interrupted_run_is_continued(kind, main_run, tmp_path):
    run = shutil.copytree(main_run[0], tmp_path / "run")
    for path in run.iterdir():  # what a run holds that was killed after its first checkpoint
        if path.name not in ("checkpoint-1", "stage1", "segrl_run.json", "segmenter.json", "segmenter.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind.example.done("train_grpo", *two_steps(kind, run), "--resume_from_checkpoint", "last")
    whole, resumed = (read_json(folder / "log_history.json") for folder in (main_run[0], run))
    assert [entry["step"] for entry in resumed] == [entry["step"] for entry in whole]
    assert resumed[0] == whole[0]
    assert resumed[1]["loss"] == pytest.approx(whole[1]["loss"], abs=1e-4)
    for name in ("model.safetensors", *(["mask_head.safetensors"] if kind.baseline == "baseline" else [])):
        expected, found = load_file(main_run[0] / name), load_file(run / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


def test_evaluation_of_a_run(kind, main_run, tmp_path):
    out = tmp_path / "out"
    rows = read_json(main_run[0] / "results.json")["stage2"]["n"]
    flags = ("--model", main_run[0], "--eval_limit", rows, "--train_limit", 2, "--output_dir", out)
    kind.example.done("evaluate", *flags)
    results, trained = read_json(out / "results.json"), read_json(main_run[0] / "results.json")
    more = set() if kind.baseline == "oracle" else {"gain_over_baseline"}
    assert set(results) == {kind.baseline, "model", "config", "versions", *more}
    assert results["model"] == trained["stage2"]
    assert (out / kind.pictures).exists()
    if kind.baseline == "oracle":
        assert results["oracle"] == trained["oracle"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(kind, data, tmp_path):
    """Weights of model, head, segmenter and adapters, whatever was drawn before."""
    runs = [tmp_path / name for name in ("one", "two", "other")]
    for seed, run in zip((7, 7, 8), runs, strict=True):
        torch.rand(seed)
        flags = ("--data", data, *kind.quick, "--seed", seed, "--output_dir", run)
        kind.example.done("train_sft", *flags)
    files = [path.name for path in runs[0].glob("*.safetensors")]
    assert len(files) == 2
    one, two, other = ([(run / name).read_bytes() for name in files] for run in runs)
    assert one == two
    assert one != other


@pytest.mark.long
def test_two_processes_finish(kind, data, tmp_path):
    """With a global batch of 4 prompts: 16 completions, of which two processes take 4 each in two steps."""
    flags = ("--data", data, *kind.quick, "--per_device_train_batch_size", 4, "--max_completion_length", 48)
    flags += ("--global_batch_size", 4)
    done = kind.example.launch("train_grpo", *flags, "--output_dir", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    rows = 4 if kind.baseline == "baseline" else 2
    results = read_json(tmp_path / "run" / "results.json")
    check_summary(kind, results["stage2"], n=rows)
    sizes = [results["config"]["grpo"][name] for name in ("gradient_accumulation_steps", "generation_batch_size")]
    assert sizes == [2, 16]
    done = kind.example.launch("train_grpo", "--data", data, "--output_dir", tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: output_dir") == 1


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_documented_commands_are_understood(kind):
    runs, text = kind.runs, (kind.example.folder / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    name = kind.example.name
    commands = re.findall(rf"^(?:accelerate launch|python) examples/{name}/(\w+)\.py ?(.*)$", text, re.MULTILINE)
    assert len(commands) >= 15
    scripts = {path.stem for path in kind.example.folder.glob("*.py")} - {"recipe", "segmenter", "slice_texts"}
    assert {script for script, _ in commands} == scripts
    for script, flags in commands:
        argv = shlex.split(flags, comments=True)
        if script == "evaluate":
            Parser(runs.evaluation_flags).read(argv)
        else:
            if "--deepspeed" in argv:  # is not installed with segrl
                at = argv.index("--deepspeed")
                assert read_json(ROOT / argv[at + 1])["zero_optimization"]["stage"] == 2
                del argv[at : at + 2]
            config, stage = {"train_sft": (SegSFTConfig, "sft"), "train_grpo": (SegGRPOConfig, "grpo")}[script]
            parse(
                [*argv, "--bf16", "false"],
                runs.training_flags,
                config,
                defaults=lambda known, stage=stage: getattr(find_preset(known.preset, runs.recipes), stage),
            )


def test_rare_kinds_of_images_get_more_views(tmp_path):
    """360 CT and 40 MR images: three to one as the square root says, not nine to one."""
    runs = KINDS[0].example.modules["recipe"].CoreSegRun
    (arguments,) = Parser(runs.training_flags, description="").read(["--data", str(tmp_path)])
    run = runs(arguments, 0, tmp_path)
    assert run.recipe.sft["max_steps"] > runs.recipes["tiny"].sft["max_steps"]
    columns = {"modality": ["CT"] * 360 + ["MR"] * 40, "lesion": ["cyst"] * 400}
    run.rows["train"] = Dataset.from_dict(columns)
    copies = run.augmented()
    views = [1 + n for n in (copies[0], copies[-1])]
    assert copies == [views[0] - 1] * 360 + [views[1] - 1] * 40
    assert views == [int(run.recipe.fill_to * share / n) for share, n in ((0.75, 360), (0.25, 40))]
    assert run.views() == 360 * views[0] + 40 * views[1]
    run.rows["train"] = Dataset.from_dict({**columns, "reasoning": ["It is on the left."] * 400})
    assert run.augmented() == [0] * 400
    run.rows["train"] = Dataset.from_dict({"modality": ["CT"], "lesion": ["cyst"]})
    assert run.augmented() == [31]  # at most 32 views of an image
    (arguments,) = Parser(runs.training_flags).read([])
    synthetic = runs(arguments, 0, tmp_path)
    synthetic.rows["train"] = synthetic.load("train")
    assert not any(synthetic.augmented())
    assert (synthetic.views(), synthetic.written()) == (2000, 400)  # stage 1 sees those with written answers
    plain: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "num_train_epochs": 1}
    stage1 = SegSFTConfig(str(tmp_path), per_device_train_batch_size=4, **plain)
    stage2 = SegGRPOConfig(str(tmp_path), per_device_train_batch_size=8, num_generations=4, **plain)
    assert [synthetic.steps(config) for config in (stage1, stage2)] == [100, 1000]


@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "evaluate"])
def test_help_shows_the_flags_of_the_example_first(kind, script):
    code, out, _ = kind.example.run(script, "--help")
    assert code == 0
    flags = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert flags[0] == "--data"
    assert flags.index("--data") < flags.index("--preset") < flags.index("--model")
    assert len(set(flags)) == len(flags)
    assert ("--learning_rate" in flags) is script.startswith("train")
    assert "--adam_beta1" not in flags
    code, out, _ = kind.example.run(script, "--help_all")
    assert code == 0
    assert ("--adam_beta1" in out) is script.startswith("train")


@pytest.mark.slow
def test_an_error_of_a_script_is_one_line_and_exit_code_2(tmp_path):
    done = KINDS[0].example.launch("train_grpo", "--preset", "tyny", "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == "error: unknown preset 'tyny'; did you mean 'tiny'? Known: core_seg_3b, tiny\n"
    assert not (tmp_path / "run").exists()


FEW = ("--train_limit", 3, "--eval_limit", 2)
BAD_FLAGS = [
    (["--max_stps", "3"], "unknown flag '--max_stps'; did you mean '--max_steps'?"),
    (["--max_step=3"], "unknown flag '--max_step'; did you mean '--max_steps'?"),
    (["somewhere"], "unexpected argument 'somewhere'"),
    (["--max_steps", "three"], "argument --max_steps/--max-steps: invalid int value: 'three'"),
    (["--num_generations", "5"], "must be divisible by num_generations"),
    (["--train_limit", "0"], "--train_limit 0: expected 1 or more"),
    (["--eval_batch_size", "0"], "--eval_batch_size 0: expected 1 or more"),
    (["--frame_kind", "px"], "argument --frame_kind/--frame-kind: invalid choice: 'px'"),
    (["--rewards", "format", "format"], "--rewards format format: a reward is named twice"),
    (["--data", "no_such_folder"], "--data 'no_such_folder': no such folder"),
    (["--data", "no_such_owner/name"], "--data 'no_such_owner/name' cannot be loaded"),
    (["--resume_from_checkpoint", "no/checkpoint-1"], "--resume_from_checkpoint 'no/checkpoint-1': no such folder"),
    (["--model", "no_such_run"], "--model 'no_such_run': no such folder"),
    (["--segmenter", "no_such.pt"], "SAM 2 checkpoint 'no_such.pt' does not exist"),
    (["--per_device_train_batch_size", "20000"], "training rows, expected at least 5000"),
]
OWN_BAD_FLAGS = {
    "core_seg": [
        ("train_grpo", ["--dense_weight", "-1"], "--dense_weight -1.0: expected 0 or more"),
        ("train_grpo", ["--dense_weight", "nan"], "--dense_weight nan: expected 0 or more"),
        ("train_grpo", ["--model", "."], "--model '.' has no mask head (no mask_head.json)"),
        ("train_sft", ["--adapter", "lineer"], "unknown adapter 'lineer'; did you mean 'linear'?"),
        ("train_sft", ["--probe", "answr"], "unknown probe 'answr'; did you mean 'answer'?"),
        ("train_sft", ["--rewards", "format"], "--rewards is for train_grpo.py"),
    ],
    "medvol_r1": [
        ("train_grpo", ["--drop_rewards", "slice_bxes"], "--drop_rewards 'slice_bxes'; did you mean 'slice_boxes'?"),
        ("train_grpo", ["--reach", "-1"], "--reach -1: expected 0 or more"),
        ("train_grpo", ["--key_slices", "0"], "--key_slices 0: expected 1 or more"),
        ("train_grpo", ["--segmenter_steps", "0"], "--segmenter_steps 0: expected 1 or more"),
        ("train_grpo", ["--prompt_boxes", "some"], "invalid choice: 'some'"),
        ("train_grpo", ["--m3d_seg", "KiTS23"], "--m3d_seg KiTS23: pass --data with the folder of M3D-Seg too"),
        ("train_grpo", ["--data", ".", "--m3d_seg", "KiTS24"], "data set of M3D-Seg 'KiTS24'; did you mean 'KiTS23'?"),
        ("train_grpo", ["--data", ".", "--m3d_seg", "KiTS23"], ".: no data set 0004 of M3D-Seg; expected 0004/0004"),
        ("train_grpo", ["--model", "."], "--model '.' holds no model"),
        ("train_sft", ["--reach", "2"], "--reach is for train_grpo.py"),
        (
            "evaluate",
            ["--model", "x", "--split", "tset"],
            "synthetic volumes 'tset'; did you mean 'test'?",
        ),
        ("evaluate", ["--model", "x", "--m3d_seg", "KiTS23"], "pass --data with the folder of M3D-Seg too"),
    ],
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adapter", "lineer"), "unknown adapter 'lineer'; did you mean 'linear'?"),
        (("--probe", "seg"), "unknown probe 'seg'"),
        (("--segmenter", "nothing.pt"), "SAM 2 checkpoint 'nothing.pt' does not exist"),
        (("--model", "no_such_run"), "--model 'no_such_run': no such folder"),
    ],
)
def test_wrong_parts_are_refused_before_data_is_made(flags, message, tmp_path, monkeypatch):
    """3,000 images used to be drawn first."""

    def load(self: Any, split: str) -> Any:
        raise AssertionError("data is made")

    monkeypatch.setattr(CORE_SEG.modules["recipe"].CoreSegRun, "load", load)
    with pytest.raises(SegRLError, match=re.escape(message)):
        CORE_SEG.modules["recipe"].CoreSegRun.check_grpo([*flags, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda value: str(value)[:40])
def test_bad_flags(kind, tmp_path, flags, message):
    assert message in kind.example.refused("train_grpo", *FEW, *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_flags_of_its_own(kind, tmp_path):
    for script, flags, message in OWN_BAD_FLAGS[kind.example.name]:
        assert message in kind.example.refused(script, *FEW, *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_data_sets_on_disk(kind, data, tmp_path):
    rows = make_synthetic(4, size=64) if kind.baseline == "baseline" else load_volumes(data, "train")
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "tset": rows}).save_to_disk(str(tmp_path / "split"))
    DatasetDict({"train": rows.remove_columns("query"), "test": rows}).save_to_disk(str(tmp_path / "query"))
    for name, message in [
        ("one", "is one data set; expected the splits train and test"),
        ("split", "'test'; did you mean 'tset'?"),
        ("query", "lacks the columns ['query']"),
    ]:
        flags = ("--data", tmp_path / name, "--output_dir", tmp_path / "run")
        assert message in kind.example.refused("train_grpo", *flags)
    assert not (tmp_path / "run").exists()


# ---- CORE-Seg: ablations, one command each ---------------------------------------------------------------------------

CORE_SEG, QUICK = KINDS[0].example, KINDS[0].quick


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return lesions(tmp_path_factory.mktemp("images") / "lesions")


@pytest.fixture(scope="module")
@slow_to_build
def sft_run(tmp_path_factory, images) -> Path:
    """One step of stage 1."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    CORE_SEG.done("train_sft", "--data", images, *QUICK, "--output_dir", folder)
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_a_validation_before_the_first_step_is_of_the_stage_alone(tmp_path):
    """The text-only part before stage 1 is a training too, which has no rows to validate on."""
    flags = ("--quick", "--max_steps", 1, "--train_limit", 12, "--eval_limit", 2, "--pretrain_steps", 1, *PIN)
    validated = ("--val_fraction", 0.2, "--eval_on_start", "True")
    CORE_SEG.done("train_sft", *flags, *validated, "--output_dir", tmp_path / "run")
    history = read_json(tmp_path / "run" / "log_history.json")
    assert [entry["step"] for entry in history if "eval_dice" in entry] == [0, 1]


@pytest.mark.long
def test_stage2_from_a_stage1_run_on_a_data_set_on_disk(sft_run, tmp_path):
    """Without chain of thought, which stage 1 had, and with some of the rewards."""
    rows = make_synthetic(24, size=64).remove_columns(["modality", "name"])
    splits: Any = {"train": rows.select(range(16)), "test": rows.select(range(16, 24))}
    DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    run = tmp_path / "run"
    flags = ("--no_reasoning", "--rewards", "format", "box_f1", "--data", tmp_path / "data", *QUICK)
    CORE_SEG.done("train_grpo", "--model", sft_run, *flags, "--output_dir", run)
    assert not (run / "stage1").exists()
    assert list(read_json(run / "results.json")["stage2"]["groups"]["modality"]) == ["unspecified"]
    assert [record["name"] for record in read_json(run / "predictions.json")] == [f"row {n}" for n in range(4)]
    assert [load(folder).settings.reasoning for folder in (sft_run, run)] == [True, False]
    (entry,) = steps_of(run)
    rewards = {f"rewards/{name}/mean" for name in ("format", "box_f1")}
    assert {key for key in entry if re.fullmatch("rewards/.*/mean", key)} == rewards


@pytest.mark.long
def test_without_dense_losses(images, tmp_path):
    run = tmp_path / "run"
    CORE_SEG.done("train_grpo", "--dense_weight", 0, "--data", images, *QUICK, "--output_dir", run)
    for part in ("stage1", "."):
        history = read_json(run / part / "log_history.json")
        assert not any(key.startswith("dense/") for entry in history for key in entry)
    heads = [load_file(run / part / "mask_head.safetensors") for part in ("stage1", ".")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "adapter", "probe", "more"),
    [
        ("train_grpo", "linear", "answer", []),
        pytest.param("train_grpo", "mlp", "seg_token", ["--skip_stage1"], marks=pytest.mark.long),
        pytest.param("train_sft", "semantic_guided", "answer", [], marks=pytest.mark.long),
    ],
)
def test_other_parts_of_the_head(images, tmp_path, script, adapter, probe, more):
    run = tmp_path / "run"
    flags = ("--adapter", adapter, "--probe", probe, "--data", images, *QUICK, "--output_dir", run)
    CORE_SEG.done(script, *flags, *more)
    folders = [run] if more or script == "train_sft" else [run / "stage1", run]
    assert (run / "stage1").exists() is (len(folders) == 2)
    for folder in folders:
        head = read_json(folder / "mask_head.json")
        assert (head["adapter"]["type"], head["probe"]["type"]) == (adapter, probe)


def test_a_run_is_not_trained_further_with_other_parts(tmp_path, sft_run, images):
    flags = ("--model", sft_run, "--data", images, "--output_dir", tmp_path / "run")
    assert "--adapter belongs to stage 1" in CORE_SEG.refused("train_grpo", "--adapter", "mlp", *flags)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, images, sft_run):
    for script, spoiled in [("train_grpo", "model.safetensors"), ("evaluate", "mask_head.safetensors")]:
        model = shutil.copytree(sft_run, tmp_path / script)
        weights = load_file(model / spoiled)
        name = next(key for key in weights if "layers.0" in key or "adapter" in key)
        del weights[name]
        save_file(weights, model / spoiled, metadata={"format": "pt"})
        said = CORE_SEG.refused(script, "--model", model, "--data", images, "--output_dir", tmp_path / "run")
        assert name.split(".")[-1] in said
    base = tmp_path / "train_grpo"
    (base / "mask_head.json").unlink()
    said = CORE_SEG.refused("train_sft", "--model", base, "--data", images, "--output_dir", tmp_path / "run")
    assert "does not hold all weights" in said
    assert not (tmp_path / "run").exists()


# ---- CORE-Seg: bad data, the file is named, nothing is written -------------------------------------------------------


def spoil_missing_image(folder: Path) -> None:
    next((folder / "images").iterdir()).unlink()


def spoil_missing_mask(folder: Path) -> None:
    next((folder / "masks").iterdir()).unlink()


def spoil_size(folder: Path) -> None:
    Image.new("L", (8, 8)).save(next((folder / "masks").iterdir()))


def spoil_values(folder: Path) -> None:
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(next((folder / "masks").iterdir()))


def spoil_image(folder: Path) -> None:
    path = next((folder / "images").iterdir())
    path.write_bytes(path.read_bytes()[:200])


def spoil_manifest(folder: Path) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text(lines[0] + "\n")


def spoil_query(folder: Path) -> None:
    with (folder / "manifest.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    rows[3][header.index("query")] = " "
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def spoil_split(folder: Path) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(",test,", ",tset,"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_image, r"1 problems in \d+ rows.*\n.*images/.*no such file"),
        (spoil_missing_mask, r"1 problems in \d+ rows.*\n.*mask: no such file"),
        (spoil_size, r"\n.*the mask is 8 x 8 px, the image 64 x 64"),
        (spoil_values, r"\n.*mask: .*values"),
        (spoil_image, r"\n.*image: cannot be decoded"),
        (spoil_manifest, r"no rows under the header"),
        (spoil_query, r"\n.*column 'query' is empty"),
        (spoil_split, r"unknown split of .* 'test'; did you mean 'tset'\?"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_data(tmp_path, images, spoil, message):
    folder = shutil.copytree(images, tmp_path / "data")
    spoil(folder)
    said = CORE_SEG.refused("train_grpo", "--data", folder, "--output_dir", tmp_path / "run")
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


# ---- CORE-Seg: the published preset, on small files of the real layout -----------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """A hub-style Qwen2.5-VL (tied, as 3B is, with spare rows and no `<seg>`) and MedSAM2's `.pt` at full size."""
    folder = tmp_path_factory.mktemp("published")
    model, processor = tiny_qwen2_5_vl(tag_tokens=TAGS, tie_word_embeddings=True, hidden_size=64, max_pixels=56 * 56)
    write_hub_folder(folder / "Qwen2.5-VL-3B-Instruct", model, processor)
    torch.manual_seed(1)
    segmenter = Sam2Segmenter(sam2_config("sam2.1_hiera_tiny", image_size=512))
    torch.save({"model": segmenter.sam.state_dict()}, folder / "MedSAM2_latest.pt")
    return folder / "Qwen2.5-VL-3B-Instruct", folder / "MedSAM2_latest.pt"


PUBLISHED = (
    *("--preset", "core_seg_3b", "--max_steps", 1, "--bf16", "false", "--report_to", "none", "--logging_steps", 1),
    *("--train_limit", 4, "--eval_limit", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1),
    *("--save_strategy", "no", *PIN),
)


@pytest.mark.slow
def test_one_step_of_each_stage_of_the_published_preset(published, tmp_path):
    sft, run = tmp_path / "sft", tmp_path / "run"
    CORE_SEG.done("train_sft", *PUBLISHED, "--model", published[0], "--segmenter", published[1], "--output_dir", sft)
    CORE_SEG.done("train_grpo", *PUBLISHED, "--model", sft, "--max_completion_length", 8, "--output_dir", run)
    config = read_json(sft / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 128, 0.05)
    assert config["base_model_name_or_path"] == str(published[0])
    adapter = load_file(sft / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key, value in adapter.items() if "lora_B" in key and value.any()} == {"lora_B"}
    assert not any("visual" in key for key in adapter)
    assert any("trainable_tokens_delta" in key for key in adapter)
    checkpoint = torch.load(published[1], weights_only=True)["model"]
    trained = {key[14:]: value for key, value in load_file(sft / "mask_head.safetensors").items() if ".sam." in key}
    assert trained.keys() == checkpoint.keys()
    changed = {key for key, value in trained.items() if not torch.equal(value, checkpoint[key])}
    assert changed
    assert all(key.startswith("sam_mask_decoder.") for key in changed)
    history = read_json(sft / "log_history.json")
    assert {"text", "text_weighted", "dense/dice_ce", "dense/dice_ce_weighted"} <= history[0].keys()
    (entry,) = steps_of(run)
    assert {"kl", "policy", "dense/dice_ce", "rewards/box_f1/mean"} <= entry.keys()
    assert entry["rewards/format/mean"] == 0.0
    segmenter = load(run, device="cpu")
    assert segmenter.settings == ImagePromptSettings(max_edge=512, max_new_tokens=512)
    assert segmenter.model.mask_head.segmenter.image_size == 512
    row: Any = make_synthetic(1, size=64)[0]
    assert segmenter.predict(row["image"], row["query"], max_new_tokens=4).text is not None


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_one_step_of_each_stage_in_4_bit(published, tmp_path):
    sft, run = tmp_path / "sft", tmp_path / "run"
    flags = (*PUBLISHED, "--load_in_4bit")
    CORE_SEG.done("train_sft", *flags, "--model", published[0], "--segmenter", published[1], "--output_dir", sft)
    CORE_SEG.done("train_grpo", *flags, "--model", sft, "--max_completion_length", 8, "--output_dir", run)
    assert {"kl", "policy", "dense/dice_ce"} <= steps_of(run)[0].keys()
    adapter = load_file(run / "adapter_model.safetensors")
    assert any("lora_B" in key and value.any() for key, value in adapter.items())
    head = load_file(run / "mask_head.safetensors")
    assert {value.dtype for value in head.values() if value.is_floating_point()} == {torch.float32}
    assert load(run, device="cpu").model.dtype == torch.float32


def test_published_presets_load_bfloat16(published):
    model, _ = KINDS[0].runs.recipes["core_seg_3b"].build(make_synthetic(1), str(published[0]))
    assert model.dtype == torch.bfloat16


@pytest.mark.slow
def test_missing_weights_stop_the_published_preset(published, tmp_path):
    model, processor = tiny_qwen2_5_vl(tag_tokens=TAGS, tie_word_embeddings=True, hidden_size=64)
    state = {hub_key(name): value.contiguous() for name, value in model.state_dict().items()}
    del state["model.layers.1.self_attn.q_proj.weight"]
    write_hub_folder(tmp_path / "hub", model, processor, state=state)
    state = torch.load(published[1], weights_only=True)["model"]
    del state["memory_encoder.out_proj.bias"]
    torch.save({"model": state}, tmp_path / "MedSAM2_latest.pt")
    for (model, segmenter), message in [
        ((tmp_path / "hub", published[1]), r"1 missing: model\.language_model\.layers\.1\.self_attn\.q_proj\.weight"),
        ((published[0], tmp_path / "MedSAM2_latest.pt"), r"\(1 parameters\): missing memory_encoder\.out_proj\.bias"),
    ]:
        flags = ("--model", model, "--segmenter", segmenter, "--output_dir", tmp_path / "run")
        said = CORE_SEG.refused("train_sft", *PUBLISHED, *flags)
        assert re.search(message, said), said


def test_the_numbers_of_the_published_preset():
    recipe: Any = KINDS[0].runs.recipes["core_seg_3b"]
    assert recipe.lora == {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
    assert (recipe.sft["global_batch_size"], recipe.sft["learning_rate"], recipe.sft["num_train_epochs"]) == (
        32,
        1e-4,
        1,
    )
    assert recipe.grpo["global_batch_size"] == 16  # prompts of one update
    grpo = [recipe.grpo[name] for name in ("num_generations", "learning_rate", "num_train_epochs")]
    assert grpo == [4, 5e-6, 2]
    assert list(recipe.rewards) == ["format", "box_f1", "dual_granularity_mask"]
    assert recipe.prompt.max_edge == 512
    assert recipe.pretraining is None
