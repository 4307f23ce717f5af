"""The tree of a round out of the draft's beam and a branch copied from the context, with what every node sees."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backends import uses_triton
from .masks import pack_ancestor_bits
from .triton_configs import triton_version
from .validation import FLOAT_DTYPES

# What one program of the kernel compares with one another, and the nodes it packs into two words of bits.
MAX_CANDIDATES = 256
MAX_NODES = 128
# The first with `tl.gather`.
GATHER_TRITON = (3, 3)
INFINITY = float("inf")


class TreeNodes(NamedTuple):
    """Nodes of trees, all `[B, T]`: a parent before its children, unused nodes last and zero.

    Attributes:
        token_ids: int64, the root's token first.
        parents: int64 index of each node's parent; 0 for the root.
        depths: int64 distance from the root.
        valid: bool, whether the node is used.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    valid: torch.Tensor


class MergedTree(NamedTuple):
    """Nodes of trees as in [`TreeNodes`], and what they see.

    Attributes:
        ancestor_bits: int64 `[B, T, ceil(T / 64)]`: bit j of node i is set where j is i or one of its ancestors.
        ancestors: the same as bool `[B, T, T]`; an unused node sees nothing.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    valid: torch.Tensor
    ancestor_bits: torch.Tensor
    ancestors: torch.Tensor


def merge_nodes(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    widths: tuple[int, ...],
    branch: torch.Tensor,
    limits: torch.Tensor | None,
    max_nodes: int,
) -> TreeNodes:
    """The nodes of `merge_tree`, `[B, max_nodes]` each, in PyTorch; arguments as there."""
    batch, count = tokens.shape
    length = branch.shape[1]
    device = root.device
    beam_depths = level_depths(tokens, widths)
    shared, last_shared, depth_shared = _shared_path(tokens, parents, beam_depths, len(widths), branch)
    step = torch.arange(1, length + 1, device=device).expand(batch, length)
    own = (branch >= 0) & (step > depth_shared)
    previous = torch.where(step == depth_shared + 1, last_shared + 1, count + step - 1)
    protected = torch.ones(batch, 1, dtype=torch.bool, device=device)
    depths = torch.cat([torch.zeros_like(root), beam_depths, step], dim=1)
    usable = torch.cat([protected, (scores > -INFINITY) | shared, own], dim=1)
    if limits is not None:
        usable &= depths <= limits
    return _select(
        torch.cat([root, tokens, branch.clamp(min=0)], dim=1),
        torch.cat([torch.zeros_like(root), parents + 1, previous], dim=1),
        depths,
        F.pad(scores.masked_fill(shared, INFINITY), (1, length), value=INFINITY),
        usable,
        min(max_nodes, 1 + count + length),
    )


def level_depths(tokens: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """`[B, N]` depth of each node of a beam `[B, N]` with levels of these widths, 1 for the root's children."""
    levels = tokens.split(widths, dim=1) if widths else (tokens,)
    return torch.cat([torch.full_like(ids, depth) for depth, ids in enumerate(levels, 1)], dim=1)


def _shared_path(
    tokens: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, levels: int, branch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam nodes on the branch: their mask `[B, N]`, the deepest one's index (-1: root) and depth `[B, 1]`."""
    if not levels or not branch.shape[1]:
        nothing = branch.new_zeros(branch.shape[0], 1)
        return torch.zeros_like(tokens, dtype=torch.bool), nothing - 1, nothing
    wanted = F.pad(branch, (0, max(0, levels - branch.shape[1])), value=-1).gather(1, depths - 1)
    # The root stands first; a node is on the branch if it and all nodes above it have the branch's tokens.
    on_branch = F.pad(tokens == wanted, (1, 0), value=True)
    jump = F.pad(parents + 1, (1, 0))
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
) -> TreeNodes:
    """Keep the best `max_nodes` candidates, in candidate order, unused ones last."""
    # A stable sort keeps a parent before a child of equal score; a branch too long for the budget loses its end.
    order = scores.masked_fill(~usable, -INFINITY).sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(usable).scatter(1, order[:, :max_nodes], True) & usable
    index = (~kept).to(torch.uint8).sort(dim=1, stable=True).indices[:, :max_nodes]
    valid = kept.gather(1, index)
    new_index = kept.cumsum(dim=1) - 1
    return TreeNodes(
        token_ids=tokens.gather(1, index).masked_fill(~valid, 0),
        parents=new_index.gather(1, parents.gather(1, index)).masked_fill(~valid, 0),
        depths=depths.gather(1, index).masked_fill(~valid, 0),
        valid=valid,
    )


