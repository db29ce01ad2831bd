"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segrl.files.whole import is_unfinished, whole_file, write_whole

ROOT = Path(__file__).parents[1]
_KILLED = """
import os, signal, sys
from segrl.files.whole import whole_file
with whole_file(sys.argv[1], suffix=sys.argv[2]) as unfinished:
    unfinished.write_text("hal")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(path: Path, suffix: str) -> Path:
    """Kill a process in the middle of a file; the path of what it leaves."""
    before = set(path.parent.iterdir())
    command = [sys.executable, "-c", _KILLED, str(path), suffix]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert process.returncode == -signal.SIGKILL
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_text_and_bytes_replace_an_earlier_file(tmp_path):
    path = tmp_path / "deep" / "notes.txt"
    assert write_whole(path, "größer\n") == path
    assert path.read_bytes() == "größer\n".encode()
    assert write_whole(str(path), b"\r\n").read_bytes() == b"\r\n"
    assert write_whole(path, "").read_bytes() == b""
    assert [item.name for item in path.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("suffix", ["", ".nii.gz"])
def test_after_an_error_the_earlier_file_is_there_and_nothing_else(tmp_path, suffix):
    path = write_whole(tmp_path / "notes.txt", "earlier")

    def write() -> None:
        with whole_file(path, suffix=suffix) as unfinished:
            assert unfinished.name == f".notes.txt.{os.getpid()}.tmp{suffix}"
            unfinished.write_text("hal")
            raise ValueError("half")

    with pytest.raises(ValueError, match=r"^half$"):
        write()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["", ".nii.gz", ".png"])
def test_what_a_killed_process_leaves_is_known(tmp_path, suffix):
    path = write_whole(tmp_path / "notes.txt", "earlier")
    left = killed_while_writing(path, suffix)
    assert left.read_text() == "hal"
    assert left.name.endswith(f".tmp{suffix}")
    assert is_unfinished(left)
    assert not is_unfinished(path)
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("name", ["notes.txt", ".tmp", ".draft.tmp", "notes.7.tmp", ".notes.7.tmpl", ".notes.7.nii.gz"])
def test_other_files_are_not_unfinished(name):
    assert not is_unfinished(name)


def test_a_folder_in_its_place_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(OSError, match="irectory"):
        write_whole(tmp_path / "notes.txt", "text")
    assert list(tmp_path.rglob("*")) == [tmp_path / "notes.txt"]


def test_only_one_module_replaces_files():
    """A second way to write a file at once would be found here; the feature cache locks its folder and marks times."""
    own = {"files/whole.py", "caching/feature_cache.py"}
    home = Path(__file__).parents[1] / "segrl"
    found = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*.py")
        if "os.replace(" in path.read_text() or ".replace(path" in path.read_text()
    }
    assert found == own
