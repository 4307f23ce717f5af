"""`greedy_walk` in Triton: the largest logits of parts of the vocabulary, then the walk."""

import torch
import triton
import triton.language as tl

# Tokens that one program looks at.
CHUNK = 4096
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def chunk_best_kernel(logits, keys, stride_b, stride_t, nodes, vocabulary, CHUNK: tl.constexpr):
    """Grid: (chunks, sequences * nodes). The largest logit of a chunk, above the complement of its token."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = token < vocabulary
    base = logits + row // nodes * stride_b + row % nodes * stride_t
    values = tl.load(base + token, mask=mask, other=0.0).to(tl.float32)
    # Bits that sort like the numbers; both zeros are equal, and NaN is above infinity.
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = tl.where(values != values, 2147483647, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    top = tl.max(tl.where(mask, bits, -2147483648), 0)
    first = tl.min(tl.where(mask & (bits == top), token, 2147483647), 0)
    tl.store(keys + row * tl.num_programs(0) + chunk, ((top.to(tl.int64) + 1) << 32) - 1 - first)


@triton.jit
def greedy_walk_kernel(
    token_ids, parents, valid, keys, visited, report, nodes, chunks, most,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences,)."""
    sequence = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_T)
    chunk = tl.arange(0, BLOCK_C)
    mask = index < nodes
    at = sequence * nodes + index
    own = tl.load(token_ids + at, mask=mask, other=-1)
    parent = tl.load(parents + at, mask=mask, other=-1)
    used = tl.load(valid + at, mask=mask, other=0).to(tl.int32)
    best = tl.full([BLOCK_T], NO_KEY, tl.int64)
    for first in range(0, chunks, BLOCK_C):
        part = first + chunk
        every = tl.load(
            keys + at[:, None] * chunks + part[None, :], mask=mask[:, None] & (part < chunks)[None, :], other=NO_KEY
        )
        best = tl.maximum(best, tl.max(every, 1))
    following = (-1 - best) & 0xFFFFFFFF  # the token after each node
    is_child = (used != 0) & (index > 0)
    visited += sequence * most
    report += sequence * (2 + most)
    node = sequence * 0
    count = sequence * 0
    for step in range(most):
        at_node, token = sequence * 0, sequence * 0
        if node >= 0:  # most walks are short, and the longest path may not be
            at_node = node
            token = tl.sum(tl.where(index == node, following, 0), 0)
            child = is_child & (parent == node) & (own == token)
            node = tl.max(tl.where(child, index, -1), 0).to(tl.int64)
            count += 1
        tl.store(visited + step, at_node)
        tl.store(report + 2 + step, token)
    tl.store(report, tl.sum(used, 0).to(tl.int64) - 1)
    tl.store(report + 1, count)


def greedy_walk_triton(
    token_ids: torch.Tensor, parents: torch.Tensor, valid: torch.Tensor, logits: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy_walk_torch` in two launches."""
    batch, nodes, vocabulary = logits.shape
    chunks = -(-vocabulary // CHUNK)
    visited = torch.empty(batch, most, dtype=torch.long, device=logits.device)
    report = torch.empty(batch, 2 + most, dtype=torch.long, device=logits.device)
    if batch == 0:
        return visited, report
    keys = torch.empty(batch, nodes, chunks, dtype=torch.long, device=logits.device)
    chunk_best_kernel[(chunks, batch * nodes)](
        logits, keys, *logits.stride()[:2], nodes, vocabulary, CHUNK=CHUNK, num_warps=4
    )
    block_t = triton.next_power_of_2(nodes)
    block_c = min(triton.next_power_of_2(chunks), max(1, 4096 // block_t))
    greedy_walk_kernel[(batch,)](
        token_ids.contiguous(),
        parents.contiguous(),
        valid.contiguous(),
        keys,
        visited,
        report,
        nodes,
        chunks,
        most,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=max(1, min(8, block_t * block_c // 256)),
    )
    return visited, report
