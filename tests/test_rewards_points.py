"""Rewards for points."""

import itertools
import json
import math

import numpy as np
import pytest
from answers import FAR, HEIGHT, LEFT, RIGHT, WIDTH, box_lists, in_answer, mask_of, read, says, target_of
from growth import grows_linearly
from hypothesis import given
from hypothesis import strategies as st
from references import largest_total

from segrl.errors import RewardError
from segrl.predictions import Target
from segrl.rewards import make_reward
from segrl.rewards.builtin import point_distance, point_in_box, point_in_mask
from segrl.testing import check_reward

BOTH = target_of(LEFT, RIGHT)
EMPTY = target_of()
IN_LEFT, IN_RIGHT, OUTSIDE = [9.5, 8.5], [27.5, 22.5], [1, 30]
VARIANTS = [
    (point_in_box, {}),
    (point_in_mask, {}),
    (point_distance, {}),
    (point_distance, {"within_px": 4, "graded": True}),
    (point_distance, {"within_px": 100, "resized_to": 840}),
    (point_distance, {"within_px": 6, "inside_box": True}),
]
each_variant = pytest.mark.parametrize(("reward", "settings"), VARIANTS)
coordinates = st.tuples(st.integers(0, 2 * WIDTH).map(lambda x: x / 2), st.integers(0, 2 * HEIGHT).map(lambda y: y / 2))
point_lists = st.lists(coordinates, max_size=4, unique=True)


def score_of(reward, points, target=BOTH, **settings):
    return reward(says(points=points), target, **settings)


def slow_share(points, target, value):
    """Best total of one-to-one pairs, by trying them all, over the larger number; empty sides by the rule."""
    count = len(target.boxes)
    if not points or not count:
        return float(not points and not count)
    return largest_total(np.array([[value(p, n) for n in range(count)] for p in points], dtype=float)) / max(
        len(points), count
    )


def test_point_in_box_and_mask_known_values():
    for reward in (point_in_box, point_in_mask):
        assert score_of(reward, [IN_RIGHT, IN_LEFT]) == 1.0
        assert score_of(reward, [IN_LEFT]) == 0.5
        assert score_of(reward, [IN_LEFT, [5, 5]]) == 0.5  # two points in one lesion
        assert score_of(reward, [IN_LEFT, OUTSIDE, [2, 2]]) == pytest.approx(1 / 3)
        assert score_of(reward, [LEFT[:2], RIGHT[:2]]) == 1.0
        assert score_of(reward, [LEFT[2:], RIGHT[2:]]) == 0.0  # half-open: the far corner is outside


def test_a_hole_in_the_lesion_is_in_its_box_but_not_on_its_mask():
    mask = mask_of(LEFT)
    mask[6:12, 7:13] = False
    ring = Target.from_mask(mask)
    assert score_of(point_in_box, [[9, 9]], ring) == 1.0
    assert score_of(point_in_mask, [[9, 9]], ring) == 0.0
    assert score_of(point_in_mask, [[5, 9]], ring) == 1.0


def test_points_on_the_far_edge_of_the_image_are_outside():
    whole = target_of([0, 0, WIDTH, HEIGHT])
    assert score_of(point_in_mask, [[WIDTH, HEIGHT]], whole) == 0.0
    assert score_of(point_in_mask, [[WIDTH - 0.5, HEIGHT - 0.5]], whole) == 1.0


def test_point_distance_known_values():
    one = target_of([10, 10, 13, 13])
    assert one.points.tolist() == [[11.5, 11.5]]
    three_off = [[14.5, 11.5]]
    assert score_of(point_distance, three_off, one, within_px=3) == 0.0
    assert score_of(point_distance, three_off, one, within_px=3.01) == 1.0
    assert score_of(point_distance, three_off, one, within_px=12, graded=True) == 0.75
    assert score_of(point_distance, three_off, one, within_px=3 * 840 / WIDTH + 0.1, resized_to=840) == 1.0
    assert score_of(point_distance, three_off, one, within_px=3 * 840 / WIDTH - 0.1, resized_to=840) == 0.0
    assert score_of(point_distance, BOTH.points.tolist(), within_px=0.1) == 1.0
    assert score_of(point_distance, BOTH.points[::-1].tolist(), within_px=0.1) == 1.0
    assert score_of(point_distance, [*BOTH.points.tolist(), OUTSIDE], within_px=0.1) == pytest.approx(2 / 3)


def test_a_point_outside_its_own_box_does_not_count():
    points = BOTH.points.tolist()

    def inside(*boxes, points=points):
        return point_distance(says(*boxes, points=points), BOTH, within_px=1, inside_box=True)

    assert inside(LEFT, RIGHT) == 1.0
    assert inside(RIGHT, LEFT) == 0.0
    assert inside(LEFT, FAR) == 0.5
    assert inside(FAR, RIGHT, LEFT) == 1.0  # not as many points as boxes: any of them
    assert inside(LEFT, points=points) == 0.5
    assert inside() == 0.0
    twice = [points[0]] * 2  # the copy that counts is the one in its box, wherever it stands
    assert inside(LEFT, RIGHT, points=twice) == inside(RIGHT, LEFT, points=twice) == 0.5
    for edge in (LEFT[:2], LEFT[2:]):
        assert point_distance(says(LEFT, points=[edge]), target_of(LEFT), within_px=99, inside_box=True) == 1.0


