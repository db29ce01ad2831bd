"""The command line as a user meets it: what is printed, where, with which exit status, and never raw model text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reward_cases import GOOD, TARGET, TRUE_BOXES, built_in, mask_of

from segrl.cli.main import main
from segrl.geometry import mask_to_rle
from segrl.rewards import dump_reward, list_rewards, make_reward, register_reward, registry

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b[31mred\x07 [bold]loud[/bold] [/oops] \x9b1m \u202e \ud800"
FRAME = ("--frame", "original_px")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`main` in an empty folder; exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def predictions(*texts: str, **columns: Any) -> Path:
    rows = [{"completion": text, "name": "scan_7.png", "mask": mask_to_rle(TARGET.mask),
             "predicted_mask": mask_to_rle(mask_of(*TRUE_BOXES)), **columns} for text in texts]  # fmt: skip
    path = Path("predictions.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_a_shell(*arguments: Any, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "segrl", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


# --- the process


@pytest.mark.slow
def test_a_shell_gets_output_errors_and_status(tmp_path):
    good = in_a_shell("rewards", "describe", "box_f1", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "mean IoU of matched pairs · F1" in good.stdout
    bad = in_a_shell("rewards", "describe", "box_f2", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("segrl: error: unknown reward 'box_f2'; did you mean 'box_f1'?")


@pytest.mark.slow
def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"completion": "é ☃"}))
    for command in (("describe", "box_f1"), ("score", "--rewards", "format", "p.jsonl"), ("list",)):
        done = in_a_shell("rewards", *command, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()


HEAVY = (
    *("accelerate", "datasets", "hypothesis", "matplotlib", "openai", "pandas", "peft", "pyarrow", "ray", "sklearn"),
    *("segmentation_models_pytorch", "torch", "torchvision", "transformers", "trl"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("--help", "--version", "rewards --help", "rewards list", "rewards describe format", "data --help"),
        *("data list", "curate --help", "curate run --help", "predict --help", "eval --help", "report --help"),
        *("curate run bad.yaml", "curate difficulty bad.yaml", "curate run bad.yaml --dry_run"),
    ],
)
def test_commands_start_without_frameworks(command, tmp_path):
    (tmp_path / "bad.yaml").write_text("sources: [{path: mine, licence: MIT}]\njudge: {rounds: many}\n")
    code = (
        "import sys; from segrl.cli.main import main\n"
        f"try: status = main({command.split()!r})\n"
        "except SystemExit as stop: status = stop.code or 0\n"
        f"print(status, sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("2 []" if "bad.yaml" in command else "0 []"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["segrl.caching", "segrl.curation", "segrl.data", "segrl.data.formats"])
def test_folders_of_lazy_names_import_nothing_heavy(folder, tmp_path):
    code = f"import sys, {folder}; print(sorted({set(HEAVY) | {'numpy', 'PIL'}!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m segrl rewards list --json | head -1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.mark.parametrize(
    "arguments", [(), ("rewards",), ("rewards", "lost"), ("rewards", "score"), ("rewards", "check")]
)
def test_wrong_usage_is_status_2(arguments, run):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "usage: segrl" in err


@pytest.mark.parametrize("command", ["list", "describe", "score", "audit", "check"])
def test_every_command_explains_itself(command, run):
    status, out, _ = run("rewards", command, "--help")
    assert status == 0
    assert "--import MODULE" in out


# --- list and describe


def test_list_has_every_reward(run):
    status, out, _ = run("rewards", "list")
    assert status == 0
    assert all(name in out for name in list_rewards())
    _, out, _ = run("rewards", "list", "--json")
    rewards = {reward["name"]: reward for reward in json.loads(out)}
    assert sorted(rewards) == list_rewards()
    assert rewards["dual_granularity_mask"]["range"] == [-1.0, 3.0]
    assert rewards["dual_granularity_mask"]["needs"] == ["mask", "target"]
    assert rewards["core_seg"]["range"] == [-1.0, 5.0]
    assert {name for name, reward in rewards.items() if reward["origin"].startswith("segrl ")} == set(built_in())


@pytest.mark.parametrize("name", built_in())
def test_every_reward_is_described(name, run):
    status, out, _ = run("rewards", "describe", name, "--json")
    described = json.loads(out)
    assert status == 0
    assert described["summary"]
    assert described["equation"]
    assert all(setting["doc"] for setting in described["settings"])
    assert ("yaml" in described) == (described["form"] == "preset")
    status, out, _ = run("rewards", "describe", name)
    assert status == 0
    assert all(setting["name"] in out for setting in described["settings"])


def test_describe_prints_the_parts_of_a_preset_and_of_a_file(run):
    _, out, _ = run("rewards", "describe", "core_seg")
    assert "- reward: box_f1\n  settings:\n    min_iou: 0.5" in "\n".join(line.rstrip() for line in out.splitlines())
    dump_reward(make_reward("box_f1").gate("format"), "mine.yaml")
    status, out, _ = run("rewards", "describe", "mine.yaml")
    assert status == 0
    assert "- gate:" in out


MINE = '''
"""My rewards."""
from segrl import register_reward

@register_reward("short", needs_target=False, range=lambda most, **_: (0, float(most)))
def short(prediction, target, *, most: float, unit: str = "%s"):
    """Pays for \x1b[31m short [red]texts[/red].

    Args:
        prediction: Read.
        most: The most,
            over two lines.
        unit (str): What is counted.
    """
    return float(len(prediction.text) < 10)

class Batched:
    """Ones.

    Args:
        value: Of all.
    """
    def __init__(self, value: float = 1.0):
        self.value = value
    def score_batch(self, predictions, targets):
        return [self.value] * len(predictions)
'''


def test_describe_reads_settings_of_functions_and_classes(run):
    Path("mine.py").write_text(MINE)
    status, out, _ = run("rewards", "describe", "short", "--import", "mine", "--json")
    described = json.loads(out)
    assert status == 0
    assert described["settings"] == [
        {"name": "most", "required": True, "default": None, "doc": "The most, over two lines."},
        {"name": "unit", "required": False, "default": "%s", "doc": "What is counted."},
    ]
    assert described["range"] is None
    assert described["origin"] == "module mine"
    status, out, _ = run("rewards", "describe", "short", "--import", "mine")
    assert r"Pays for \x1b[31m short [red]texts[/red]." in out
    assert "(required)" in out
    status, out, _ = run("rewards", "describe", "mine:Batched", "--json")
    assert json.loads(out)["settings"] == [{"name": "value", "required": False, "default": 1.0, "doc": "Of all."}]
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "--import broken: ModuleNotFoundError: No module named 'broken'"),
        ("x = 1\nraise KeyError('spot')", "--import broken: KeyError: 'spot' ("),
        ("def", "--import broken: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(source, message, run):
    if source is not None:
        Path("broken.py").write_text(source)
    status, _, err = run("rewards", "list", "--import", "broken")
    assert status == 2
    assert message in err
    if source is not None and "spot" in source:
        assert "broken.py, line 2)" in err


PACKAGES = {
    "lost": ("lost_reward = lost:x", "raise RuntimeError('no \x1b[31m licence')"),
    "other": ("box_f1 = other:box_f1", "def box_f1(prediction, target): return 0.0"),
    "presets": (
        "their_preset = presets:their_preset",
        "from segrl.rewards import register_preset\n\n@register_preset('their_preset')\n"
        "def their_preset():\n    'Theirs.'\n    raise RuntimeError('no weights')",
    ),
}


def test_broken_plugins_and_name_conflicts_are_listed(run, monkeypatch, tmp_path):
    for number, (name, (entry, source)) in enumerate(PACKAGES.items(), 1):
        (tmp_path / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{name}-{number}.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}.0\n")
        (metadata / "entry_points.txt").write_text(f"[segrl.rewards]\n{entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, out, _ = run("rewards", "list", "--json")
    assert status == 0
    found = {(reward["name"], reward["origin"]): reward["broken"] for reward in json.loads(out)}
    assert found["lost_reward", "lost 1.0"] == "cannot be imported from 'lost:x': RuntimeError: no \x1b[31m licence"
    assert found["box_f1", "other 2.0"].startswith("the name is taken by segrl ")
    assert found["their_preset", "presets 3.0"] == "cannot be made: RuntimeError: no weights"
    assert found["box_f1", make_reward("box_f1").info.origin] is None
    _, out, _ = run("rewards", "list")
    assert r"RuntimeError: no \x1b[31m licence" in " ".join(out.replace("│", " ").split())
    for name in ("lost_reward", "their_preset"):
        status, _, err = run("rewards", "describe", name)
        assert status == 2
        assert "RuntimeError: no " in err
    for name in PACKAGES:
        sys.modules.pop(name, None)


# --- score


def test_score_prints_rows_statistics_and_histograms(run):
    status, out, err = run(
        "rewards", "score", "--rewards", "format", "box_f1", predictions(GOOD, GOOD, ""), "--rows", 2, *FRAME
    )
    assert (status, err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    assert lines[0] == "total: 3 completions (2 valid, 1 no_answer)"
    assert lines[1] == "1 of 3 answers is invalid (33.3 %): 1 no_answer (no closed <answer> block with text in it)"
    assert lines[2] == "first 2 of 3 rows"
    assert any(line.startswith("line 2 scan_7.png valid 1 1 2 <think>Two dark") for line in lines)
    assert not any(line.startswith("line 3") for line in lines)
    assert "format 0 to 1 3 3 0.6667 0.4714 0 0.5 1 1 1" in lines
    assert lines[-2:] == ["0 1 " + "█" * 20, "2 2 " + "█" * 40]


def test_score_as_json_and_into_a_file(run):
    status, out, _ = run("rewards", "score", predictions(GOOD, ""), "--rewards", "box_f1", "--json", "--rows", 1,
                         "--output", "out/scores.csv", *FRAME)  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert found["rows"] == [
        {"where": "predictions.jsonl, line 1", "name": "scan_7.png", "status": "valid", "box_f1": 1.0}
    ]
    assert found["columns"]["box_f1"]["mean"] == 0.5
    assert found["columns"]["box_f1"]["histogram"] == [{"label": "0", "count": 1}, {"label": "1", "count": 1}]
    assert Path("out/scores.csv").read_text().splitlines()[1:] == [
        '"predictions.jsonl, line 1",scan_7.png,valid,1.0',
        '"predictions.jsonl, line 2",scan_7.png,no_answer,0.0',
    ]


def test_score_takes_a_file_of_rewards_and_truth_from_elsewhere(run):
    Path("rewards.yaml").write_text(
        "completion_format: {frame: original_px}\nrewards:\n- reward: box_f1\n  name: boxes\n  weight: 2\n  steps:\n"
        "  - schedule: {0: 0, 1: 1}\n- reward: format\n"
    )
    path = predictions(GOOD, mask=None)
    Path("t.jsonl").write_text(json.dumps({"name": "scan_7.png", "mask": mask_to_rle(TARGET.mask)}))
    status, out, _ = run("rewards", "score", "--rewards", "rewards.yaml", path, "--ground-truth", "t.jsonl", "--json",
                         "--progress", 0.25)  # fmt: skip
    assert status == 0
    means = {name: column["mean"] for name, column in json.loads(out)["columns"].items()}
    assert means == {"boxes": 0.25, "format": 1.0, "total": 1.5}


def test_reading_can_be_changed(run):
    path = predictions("<answer>[4, 4, 16, 14], [22, 18, 34, 28]</answer>")
    for flags, mean in (((), 0.0), (("--no-seg", "--no-reasoning"), 1.0)):
        _, out, _ = run("rewards", "score", path, "--rewards", "box_f1", "--json", *FRAME, *flags)
        assert json.loads(out)["columns"]["box_f1"]["mean"] == mean


def test_model_text_is_escaped(run):
    path = predictions(HOSTILE + "x" * 10**6, name=f"a{HOSTILE}")
    for flags in ((), ("--json",), ("--output", "scores.jsonl")):
        status, out, err = run("rewards", "score", "--rewards", "format", path, *flags)
        assert (status, err) == (0, "")
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)
        assert len(out) < 10_000
    _, out, _ = run("rewards", "score", "--rewards", "format", path)
    assert r"\x1b[31mred\x07 [bold]" in out
    Path("bad.jsonl").write_text(json.dumps({"completion": GOOD, "mask": HOSTILE}))
    status, out, err = run("rewards", "score", "--rewards", "box_f1", "bad.jsonl")
    assert (status, out) == (2, "")
    assert r"column 'mask': \x1b[31mred" in err
    assert "\x1b" not in err


TYPED = HOSTILE.replace("\ud800", "\udcff")  # a byte that is no UTF-8, as Python reads it from a shell


@pytest.mark.parametrize(
    "arguments",
    [
        (TYPED,),
        ("rewards", TYPED),
        ("rewards", "list", TYPED),
        ("rewards", "describe", TYPED),
        ("rewards", "describe", f"{TYPED}.yaml"),
        ("rewards", "score", "--rewards", "format", "p.jsonl", "--rows", TYPED),
        ("rewards", "score", "--rewards", "format", f"{TYPED}.jsonl"),
        ("rewards", "score", "--rewards", "format", "p.jsonl", "--ground-truth", f"{TYPED}.csv"),
        ("rewards", "score", "--rewards", "format", "p.jsonl", "--output", TYPED),
        ("rewards", "check", TYPED),
        ("rewards", "audit", TYPED),
        ("parts", "describe", TYPED),
        ("rewards", "list", "--import", TYPED),
    ],
)
def test_what_was_typed_is_escaped(arguments, run):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(err)
    assert r"\x1b[31mred" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rewards", "box_f1"), "no file of predictions"),
        (("--rewards", "box_f1", "format"), "no file of predictions"),
        (("--rewards", "box_f2", "p.jsonl"), "unknown reward 'box_f2'; did you mean 'box_f1'?"),
        (("--rewards", "lost.yaml", "p.jsonl"), "lost.yaml: cannot be read"),
        (("--rewards", "format", "lost.jsonl"), "lost.jsonl: cannot be read: No such file"),
        (("--rewards", "format", "empty.jsonl"), "empty.jsonl: no rows"),
        (("--rewards", "format", "cut.jsonl"), "cut.jsonl, line 1: not JSON"),
        (("--rewards", "format", "p.jsonl", "--output", "scores.xlsx"), "scores.xlsx: cannot write .xlsx"),
        (("--rewards", "format", "p.jsonl", "--frame", "thousand"), "thousand"),
        (("--rewards", "format", "p.jsonl", "--progress", "2"), "expected a number from 0 to 1"),
        (("--rewards", "format", "p.jsonl", "--rows", "-1"), "expected 0 or more"),
    ],
)
def test_score_errors_are_status_2(arguments, message, run):
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl").write_text('{"completion": "<thi')
    predictions(GOOD).rename("p.jsonl")
    status, out, err = run("rewards", "score", *arguments)
    assert (status, out) == (2, "")
    assert message in err


# --- check and audit


@pytest.mark.slow
def test_check_passes_and_fails(run):
    status, out, _ = run("rewards", "check", "format", "box_f1", "--examples", 5)
    assert status == 0
    assert "hostile text" in out
    Path("lazy.py").write_text("def lazy(prediction, target):\n    return float(len(prediction.text)) * 'inf'\n")
    status, out, _ = run("rewards", "check", "lazy:lazy", "format", "--examples", 5)
    assert status == 1
    assert "reward 'lazy' fails" in out
    assert "format: " in out
    status, _, err = run("rewards", "check", "fromat")
    assert status == 2
    assert "did you mean 'format'?" in err
    sys.modules.pop("lazy")


@pytest.mark.slow
def test_audit_judges_each_name_or_the_sum(run):
    status, out, err = run("rewards", "audit", "box_f1", "format", "--json")
    report = json.loads(out)
    assert (status, err) == (1, "")  # a format alone rewards empty talk
    assert {verdict["reward"]: verdict["hackable"] for verdict in report["verdicts"]} == {
        "box_f1": False,
        "format": True,
    }
    assert report["hackable"]
    status, out, _ = run("rewards", "audit", "box_f1")
    assert status == 0
    assert "box_f1: clean" in out
    status, out, _ = run("rewards", "audit", "--sum", "box_f1", "format", "--json")
    (total,) = json.loads(out)["verdicts"]
    assert total["reward"] == "total"
    assert set(total["rows"][0]["parts"]) == {"box_f1", "format"}
    assert status == total["hackable"]


def test_audit_judges_a_file(run):
    Path("mine.yaml").write_text("name: mine\nrewards:\n- reward: format\n- {reward: box_f1, weight: 3}\n")
    status, out, _ = run("rewards", "audit", "--rewards", "mine.yaml", "--json")
    (mine,) = json.loads(out)["verdicts"]
    assert mine["reward"] == "mine"
    assert status == mine["hackable"]
    status, out, _ = run("rewards", "audit", "--rewards", "mine.yaml")
    assert "mine: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected names of rewards, or --rewards FILE"),
        (("format", "--rewards", "mine.yaml"), "expected names of rewards, or --rewards FILE"),
        (("fromat",), "did you mean 'format'?"),
        (("--rewards", "lost.yaml"), "lost.yaml: cannot be read"),
    ],
)
def test_audit_errors_are_status_2(arguments, message, run):
    status, out, err = run("rewards", "audit", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_a_reward_with_a_wrong_claim_does_not_stop_the_list(run, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @register_reward("test_wrong_claim", range=lambda high, **_: (0, high), monotone=lambda **_: {}["none"])
    def wrong(prediction, target, *, high: float):
        """Its claims cannot be resolved without settings."""
        return 0.0

    status, out, _ = run("rewards", "list", "--json")
    listed = {reward["name"]: reward for reward in json.loads(out)}
    assert status == 0
    assert listed["test_wrong_claim"]["range"] is None
    assert "box_f1" in listed


def test_a_reward_of_the_current_folder_is_described(run, tmp_path):
    (tmp_path / "described_here.py").write_text('def here(prediction, target):\n    """In this folder."""\n')
    status, out, _ = run("rewards", "describe", "described_here:here", "--json")
    assert status == 0
    assert json.loads(out)["summary"] == "In this folder."
