"""Filling of micro-batches: every row once, groups whole, within the budget, in as few as first fit needs."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from segrl.sharing import PromptKey, RowGroup, consecutive_parts, fill_micro_batches, fill_padded, prompt_groups

groups_of_rows = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=8)


def numbered(sizes):
    groups, start = [], 0
    for rows, tokens in sizes:
        groups.append(RowGroup(tuple(range(start, start + rows)), tokens))
        start += rows
    return groups


@given(groups_of_rows, st.integers(30, 60))
def test_groups_stay_whole_within_the_budget(sizes, budget):
    groups = numbered(sizes)
    parts = fill_micro_batches(groups, budget)
    assert sorted(row for part in parts for row in part) == [row for group in groups for row in group.rows]
    for part in parts:
        inside = [group for group in groups if set(group.rows) <= set(part)]
        assert sum(len(group.rows) for group in inside) == len(part)
        assert sum(group.tokens for group in inside) <= budget
        for group in inside:  # side by side
            first = part.index(group.rows[0])
            assert tuple(part[first : first + len(group.rows)]) == group.rows
    loads = [sum(g.tokens for g in groups if set(g.rows) <= set(part)) for part in parts]
    assert sum(load <= budget / 2 for load in loads) <= 1  # first fit leaves at most one part half empty


@given(groups_of_rows, st.integers(30, 60), st.integers(1, 40))
def test_as_many_as_another_process_has(sizes, budget, wanted):
    groups = numbered(sizes)
    rows = [row for group in groups for row in group.rows]
    parts = fill_micro_batches(groups, budget, wanted)
    assert sorted(row for part in parts for row in part) == rows
    assert len(parts) >= min(wanted, len(rows))
    assert len(parts) == max(len(fill_micro_batches(groups, budget)), min(wanted, len(rows)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(30, 90), st.integers(1, 20))
def test_padded_rows(lengths, budget, wanted):
    parts = fill_padded(lengths, budget, wanted)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) * max(lengths[row] for row in part) <= budget for part in parts)
    assert len(parts) >= min(wanted, len(lengths))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=12), st.integers(1, 40))
def test_consecutive_parts(rows, budget):
    keys = [PromptKey((1,) * (number + 1)) for number, _ in rows]
    lengths = [length for _, length in rows]
    parts = consecutive_parts(keys, lengths, budget)
    assert [row for part in parts for row in part] == list(range(len(rows)))
    for part, following in pairwise(parts):
        assert keys[part[-1]] != keys[following[0]]
    for part in parts:
        runs = sum(keys[row] != keys[row - 1] for row in part[1:])
        tokens = len(keys[part[0]].tokens) + sum(lengths[row] for row in part)
        tokens += sum(len(keys[row].tokens) for row in part[1:] if keys[row] != keys[row - 1])
        assert tokens <= budget or runs == 0


def test_groups_by_prompt():
    keys = [PromptKey((5, 6)), PromptKey((5, 6), ("image",)), PromptKey((5, 6))]
    assert prompt_groups(keys, [3, 4, 0]) == [RowGroup((0, 2), 5), RowGroup((1,), 6)]
    assert prompt_groups([], []) == []
    assert fill_micro_batches([], 5) == []
    assert consecutive_parts([], [], 5) == []
