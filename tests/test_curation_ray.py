"""Builds on a local Ray cluster of two nodes give the bytes of those without."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_server import ChatServer
from curation_build import CONCURRENCY, build
from curation_cases import faulty_reply, good_reply, make_cases
from script_modules import ROOT

from segrl.curation import CommitteeSettings
from segrl.curation.difficulty import DifficultySettings, find_difficulty
from segrl.errors import SegRLError

DIFFICULTY = DifficultySettings(
    committee=CommitteeSettings(encoders=("tu-regnetx_002",), size=32, steps=2, batch=2, check=2, folds=3)
)
FILES = ("texts.jsonl", "judgements.jsonl", "judges.json", "scored.jsonl", "selected.jsonl", "difficulty/errors.jsonl",
         "difficulty/mine/member0_fold0.json", "difficulty/mine/member0_fold2.json")  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.timeout(1800)
def test_a_cluster_of_two_makes_the_same_files(tmp_path):
    cases = make_cases(tmp_path, 21)
    with ChatServer(faulty_reply) as server:
        build(tmp_path / "alone", server.url)
        find_difficulty(cases, DIFFICULTY, tmp_path / "alone")
        asked = len(server.requests)
    with ChatServer(faulty_reply) as server, ChatServer(lambda request, _: good_reply(request)) as other:
        command = [sys.executable, "-W", "ignore", Path(__file__).with_name("ray_builds.py"), tmp_path / "ray"]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RAY_USAGE_STATS_ENABLED": "0",
                       "RAY_raylet_start_wait_time_s": "600"}  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            [*map(str, command), server.url, other.url], env=environment, capture_output=True, text=True, timeout=1700,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.requests) == asked
        assert max(server.sent.values()) == 1
        assert server.most_at_once <= CONCURRENCY
        assert len(other.requests) <= 3  # of both workers together
    lines = done.stdout.splitlines()
    assert lines[0] == "nodes 2 cpus 2"
    assert lines[1].startswith("limit writer: max_calls=3 is reached; what has arrived is kept")
    assert lines[2] == "connected True"  # a connection of the caller stays his
    for name in FILES:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(tmp_path):
    with pytest.raises(SegRLError, match=r'ray is not installed; run pip install "segrl\[ray\]"'):
        find_difficulty(make_cases(tmp_path, 4), DIFFICULTY, tmp_path / "build", engine="ray")
