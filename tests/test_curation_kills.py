"""Builds that are killed again and again end with the same bytes, and no answer that arrived is asked for again."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import ChatServer
from curation_build import CONCURRENCY, build
from curation_cases import code, faulty_reply, make_cases

ROOT = Path(__file__).parent.parent
FILES = ("texts.jsonl", "judgements.jsonl", "judges.json")


def start(folder: Path, url: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("curation_build.py")), str(folder), url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def kept(folder: Path) -> set[str]:
    """The answers on disk, by the words that stand for their requests."""
    if not (folder / "calls.sqlite").exists():
        return set()
    file = sqlite3.connect(folder / "calls.sqlite")
    rows = file.execute("SELECT text || reason FROM answers").fetchall() if _has_table(file) else []
    file.close()
    return {row[0] for row in rows}


def _has_table(file: sqlite3.Connection) -> bool:
    return bool(file.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall())


def killed_builds(home: Path, kills: int, count: int) -> None:
    make_cases(home, count)
    with ChatServer(faulty_reply) as server:
        build(home / "alone", server.url)
        total = len(server.requests)
    draw = random.Random(kills)
    with ChatServer(faulty_reply, pause=0.03) as server:
        repeats, done = [], 0
        while True:
            before, stored = len(server.requests), kept(home / "killed")
            twice = sum(count - 1 for count in server.sent.values())
            process = start(home / "killed", server.url)
            point = before + draw.randint(1, max(2, total // kills)) if done < kills else None
            while process.poll() is None and (point is None or len(server.requests) < point):
                time.sleep(0.003)
            if process.poll() is None:
                time.sleep(draw.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                done += 1
            process.wait()
            while server.at_once:  # the server sends what is under way
                time.sleep(0.003)
            for request in server.requests[before:]:
                assert not any(code(request) in text for text in stored), "asked for an answer that was on disk"
            repeats.append(sum(count - 1 for count in server.sent.values()) - twice)
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0
                if done >= kills:
                    break
                raise AssertionError(f"the build ended after {done} kills; make it longer")
        print(f"{done} kills, {len(server.requests)} requests ({total} without), sent twice, by run: {repeats}")
        assert max(repeats) <= CONCURRENCY
        assert sum(repeats) <= done * CONCURRENCY
    for name in FILES:
        assert (home / "killed" / name).read_bytes() == (home / "alone" / name).read_bytes(), name


@pytest.mark.slow
def test_three_kills(tmp_path):
    killed_builds(tmp_path, kills=3, count=12)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_twenty_kills(tmp_path):
    killed_builds(tmp_path, kills=20, count=60)
