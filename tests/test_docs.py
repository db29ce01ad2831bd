"""The documentation's Python runs as it is printed."""

import re
import runpy
import sys
from importlib import import_module
from itertools import groupby
from operator import itemgetter

import pytest
from public_names import BLOCKS, PAGES, ROOT, is_callable, public_names

from segrl.rewards import make_reward
from segrl.rewards.registry import registered_infos

INDEX = ROOT / "docs" / "reference" / "index.md"
REFERENCE = "\n".join(page.read_text() for page in PAGES if page.parent == INDEX.parent and page != INDEX)


def test_the_quick_start_has_code():
    assert len(BLOCKS[ROOT / "docs" / "quickstart.md"]) >= 3


def test_every_block_of_python_is_read():
    for page, blocks in BLOCKS.items():
        assert len(blocks) == page.read_text().count("\n```python"), page


SLOW = {"extend-segrl.md", "write-a-training-script.md", "test-a-reward.md", "reward-plugin.md"}
PRINTED = [(page, number) for page, blocks in BLOCKS.items() for number in range(len(blocks))]


@pytest.fixture
def own_modules():
    """Forget the modules that a test imports: files of other pages have the same names."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not str(getattr(sys.modules[name], "__file__", "")).startswith((sys.prefix, sys.base_prefix, str(ROOT))):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # without a GPU
@pytest.mark.parametrize(
    ("page", "number"),
    [pytest.param(page, number, marks=[pytest.mark.slow] * (page.name in SLOW)) for page, number in PRINTED],
    ids=[f"{page.relative_to(ROOT).as_posix()}:{number}" for page, number in PRINTED],
)
def test_code_runs_as_it_is_printed(page, number, tmp_path, monkeypatch, registries, own_modules):
    """Each block by itself, in a folder with the files that the blocks before it are."""
    for name, code in BLOCKS[page][: number + 1]:
        if name:
            (tmp_path / name).write_text(code)
    name, code = BLOCKS[page][number]
    script = tmp_path / (name or "block.py")
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")


def test_pictures_are_small_and_in_the_gallery():
    pictures = sorted((ROOT / "docs" / "assets").iterdir())
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert len(pictures) >= 12
    assert [path.name for path in pictures if path.stat().st_size > 300_000] == []
    assert [path.name for path in pictures if f"](assets/{path.name})" not in gallery] == []


def anchors(path):
    """Headings of a text as links name them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    plain = (re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


def test_links_lead_somewhere():
    """To files and headings; `mkdocs build --strict` also checks those of pages and of names in the reference."""
    texts = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("examples/*/README.md")]
    broken, count = [], 0
    for path in texts:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
            file, _, heading = link.partition("#")
            target = path.parent / file if file else path
            known = link.startswith("https://") or (target.exists() and (not heading or heading in anchors(target)))
            broken += [] if known else [f"{path}: {link}"]
            count += 1
    assert broken == []
    assert count > 100


def imported(path):
    """Return the module or the attribute of a module that a page names."""
    module, _, name = path.rpartition(".")
    value = getattr(import_module(module), name, None)  # a folder may list a function that is named as its file
    return import_module(path) if value is None else value


def documented() -> dict[int, str]:
    """Return the path under which the reference documents an object, by the object's id."""
    return {id(imported(path)): path for path in re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)}


def test_every_public_name_has_its_place_in_the_reference():
    places = documented()
    names = [(f"{surface}.{name}", value) for surface, name, value in public_names() if is_callable(value)]
    missing = [name for name, value in names if id(value) not in places]
    assert missing == []


def api_index() -> str:
    """Return the page of all public names, linked to where they are documented, with the first lines of docstrings."""
    places = documented()
    lines = ["# All names", "", "What `segrl` offers, by folder: `from segrl.geometry import giou`."]
    for surface, names in groupby(public_names(), key=itemgetter(0)):
        lines += ["", f"## {surface}", "", first_line(import_module(surface)), ""]
        names = list(names)
        functions = [(name, value) for _, name, value in names if is_callable(value)]
        if functions:
            lines += ["| name | |", "| --- | --- |"]
        for name, value in functions:
            place = places.get(id(value))
            lines.append(f"| {f'[`{name}`][{place}]' if place else f'`{name}`'} | {first_line(value)} |")
        constants = [f"`{name}`" for _, name, value in names if not is_callable(value)]
        if constants:
            lines += ["", f"Constants: {', '.join(constants)}."]
    return "\n".join(lines) + "\n"


def first_line(value: object) -> str:
    return (getattr(value, "__doc__", None) or "").strip().partition("\n")[0].replace("|", "\\|")


def test_the_index_of_names_is_up_to_date():
    assert INDEX.read_text() == api_index(), "write it again: see CONTRIBUTING.md"


def reward_table() -> str:
    """What the built-in rewards declare, as the table of the reference."""
    lines = ["| name | equation | range | needs | source |", "| --- | --- | --- | --- | --- |"]
    for info in registered_infos():
        if info.form == "preset" or not info.origin.startswith("segrl "):
            continue
        scores = make_reward(info.name).range
        assert scores is not None
        needs = [word for word, wanted in (("mask", info.needs_mask), ("volume", info.volume)) if wanted]
        cells = [f"`{info.name}`", info.equation, f"{scores[0]:g} to {scores[1]:g}", ", ".join(needs), info.source]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def test_the_reference_says_what_the_rewards_declare():
    assert reward_table() in (ROOT / "docs" / "reference" / "rewards.md").read_text()


def test_every_built_in_reward_has_its_place_in_the_reference():
    places = documented()
    for info in registered_infos():
        if info.origin.startswith("segrl "):
            assert id(info.function) in places, info.name
