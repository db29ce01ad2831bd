"""Distances between the outlines of two masks: boundary IoU, Hausdorff distance, surface Dice.

Masks have any number of dimensions, and everything beyond the image counts as background. The surface of a mask is its
foreground with a background neighbour across a face (4 neighbours in 2D, 6 in 3D); distances are Euclidean, between the
centres of surface elements. Scores of empty masks follow `segrl.geometry.empty_score`.

Only the box around both masks is read, which changes no result and makes small lesions in large images cheap.
"""

# P, T surface elements of the predicted and the ground truth mask; bits: 1 = in pred, 2 = in true, 3 = in both

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import KDTree

from segrl.errors import DataError
from segrl.geometry.masks import empty_score, foreground

__all__ = ["boundary_iou", "hausdorff", "surface", "surface_dice", "surface_distances"]

PRED, TRUE, BOTH = 1, 2, 3
# A search tree takes about 0.5 us per surface element, two distance transforms 0.1 us per element of the box.
TREE_COST = 5
# Relative slack of a tolerance: 3 voxels of 0.1 mm are within 0.3 mm, whatever the last digit says.
ROUNDING = 1e-9


def boundary_iou(pred: ArrayLike, true: ArrayLike, dilation: float = 0.02) -> float:
    """Compute the IoU of the rims of two masks (Boundary IoU, Cheng et al. 2021).

    The rim of a mask is its foreground within d pixels (chessboard distance) of the background or of the end of the
    image; ``d = max(1, round(dilation * image diagonal))``. The time grows with the logarithm of d.

    Args:
        pred: (H, W) or (D, H, W), bool or integer.
        true: Ground truth mask of the same shape.
        dilation: Width of the rim as a share of the image's diagonal, positive.

    Returns:
        A score in [0, 1]; both empty 1.0, exactly one empty 0.0. It is the plain IoU if both masks are all rim.

    Raises:
        DataError: Shapes differ, a float mask, or a dilation that is not positive.

    Example:
        >>> square, ring = np.ones((6, 6), dtype=bool), np.ones((6, 6), dtype=bool)
        >>> ring[1:5, 1:5] = False
        >>> boundary_iou(square, ring), boundary_iou(square[:, :5], ring[:, 1:])
        (1.0, 0.7777777777777778)
    """
    if not 0 < dilation < math.inf:
        raise DataError(f"dilation={dilation}; expected a positive share of the diagonal, such as 0.02")
    bits, shape = _both(pred, true)
    empty = _empty(bits)
    if empty is not None:
        return empty
    radius = max(1, round(dilation * math.hypot(*shape)))
    rim = _without(bits, _inside(bits, radius), radius)
    return _count(rim, BOTH) / int(np.count_nonzero(rim))


def hausdorff(
    pred: ArrayLike, true: ArrayLike, percentile: float = 95.0, spacing: Sequence[float] | None = None
) -> float:
    """Compute the Hausdorff distance of two surfaces, by default its 95th percentile (HD95).

    ``max(percentile of the distances pred -> true, percentile of the distances true -> pred)``: the larger of the two
    directed percentiles, interpolated linearly, as in MONAI's `compute_hausdorff_distance`. (Other packages pool both
    directions into one percentile, which is at most as large.)

    Args:
        pred: Mask of any number of dimensions, bool or integer.
        true: Ground truth mask of the same shape.
        percentile: In (0, 100]; 100 is the Hausdorff distance itself.
        spacing: Size of an element along each axis, in the order of the axes; None counts pixels.

    Returns:
        The distance in the unit of `spacing`, or in pixels; both empty 0.0, exactly one empty infinite.

    Raises:
        DataError: Shapes differ, a float mask, or a percentile or spacing that is out of range.

    Example:
        >>> hausdorff([[1, 0, 0, 0]], [[0, 0, 0, 1]], spacing=(1.0, 0.5))
        1.5
    """
    if not 0 < percentile <= 100:
        raise DataError(f"percentile={percentile}; expected a number in (0, 100], such as 95")
    distances = surface_distances(pred, true, spacing)
    if min(map(len, distances)) == 0:
        return 0.0 if max(map(len, distances)) == 0 else math.inf
    return max(float(np.percentile(directed, percentile)) for directed in distances)


