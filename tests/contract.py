"""Run the contract tests against other versions of TRL and transformers, and print what moved.

    python tests/contract.py trl=1.16.0 transformers=5.17.0
    python tests/contract.py trl=1.17.0 -- -k signatures   # arguments for pytest
    python tests/contract.py --table                       # what is installed, and the oldest of each pin

The packages are installed into a virtual environment of their own, over the packages of the interpreter that runs this
script: torch and all that fits already is taken from there, so that a version costs some megabytes. Then

- every method of TRL and transformers that segrl's trainers override is compared, line by line, with the one that is
  installed here (`moved`), and
- the tests of `FILES` run, of which failures say which assumption is broken.

The last line is a row of the table in `docs/explanation/compatibility.md`, which `--table` writes (`.ci/long` writes a
copy and compares it).
The exit status is that of pytest.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("test_trl_contract.py", "test_sharing_contract.py")
PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft")
TABLE = ROOT / "docs" / "explanation" / "compatibility.md"
_HEAD = f"| {' | '.join(PACKAGES)} | tests of the contract |\n|{' --- |' * (len(PACKAGES) + 1)}\n"


def sources() -> dict[str, str]:
    """Source of each function of TRL and transformers that a trainer of segrl overrides, by name."""
    from segrl.trainers import SegGRPOTrainer, SegSFTTrainer

    found = {}
    for trainer in (SegGRPOTrainer, SegSFTTrainer):
        ours = [kind for kind in trainer.__mro__ if kind.__module__.startswith("segrl")]
        names = {name for kind in ours for name, value in vars(kind).items() if inspect.isfunction(value)}
        for kind in trainer.__mro__:
            if kind.__module__.startswith(("trl", "transformers")):
                for name in names & vars(kind).keys():
                    if inspect.isfunction(value := vars(kind)[name]):
                        found[f"{kind.__name__}.{name}"] = inspect.getsource(value)
    return found


def environment(folder: str, packages: Sequence[str]) -> str:
    """Make a virtual environment over the packages of this interpreter; returns its interpreter."""
    venv.create(folder, with_pip=False)
    python = str(Path(folder, "bin", "python"))
    site = next(Path(folder, "lib").glob("python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "base.pth").write_text(here + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *(name.replace("=", "==", 1) for name in packages)], check=True)
    return python


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line for each function that is gone, new, or has other lines."""
    lines = []
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            lines.append(f"{name}: {'gone' if other is None else 'new'}")
        elif one != other:
            changes = [line[0] for line in difflib.ndiff(one.splitlines(), other.splitlines())]
            lines.append(f"{name}: {changes.count('+')} lines more, {changes.count('-')} less")
    return lines


def oldest(project: str) -> list[str]:
    """The lower bounds of `PACKAGES` in a pyproject.toml, but torch's, whose builds are gigabytes."""
    pins = re.findall(r'"([\w-]+)>=([\d.]+)', project)
    return [f"{name}={bound}" for name, bound in pins if name in PACKAGES and name != "torch"]


def with_rows(page: str, rows: Sequence[str]) -> str:
    """The page with other rows in its table of versions."""
    before, head, after = page.partition(_HEAD)
    if not head:
        raise SystemExit(f"no table with the columns {', '.join(PACKAGES)} in the page")
    return before + head + "".join(f"{row}\n" for row in rows) + after[re.match(r"(\|.*\n)*", after).end() :]  # type: ignore[union-attr]


def main(argv: Sequence[str]) -> int:
    """Return pytest's status, or 3 if segrl cannot be imported."""
    given = list(argv)
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="package=version; none tests what is installed")
    parser.add_argument("--table", action="store_true", help="write the table of tested versions")
    parser.add_argument("--page", type=Path, default=TABLE, help="where --table writes; default: the page of the docs")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    if args.probe:
        print(json.dumps({"versions": {name: version(name) for name in PACKAGES}, "sources": sources()}))
        return 0
    if wrong := [item for item in args.packages if not re.fullmatch(r"[\w.-]+=[\w.]+", item)]:
        parser.error(f"{wrong[0]!r}: expected package=version, such as transformers=5.17.0")
    if not args.table:
        return tested(args.packages, rest)[0]
    if args.packages:
        parser.error("--table tests what is installed and the oldest of each pin; drop the versions")
    runs = [tested(packages, rest) for packages in ([], oldest((ROOT / "pyproject.toml").read_text()))]
    if all(row for _, row in runs):
        args.page.write_text(with_rows(args.page.read_text(), [row for _, row in runs]))
    return max(status for status, _ in runs)


def tested(packages: Sequence[str], rest: Sequence[str]) -> tuple[int, str]:
    """Run the tests with other versions, print what moved and failed; returns the status and the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        python = environment(folder, packages) if packages else sys.executable
        call = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, "capture_output": True}
        probe = subprocess.run([python, __file__, "--probe"], **call)
        if probe.returncode:
            print(f"segrl cannot be imported: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
            return 3, ""
        there = json.loads(probe.stdout.splitlines()[-1])
        for line in moved(sources(), there["sources"]):
            print(f"moved: {line}")
        files = [str(ROOT / "tests" / name) for name in FILES]
        tests = subprocess.run([python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *files, *rest], **call)
    report = tests.stdout.splitlines()
    print("\n".join(line for line in report if line.startswith(("FAILED", "ERROR"))))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", report[-1] if report else "")}
    passed, failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
    if not passed:
        print(tests.stdout[-2000:], tests.stderr[-2000:])
    row = f"| {' | '.join(there['versions'][name] for name in PACKAGES)} | {passed} passed, {failed} failed |"
    print(row)
    return tests.returncode, row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
