"""The audit finds the rewards that published systems were hacked with, and lets the honest ones pass."""

import io
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import sampled
from rich.console import Console

from segrl.audit import AuditReport, audit
from segrl.audit.judging import COLUMNS
from segrl.audit.policies import GRADES, POLICIES, answer
from segrl.audit.scenes import KINDS, make_scenes
from segrl.errors import RewardError, UnknownNameError
from segrl.geometry import boxes_from_mask, match_boxes, pairwise_iou
from segrl.metrics import dice, iou
from segrl.predictions import Frame, Target, VolumeTarget
from segrl.rewards import (
    CompletionFormat,
    Reward,
    list_rewards,
    make_reward,
    register_reward,
    registry,
    reward_info,
    weighted_sum,
)
from segrl.rewards.builtin import box_iou

TEXT, JSON = CompletionFormat(), CompletionFormat(answer_format="json")
BY_NAME = {policy.name: policy for policy in POLICIES}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def verdict(reward, **options):
    if isinstance(reward, str | Reward) and not options:
        return known_verdict(reward)
    (found,) = audit(reward, **options).verdicts
    return found


@cache
def known_verdict(reward):
    (found,) = audit(reward).verdicts
    return found


def winners(reward, **options):
    return {row.policy for row in verdict(reward, **options).rows if row.wins}


# --- rewards that pay for garbage


def iou_table(prediction, target):
    return pairwise_iou(prediction.boxes, target.boxes)


def recall(prediction, target):
    """Every lesion's best box; more boxes never hurt."""
    table = iou_table(prediction, target)
    return float((table.max(axis=0) > 0.5).mean()) if table.size else float(target.empty)


def covered(prediction, target):
    """Share of the lesion inside of the mask."""
    if prediction.mask is None or target.empty:
        return float(target.empty)
    return float(prediction.mask[target.mask].mean())


def f1_not_one_to_one(prediction, target):
    """Each box that hits anything is a true positive."""
    table = iou_table(prediction, target)
    if not prediction.valid or not table.size:
        return float(prediction.valid and len(prediction.boxes) == len(target.boxes))
    hits = int((table.max(axis=1) > 0.5).sum())
    return 2 * hits / (len(prediction.boxes) + len(target.boxes))


def first_box_of_the_text(prediction, target):
    """The first box anywhere counts, in the reasoning too."""
    found = re.search(r"\[(\d+), (\d+), (\d+), (\d+)\]", prediction.text)
    if found is None or target.empty:
        return float(found is None and target.empty)
    frame = Frame("relative_1000", (target.width, target.height))
    return float(pairwise_iou(frame.to_original([[int(n) for n in found.groups()]]), target.boxes).max())


def pays_for_answering(prediction, target):
    """Where there is nothing to find any box is as good as none, and finding one is a start."""
    if not prediction.valid:
        return 0.0
    if target.empty:
        return 0.2 + 0.3 * (len(prediction.boxes) > 0)
    return 0.2 + 0.8 * box_iou(prediction, target)


def unreadable_is_right(prediction, target):
    """What cannot be parsed is given the benefit of the doubt."""
    return 1.0 if not prediction.valid else box_iou(prediction, target)


def confidence_of_misses(prediction, target):
    """A miss scores 1 - c, so that a net of unsure boxes scores most."""
    if prediction.scores is None or target.empty:
        return float(len(prediction.boxes) == 0 and target.empty)
    hit = iou_table(prediction, target).max(axis=1) > 0.5
    return float(np.where(hit, prediction.scores, 1 - prediction.scores).mean())