@given(point_lists, box_lists(unique=True))
def test_points_equal_a_slow_reading(points, boxes):
    target = target_of(*boxes)

    def in_box(p, n):
        x1, y1, x2, y2 = boxes[n]
        return x1 <= p[0] < x2 and y1 <= p[1] < y2

    def off(p, n):
        return math.dist(p, target.points[n])

    assert score_of(point_in_box, points, target) == pytest.approx(slow_share(points, target, in_box))
    assert score_of(point_in_mask, points, target) == pytest.approx(slow_share(points, target, in_box))
    near = slow_share(points, target, lambda p, n: off(p, n) < 5)
    assert score_of(point_distance, points, target, within_px=5) == pytest.approx(near)
    graded = slow_share(points, target, lambda p, n: max(0.0, 1 - off(p, n) / 5))
    assert score_of(point_distance, points, target, within_px=5, graded=True) == pytest.approx(graded)


@given(point_lists, st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=6, max_size=6))
def test_point_in_mask_equals_a_slow_reading_on_any_mask(points, rows):
    mask = np.kron(np.array(rows), np.ones((4, 4), dtype=bool))  # touching and nested lesions of many shapes
    mask = np.pad(mask, ((0, HEIGHT - 24), (0, WIDTH - 32)))
    target = Target.from_mask(mask)
    boxes = target.boxes.tolist()

    def hit(p, n):
        x, y = int(p[0]), int(p[1])
        on = x < WIDTH and y < HEIGHT and bool(mask[y, x])
        return on and boxes[n][0] <= p[0] < boxes[n][2] and boxes[n][1] <= p[1] < boxes[n][3]

    if len(boxes) <= 6:  # the slow reading tries all pairs
        assert score_of(point_in_mask, points, target) == pytest.approx(slow_share(points, target, hit))


@pytest.mark.slow
@each_variant
@given(point_lists, box_lists(), st.randoms(use_true_random=False))
def test_range_order_and_copies(reward, settings, points, boxes, random):
    target = target_of(*boxes)
    made = make_reward(reward, **settings)
    value = made.score(says(points=points), target)
    assert value is not None
    assert 0 <= value <= 1
    shuffled = random.sample(points, len(points))
    assert score_of(reward, shuffled, target_of(*random.sample(boxes, len(boxes))), **settings) == pytest.approx(value)
    if len(set(map(tuple, target.points.tolist()))) == len(boxes):
        for copies in itertools.accumulate(points, lambda sofar, p: [*sofar, p], initial=[]):
            assert score_of(reward, points + copies, target, **settings) <= value + 1e-9


@each_variant
def test_empty_sides(reward, settings):
    assert score_of(reward, [], EMPTY, **settings) == 1.0
    assert score_of(reward, [IN_LEFT], EMPTY, **settings) == 0.0
    assert score_of(reward, [], BOTH, **settings) == 0.0
    assert reward(says(LEFT), EMPTY, **settings) == 0.0  # a hallucinated box is no empty answer
    assert reward(says(LEFT, RIGHT), BOTH, **settings) == 0.0


@each_variant
@pytest.mark.parametrize("target", [BOTH, EMPTY], ids=["lesions", "no lesion"])
def test_an_invalid_text_scores_nothing_unless_asked_for(reward, settings, target):
    pairs = zip([LEFT, RIGHT], BOTH.points.tolist(), strict=True)
    good = json.dumps([{"bbox_2d": box, "point_2d": point} for box, point in pairs])
    for text in ("", " ", in_answer("none"), in_answer(good) * 2, in_answer(good)[:-30]):
        assert reward(read(text), target, **settings) == 0.0
    trailing = read(in_answer(good) + " Done.")
    assert reward(trailing, target, **settings) == 0.0
    assert reward(trailing, BOTH, require_valid=False, **settings) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"within_px": 0}, "within_px=0; expected a positive number of pixels"),
        ({"resized_to": -1}, "resized_to=-1; expected None or a positive edge"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(RewardError, match=message):
        score_of(point_distance, [IN_LEFT], **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "settings"), [variant for variant in VARIANTS if variant[1]])
def test_what_is_declared_holds_for_these_settings_too(reward, settings):
    check_reward(reward, max_examples=20, **settings)


@each_variant
def test_work_is_linear_in_the_points(reward, settings):
    def scored(count):
        points = [{"point_2d": [n % 40 + n * 1e-9, n % 32]} for n in range(count)]
        prediction = read(in_answer(json.dumps(points)))
        assert len(prediction.points) == count
        return lambda: reward(prediction, BOTH, **settings)

    assert scored(24_000)() < 0.01
    assert grows_linearly(scored, 300)