def surface_dice(pred: ArrayLike, true: ArrayLike, tolerance: float, spacing: Sequence[float] | None = None) -> float:
    """Compute the share of both surfaces within a tolerance of the other one (normalised surface Dice, NSD).

    Every surface element counts once, as in MONAI's `compute_surface_dice` without sub-voxels; DeepMind's
    surface-distance weights elements by their area instead (Nikolov et al. 2018).

    Args:
        pred: Mask of any number of dimensions, bool or integer.
        true: Ground truth mask of the same shape.
        tolerance: Largest distance that counts as agreement, in the unit of `spacing` or in pixels; not negative.
        spacing: Size of an element along each axis, in the order of the axes; None counts pixels.

    Returns:
        A score in [0, 1]; both empty 1.0, exactly one empty 0.0.

    Raises:
        DataError: Shapes differ, a float mask, or a tolerance or spacing that is out of range.

    Example:
        >>> surface_dice([[1, 0, 0, 0]], [[0, 1, 0, 1]], tolerance=1.0)
        0.6666666666666666
    """
    if not 0 <= tolerance < math.inf:
        raise DataError(f"tolerance={tolerance}; expected a distance of at least 0")
    limit = tolerance * (1 + ROUNDING)
    distances = _distances(pred, true, spacing, limit)
    empty = empty_score(len(distances[0]) == 0, len(distances[1]) == 0)
    if empty is not None:
        return empty
    near = sum(int(np.count_nonzero(directed <= limit)) for directed in distances)
    return near / sum(map(len, distances))


