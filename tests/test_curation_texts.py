"""Questions, texts and judgements of a build, offline and against a real server on this machine."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer, Fault, text_of
from curation_build import settings
from curation_cases import faulty_reply, good_reply, make_cases

from segrl.curation.endpoints import Endpoint
from segrl.curation.facts import read_facts
from segrl.curation.judge_quality import weighted_kappa
from segrl.curation.judgements import judge_texts, read_judgements
from segrl.curation.judges import JudgeSettings, check_judge, judge_by_rules
from segrl.curation.prompts import PROMPT_NAMES, read_prompts, write_prompts
from segrl.curation.questions import read_descriptions, write_question
from segrl.curation.rules import check_text
from segrl.curation.template_texts import measure_appearance, template_reasoning
from segrl.curation.texts import TextSettings, read_texts, write_texts
from segrl.errors import DataError, SegRLError
from segrl.geometry.image_files import read_image
from segrl.geometry.mask_images import read_mask_file


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return make_cases(tmp_path_factory.mktemp("cases"), 16)


def test_offline_texts_are_accepted(cases, tmp_path):
    texts = write_texts(cases, TextSettings(), tmp_path)
    assert [text.id for text in texts] == [case.id for case in cases]
    assert {text.status for text in texts} == {"written"}, [text.problems for text in texts]
    assert read_texts(tmp_path) == texts
    assert texts[0].answer == "The cyst is located at [4, 4, 16, 18]."
    assert {text.implicit for text in texts} == {True, False}
    assert not any(case.lesion in text.query for case, text in zip(cases, texts, strict=True) if text.implicit)
    assert len({text.reasoning for text in texts}) > 12
    before = (tmp_path / "texts.jsonl").read_bytes()
    write_texts(cases, TextSettings(), tmp_path)
    assert (tmp_path / "texts.jsonl").read_bytes() == before

    judgements = judge_texts(cases, JudgeSettings(), tmp_path)
    assert {judgement.status for judgement in judgements} == {"accepted"}
    assert read_judgements(tmp_path) == judgements
    found = json.loads((tmp_path / "judges.json").read_text())["calibration"]
    assert sum(row["texts"] for row in found.values()) == 60
    assert sum(row["rules"] for row in found.values()) >= 57


def test_template_texts_are_true(cases):
    for number, case in enumerate(cases):
        facts = read_facts(case)
        grey = np.asarray(read_image(case.image).convert("L"))
        text = template_reasoning(facts, measure_appearance(grey, read_mask_file(case.mask)), case.id)
        assert ("brighter" if number % 3 else "darker") in text
        assert facts.location in text
        assert facts.size in text
        assert check_text(text, facts).problems == ()
        assert judge_by_rules(text, facts).score >= 0.8


def test_two_prompts_make_a_text_and_a_low_score_another(cases, tmp_path):
    text, judge = settings("http://unused/v1")
    with ChatServer(lambda request, attempt: Fault(text=good_reply(request))) as server:
        text, judge = settings(server.url)
        texts = write_texts(cases, text, tmp_path)
        judgements = judge_texts(cases, judge, tmp_path, text=text)
        made = len(server.requests)
        assert judge_texts(cases, judge, tmp_path, text=text) == judgements
    assert len(server.requests) == made  # nothing is asked twice
    assert set(server.attempts.values()) == {1}
    by_model = Counter(request["model"] for request in server.requests)
    again = [judgement for judgement in judgements if len(judgement.rounds) > 1]
    assert 0 < len(again) < len(cases)
    assert by_model == {"writer": 2 * (len(cases) + len(again)), "judge": len(cases) + len(again) + 6, "second": 6}
    assert {text.status for text in texts} == {"written"}
    assert set(texts[0].prompts) == {"perception", "reasoning"}
    for judgement in again:
        first, last = judgement.rounds
        assert first.score < 0.8
        assert "Say more of the outline" in first.remarks
        assert last.reasoning != first.reasoning
        remarks = [request for request in server.requests if first.remarks in text_of(request)]
        assert len(remarks) == 2  # both prompts carry them
    agreement = json.loads((tmp_path / "judges.json").read_text())["agreement"]
    assert agreement["texts"] == 6
    assert len(server.requests[0]["messages"][0]["content"]) == 3  # image, image with outline, text


def test_faults_lose_nothing_and_are_listed(cases, tmp_path):
    with ChatServer(faulty_reply) as server:
        text, judge = settings(server.url)
        texts = write_texts(cases, text, tmp_path)
        judgements = judge_texts(cases, judge, tmp_path, text=text)
        assert set(server.sent.values()) == {1}  # answers that arrived
        asked = len(server.requests)
        write_texts(cases, text, tmp_path)
        assert judge_texts(cases, judge, tmp_path, text=text) == judgements
        failing = sum(1 for attempts in server.attempts.values() if attempts > 2)
        assert len(server.requests) - asked <= 6 * failing + 6
    assert [text.id for text in texts] == [judgement.id for judgement in judgements] == [case.id for case in cases]
    assert len({text.status for text in texts}) > 1
    for text in texts:
        assert {"written": True, "refused": bool(text.problems), "failed": bool(text.reason)}[text.status]
    assert all(bool(judgement.reason) == (judgement.status != "accepted") for judgement in judgements)


def test_texts_that_many_share_are_refused(cases, tmp_path):
    stock = ("The breast is regular and the lesion in question is dark.", "Unlike a vessel, it ends where its rim is.")

    def reply(request, attempt):
        return Fault(text=stock["Describe in plain" not in text_of(request)])

    with ChatServer(reply) as server:
        texts = write_texts(cases, settings(server.url)[0], tmp_path)
    assert {text.status for text in texts} == {"refused"}
    assert {text.problems for text in texts} == {("boilerplate: shared with other texts",)}


def test_a_judge_that_is_the_writer(cases, tmp_path):
    here = Endpoint(url="http://a/v1", model="M")
    there = Endpoint(url="http://b/v1", model=" m")
    text = TextSettings(writer=here)
    for judge in (JudgeSettings(judge=there), JudgeSettings(second=there)):
        with pytest.raises(SegRLError, match=r"is the model of the writer.*allow_same"):
            judge_texts(cases, judge, tmp_path, text=text)
        check_judge(text, replace(judge, allow_same=True))
    with pytest.raises(SegRLError, match="judge and second are both"):
        JudgeSettings(judge=here, second=there)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_before_anything_is_written(cases, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    keyless = TextSettings(writer=Endpoint(url="http://a/v1", model="m", key_variable="NO_KEY"))
    build = tmp_path / "build"
    with pytest.raises(SegRLError, match="NO_KEY is not set"):
        write_texts(cases, keyless, build)
    with pytest.raises(DataError, match="no cases"):
        write_texts([], TextSettings(), build)
    with pytest.raises(DataError, match=r"texts\.jsonl: cannot be read .*stage `write` first"):
        judge_texts(cases, JudgeSettings(), build)
    assert not build.exists()
    write_texts(cases[:3], TextSettings(), build)
    with pytest.raises(DataError, match="no text of 13 cases"):
        judge_texts(cases, JudgeSettings(), build)
    with pytest.raises(DataError, match="texts of template, the settings say m"):
        judge_texts(cases[:3], JudgeSettings(), build, text=replace(keyless))
    (build / "texts.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match="line 1: no text"):
        read_texts(build)


def test_a_price_limit_stops_and_the_build_goes_on(cases, tmp_path):
    with ChatServer(lambda request, attempt: Fault(text=good_reply(request))) as server:
        text, _ = settings(server.url, max_calls=9)
        with pytest.raises(SegRLError, match="max_calls=9 is reached"):
            write_texts(cases, text, tmp_path)
        assert len(server.requests) == 9
        assert not (tmp_path / "texts.jsonl").exists()
        write_texts(cases, settings(server.url)[0], tmp_path)
    assert len(server.requests) == 2 * len(cases)


def test_prompts_of_a_user(tmp_path):
    written = write_prompts(tmp_path / "mine")
    assert sorted(path.stem for path in written) == sorted(PROMPT_NAMES)
    assert write_prompts(tmp_path / "mine") == []
    packaged = read_prompts(None)
    assert read_prompts(tmp_path / "mine") == packaged
    (tmp_path / "mine" / "judge.txt").write_text("# version 7\nIs {reasoning} good? {{}}")
    changed = read_prompts(tmp_path / "mine")["judge"]
    assert changed.fill({"reasoning": "it"}) == "Is it good? {}"
    assert changed.version.startswith("7, ")
    assert changed.version != packaged["judge"].version


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Say\n{leson}", r"judge\.txt, line 2: unknown field 'leson'; did you mean 'lesion'"),
        ("{perception}", "unknown field 'perception'"),
        ("{lesion", "line 1: .*written twice"),
        ("{}", "unknown field ''"),
        ("{lesion!r:>5}", "has a format"),
        ("# only a note", "is empty"),
    ],
)
def test_prompts_that_are_wrong(tmp_path, content, message):
    (tmp_path / "judge.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path)


def test_prompt_files_of_other_names(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        read_prompts(tmp_path / "none")
    (tmp_path / "jugde.txt").write_text("x")
    with pytest.raises(DataError, match="unknown prompt 'jugde'; did you mean 'judge'"):
        read_prompts(tmp_path)


def test_questions(cases, tmp_path):
    facts = read_facts(cases[0])
    asked = [write_question(facts, str(number), implicit_share=0.3) for number in range(400)]
    assert 0.2 < sum(implicit for _, implicit in asked) / len(asked) < 0.4
    assert all(("cyst" in query) != implicit for query, implicit in asked)
    assert len({query for query, _ in asked}) >= 25
    (tmp_path / "d.json").write_text(json.dumps({"cyst": ["A sac filled with fluid."]}))
    described = read_descriptions(tmp_path / "d.json")
    assert "sac filled with fluid" in write_question(facts, "1", implicit_share=1.0, descriptions=described)[0]
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(DataError, match=r"d\.json' cannot be read"):
        read_descriptions(tmp_path / "d.json")


def test_weighted_kappa():
    assert weighted_kappa([0.0, 1.0, 0.5], [1.0, 0.0, 0.5]) == -1.0
    assert weighted_kappa([], []) is None
    # by hand: grades 0, 10 beside 0, 9: observed (0 + 1) / 2; by chance the mean of 0, 81, 100, 1 over all pairs
    assert weighted_kappa([0.0, 1.0], [0.0, 0.9]) == pytest.approx(1 - 0.5 / 45.5, abs=1e-6)


def test_two_builds_in_one_folder(cases, tmp_path):
    holds = "from pathlib import Path; from segrl.curation.build_folder import build_lock; import sys\n"
    holds += "with build_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(SegRLError, match="another process works in the build folder"):
            write_texts(cases, TextSettings(), tmp_path)
    finally:
        other.kill()  # a killed process keeps nobody out
        other.communicate()
    write_texts(cases, TextSettings(), tmp_path)
