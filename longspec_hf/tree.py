"""The token tree: what one round proposes and the target verifies in one forward. Pure tensor functions.

A batch row holds nodes 0 .. T-1; node 0 is the root, the newest committed token. A parent's index is smaller than its
children's. Rows with fewer nodes end in unused ones (`valid` False), which see nothing and are seen by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from longspec_hf_kernels import pack_ancestor_bits
from torch.nn import functional as F

from .beam import Beam


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
    batch_size, count = beam.token_ids.shape
    length = branch.shape[1]
    device = root.device
    shared, last_shared, depth_shared = _shared_path(beam, branch)

    step = torch.arange(1, length + 1, device=device).expand(batch_size, length)
    own = (branch >= 0) & (step > depth_shared)
    previous = torch.where(step == depth_shared + 1, last_shared + 1, count + step - 1)
    protected = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
    infinity = float("inf")
    scores = torch.cat(
        [
            torch.full((batch_size, 1), infinity, device=device, dtype=beam.scores.dtype),
            beam.scores.masked_fill(shared, infinity),
            torch.zeros(batch_size, length, device=device, dtype=beam.scores.dtype)
            .masked_fill(own, infinity)
            .masked_fill(~own, -infinity),
        ],
        dim=1,
    )
    tokens = torch.cat([root, beam.token_ids, branch.clamp(min=0)], dim=1)
    parents = torch.cat([torch.zeros_like(root), beam.parents + 1, previous], dim=1)
    depths = torch.cat([torch.zeros_like(root), beam.depths, step], dim=1)
    usable = torch.cat([protected, (beam.scores > -infinity) | shared, own], dim=1)
    if max_depths is not None:
        usable &= depths <= max_depths
    return _select(tokens, parents, depths, scores, usable, min(max_nodes, 1 + count + length))


def _shared_path(beam: Beam, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam nodes on the branch: their mask `[B, N]`, the deepest one's index (-1: root) and depth `[B, 1]`."""
    depths, levels = beam.depths, len(beam.widths)
    if not levels or not branch.shape[1]:
        nothing = branch.new_zeros(branch.shape[0], 1)
        return torch.zeros_like(beam.token_ids, dtype=torch.bool), nothing - 1, nothing
    wanted = F.pad(branch, (0, max(0, levels - branch.shape[1])), value=-1).gather(1, depths - 1)
    # The root stands first; a node is on the branch if it and all nodes above it have the branch's tokens.
    on_branch = F.pad(beam.token_ids == wanted, (1, 0), value=True)
    jump = F.pad(beam.parents + 1, (1, 0))
    for _ in range((levels - 1).bit_length()):
        on_branch = on_branch & on_branch.gather(1, jump)
        jump = jump.gather(1, jump)
    shared = on_branch[:, 1:]
    index = torch.arange(shared.shape[1], device=shared.device)
    last = torch.where(shared, index, -1).amax(dim=1, keepdim=True)
    return shared, last, torch.where(shared, depths, 0).amax(dim=1, keepdim=True)


def _select(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    depths: torch.Tensor,
    scores: torch.Tensor,
    usable: torch.Tensor,
    max_nodes: int,
) -> TokenTree:
    """Keep the best `max_nodes` candidates, in candidate order, unused ones last."""
    # A stable sort keeps a parent before a child of equal score; a branch too long for the budget loses its end.
    order = scores.masked_fill(~usable, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(usable).scatter(1, order[:, :max_nodes], True) & usable
    index = (~kept).to(torch.uint8).sort(dim=1, stable=True).indices[:, :max_nodes]
    valid = kept.gather(1, index)
    new_index = kept.cumsum(dim=1) - 1
    new_parents = new_index.gather(1, parents.gather(1, index)).masked_fill(~valid, 0)
    return TokenTree(
        token_ids=tokens.gather(1, index).masked_fill(~valid, 0),
        parents=new_parents,
        depths=depths.gather(1, index).masked_fill(~valid, 0),
        valid=valid,
    )


def ancestor_matrix(parents: torch.Tensor, valid: torch.Tensor, depth: int | None = None) -> torch.Tensor:
    """Boolean `[B, T, T]`: entry (i, j) says that node j is node i or an ancestor of it.

    Args:
        parents, valid: of a tree.
        depth: of its deepest node at most, if known.
    """
    count = parents.shape[1]
    matrix = torch.eye(count, dtype=torch.bool, device=parents.device).expand(parents.shape[0], -1, -1).clone()
    # Rows doubled at each step: after k steps a node knows itself and 2**k - 1 generations.
    jump = parents
    for _ in range((count - 1 if depth is None else min(depth, count - 1)).bit_length()):
        matrix |= matrix.gather(1, jump.unsqueeze(-1).expand(-1, -1, count))
        jump = jump.gather(1, jump)
    return matrix & valid.unsqueeze(-1)


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