def ancestor_matrix(parents: torch.Tensor, valid: torch.Tensor, depth: int | None = None) -> torch.Tensor:
    """Boolean `[B, T, T]`: entry (i, j) says that node j is node i or an ancestor of it.

    Args:
        parents, valid: `[B, T]` of a tree.
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


def merge_tree_torch(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    widths: tuple[int, ...],
    branch: torch.Tensor,
    limits: torch.Tensor | None,
    max_nodes: int,
    depth: int,
) -> MergedTree:
    """The definition of `merge_tree`."""
    nodes = merge_nodes(root, tokens, parents, scores, widths, branch, limits, max_nodes)
    ancestors = ancestor_matrix(nodes.parents, nodes.valid, depth)
    return MergedTree(*nodes, pack_ancestor_bits(ancestors), ancestors)


def merge_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    widths: tuple[int, ...],
    branch: torch.Tensor,
    limits: torch.Tensor | None,
    max_nodes: int,
    depth: int,
) -> MergedTree:
    """Join root, beam and one branch to a tree of `T = min(max_nodes, 1 + N + L)` nodes, unused ones included.

    The branch hangs below the root and shares the nodes it has in common with the beam. Root and branch are kept
    first, then the beam's best-scored nodes, of equal ones the first; the kept nodes stay in this order: root, beam,
    branch.

    Args:
        root: int64 `[B, 1]` newest committed token.
        tokens: int64 `[B, N]` of the beam, level after level.
        parents: int64 `[B, N]` index in the beam of each node's parent, -1 for the root.
        scores: float `[B, N]`, no node's above its parent's; a node of score `-inf` is unused, unless on the branch.
        widths: number of beam nodes at each depth; the sum is N.
        branch: int64 `[B, L]` tokens copied from the context, -1 from where a row's branch ends.
        limits: int64 `[B, 1]` deepest node of each row, or None.
        max_nodes: nodes of the tree, the root included.
        depth: deepest node there can be: `max(len(widths), L)`, or less where `limits` say so.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    batch, count = root.shape[0], sum(widths)
    for name, tensor, columns in (("root", root, 1), ("tokens", tokens, count), ("parents", parents, count)):
        _expect_int64(name, tensor, [batch, columns])
    if branch.dim() != 2:
        raise ValueError(f"`branch` must be [{batch}, L], got {branch.dim()} dimensions.")
    _expect_int64("branch", branch, [batch, branch.shape[1]])
    if limits is not None:
        _expect_int64("limits", limits, [batch, 1])
    if not (scores.shape == tokens.shape and scores.dtype in FLOAT_DTYPES):
        raise ValueError(
            f"`scores` must be floats of shape {list(tokens.shape)} like `tokens`, got {scores.dtype} of shape "
            f"{list(scores.shape)}."
        )
    if max_nodes < 1:
        raise ValueError(f"`max_nodes` must be at least 1, the root, got {max_nodes}.")
    if depth < 0:
        raise ValueError(f"`depth` must not be negative, got {depth}.")
    if uses_triton(scores) and _kernel_fits(1 + count + branch.shape[1], max_nodes):
        from .fused_tree_kernel import merge_tree_triton

        return merge_tree_triton(root, tokens, parents, scores, widths, branch, limits, max_nodes, depth)
    return merge_tree_torch(root, tokens, parents, scores, widths, branch, limits, max_nodes, depth)


def _kernel_fits(candidates: int, max_nodes: int) -> bool:
    fits = candidates <= MAX_CANDIDATES and min(max_nodes, candidates) <= MAX_NODES
    return fits and triton_version() >= GATHER_TRITON


def _expect_int64(name: str, tensor: torch.Tensor, shape: list[int]) -> None:
    if not (list(tensor.shape) == shape and tensor.dtype == torch.int64):
        raise ValueError(f"`{name}` must be int64 of shape {shape}, got {tensor.dtype} of shape {list(tensor.shape)}.")