def surface_distances(
    pred: ArrayLike, true: ArrayLike, spacing: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the distance of every surface element to the nearest surface element of the other mask.

    Args:
        pred: Mask of any number of dimensions, bool or integer.
        true: Ground truth mask of the same shape.
        spacing: Size of an element along each axis, in the order of the axes; None counts pixels.

    Returns:
        (P,) and (T,) float64 distances, pred to true and true to pred, in no particular order; infinite if the other
        mask is empty.

    Raises:
        DataError: Shapes differ, a float mask, or a spacing that is not positive.

    Example:
        >>> [sorted(directed.tolist()) for directed in surface_distances([[1, 0, 0, 0]], [[0, 1, 0, 1]])]
        [[1.0], [1.0, 3.0]]
    """
    return _distances(pred, true, spacing, math.inf)


def surface(mask: ArrayLike) -> np.ndarray:
    """Return the surface of a mask: foreground with a background neighbour across a face, or at the image's end.

    Args:
        mask: Any number of dimensions, bool or integer.

    Returns:
        bool array of the same shape; empty for an empty mask, and all of a mask that is one element thick.

    Raises:
        DataError: A float mask.

    Example:
        >>> surface(np.ones((3, 4), dtype=bool)).astype(int).tolist()
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    inside = foreground(mask, ndim=None)
    return _without(inside, _core(inside), 1)


def _distances(
    pred: ArrayLike, true: ArrayLike, spacing: Sequence[float] | None, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute `surface_distances`; a distance above `limit` may be given as infinite."""
    bits, shape = _both(pred, true)
    steps = _steps(spacing, len(shape))
    if bits.size == 0:
        return np.zeros(0), np.zeros(0)
    outline = _without(bits, _core(bits), 1)
    flat = np.flatnonzero(outline != 0)
    sides = outline.ravel()[flat]
    shared = _count(sides, BOTH)
    sparse = TREE_COST * (len(flat) + shared) < outline.size
    positions = np.stack(np.unravel_index(flat, outline.shape), axis=1) * np.array(steps) if sparse else None
    found = []
    for side, other in ((PRED, TRUE), (TRUE, PRED)):
        # An element of both surfaces is at distance 0; only the others have to search.
        alone, goals = sides == side, (sides & other) != 0
        distances = np.zeros(shared + int(np.count_nonzero(alone)))
        if not goals.any():
            distances[:] = math.inf
        elif len(distances) > shared and positions is not None:
            # An unbalanced tree takes a third less time to build, and only elements of one surface search it.
            tree = KDTree(positions[goals], leafsize=32, balanced_tree=False, compact_nodes=False)
            bound = np.nextafter(limit, math.inf)  # the bound itself is excluded
            distances[shared:] = tree.query(positions[alone], distance_upper_bound=bound)[0]
        elif len(distances) > shared:
            field = ndimage.distance_transform_edt((outline & other) == 0, sampling=steps)
            distances[shared:] = np.asarray(field).ravel()[flat[alone]]
        found.append(distances)
    return found[0], found[1]


def _both(pred: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return both masks as bits of one uint8 array, cut to the box around them (size 0 if both are empty), and the
    full shape. One array halves the passes over memory, which take most of the time of small masks."""
    inside, truth = foreground(pred, "pred", ndim=None), foreground(true, "true", ndim=None)
    if inside.shape != truth.shape or inside.ndim == 0:
        raise DataError(f"pred: expected the shape of true {truth.shape}, got {inside.shape}; resize the prediction")
    shape = inside.shape
    either = inside | truth
    for axis in range(either.ndim):  # each cut leaves less for the next axis to read
        others = tuple(other for other in range(either.ndim) if other != axis)
        used = np.flatnonzero(either.any(axis=others))
        cut = (slice(None),) * axis + (slice(used[0], used[-1] + 1) if used.size else slice(0),)
        inside, truth, either = inside[cut], truth[cut], either[cut]
    return inside.astype(np.uint8) | (truth.astype(np.uint8) << 1), shape  # a True read by PIL is a byte of 255


def _empty(bits: np.ndarray) -> float | None:
    return empty_score(not (bits & PRED).any(), not (bits & TRUE).any())


def _count(bits: np.ndarray, value: int) -> int:
    return int(np.count_nonzero(bits == value))


def _inside(bits: np.ndarray, radius: int) -> np.ndarray:
    """Compute the AND over the square of 2 * radius + 1 around every element whose square lies in the array.

    Erosion by a square is separable. Along each axis the window grows by AND with a shifted copy of itself, to at most
    twice its width, so the number of passes is logarithmic. The result is smaller by `radius` at each end.
    """
    width = 2 * radius + 1
    if min(bits.shape) < width:
        return np.zeros([max(side - width + 1, 0) for side in bits.shape], dtype=bits.dtype)
    for axis in range(bits.ndim):
        reached = 1
        while reached < width:
            step = min(reached, width - reached)
            before = (slice(None),) * axis
            bits = bits[(*before, slice(None, -step))] & bits[(*before, slice(step, None))]
            reached += step
    return bits


def _core(bits: np.ndarray) -> np.ndarray:
    """Compute the AND over every element and its face neighbours; smaller by one at each end."""
    middle = (slice(1, -1),) * bits.ndim
    core = bits[middle].copy()
    for axis in range(bits.ndim):
        for shifted in (slice(None, -2), slice(2, None)):
            core &= bits[(*middle[:axis], shifted, *middle[axis + 1 :])]
    return core


def _without(bits: np.ndarray, core: np.ndarray, margin: int) -> np.ndarray:
    """Remove the bits of `core`, which has `margin` fewer elements at each end, from `bits`."""
    rest = bits.copy()  # the core is a subset, so XOR removes it
    rest[(slice(margin, -margin),) * bits.ndim] ^= core
    return rest


def _steps(spacing: Sequence[float] | None, ndim: int) -> tuple[float, ...]:
    steps = (1.0,) * ndim if spacing is None else tuple(map(float, spacing))
    if len(steps) != ndim or not all(0 < step < math.inf for step in steps):
        raise DataError(f"spacing={spacing}; expected {ndim} positive numbers, one per axis of the masks")
    return steps
