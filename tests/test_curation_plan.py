"""Dry runs: what is counted is what a build then does, and nothing is made."""

import contextlib
import io
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from chat_server import ChatServer, Fault, text_of
from curation_build import settings as build_settings
from curation_cases import good_reply, make_cases
from public_names import BLOCKS, ROOT
from test_curation_difficulty import files_of
from test_curation_difficulty import make_cases as make_pairs
from test_curation_sources import write_set

from segrl.cli.main import main
from segrl.curation import CurationSettings, PlanAssumptions, SourceSettings, SourceSize, plan_build, plan_sources
from segrl.curation.call_cache import Answer, CallCache
from segrl.curation.calls import image_tokens, text_tokens
from segrl.curation.judgements import judge_texts
from segrl.curation.texts import write_texts
from segrl.errors import DataError

SOURCE = SourceSettings(path=Path("mine"), licence="CC0-1.0")


def reply(good_at_once: bool):
    """Texts that pass the rules; the judge refuses all that were not written anew."""

    def answer(request, _attempt):
        prompt = text_of(request)
        if "Score three parts" in prompt:
            good = good_at_once or "seen anew" in prompt
            scores = dict.fromkeys(("normal", "lesion", "reasoning"), 1.0 if good else 0.1)
            return Fault(text=json.dumps({**scores, "remarks": "Say more."}))
        text = good_reply(request)
        anew = "Write it anew" in prompt and "Describe in plain" in prompt
        return Fault(text=f"It was seen anew. {text}" if anew else text)

    return answer


@pytest.mark.parametrize("good_at_once", [True, False])
def test_calls_are_those_that_the_build_makes(tmp_path, good_at_once):
    cases = make_cases(tmp_path, 12)
    with ChatServer(reply(good_at_once)) as server:
        text, judge = build_settings(server.url, price_in=2.0, price_out=10.0)
        rows = write_texts(cases, text, tmp_path / "build")
        assert {row.problems for row in rows} == {()}
        judged = judge_texts(cases, judge, tmp_path / "build", text=text)
    assert {row.status for row in judged} == {"accepted"}
    sizes = [SourceSize("mine", {(64, 64): 12}, 4000.0, 0, "nodule", "Breast", "Ultrasound")]
    settings = CurationSettings(sources=(SOURCE,), write=text, judge=judge)
    words = round(np.mean([text_tokens(row.reasoning) for row in rows]) / 2)
    known = PlanAssumptions(again=0.0, text_tokens=words, verdict_tokens=20)
    plan = plan_sources(sizes, settings, known, hard=sizes)
    end = 0 if good_at_once else 1
    for model in ("writer", "judge", "second"):
        own = [calls for calls in plan.calls if calls.model == model]
        asked = [request for request in server.requests if request["model"] == model]
        assert sum(calls.calls[end] for calls in own) == len(asked)
        images = sum(part["type"] == "image_url" for request in asked for part in request["messages"][0]["content"])
        tokens = sum(text_tokens(text_of(request)) for request in asked) + images * image_tokens((64, 64), 64)
        planned = sum(calls.tokens_in[end] for calls in own)
        assert tokens <= planned * 1.1
        if good_at_once:
            assert tokens == pytest.approx(planned, rel=0.1)
            assert sum(calls.cost[0] for calls in own) == pytest.approx(
                sum(calls.tokens_in[0] * 2e-6 + calls.tokens_out[0] * 1e-5 for calls in own)
            )


def test_assumptions_move_what_is_expected_and_not_what_is_most():
    text, judge = build_settings("http://localhost:1/v1")
    settings = CurationSettings(sources=(SOURCE,), write=text, judge=judge)
    sizes = [SourceSize("mine", {(512, 512): 700, (100, 100): 300}, 2e5)]
    few, many = (plan_sources(sizes, settings, PlanAssumptions(hard=share, again=share)) for share in (0.1, 0.5))
    assert (few.hard, many.hard) == ((100, 1000), (500, 1000))
    writing, again, judging, second = few.calls
    assert writing.calls == (200, 2000)
    assert again.calls == (20, 2000)  # one round, and a tenth of the texts
    assert judging.calls == (110 + 6, 2000 + 6)  # 6 of the calibration
    assert second.calls == (6, 6)
    assert [calls.calls[1] for calls in few.calls] == [calls.calls[1] for calls in many.calls]
    assert many.calls[1].calls[0] == 500
    assert few.disk["dataset"] == (2 * 10**7, 2 * 10**8)
    hours = plan_sources(sizes, settings, PlanAssumptions(training_rate=100.0, read_rate=1e3, write_rate=10.0))
    assert hours.gpu_hours == pytest.approx((hours.images + hours.predictions / 3) / 100 / 3600)
    assert hours.calls[0].gpu_hours == pytest.approx(
        (hours.calls[0].tokens_in[0] / 1e3 + hours.calls[0].tokens_out[0] / 10) / 3600
    )


def test_limits_that_will_stop_the_build_are_said():
    text, judge = build_settings("http://localhost:1/v1", max_calls=300)
    settings = CurationSettings(sources=(SOURCE,), write=text, judge=judge)
    plan = plan_sources([SourceSize("mine", {(64, 64): 1000}, 1.0)], settings, PlanAssumptions(hard=0.2, again=0.1))
    assert plan.notes == (
        "max_calls=300 of writer will stop the build: 440 expected, 4,000 at most",
        "max_calls=300 of judge may stop the build: 226 expected, 2,006 at most",
    )


