"""A build is killed again and again at random moments, and ends with the files of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from script_modules import ROOT
from test_curation_difficulty import files_of, make_cases

KILLS = 20
SETTINGS = """
sources: [{path: pairs, format: pairs, lesion: nodule, modality: CT, licence: MIT}]
difficulty:
  committee: {encoders: [tu-regnetx_002], size: 32, steps: 2, batch: 2, check: 2, folds: 3}
"""


def launch(home: Path, build: str, last: int) -> subprocess.CompletedProcess[str]:
    """Run all stages in a process that kills itself at its n-th file; 0 lets it finish."""
    script = home / "curate.py"
    script.write_text("import sys\nfrom segrl.cli.main import main\nsys.exit(main())\n")
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("killed_run.py"), last, script]
    return subprocess.run(
        [str(part) for part in (*command, "curate", "run", home / "curate.yaml", "--build", home / build)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(last)},
        capture_output=True,
        text=True,
        timeout=1200,  # of a machine that is busy
        check=False,
    )


def finished(process: subprocess.CompletedProcess[str]) -> int:
    assert process.returncode == 0, process.stderr[-3000:]
    return int(process.stdout.rsplit("events: ", 1)[1])


def content(build: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(build).items() if name != ".lock"}


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_killed_build_ends_with_the_same_files(tmp_path):
    make_cases(tmp_path / "pairs", 20)
    (tmp_path / "curate.yaml").write_text(SETTINGS)
    events = finished(launch(tmp_path, "alone", 0))
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        for path in sorted((tmp_path / "killed").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        while True:
            process = launch(tmp_path, "killed", draw.randint(1, events) if kills < KILLS else 0)
            if process.returncode != -signal.SIGKILL:
                break
            kills += 1
        finished(process)
        assert content(tmp_path / "killed") == content(tmp_path / "alone")
