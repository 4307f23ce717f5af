"""The trees that `tree_shape="auto"` chooses among: depths times sizes.

A size is a number of nodes with what goes with it: how wide the beam is at a depth, and how much of the nodes a branch
copied from the context may take. A deeper tree of the same size holds other nodes, not more of them: the best-scored
ones of more levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEPTHS = (1, 2, 3, 4, 5, 6, 8)
FIRST_WIDTH = 4
"""Children of the root: with more, the deeper levels have worse parents."""
MOST_BEAM_NODES = 64
"""Nodes that are expanded, the root included: what fits one word of ancestor bits."""
PACKED_ROWS = 64
"""Rows of the attention kernels' tiles: query heads of one K/V head times nodes."""
LEAST_FILLING = 0.75
"""Of those tiles. At 128k tokens attention over 32 nodes of 7 heads takes little more than half of that over 64."""


@dataclass(frozen=True)
class TreeSize:
    """Sizes come in a row, each of which holds the one before.

    Attributes:
        nodes: most nodes, the root included.
        width: beam nodes kept at a depth.
        branch: longest branch copied from the context.
    """

    nodes: int
    width: int
    branch: int


SIZES = (TreeSize(4, 2, 2), TreeSize(8, 4, 3), TreeSize(16, 8, 8), TreeSize(32, 8, 16), TreeSize(64, 16, 32))
"""Half of a large tree goes to the branch: in a replay that gave the most tokens, on texts that loop and on others.
Where the last two tokens have occurred before, the tenth of the copy is committed more often than the beam's fortieth
node."""


@dataclass(frozen=True)
class Candidate:
    """One tree to choose.

    Attributes:
        shape: nodes kept at each depth of the beam.
        size: index of the size it belongs to.
        nodes: most nodes, the root included.
        branch: longest branch.
    """

    shape: tuple[int, ...]
    size: int
    nodes: int
    branch: int


def tree_sizes(max_nodes: int, max_branch: int) -> tuple[TreeSize, ...]:
    """The sizes of at most `max_nodes` nodes, or the one of so many, with branches of at most `max_branch`."""
    fitting = [size for size in SIZES if size.nodes <= max_nodes] or [TreeSize(max_nodes, max_nodes, max_nodes - 1)]
    return tuple(TreeSize(size.nodes, size.width, min(size.branch, max_branch)) for size in fitting)


def cpu_candidates(sizes: Sequence[TreeSize], depth: int) -> list[Candidate]:
    """Trees for devices where every node costs: narrow ones, and branches alone.

    Args:
        sizes: from `tree_sizes`.
        depth: deepest beam.
    """
    trees = [
        Candidate(_shape(levels, size.width), index, size.nodes, size.branch)
        for index, size in enumerate(sizes)
        for levels in _depths(depth)
        if levels < size.nodes
    ]
    branches = sorted({size.branch for size in sizes} - {0})
    return [Candidate((), 0, 1 + branch, branch) for branch in branches] + trees


def packed_candidates(
    sizes: Sequence[TreeSize], depth: int, heads_per_kv_head: int, sequences: int = 1
) -> list[Candidate]:
    """Trees for devices where nodes are nearly free: of 16 nodes or more, filled to the last.

    Sizes whose packed rows (`heads_per_kv_head * nodes`) would leave more than a quarter of their tiles of 64 empty
    are left out, if there are others: of seven heads' 112, 224 and 448 rows none. In a batch nodes are not free: all
    sequences' together are what the weights are multiplied by. There trees may be small.
    """
    large = [(index, size) for index, size in enumerate(sizes) if size.nodes * sequences >= 16]
    packed = [
        (index, size)
        for index, size in large
        if sequences > 1 or _filling(heads_per_kv_head * size.nodes) >= LEAST_FILLING
    ]
    found = packed or large or [(len(sizes) - 1, sizes[-1])]
    return [
        Candidate(_shape(levels, size.width, size.nodes - 1 - size.branch), index, size.nodes, size.branch)
        for index, size in found
        for levels in _depths(depth)
        if levels < size.nodes
    ]


def _filling(rows: int) -> float:
    """Part of their tiles that packed rows take."""
    return rows / (PACKED_ROWS * -(-rows // PACKED_ROWS))


def _depths(depth: int) -> list[int]:
    """Depths of the beam up to `depth`, which is one of them where it is no more than the last."""
    return sorted({min(levels, depth) for levels in DEPTHS} - {0})


def _shape(levels: int, width: int, least: int = 0) -> tuple[int, ...]:
    """Widths of `levels` levels of about `width`: at least `least` nodes, where 64 expanded ones allow it."""
    if levels == 1:
        return (min(max(FIRST_WIDTH, width, least), MOST_BEAM_NODES),)
    first = min(FIRST_WIDTH, width)
    width = max(width, -(-(least - first) // (levels - 1)))
    if levels > 2:
        width = min(width, (MOST_BEAM_NODES - 1 - first) // (levels - 2))
    return (first, *[width] * (levels - 1))
