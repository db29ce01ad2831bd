"""`segrl init`: a project from the installed package, and one that is refused."""

import re
import shlex
import shutil

import pytest
from plugin_environment import ROOT, fresh_environment
from script_modules import script_modules

from segrl.cli import init
from segrl.cli.init import PROJECTS, examples_folder, start_project
from segrl.cli.main import main
from segrl.errors import SegRLError

EXAMPLES = ROOT / "examples"
PACKAGES = {"reward_plugin", "parts_plugin"}  # are installed, not begun from


def test_every_example_that_trains_can_be_begun():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} - PACKAGES == set(PROJECTS)
    assert examples_folder() == EXAMPLES


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_is_the_example_under_its_own_name(name, tmp_path):
    folder = tmp_path / "new" / "my_project"
    files = {path.name: path.read_text() for path in start_project(name, folder)}
    wanted = {path.name for path in (EXAMPLES / name).iterdir() if path.is_file()}
    assert set(files) == wanted | {"ABOUT.md"}
    for file in wanted - {"README.md"}:
        own = (EXAMPLES / name / file).read_text().replace(f"examples/{name}/", "my_project/")
        assert files[file] == own
    for file, text in files.items():
        if file != "published.yaml":
            assert f"examples/{name}" not in text, file
            assert "](../" not in text, file
    for link in re.findall(r"\]\(([^)]+)\)", files["README.md"] + files["ABOUT.md"]):
        assert link in files or link.startswith("https://")


@pytest.mark.parametrize("name", PROJECTS)
def test_commands_of_the_readme_are_read_as_printed(name, tmp_path, monkeypatch):
    """What the README starts is there, and can be imported; the slow test below also checks its flags."""
    monkeypatch.chdir(tmp_path)
    start_project(name, tmp_path / "mine")
    readme = (tmp_path / "mine" / "README.md").read_text()
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL))
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    assert {command[0] for command in commands} == {"accelerate", "segrl"}
    (first,) = [command for command in commands if "runs/first" in command and command[0] == "accelerate"]
    assert (tmp_path / first[2]).is_file()
    with script_modules(tmp_path / "mine") as modules:
        assert modules["recipe"].RECIPES["tiny"]
        assert first[2].removeprefix("mine/").removesuffix(".py") in modules


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["core_sag", "new"], "unknown example 'core_sag'; did you mean 'core_seg'? Known: core_seg, lisa,"),
        (["core_seg", "full"], "full is not empty, and nothing is replaced; name a new folder"),
        (["core_seg", "file"], "file is a file; expected a new or an empty folder"),
        (["core_seg", "file/new"], "name a folder that can be written"),
    ):
        assert main(["init", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert main(["init", "core_seg", "empty"]) == 0
    assert "accelerate launch empty/train_grpo.py" in capsys.readouterr().out


def test_a_package_without_examples(tmp_path):
    """A copy of the module in a folder that is laid out as a package, without them."""
    folder = tmp_path / "site" / "segrl" / "cli"
    folder.mkdir(parents=True)
    shutil.copy(init.__file__, folder)
    with (
        script_modules(folder) as modules,
        pytest.raises(SegRLError, match="the examples are missing; install segrl from its wheel"),
    ):
        modules["init"].examples_folder()


@pytest.mark.slow
def test_from_the_installed_package(tmp_path):
    run = fresh_environment(tmp_path)
    made = run("segrl", "init", "core_seg", "my_project")
    assert made.returncode == 0, made.stderr
    where = run("python", "-c", "from segrl.cli.init import examples_folder; print(examples_folder())").stdout
    assert str(tmp_path) in where
    assert (tmp_path / "my_project" / "README.md").is_file()
    flags = ["--max_steps", "5", "--pretrain_steps", "5", "--eval_limit", "16", "--output_dir", "runs/first"]
    done = run("python", "my_project/train_grpo.py", *flags, "--use_cpu", "--check_only")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all checks passed" in done.stdout
    assert not (tmp_path / "runs").exists()
