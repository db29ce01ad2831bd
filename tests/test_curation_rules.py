"""Rules for texts: planted faults are found, good texts stay, medical numbers survive. Generators: see `planted`."""

import random
import re
from collections import Counter
from typing import Any

import held_out_faults as other
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports_in_words import OPPOSITE, good_text, random_facts

from segrl.curation.facts import Facts
from segrl.curation.planted import KINDS, plant
from segrl.curation.rule_positions import find_positions, remove_positions
from segrl.curation.rule_words import find_language, repeated_sentences
from segrl.curation.rules import PROBLEMS, RuleSettings, check_corpus, check_text
from segrl.data.reasoning import count_word
from segrl.errors import SegRLError, UnknownNameError

CYST = Facts("cyst", "Breast", "Ultrasound", 1, "small", "upper left part", (0.1, 0.1, 0.3, 0.3))
GOOD = "The tissue is regular elsewhere. A dark cyst with a thin wall lies in the upper left part, unlike a vessel."


def test_one_in_twenty_texts_is_bad_and_the_rules_alone_find_them():
    rng = random.Random(16)
    rows = []
    for _ in range(1500):
        facts = random_facts(rng)
        kind = rng.choice(KINDS) if rng.random() < 0.05 else None
        text = good_text(facts, rng)
        rows.append((kind, facts, text if kind is None else plant(text, facts, kind, rng)))
    checked = [check_text(text, facts) for _, facts, text in rows]
    shared = check_corpus([item.text for item in checked], [facts for _, facts, _ in rows])
    found = Counter((kind, bool(item.problems or item.removed or number in shared))
                    for number, ((kind, *_), item) in enumerate(zip(rows, checked, strict=True)))  # fmt: skip
    bad = sum(number for (kind, _), number in found.items() if kind)
    caught = sum(number for (kind, hit), number in found.items() if kind and hit)
    good = found[None, True] + found[None, False]
    print(f"caught {caught} of {bad}, false alarms {found[None, True]} of {good}")
    assert caught >= 0.95 * bad
    assert found[None, True] <= 0.02 * good


def other_faults(rng):
    """Faults in other wordings, with facts and the sentence that is wrong."""
    x, y = rng.randint(20, 200), rng.randint(20, 200)
    numbers = {"x": x, "y": y, "x2": x + 30, "y2": y + 40, "p": rng.randint(11, 88), "q": rng.randint(11, 88)}

    def facts(fits=lambda facts: True):
        return next(made for _ in range(1000) if fits(made := random_facts(rng)))

    def sided(facts):
        return any(word in OPPOSITE for word in facts.location.split())

    for sentence in (*other.COORDINATES, *other.LANGUAGE, *other.BOILERPLATE):
        yield facts(), sentence.format(**numbers)
    for sentence in other.CONTRADICTION_SIDE:
        made = facts(sided)
        yield made, sentence.format(wrong=next(OPPOSITE[w] for w in made.location.split() if w in OPPOSITE))
    for modality, sentence in other.CONTRADICTION_MODALITY.items():
        yield facts(lambda made, modality=modality: made.modality == modality), sentence
    for sentence in other.CONTRADICTION_MANY:
        yield facts(lambda made: made.count == 1), sentence
    for sentence in other.CONTRADICTION_LARGE:
        yield facts(lambda made: made.size == "small"), sentence


def test_faults_in_other_wordings():
    rng = random.Random(5)
    for facts, sentence in other_faults(rng):
        checked = check_text(f"{good_text(facts, rng)} {sentence}", facts)
        assert checked.problems or checked.removed, sentence
    for whole in (*other.FORMAT, *other.LENGTH):
        facts = random_facts(rng)
        assert check_text(whole.replace("{text}", good_text(facts, rng)), facts).problems, whole


def whole(low=0, high=2000):
    return st.integers(low, high).map(str)


