"""The token tree: what one round proposes and the target verifies in one forward. Pure tensor functions.

A batch row holds nodes 0 .. T-1; node 0 is the root, the newest committed token. A parent's index is smaller than its
children's. Rows with fewer nodes end in unused ones (`valid` False), which see nothing and are seen by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from longspec_hf_kernels import ancestor_matrix, merge_nodes, pack_ancestor_bits

from .beam import Beam

__all__ = ["TokenTree", "ancestor_matrix", "longest_path_through", "merge"]


@dataclass(frozen=True)
class TokenTree:
    """Proposed tokens of one round.

    Attributes:
        token_ids: `[B, T]`, the root's token first.
        parents: `[B, T]` index of each node's parent; 0 for the root.
        depths: `[B, T]` distance from the root.
        valid: `[B, T]` whether the node is used.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    valid: torch.Tensor

    @property
    def num_nodes(self) -> int:
        """T, unused nodes included."""
        return self.token_ids.shape[1]

    def ancestor_bits(self) -> torch.Tensor:
        """`[B, T, ceil(T / 64)]` int64 words: bit j of node i is set where j is i or one of its ancestors."""
        return pack_ancestor_bits(ancestor_matrix(self.parents, self.valid))

    def trim(self) -> TokenTree:
        """The same tree without nodes that no row uses (one read from the device)."""
        used = int(self.valid.sum(dim=1).max())
        return TokenTree(*(t[:, :used] for t in (self.token_ids, self.parents, self.depths, self.valid)))

    def path_lists(self) -> list[tuple[list[int], list[int]]]:
        """`(token_ids, parents)` of the used nodes of each batch row, for the walk (one read from the device)."""
        rows = torch.stack([self.token_ids, self.parents, self.valid.long()]).tolist()
        return [(ids[: sum(used)], parents[: sum(used)]) for ids, parents, used in zip(*rows, strict=True)]

    @staticmethod
    def root_only(token_ids: torch.Tensor) -> TokenTree:
        """The tree of roots `[B, 1]` alone."""
        zeros = torch.zeros_like(token_ids)
        return TokenTree(token_ids, zeros, zeros, torch.ones_like(token_ids, dtype=torch.bool))


def merge(
    root: torch.Tensor, beam: Beam, branch: torch.Tensor, max_nodes: int, max_depths: torch.Tensor | None = None
) -> TokenTree:
    """Join root, beam and one branch to a tree of at most `max_nodes` nodes.

    The branch hangs below the root and shares the nodes it has in common with the beam. Root and branch are kept
    first, then the beam's best-scored nodes; a node is never kept without its parent, whose score is at least as high.

    Args:
        root: `[B, 1]` newest committed token.
        beam: the draft's nodes.
        branch: `[B, L]` tokens copied from the context, -1 from where a row's branch ends.
        max_nodes: nodes of the tree, the root included.
        max_depths: `[B, 1]` deepest node of each row.
    """
    nodes = merge_nodes(root, beam.token_ids, beam.parents, beam.scores, beam.widths, branch, max_depths, max_nodes)
    return TokenTree(*nodes)


def longest_path_through(tree: TokenTree, node: int) -> list[int]:
    """Nodes of the deepest path of the first batch row that passes through `node`, without the root, in order."""
    parents, depths = tree.parents[0].tolist(), tree.depths[0].tolist()
    ancestors = ancestor_matrix(tree.parents, tree.valid)[0].tolist()
    below = [i for i in range(tree.num_nodes) if ancestors[i][node]]
    current = max(below, key=depths.__getitem__)
    path: list[int] = []
    while current != 0:
        path.append(current)
        current = parents[current]
    return path[::-1]