def larger_is_better(prediction, target):
    """The wrong sign."""
    return -box_iou(prediction, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "by"),
    [
        (recall, {"net of boxes", "poor, and boxes around"}),
        (f1_not_one_to_one, {"good, every box nearly twice"}),
        (first_box_of_the_text, {"good, in the reasoning only"}),
        (pays_for_answering, {"whole image", "centre", "noise", "grid of boxes"}),
        (unreadable_is_right, {"empty text", "copy of the prompt", "two guesses", "good, answered twice"}),
        (confidence_of_misses, {"grid, not sure"}),
        (larger_is_better, {"poor", "fair", "always 'no lesion'", "noise"}),
        (make_reward("box_iou", require_valid=False), {"box in an unread notation"}),
        ("format", {"always 'no lesion'", "whole image", "token only"}),
        ("box_count", {"whole image", "centre"}),
        ("length_budget", {"always 'no lesion'", "whole image"}),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_gamed(reward, by):
    found = verdict(reward)
    won = {row.policy for row in found.rows if row.wins}
    assert found.hackable
    assert by <= won, won
    assert any(reason.startswith(f"{min(by)}: ") for reason in found.reasons)


def test_recall_of_masks_is_gamed_by_the_whole_image():
    register_reward("covered", needs_mask=True)(covered)
    assert winners("covered") >= {"whole image", "long repetition", "grid of boxes"}


@pytest.mark.parametrize(
    "name", sampled([name for name in list_rewards() if reward_info(name).origin.startswith("segrl ")], keep=6)
)
def test_built_in(name):
    """Whoever does not look at the truth, or at places, is hackable alone; nothing else is."""
    found = verdict(name)
    expected = not make_reward(name).needs_target or name == "box_count"
    assert found.hackable == expected, str(found)
    assert found.answer_format == ("json" if make_reward(name).volume else found.answer_format)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["box_f1", "dual_granularity_mask", "core_seg", "seg_zero"])
def test_the_verdict_does_not_hang_on_the_seed(name, seed):
    assert not verdict(name, seed=seed).hackable


# --- compositions


@pytest.mark.long
def test_what_closes_a_blind_reward():
    boxes = make_reward("box_iou")
    assert verdict("format").hackable
    assert not verdict(weighted_sum({"format": 1.0, boxes: 1.0})).hackable
    assert not verdict(make_reward("format").gate(boxes, above=0.3)).hackable
    assert not verdict(make_reward("box_count").gate(boxes, above=0.5)).hackable
    assert not verdict(boxes.gate("format").clip(0, 1).schedule({0: 0, 1: 2})).hackable


def test_a_step_can_open_what_was_closed():
    assert verdict(make_reward("box_iou").scale(-1.0)).hackable
    assert verdict(make_reward("box_iou").schedule({0: 0, 1: 1}), progress=0.0).hackable
    assert verdict(make_reward("box_iou").gate("format", otherwise=2.0)).hackable


@pytest.mark.long
@pytest.mark.parametrize("step", [{"mode": "rank"}, {"mode": "center"}, {"mode": "zscore", "group_size": 4}])
def test_group_relative_rewards_compare_the_policies(step):
    assert not verdict(make_reward("box_iou").group_relative(**step)).hackable
    relative = verdict(make_reward(recall).group_relative(**step))
    assert "poor, and boxes around" in {row.policy for row in relative.rows if row.wins}
    assert verdict(make_reward("format").group_relative(**step)).hackable


# --- the page

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "audit.md"
BOXES = make_reward("box_iou")
COMPOSITIONS = {
    "`format` + `box_f1`": weighted_sum({"format": 1.0, "box_f1": 1.0}),
    "`format` behind the gate `box_iou` > 0.3": make_reward("format").gate(BOXES, above=0.3),
    "`length_budget` behind the gate `box_iou` > 0.3": make_reward("length_budget").gate(BOXES, above=0.3),
    "`repetition` + `box_iou`": weighted_sum({"repetition": 1.0, "box_iou": 1.0}),
    "`think_answer_format` + `json_format` + `point_in_mask`": weighted_sum(
        {"think_answer_format": 1.0, "json_format": 1.0, "point_in_mask": 1.0}
    ),
    "`slice_format` + `slice_boxes`": weighted_sum({"slice_format": 1.0, "slice_boxes": 1.0}),
    "`box_count` + `box_iou`": weighted_sum({"box_count": 1.0, "box_iou": 1.0}),
    "`box_count` behind the gate `box_iou` > 0.3": make_reward("box_count").gate(BOXES, above=0.3),
    "`box_ap` with `count_penalty=False`": make_reward("box_ap", count_penalty=False),
    '`box_hungarian` with `mode="f_beta", beta=10`': make_reward("box_hungarian", mode="f_beta", beta=10),
    "`box_iou` with `threshold=0`": make_reward("box_iou", threshold=0.0),
    "`box_f1`, gated by `format` with `otherwise=1`": make_reward("box_f1").gate("format", otherwise=1.0),
}


