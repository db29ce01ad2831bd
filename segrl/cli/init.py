"""`segrl init`: an example as a project of one's own, from the installed package, without a checkout."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from segrl.cli.output import OK, add_command

__all__ = ["add_init_command", "examples_folder", "start_project"]

PROJECTS = {
    "core_seg": "2D: reasoning, boxes and a mask head; supervised stage 1, then GRPO",
    "lisa": "2D: a mask head without reasoning; supervised",
    "medvol_r1": "3D: a key slice, boxes on it, and a frozen SAM 2 that takes them through the volume",
    "seg_zero": "2D: boxes and points by GRPO, masks by a frozen SAM 2",
}
ABOUT = "ABOUT.md"  # the page of the example itself
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./(\w+)/[^)]*\)")

_README = """# {project}

Begun from segrl's example `{name}`: {what}.

Every file here is yours: {scripts}, and the presets in `recipe.py` that they run.
[{about}]({about}) explains them, with the commands of ablations and the files of a run.

The commands below are for the folder that holds `{project}/`.

## 1. See it work

The preset `tiny` needs no data, no network and no GPU. It is a demonstration: its models begin with random weights and
learn on synthetic lesions. This takes about a minute, without its numbers the minutes that `recipe.py` names:

```bash
accelerate launch {project}/{train} --max_steps 5 --pretrain_steps 5 --eval_limit 16 --output_dir runs/first
```

## 2. Your own data

```bash
{convert}
segrl data check data
```

`segrl data convert --help` lists the layouts that become such a folder, and all checks come before training.

## 3. Train, evaluate, compare

```bash
accelerate launch {project}/{train} --data data --output_dir runs/mine
segrl eval --model runs/mine --data data
segrl compare runs/mine runs/another      # two runs on the same samples, with paired intervals
```

Every flag of TRL's trainer works (`--help` lists them). For a real model take one of the other presets of `recipe.py`
(`--preset NAME`); their header says which hardware they are for.

## 4. Change something

Rewards, adapters, losses and metrics are names (`segrl rewards list`, `segrl parts list`) or classes of your own. A
preset is a row of `RECIPES` in `recipe.py`; copy one and give it a name.
"""

_CONVERT = {
    True: "segrl data convert nnunet Dataset001_Mine data        # or a manifest.csv beside NIfTI files",
    False: "segrl data convert pairs my_images data --lesion nodule --test_fraction 0.2   # or coco, nnunet, hf ...",
}


def add_init_command(areas: Any, *parents: argparse.ArgumentParser) -> None:
    """Add `segrl init` to the areas of the command."""
    text = "begin a project of your own: the scripts and presets of an example, in a new folder"
    listed = "\n".join(f"  {name:10}  {what}" for name, what in PROJECTS.items())
    command = add_command(
        *(areas, "init", text, *parents), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{listed}\n\n  segrl init core_seg my_project\n"
               "  accelerate launch my_project/train_grpo.py --output_dir runs/first",
    )  # fmt: skip
    command.add_argument("name", metavar="EXAMPLE", help=f"one of {', '.join(PROJECTS)}")
    command.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty folder")
    command.set_defaults(run=_init)


def examples_folder() -> Path:
    """Return the folder of the examples: inside an installed package, beside it in a checkout.

    Raises:
        SegRLError: Neither is there.
    """
    from segrl.errors import SegRLError

    package = Path(__file__).parents[1]
    found = next((path for path in (package / "examples", package.parent / "examples") if path.is_dir()), None)
    if found is None:
        raise SegRLError(f"{package}: the examples are missing; install segrl from its wheel, or use a checkout")
    return found


def start_project(name: str, folder: Path) -> list[Path]:
    """Write an example into `folder`, with a README that says how to go on; return the files.

    Raises:
        UnknownNameError: No such example.
        SegRLError: The folder exists and is not empty, or cannot be written.
    """
    from segrl.errors import SegRLError, unknown_name

    if name not in PROJECTS:
        raise unknown_name("example", name, PROJECTS)
    if folder.exists() and not folder.is_dir():
        raise SegRLError(f"{folder} is a file; expected a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise SegRLError(f"{folder} is not empty, and nothing is replaced; name a new folder")
    project = folder.resolve().name
    texts = {
        ABOUT if path.name == "README.md" else path.name: _own(path.read_text(encoding="utf-8"), name, project)
        for path in sorted((examples_folder() / name).iterdir())
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".json")
    }
    texts["README.md"] = _readme(name, project, sorted(texts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SegRLError(f"{folder}: {error.strerror or error}; name a folder that can be written") from error
    return [folder / file for file in sorted(texts)]


def _own(text: str, name: str, project: str) -> str:
    """Turn the commands of an example's file into those of the project; links to other examples become their names."""
    text = text.replace(f"examples/{name}/", f"{project}/").replace("From the root of the checkout:", "As printed:")
    return _LINK.sub(lambda found: f"{found[1]} (`segrl init {found[2]} {found[2]}`)", text)


def _readme(name: str, project: str, files: list[str]) -> str:
    train = next(file for file in ("train_grpo.py", "train_sft.py") if file in files)
    others = [f"`{file}`" for file in files if file.endswith(".py") and file != "recipe.py"]
    scripts = f"the scripts {', '.join(others[:-1])} and {others[-1]}"
    return _README.format(
        project=project,
        name=name,
        what=PROJECTS[name],
        scripts=scripts,
        about=ABOUT,
        train=train,
        convert=_CONVERT[name == "medvol_r1"],
    )


def _init(arguments: argparse.Namespace) -> int:
    from segrl.reports.terminal import say

    files = start_project(arguments.name, arguments.folder)
    say("\n".join(map(str, files)))
    say(f"{arguments.folder / 'README.md'} says how to go on; first: {_first(files)}")
    return OK


def _first(files: list[Path]) -> str:
    train = next(file for name in ("train_grpo.py", "train_sft.py") for file in files if file.name == name)
    return f"accelerate launch {train} --max_steps 5 --pretrain_steps 5 --eval_limit 16 --output_dir runs/first"