NUMBER = st.one_of(whole(), st.floats(0, 2000).map(lambda value: f"{value:.1f}"))
GAP = st.sampled_from([", ", ",", "; ", " ,"])
OPEN = st.sampled_from(["[]", "()", "{}", "<>", "⟨⟩", "［］", "（）"])
FORMS = (
    "{open}{a}{gap}{b}{gap}{c}{gap}{d}{close}", "{open}{a}{gap}{b}{close}", "{a}{gap}{b}{gap}{c}{gap}{d}",
    "x={a}, y={b}", "x1: {a} y1: {b}", "({a}, {b}) to ({c}, {d})", "pixel {n}", "{n} px", "{n} pixels", "row {n}",
    "column {n}", "{n} x {m}", "{p} % from the left", "{p}% of the image width", "{p} percent of the way down",
    "<box>({a},{b}),({c},{d})</box>", "<loc_{n}>", '"bbox_2d": [{a}, {b}, {c}, {d}]', "{n}-{m}-{n}-{m}",
    "top: {n}, left: {m}", "coordinates {a} {b}", "bounding box {a} {b} {c} {d}",
)  # fmt: skip


SENTENCES = ("The cyst lies at {}.", "It is found at {} in the image.", "Dark: {}.", "A spot ({}) is seen.")


@given(
    st.sampled_from(FORMS),
    st.lists(NUMBER, min_size=4, max_size=4),
    *(whole(10), whole(10), whole(1, 99), GAP, OPEN),
    st.sampled_from(SENTENCES),
)
def test_no_position_in_any_notation_survives(form, corners, n, m, p, gap, brackets, sentence):
    a, b, c, d = corners
    notation = form.format(a=a, b=b, c=c, d=d, n=n, m=m, p=p, gap=gap, open=brackets[0], close=brackets[1])
    checked = check_text(f"{GOOD} {sentence.format(notation)}", CYST)
    refused = any(problem.startswith(("coordinates", "format")) for problem in checked.problems)
    left = checked.text.replace(GOOD, "")
    alone = [rf"(?<![\d.]){re.escape(number)}(?![\d.])" for number in (a, b, n, m, p)]
    assert refused or not any(re.search(pattern, left) for pattern in alone)


MEDICAL = (
    "{n} mm",
    "{n}.5 cm",
    "{n} x {m} mm",
    "{n} × {m} × {n} cm",
    "{n} by {m} mm",
    "{n} HU",
    "grade {k}",
    "BI-RADS {k}",
    "T{k}",
    "L{k}/L{k}",
    "C{k}-C{k}",
    "{n} % of its volume",
    "the {k} o'clock position",
    "a {n}-year-old patient",
    "stage T{k}N0M0",
    "Gleason {k}+{k}",
    "segment {k}",
    "{n} months ago",
    "1:{k}",
    "{k} lesions",
    "type {k}",
    "zone {k}",
    "20{n:02}",
    "an ADC of 0.{k}",
    "{n}-{m} mm",
)


@given(st.sampled_from(MEDICAL), st.integers(10, 99), st.integers(10, 99), st.integers(1, 9))
def test_medical_numbers_survive(form, n, m, k):
    number = form.format(n=n, m=m, k=k)
    text = f"It goes along with {number} as one would expect here."
    assert (find_positions(text), remove_positions(text)) == ([], (text, []))


