"""The shape of the package, read from its source: layers, circles, lists of public names, and who may use what."""

import ast
import graphlib
import re
from collections.abc import Iterator
from importlib import import_module

from public_names import BLOCKS, FILES, ROOT

TOP_FILES = {"__init__", "__main__", "_version", "errors", "losses", "hub"}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
# What uses segrl from outside: the examples, and each block of code in the pages.
OUTSIDE = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "examples").rglob("*.py"))}
for page, blocks in BLOCKS.items():
    OUTSIDE |= {f"{page.relative_to(ROOT).as_posix()}:{number}": block for number, (_, block) in enumerate(blocks)}


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every absolute import, also of those inside functions and under `TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            yield from ((str(node.module), alias.name) for alias in node.names)


def imported_files(module: str) -> set[str]:
    """Return the modules of segrl that a module imports; `from folder import file` is the file."""
    files = set()
    for source, name in imports(TREES[module]):
        if source.split(".")[0] == "segrl":
            files.add(f"{source}.{name}" if f"{source}.{name}" in FILES else source)
    return files


def top_level(module: str) -> str:
    """Return the folder or top-level file that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def layers() -> dict[str, int]:
    """Return the line of each folder in the table of the design page, counted from below."""
    page = (ROOT / "docs/explanation/design.md").read_text()
    (table,) = re.findall(r"^```text\nexamples/.*?\n-+\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = reversed(table.splitlines())
    return {name: height for height, line in enumerate(lines) for name in re.split(" {2,}", line)[0].split(" · ")}


def test_every_folder_and_file_is_in_the_table_of_layers():
    found = {top_level(module) for module in FILES} - {"__init__"}
    assert found == set(layers()), "place it in the table of docs/explanation/design.md"


def test_no_other_file_at_the_top():
    files = {path.name for path in (ROOT / "segrl").iterdir() if path.is_file()}
    assert files == {f"{name}.py" for name in TOP_FILES} | {"__init__.pyi", "py.typed"}


def test_imports_go_down():
    heights = layers()
    up = [
        f"{module} imports {target}"
        for module in FILES
        for target in imported_files(module)
        if module != "segrl"
        and top_level(module) != top_level(target)
        # `segrl` itself has no height: inside the package, nobody imports its face
        and heights[top_level(module)] <= heights.get(top_level(target), len(heights))
    ]
    assert up == []


def test_files_form_no_circle():
    # An explicit import of one's own folder is an edge to its `__init__`, which imports the file again: a circle.
    graphlib.TopologicalSorter({module: imported_files(module) for module in FILES}).prepare()


def test_only_the_trainers_import_trl():
    users = {module for module in FILES for source, _ in imports(TREES[module]) if source.split(".")[0] == "trl"}
    assert {top_level(module) for module in users} == {"trainers"}


def test_one_function_prints():
    """`say` escapes what is not printable; whatever prints past it could send control characters to a terminal."""
    trees = {**TREES, **{where: ast.parse(text) for where, text in OUTSIDE.items() if where.endswith(".py")}}
    printing = {
        module
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"))
    }
    assert printing == {"segrl.reports.terminal"}


def has_list_after_imports(tree: ast.Module) -> bool:
    """Return whether the first statement after docstring and imports (guarded ones too) binds `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and node is tree.body[0]):
            continue
        if isinstance(node, ast.If | ast.Try) and any(
            isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body
        ):
            continue
        return "__all__" in ast.unparse(node).split(" = ")[0].split(":")[0]
    return False


def test_every_module_lists_its_names_after_its_imports():
    assert [module for module in FILES if not has_list_after_imports(TREES[module])] == []


def test_listed_names_exist_once_and_are_not_private():
    wrong = []
    for module in set(FILES) - {"segrl.__main__"}:
        listed = list(getattr(import_module(module), "__all__", []))
        wrong += [f"{module}: {name} is listed twice" for name in set(listed) if listed.count(name) > 1]
        wrong += [f"{module}: {name} does not exist" for name in listed if not hasattr(import_module(module), name)]
        wrong += [f"{module}: {name} is private" for name in listed if re.match("_(?!_)", name)]
    assert wrong == []


def test_no_private_name_crosses_modules():
    crossing = {
        (module, source)
        for module in FILES
        for source, name in imports(TREES[module])
        if name and re.match("_(?!_)", name) and f"{source}.{name}" not in FILES
    }
    assert crossing == set()


def is_public(source: str, name: str | None) -> bool:
    """Return whether `from source import name` uses a name that a folder or a top-level file lists."""
    if name is None:
        return source == "segrl"
    module = import_module(source)
    return (hasattr(module, "__path__") or source.removeprefix("segrl.") in TOP_FILES) and name in module.__all__


def test_examples_and_pages_use_public_names():
    hidden = {
        (where, source)
        for where, text in OUTSIDE.items()
        for source, name in imports(ast.parse(text))
        if source.split(".")[0] == "segrl" and not is_public(source, name)
    }
    assert hidden == set()
