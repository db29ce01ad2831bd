"""Texts and verdicts of a real server, `transformers serve` with a tiny model of random weights."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from curation_cases import make_cases

from segrl.curation import Endpoint, JudgeSettings, TextSettings, judge_texts, write_texts
from segrl.curation.call_cache import CallCache
from segrl.models.tiny import tiny_qwen2_5_vl

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("fastapi") is None, reason="transformers serve needs transformers[serving]"),
]


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    model, processor = tiny_qwen2_5_vl(layers=1, vision_layers=2, hidden_size=64, vision_hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "model", "--port", port,
               "--device", "cpu"]  # fmt: skip
    with (tmp_path / "server.txt").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=dict(os.environ))
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "server.txt").read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/v1/models", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield Endpoint(
            url=f"http://localhost:{port}/v1", model=str(tmp_path / "model"), key_variable="", max_tokens=24,
            concurrency=2, retries=1, timeout=120.0,
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait(30)


def test_a_tiny_model_behind_transformers_serve(endpoint, tmp_path):
    """Random weights write no text and no verdict: every row says so, and nothing is asked twice."""
    cases, build = make_cases(tmp_path / "cases", 3), tmp_path / "build"
    texts = write_texts(cases, TextSettings(writer=endpoint), build)
    assert {text.status for text in texts} <= {"failed", "refused"}
    assert all(text.reason or text.problems for text in texts)
    with CallCache(build / "calls.sqlite") as cache:
        calls, _ = cache.spent(endpoint.model)
    assert 3 <= calls <= 6
    assert write_texts(cases, TextSettings(writer=replace(endpoint, url="http://localhost:1/v1")), build) == texts
    write_texts(cases, TextSettings(), build)
    for structured in ("json_schema", "json_object", "prompt"):  # which this server ignores
        judge = JudgeSettings(judge=replace(endpoint, structured=structured), rounds=0, calibration=0)
        judged = judge_texts(cases, judge, build)
        assert {row.status for row in judged} == {"failed"}
        assert all(row.reason.startswith("no verdict: ") for row in judged)
    other = write_texts(cases[:1], TextSettings(writer=replace(endpoint, model="other")), tmp_path / "other")
    assert "Server is pinned to" in other[0].reason  # its words, not those of OpenAI's layout