def verdict_table(rewards) -> str:
    """What the audit finds over scenes with lesions, as a table of the documentation."""
    lines = ["| reward | verdict | perfect | poor | best degenerate policy | hacked by |", "| --- " * 6 + "|"]
    for label, reward in rewards.items():
        found = verdict(reward)
        scored = {row.policy: row.lesions for row in found.rows}
        degenerate = [row for row in found.rows if row.kind == "degenerate"]
        best = max(degenerate, key=lambda row: row.lesions or 0.0)
        won = [row.policy for row in found.rows if row.wins]
        more = f" and {len(won) - 2} more" if len(won) > 2 else ""
        cells = [
            label,
            "**HACKABLE**" if found.hackable else "clean",
            f"{scored['perfect']:.2f}",
            f"{scored['poor']:.2f}",
            f"{best.lesions:.2f} ({best.policy})",
            "; ".join(won[:2]) + more,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def built_in(*forms):
    infos = [reward_info(name) for name in list_rewards()]
    kept = [
        info for info in infos if info.origin.startswith("segrl ") and (info.form == "preset") == ("preset" in forms)
    ]
    return {f"`{info.name}`": info.name for info in kept}


ORIGINALS = {
    "recall: every lesion's best box": recall,
    "F1 in which each box that hits is a true positive": f1_not_one_to_one,
    "IoU of the first box anywhere in the text": first_box_of_the_text,
    "any box scores something, also where nothing is to be found": pays_for_answering,
    "an unreadable text scores 1": unreadable_is_right,
    "a miss scores 1 − confidence": confidence_of_misses,
}
TABLES = {"alone": built_in(), "presets": built_in("preset"), "composed": COMPOSITIONS, "originals": ORIGINALS}


@pytest.mark.slow
@pytest.mark.parametrize("rewards", TABLES.values(), ids=TABLES)
def test_the_page_says_what_the_audit_finds(rewards):
    assert verdict_table(rewards) in PAGE.read_text()


def test_the_page_names_every_policy():
    page = PAGE.read_text()
    assert [policy.name for policy in POLICIES if f"| {policy.name} |" not in page] == []


# --- what the report says


def test_report():
    report = audit(["format", weighted_sum({"format": 1.0, "box_f1": 2.0}, "both")], scenes=12)
    assert isinstance(report, AuditReport)
    alone, both = report.verdicts
    assert (report.hackable, alone.hackable, both.hackable, report.scenes) == (True, True, False, 12)
    assert len(report.rows) == len(alone.rows) + len(both.rows)
    assert "it does not read the ground truth" in alone.advice
    assert str(both) == "both: clean"
    assert str(alone).startswith("format: HACKABLE\n  - always 'no lesion': 1 over scenes of kind 'one', as all honest")

    perfect = next(row for row in both.rows if row.policy == "perfect")
    whole = next(row for row in both.rows if row.policy == "whole image")
    assert (perfect.all, perfect.empty) == (pytest.approx(3.0, abs=0.05), 3.0)
    assert (whole.lesions, whole.empty, whole.parts) == (1.0, 1.0, {"format": 1.0, "box_f1": 0.0})
    assert whole.kinds == dict.fromkeys(KINDS, 1.0)

    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (plain["hackable"], plain["scenes"]) == (True, 12)
    assert [entry["reward"] for entry in plain["verdicts"]] == ["format", "both"]
    assert {"policy", "kind", "wins", "parts", *COLUMNS} <= plain["verdicts"][1]["rows"][0].keys()


def test_the_printed_report_holds_every_pay_and_no_markup():
    out = io.StringIO()
    hostile = make_reward("box_f1").named("[red]\x1b[31mboxes")
    Console(file=out, width=100).print(audit(hostile, scenes=6))
    printed = out.getvalue()
    assert "\x1b" not in printed
    assert r"[red]\x1b[31mboxes: clean" in printed
    assert len(re.findall(r"│ (?:good|perfect) +│ +[01]\.\d{3} │", printed)) == 2


def test_a_reward_that_applies_nowhere_is_not_judged():
    found = verdict(lambda prediction, target: None)
    assert (found.hackable, found.reasons) == (False, ())
    assert found.advice == "it applies to none of the scenes; give ground truths of your own"


def test_a_reward_that_applies_to_some_scenes():
    def small(prediction, target):
        if target.empty or target.mask.mean() > 0.01:
            return None
        return make_reward("box_iou").score(prediction, target)

    found = verdict(small)
    assert not found.hackable
    assert {row.empty for row in found.rows} == {None}


# --- truths of one's own


def test_own_truths():
    middle = np.zeros((64, 64), dtype=bool)
    middle[15:49, 15:49] = True
    prior = verdict("box_iou", scenes=[Target.from_mask(middle)] * 3)
    assert {row.policy for row in prior.rows if row.wins} >= {"centre"}, "all lesions are where the prior is"

    volume = VolumeTarget.from_mask(np.stack([middle & False, middle, middle & False, middle & False]))
    assert "-" not in verdict("slice_visibility", scenes=[volume, Target.from_mask(middle)]).answer_format
    with pytest.raises(RewardError, match="reward 'slice_boxes': no scenes"):
        audit("slice_boxes", scenes=[Target.from_mask(middle)])
    with pytest.raises(RewardError, match="no scenes"):
        audit("box_f1", scenes=0)
    with pytest.raises(UnknownNameError, match="did you mean 'box_f1'"):
        audit("box_f2")


# --- the grammar


@pytest.mark.slow
def test_policies_answer_in_the_grammar_that_the_reward_reads():
    assert verdict("box_f1").answer_format == "text"
    assert verdict("point_in_mask").answer_format == "json"
    assert verdict("box_confidence").answer_format == "json"
    assert verdict("medvol_r1").answer_format == "json"
    pixels = make_reward("box_f1", frame="original_px", seg_token="", require_seg=False, require_reasoning=False)
    assert not verdict(pixels).hackable
    seen = []

    def frame(shown, original):
        seen.append(shown)
        return Frame("original_px", original)

    assert not verdict(make_reward("mask_iou", frame=frame)).hackable
    assert set(seen) == {(256, 256)}


# --- scenes and policies


@pytest.mark.parametrize("volume", [False, True])
def test_scenes(volume):
    scenes, again = make_scenes(24, volume=volume, seed=3), make_scenes(24, volume=volume, seed=3)
    assert [scene.kind for scene in scenes] == list(KINDS) * 4
    for scene, same in zip(scenes, again, strict=True):
        assert (scene.target.mask == same.target.mask).all()
        mask = scene.target.mask.max(axis=0) if volume else scene.target.mask
        assert len(boxes_from_mask(mask)) == {"none": 0, "several": 3}.get(scene.kind, 1)
        assert scene.target.empty == (scene.kind == "none")
        edges = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        assert edges or scene.kind != "at the border"
        size = mask.shape[0]
        fixed = [[0, 0, size, size], [size / 4, size / 4, size * 3 / 4, size * 3 / 4]]
        assert not len(boxes_from_mask(mask)) or pairwise_iou(boxes_from_mask(mask), fixed).max() < 0.4
        assert {"tiny": mask.mean() < 0.01, "large": mask.mean() > 0.15}.get(scene.kind, mask.mean() < 0.15)
    assert (make_scenes(1, volume=volume, seed=4)[0].target.mask != scenes[0].target.mask).any()


@pytest.mark.parametrize("completion_format", [TEXT, JSON])
def test_honest_policies_have_the_overlap_of_their_grade(completion_format):
    for scene in make_scenes(24):
        for grade, levels in GRADES.items():
            said = answer(BY_NAME[grade], scene, completion_format, True)
            assert said is not None
            assert said.valid
            assert said.mask is not None
            assert isinstance(scene.target, Target)
            if scene.target.empty:
                assert len(said.boxes) == 0
                assert not said.mask.any()
                continue
            boxes = np.diag(pairwise_iou(said.boxes, scene.target.boxes))
            assert min(abs(boxes[0] - level) for level in levels) < 0.05 or scene.kind == "tiny"
            assert min(abs(iou(said.mask, scene.target.mask) - level) for level in levels) < 0.2
            if completion_format is JSON:
                assert said.scores is not None
                assert said.points.shape == (len(said.boxes), 2)


def test_degenerate_policies_do_not_look_at_the_truth():
    scenes = make_scenes(2)
    for policy in POLICIES:
        if policy.kind == "degenerate":
            for completion_format in (TEXT, JSON):
                texts = [policy.shows, *(answer(policy, scene, completion_format, False) for scene in scenes)][1:]
                same = {None if said is None else said.text for said in texts}
                assert len(same) == 1 or policy.name == "noise"


def test_honest_masks_of_volumes_have_the_overlap_of_their_grade():
    for scene in make_scenes(12, volume=True):
        for grade, levels in GRADES.items():
            said = answer(BY_NAME[grade], scene, JSON, True)
            assert said is not None
            assert said.mask is not None
            assert said.mask.shape == scene.target.mask.shape
            if scene.target.empty:
                assert not said.mask.any()
                continue
            assert min(abs(iou(said.mask, scene.target.mask) - level) for level in levels) < 0.25, "whole pixels"
            assert said.slice_index is not None
            assert scene.target.mask[said.slice_index].any()


def test_the_mask_of_a_volume_comes_from_boxes_on_a_slice():
    scene = make_scenes(1, volume=True)[0]
    for policy in POLICIES:
        for completion_format in (JSON, CompletionFormat(answer_format="json", require_seg=False)):
            said = answer(policy, scene, completion_format, True)
            if said is None:
                continue
            assert said.mask is not None
            assert said.mask.shape == scene.target.mask.shape
            assert said.mask.any() == (said.slice_index is not None and len(said.boxes) > 0)
    whole, first = (answer(BY_NAME[name], scene, JSON, True) for name in ("whole image", "first slice"))
    assert whole is not None
    assert first is not None
    assert whole.mask is not None
    assert first.mask is not None
    assert whole.mask.all()
    assert first.mask.all()


def test_more_boxes_show_more_of_a_volume_but_not_of_an_image():
    for volume in (True, False):
        scene = make_scenes(1, volume=volume)[0]
        for trick in ("poor, and boxes around", "good, and a grid"):
            plain, more = (answer(BY_NAME[name], scene, JSON, True) for name in (trick.split(",")[0], trick))
            assert plain is not None
            assert more is not None
            assert plain.mask is not None
            assert more.mask is not None
            assert (more.mask >= plain.mask).all()
            assert (more.mask.sum() > plain.mask.sum()) == volume


@pytest.mark.long
def test_a_window_without_truth_must_not_be_paid_for_an_empty_mask():
    """The rule for empty masks, applied to the slices around the named one, rewards naming a slice far away."""

    def window_dice(prediction, target):
        k = prediction.slice_index
        if not prediction.valid or k is None or target.empty:
            return float(prediction.valid and k is None and target.empty)
        return dice(prediction.mask[k : k + 1], target.mask[k : k + 1])

    settings = {
        "needs_mask": True,
        "volume": True,
        "completion_format": {"answer_format": "json", "require_seg": False},
    }
    register_reward("window_dice", **settings)(window_dice)
    assert winners("window_dice") >= {"only a slice"}
    assert not verdict(make_reward("propagated_dice", delta=0)).hackable
    assert not verdict(make_reward("medvol_r1", delta=0)).hackable


def test_boxes_around_win_if_only_matched_ones_prompt():
    """As MedVol-R1 trains: the best of many boxes is propagated, and the others cost less than it brings."""
    rewards, trick = [make_reward("medvol_r1", weights=[1, 1, w, 1]) for w in (1, 2)], BY_NAME["poor, and boxes around"]
    scored = {"poor": [], "matched": [], "all": []}
    for scene in make_scenes(24, volume=True):
        if scene.kind in ("none", "several"):
            continue
        poor, more = (answer(policy, scene, JSON, True) for policy in (BY_NAME["poor"], trick))
        assert poor is not None
        assert more is not None
        assert more.slice_index is not None
        assert isinstance(scene.target, VolumeTarget)
        true = scene.target.at(more.slice_index).boxes
        x, y = np.rint((more.boxes[match_boxes(more.boxes, true).pred_index] - true)[0, :2]).astype(int)
        best = more.with_mask(np.roll(scene.target.mask, (y, x), axis=(1, 2)))
        for name, said in {"poor": poor, "matched": best, "all": more}.items():
            scored[name].append([reward.score(said, scene.target) for reward in rewards])
    poor, matched, everything = (np.mean(scores, axis=0) for scores in scored.values())
    assert matched[0] > poor[0] + 0.1
    assert everything[0] < poor[0] - 0.3
    assert matched[1] < poor[1] - 0.1, "the boxes count twice"


def test_voxels_found_are_gamed_by_the_whole_volume():
    register_reward("voxels_found", needs_mask=True, volume=True, completion_format={"answer_format": "json"})(covered)
    assert winners("voxels_found") >= {"whole image", "grid of boxes", "poor, and boxes around"}


def test_an_answer_without_the_token_has_no_mask():
    scene = make_scenes(1)[0]
    for policy in POLICIES:
        for completion_format in (TEXT, JSON):
            said = answer(policy, scene, completion_format, True)
            assert said is None or (said.mask is not None) == said.has_seg
            assert said is None or said.has_seg or policy.kind != "honest"
    assert {policy.instead_of for policy in POLICIES if policy.kind == "trick"} <= BY_NAME.keys()
