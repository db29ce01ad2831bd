"""Near-duplicates among the images of a set, by their perceptual hashes."""

# n images; b bits of a hash

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segrl.curation.packages import require
from segrl.errors import DataError

__all__ = ["near_duplicates"]

_SIDE = 16  # of the grid of frequencies: 256 bits
_BLOCK = 1024  # rows whose distances to all others are in memory at once


def near_duplicates(images: Iterable[Image.Image], distance: int) -> list[int]:
    """Return the number of the group of every image; images whose hashes differ little are in one group.

    Hashes are those of `imagehash.phash` with 256 bits. Groups are chains: each image is near one of the others.

    Args:
        images: In any sizes.
        distance: Bits, of 256, in which two hashes may differ at most; below 0 every image is alone.

    Raises:
        DataError: No images.
        SegRLError: The extra `curation` is not installed.

    Example:
        >>> noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64), dtype=np.uint8)
        >>> first, second = map(Image.fromarray, noise)
        >>> near_duplicates([first, second, first.resize((60, 60))], 16)
        [0, 1, 0]
    """
    phash = require("imagehash").phash
    hashes = np.array([phash(image, hash_size=_SIDE).hash.reshape(-1) for image in images], dtype=np.float32)
    if not len(hashes):
        raise DataError("no images; expected one or more")
    pairs = []
    for begin in range(0, len(hashes), _BLOCK):
        block = hashes[begin : begin + _BLOCK]
        differ = block.sum(1)[:, None] + hashes.sum(1)[None] - 2 * block @ hashes.T
        near = np.argwhere(differ <= distance)
        pairs.append(near + np.array([begin, 0]))
    edges = np.concatenate(pairs)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(hashes), len(hashes)))
    return connected_components(graph, directed=False)[1].tolist()
