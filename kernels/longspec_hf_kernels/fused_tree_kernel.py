"""`merge_tree` in Triton, in one launch.

A program holds all candidates of one sequence, one a thread: the root, the beam, the branch. Ranks are counted instead
of sorted, and a node's ancestors gathered as bits of 64-bit words, from twice as far above at each step.
"""

import torch
import triton
import triton.language as tl

from .fused_tree import MergedTree
from .masks import words_for

WARP_SIZE = 32
# Of a matrix of candidates, done at a time.
COLUMNS = tl.constexpr(32)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def merge_tree_kernel(
    root, tokens, parents, scores, branch, limits,
    out_tokens, out_parents, out_depths, out_valid, out_bits, out_ancestors,
    stride_root, stride_tokens, stride_parents, stride_scores, stride_branch, stride_limits,
    NODES: tl.constexpr, LEVELS: tl.constexpr, WIDTHS: tl.constexpr, LENGTH: tl.constexpr, HAS_LIMITS: tl.constexpr,
    KEPT: tl.constexpr, SHARED_STEPS: tl.constexpr, ANCESTOR_STEPS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences,). WIDTHS has 16 bits a level: one number, as not every Triton takes a tuple for a constant."""
    sequence = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    in_beam = (place >= 1) & (place <= NODES)
    in_branch = (place > NODES) & (place <= NODES + LENGTH)
    depth = tl.where(in_branch, place - NODES, 0)
    first = 1
    for level in tl.static_range(LEVELS):
        depth += (in_beam & (place >= first)).to(tl.int32)
        first += (WIDTHS >> (16 * level)) & 0xFFFF
    token = tl.load(tokens + sequence * stride_tokens + place - 1, mask=in_beam, other=0)
    parent = tl.load(parents + sequence * stride_parents + place - 1, mask=in_beam, other=-1).to(tl.int32) + 1
    score = tl.load(scores + sequence * stride_scores + place - 1, mask=in_beam, other=-INFINITY).to(tl.float32)
    on_depth = (depth >= 1) & (depth <= LENGTH)
    proposed = tl.load(branch + sequence * stride_branch + depth - 1, mask=on_depth, other=-1)

    # A beam node is on the branch if it and all nodes above it have the branch's tokens.
    on_branch = ((place == 0) | (in_beam & (token == proposed))).to(tl.int32)
    jump = parent
    for _ in tl.static_range(SHARED_STEPS):
        on_branch = on_branch & tl.gather(on_branch, jump, 0)
        jump = tl.gather(jump, jump, 0)
    last_shared = tl.max(tl.where(on_branch != 0, place, 0), 0)
    depth_shared = tl.max(tl.where(on_branch != 0, depth, 0), 0)
    own = in_branch & (proposed >= 0) & (depth > depth_shared)
    previous = tl.where(depth == depth_shared + 1, last_shared, place - 1)
    parent = tl.where(in_branch, previous, parent)
    token = tl.where(in_branch, proposed, token)
    token = tl.where(place == 0, tl.load(root + sequence * stride_root), token)

    certain = (on_branch != 0) | own
    usable = certain | (in_beam & (score > -INFINITY))
    if HAS_LIMITS:
        usable = usable & (depth <= tl.load(limits + sequence * stride_limits))
    score = tl.where(usable, tl.where(certain, INFINITY, score), -INFINITY)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, BLOCK, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = tl.gather(score, column, 0)[None, :]
        earlier = column[None, :] < place[:, None]
        ahead = (other > score[:, None]) | ((other == score[:, None]) & earlier)
        rank += tl.sum(ahead.to(tl.int32), 1)
    kept = usable & (rank < KEPT)

    # Kept candidates become the first nodes, the others the unused ones.
    number = tl.cumsum(kept.to(tl.int32), 0)
    node = tl.where(kept, number - 1, tl.sum(kept.to(tl.int32), 0) + place - number)
    written = node < KEPT
    at = sequence * KEPT + node
    tl.store(out_tokens + at, tl.where(kept, token, 0), mask=written)
    tl.store(out_parents + at, tl.where(kept, tl.gather(node, parent, 0), 0).to(tl.int64), mask=written)
    tl.store(out_depths + at, tl.where(kept, depth, 0).to(tl.int64), mask=written)
    tl.store(out_valid + at, kept, mask=written)
    for word in tl.static_range(WORDS):
        bits = tl.where(node // 64 == word, tl.full([BLOCK], 1, tl.int64) << (node % 64).to(tl.int64), 0)
        jump = parent
        for _ in tl.static_range(ANCESTOR_STEPS):
            bits = bits | tl.gather(bits, jump, 0)
            jump = tl.gather(jump, jump, 0)
        bits = tl.where(kept, bits, 0)
        tl.store(out_bits + at * WORDS + word, bits, mask=written)
        for start in tl.static_range(0, 64, COLUMNS):
            shift = start + tl.arange(0, COLUMNS)
            column = word * 64 + shift
            visible = ((bits[:, None] >> shift.to(tl.int64)[None, :]) & 1) != 0
            mask = written[:, None] & (column < KEPT)[None, :]
            tl.store(out_ancestors + at[:, None] * KEPT + column[None, :], visible, mask=mask)


def merge_tree_triton(
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
    """`merge_tree_torch` in one launch."""
    batch, count = tokens.shape
    candidates = 1 + count + branch.shape[1]
    kept = min(max_nodes, candidates)
    words = words_for(kept)
    device = root.device
    out_tokens, out_parents, out_depths = (
        torch.empty(batch, kept, dtype=torch.int64, device=device) for _ in range(3)
    )
    out = MergedTree(
        out_tokens,
        out_parents,
        out_depths,
        torch.empty(batch, kept, dtype=torch.bool, device=device),
        torch.empty(batch, kept, words, dtype=torch.int64, device=device),
        torch.empty(batch, kept, kept, dtype=torch.bool, device=device),
    )
    if batch == 0:
        return out
    block = max(WARP_SIZE, triton.next_power_of_2(candidates))
    tokens, parents, scores, branch = (
        rows if rows.stride(1) == 1 else rows.contiguous() for rows in (tokens, parents, scores, branch)
    )
    bounds = root if limits is None else limits  # unread without limits
    merge_tree_kernel[(batch,)](
        root,
        tokens,
        parents,
        scores,
        branch,
        bounds,
        *out,
        root.stride(0),
        tokens.stride(0),
        parents.stride(0),
        scores.stride(0),
        branch.stride(0),
        bounds.stride(0),
        NODES=count,
        LENGTH=branch.shape[1],
        KEPT=kept,
        LEVELS=len(widths),
        WIDTHS=sum(width << (16 * level) for level, width in enumerate(widths)),
        HAS_LIMITS=limits is not None,
        SHARED_STEPS=max(0, len(widths) - 1).bit_length(),
        ANCESTOR_STEPS=min(depth, kept - 1).bit_length(),
        WORDS=words,
        BLOCK=block,
        num_warps=block // WARP_SIZE,
    )
    return out
