"""Texts and judgements of a build in a process of its own: `curation_build.py FOLDER URL`."""

import sys
from pathlib import Path
from typing import Any

from segrl.curation.case import read_cases
from segrl.curation.endpoints import Endpoint
from segrl.curation.judgements import judge_texts
from segrl.curation.judges import JudgeSettings
from segrl.curation.texts import TextSettings, write_texts

CONCURRENCY = 4


def settings(url: str, **more: Any) -> tuple[TextSettings, JudgeSettings]:
    def endpoint(model: str) -> Endpoint:
        limits = {"concurrency": CONCURRENCY, "retries": 2, "timeout": 30.0, "max_edge": 64}
        return Endpoint(**{"url": url, "model": model, "key_variable": "", **limits, **more})

    judge, second = endpoint("judge"), endpoint("second")
    judge_settings = JudgeSettings(judge=judge, second=second, agreement_sample=6, calibration=6, rounds=1)
    return TextSettings(writer=endpoint("writer")), judge_settings


def build(folder: Path, url: str, **more: Any) -> None:
    text, judge = settings(url, **more)
    cases = read_cases(folder.parent / "cases.jsonl")
    write_texts(cases, text, folder)
    judge_texts(cases, judge, folder, text=text)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2])
