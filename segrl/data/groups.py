"""Rows that must not be torn apart, and folds that keep them together."""

# n rows; K folds

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["balanced_folds", "joined"]


def joined(*columns: Sequence[Hashable]) -> list[int]:
    """Return the number of the group of every row: rows that have the same value in one column are in one group.

    Args:
        columns: (n,) each; values of different columns are different.

    Example:
        >>> joined(["a", "b", "a", "c"], [1, 2, 3, 2])
        [0, 1, 0, 1]
    """
    count = len(columns[0])
    nodes = {(n, text): count + k for k, (n, text) in enumerate({(n, t) for n, c in enumerate(columns) for t in c})}
    edges = np.array([(row, nodes[n, text]) for n, column in enumerate(columns) for row, text in enumerate(column)])
    size = count + len(nodes)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1][:count].tolist()


def balanced_folds(
    groups: Sequence[int], strata: Sequence[Hashable], keys: Sequence[str], folds: int
) -> list[set[int]]:
    """Divide rows into folds that keep groups together and spread what they show.

    Large groups come first, each goes to the fold that has least of what it shows; equal ones in the order of a key.

    Args:
        groups: (n,) number of the group of every row.
        strata: (n,) what a row shows, of which every fold gets its share.
        keys: (n,) texts without meaning, such as hashes of names.
        folds: K, at most as many as groups.

    Returns:
        The numbers of the rows of each fold.

    Example:
        >>> balanced_folds([0, 0, 1, 2], ["a", "a", "a", "b"], ["1", "2", "3", "4"], 2)
        [{0, 1}, {2, 3}]
    """
    members: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    order = sorted(members.values(), key=lambda found: (-len(found), keys[found[0]]))
    counts: list[Counter[Hashable]] = [Counter() for _ in range(folds)]
    divided: list[set[int]] = [set() for _ in range(folds)]
    for found in order:
        shown = Counter(strata[n] for n in found)
        held = [(sum(counts[k][each] * c for each, c in shown.items()), len(divided[k])) for k in range(folds)]
        least = held.index(min(held))
        divided[least].update(found)
        counts[least] += shown
    return divided
