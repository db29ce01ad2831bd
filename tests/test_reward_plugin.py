"""The example plugin, really installed into a fresh environment and used there as a user does."""

from __future__ import annotations

import json

import pytest
from plugin_environment import ROOT, Run, fresh_environment, write_package

PLUGIN = ROOT / "examples" / "reward_plugin"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Runs a program of a new environment that has segrl, the plugin and a broken plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    entries = '[project.entry-points."segrl.rewards"]\nbroken_bonus = "broken_plugin:broken_bonus"'
    code = 'raise RuntimeError("no \\x1b[31m[red]licence[/red]")\n'
    return fresh_environment(folder, PLUGIN, write_package(folder / "broken", "broken_plugin", entries, code))


def test_the_tutorial_ends_with_the_example():
    page = (ROOT / "docs" / "tutorials" / "reward-plugin.md").read_text()
    assert (PLUGIN / "pyproject.toml").read_text() in page
    for name in ("segrl_reward_plugin.py", "test_small_lesion_bonus.py"):
        code = (PLUGIN / name).read_text()
        start = code.index("@" if name.startswith("segrl") else "import pytest")
        assert code[start:] in page


def test_nothing_comes_from_the_checkout(run: Run):
    files = run("python", "-c", "import segrl, segrl_reward_plugin as p; print(segrl.__file__, p.__file__)")
    assert str(ROOT) not in files.stdout
    assert files.returncode == 0


def test_list_shows_the_plugin_and_the_broken_one(run: Run):
    done = run("segrl", "rewards", "list", "--json")
    assert done.returncode == 0, done.stderr
    rewards = {reward["name"]: reward for reward in json.loads(done.stdout)}
    assert rewards["small_lesion_bonus"]["origin"] == "segrl-reward-plugin 0.1.0"
    assert rewards["small_lesion_bonus"]["broken"] is None
    assert rewards["broken_bonus"]["origin"] == "broken-plugin 2.5"
    assert "RuntimeError: no" in rewards["broken_bonus"]["broken"]
    assert rewards["box_f1"]["broken"] is None

    table = run("segrl", "rewards", "list").stdout
    assert r"\x1b[31m[red]licence[/red]" in " ".join(table.split())
    assert "\x1b" not in table


def test_describe_reads_the_plugin(run: Run):
    shown = run("segrl", "rewards", "describe", "small_lesion_bonus")
    assert shown.returncode == 0, shown.stderr
    for part in ("segrl-reward-plugin 0.1.0", "max_area", "0.01", "Largest share of the image", "max(N, M)"):
        assert part in shown.stdout

    broken = run("segrl", "rewards", "describe", "broken_bonus")
    assert broken.returncode == 2
    assert "cannot be imported from 'broken_plugin:broken_bonus'" in broken.stderr


def test_it_passes_its_check_and_its_own_test(run: Run):
    checked = run("segrl", "rewards", "check", "small_lesion_bonus", "--examples", "10")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", PLUGIN)
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout


def test_audit_finds_no_way_to_game_it(run: Run):
    done = run("segrl", "rewards", "audit", "small_lesion_bonus", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (verdict,) = json.loads(done.stdout)["verdicts"]
    assert (verdict["reward"], verdict["hackable"]) == ("small_lesion_bonus", False)
    assert run("segrl", "rewards", "audit", "--sum", "format", "box_f1", "small_lesion_bonus").returncode == 0


def test_it_is_found_by_name_and_survives_yaml_and_pickle(run: Run):
    code = (
        "import pickle; from segrl import make_reward; from segrl.rewards import dump_reward, load_reward;"
        "reward = make_reward('small_lesion_bonus', max_area=0.5);"
        "dump_reward(reward, 'bonus.yaml');"
        "assert load_reward('bonus.yaml') == reward == pickle.loads(pickle.dumps(reward));"
        "print(reward.info.origin)"
    )
    done = run("python", "-c", code)
    assert done.stdout.strip() == "segrl-reward-plugin 0.1.0", done.stderr