@pytest.mark.parametrize(("name", "value"), [("again", 1.5), ("hard", -0.1), ("text_tokens", 0), ("read_rate", 0.0)])
def test_assumptions_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value}; expected"):
        PlanAssumptions(**{name: value})


def test_no_sources():
    with pytest.raises(DataError, match=r"^no sources"):
        plan_sources([], CurationSettings(sources=(SOURCE,)))


YAML = """
sources: [{path: pairs, format: pairs, lesion: nodule, modality: CT, licence: MIT}]
difficulty:
  committee: {encoders: [tu-regnetx_002], size: 32, steps: 2, batch: 2, check: 2, folds: 3}
"""


def test_a_dry_run_of_each_stage_makes_nothing(tmp_path, capsys):
    make_pairs(tmp_path / "pairs", 20)
    writer = 'write: {writer: {url: "http://localhost:1/v1", model: m, price_in: 1, price_out: 2}}\n'
    (tmp_path / "curate.yaml").write_text(YAML + writer)
    before = files_of(tmp_path)
    for stage in ("run", "difficulty", "select", "write", "judge", "publish"):
        assert main(["curate", stage, str(tmp_path / "curate.yaml"), "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("A plan; nothing is made.\ncases        20 of 1 source; 6 hard expected, 20 at most\n")
        assert ("3 trainings (0 on disk) of 2 steps at most, 12 images; 20 predictions" in out) == (
            stage in ("run", "difficulty")
        )
        assert ("write: writer m: 12 (40 at most) calls" in out) == (stage in ("run", "write"))
        assert ("dataset " in out) == (stage in ("run", "publish"))
        assert out.splitlines()[-1].startswith("assumed      hard=0.31")
    assert files_of(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    make_pairs(tmp_path / "pairs", 20)
    (tmp_path / "curate.yaml").write_text(YAML)
    for other, message in (("pairs", "is not empty, and no build"), ("curate.yaml", "is not empty, and no build")):
        words = ["curate", "run", str(tmp_path / "curate.yaml"), "--dry_run", "--build", str(tmp_path / other)]
        assert main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_build_holds_is_counted(tmp_path, capsys):
    make_pairs(tmp_path / "pairs", 20)
    (tmp_path / "curate.yaml").write_text(YAML)
    assert main(["curate", "run", str(tmp_path / "curate.yaml")]) == 0
    with CallCache(tmp_path / "build/calls.sqlite") as cache:
        cache.put("key", "m", "", Answer("answered", "text", cost=0.5))
    before = files_of(tmp_path)
    plan = plan_build(CurationSettings.read(tmp_path / "curate.yaml"), tmp_path / "build")
    assert files_of(tmp_path) == before
    assert plan.trained == plan.trainings == 3
    hard = len((tmp_path / "build/selected.jsonl").read_text().splitlines())
    assert plan.hard == (hard, hard)
    assert plan.kept == {"m": (1, 0.5)}
    for part, paths in {  # masks of networks that have learned nothing, as here, are longer than those in the estimate
        "sources": (tmp_path / "build/sources").rglob("*.png"),
        "cases": (tmp_path / "build").glob("[cs]*.jsonl"),
        "dataset": (tmp_path / "build/dataset").rglob("*.arrow"),
    }.items():
        size = sum(path.stat().st_size for path in paths)
        assert size / 2 <= plan.disk[part][0] <= size * 2, (part, size, plan.disk[part])


def test_every_layout_is_counted(tmp_path):
    write_set(tmp_path / "mine", 22, source=lambda number: "a" if number < 2 else "b", patient=str)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    for number in range(10):
        for folder, name in (("imagesTr", f"c{number}_0000"), ("labelsTr", f"c{number}")):
            (tmp_path / "scans" / folder).mkdir(parents=True, exist_ok=True)
            voxels = np.zeros((30, 20, 6), np.int16)
            voxels[5:9, 5:9, 1:5] = 1
            nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scans" / folder / f"{name}.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cyst": 1}, "numTraining": 10,
               "file_ending": ".nii.gz"}  # fmt: skip
    (tmp_path / "scans/dataset.json").write_text(json.dumps(content))
    scans = SourceSettings(path=tmp_path / "scans", format="nnunet", licence="MIT", modality="CT", slices=2)
    with pytest.raises(DataError, match=r"the source 'a' has 2 images"):
        plan_build(CurationSettings(sources=(SourceSettings(path=tmp_path / "mine", licence="MIT"),)), tmp_path / "no")
    mine = SourceSettings(path=tmp_path / "mine", licence="MIT", name="mine")
    plan = plan_build(CurationSettings(sources=(mine, scans)), tmp_path / "build")
    assert plan.cases == {"mine": 22, "scans": 20}
    assert plan.disk["sources"] == (7200, 7200)  # 20 slices of 30 x 20 pixels
    assert not (tmp_path / "build").exists()


def test_the_plan_on_paper_is_what_the_code_computes():
    page = ROOT / "docs/how-to/build-a-data-set.md"
    (block,) = [code for _, code in BLOCKS[page] if "plan_sources" in code]
    (shown,) = re.findall(r"^```text\n(cases .*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block, {})
    assert out.getvalue() == shown