def test_coordinates_are_removed_where_the_sentence_stays_whole():
    text = f"{GOOD} A cyst, located at (12, 34), is dark. Its box is [1, 2, 3, 4]. At [1, 2, 3, 4] begins the rim."
    checked = check_text(text, CYST)
    assert checked.text == f"{GOOD} A cyst, is dark."
    assert len(checked.removed) == 3
    assert checked.problems == ()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The cyst is dark.", "length"),
        (f"{GOOD} " * 30, "length"),
        (f"{GOOD}</think>", "format"),
        (f"- {GOOD}\n- {GOOD}", "format"),
        (GOOD[:-1] + " and its", "format"),
        (f"{GOOD} It is in the lower right corner of the image.", "contradiction: side"),
        (f"{GOOD} Its T2-weighted signal is high.", "contradiction: modality"),
        (f"{GOOD} Three cysts are seen.", "contradiction: count"),
        (f"{GOOD} The cyst is very large.", "contradiction: size"),
        (f"{GOOD} Der Befund ist gut abgegrenzt und unverändert.", "language"),
        (f"I'm sorry, I cannot look at it. {GOOD}", "boilerplate"),
        (f"{GOOD} A thin wall surrounds it. A thin wall surrounds it.", "boilerplate: said twice"),
        ("Something seems to be different here and one may look at all of it once more.", "boilerplate: names neither"),
        (f"{GOOD} The red outline shows it.", "annotation"),
        (f"{GOOD} It spans 40 pixels.", "coordinates"),
    ],
)
def test_kinds_of_problems(text, kind):
    problems = check_text(text, CYST).problems
    assert any(problem.startswith(kind) for problem in problems), problems
    assert all(problem.split(":")[0] in PROBLEMS for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD} The right half of the image is normal.",
        f"{GOOD} It belongs to the right lobe and the upper outer quadrant of the breast.",
        f"{GOOD} MRI would show whether it is hyperintense.",
        f"{GOOD} No other cysts are seen, and two ribs cast shadows.",
        f"{GOOD} Large vessels run below it.",
        f"{GOOD} It measures 3 mm, which is small for a lesion of grade 2 at L4/L5.",
    ],
)
def test_what_is_no_contradiction(text):
    assert check_text(text, CYST).problems == ()


def test_facts_that_are_not_known_contradict_nothing():
    nothing = Facts("cyst", "", "", 0, "", "", (0.0, 0.0, 0.0, 0.0))
    text = f"{GOOD} Three large cysts are seen in the lower right corner of the image, and T2-weighted signal is high."
    assert check_text(text, nothing).problems == ()


def test_a_text_that_others_have_too():
    other_text = "The skin is even. In the lower part of the image is a dark mole with a notched border."
    shared = check_corpus([GOOD, other_text, GOOD.replace("cyst", "tumour")],
                          [CYST, CYST, Facts(**{**vars(CYST), "lesion": "tumour"})])  # fmt: skip
    assert set(shared) == {0, 2}
    assert repeated_sentences([f"Row {count_word(n)} differs from all." for n in range(5)]) == set()


def test_languages():
    german = "Der Befund liegt im oberen Teil und ist gut vom Gewebe abgegrenzt."
    assert find_language(german, "de") == ""
    assert find_language(german, "en") == german
    assert find_language("病灶边缘不规则，内部回声不均匀。", "zh") == ""
    assert find_language("Oval, dark.", "en") == ""  # too short to tell
    with pytest.raises(UnknownNameError, match="language 'xx'"):
        find_language("It is.", "xx")


def test_settings_out_of_range():
    wrong: tuple[dict[str, Any], ...] = ({"min_words": 0}, {"min_words": 9, "max_words": 8}, {"repeated_share": 0.0})
    for settings in wrong:
        with pytest.raises(SegRLError, match=next(iter(settings))):
            RuleSettings(**settings)
    with pytest.raises(UnknownNameError, match="language 'english'"):
        RuleSettings(language="english")
    with pytest.raises(UnknownNameError, match="kind of fault 'spelling'"):
        plant(GOOD, CYST, "spelling", random.Random(0))


@pytest.mark.parametrize(
    "text", ["(" * 5000, "1 " * 5000, "x=1," * 3000, "a " * 9000 + ".", "1x" * 5000, "%left " * 3000]
)
def test_long_texts_take_linear_time(text):
    """Patterns that backtrack would take hours: the test's own time limit decides."""
    check_text(text, CYST)
