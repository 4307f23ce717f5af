"""`best_children_fused` in Triton: parts of the vocabulary first, then their union.

Candidates are int64 keys that sort as `_ordered` of `fused_beam` says: the order-preserving bits of an fp32 value
above the complement of an index, so that a maximum over keys finds value and index at once and never ties.
"""

import torch
import triton
import triton.language as tl

from .early_launch import overlapped, release_successor, wait_for_predecessor
from .triton_configs import device_limits

# Parts of the vocabulary to choose from, and the fewest programs to choose each for: small parts are quickly searched,
# but their lists are merged by one program.
CHUNKS = {4096: 512, 2048: 64, 1024: 64, 512: 64, 256: 1}
WARP_ELEMENTS = 512
NO_KEY = tl.constexpr(-(2**63))  # below the key of -inf


@triton.jit
def _ordered(values, index):
    """The keys of fp32 `values`; the lower of two indices has the larger key."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits.to(tl.int64) + 1) << 32) - 1 - index.to(tl.int64)


@triton.jit
def _value(keys):
    """The fp32 values of keys."""
    bits = (keys >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _index(keys):
    """The indices of keys: the complement of the lower 32 bits."""
    return (-1 - keys).to(tl.int32)


@triton.jit
def chunk_candidates_kernel(
    scores, logits, keys, tops, sums, stride_sb, stride_sk, stride_lb, stride_lk, stride_lv,
    nodes, vocabulary, width, softcap, sharpness,
    CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks, sequences * nodes). Maximum, sum of exponentials and the `width` largest keys of a chunk."""
    if EARLY:
        wait_for_predecessor()
        release_successor()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence, node = row // nodes, row % nodes
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = token < vocabulary
    score = tl.load(scores + sequence * stride_sb + node * stride_sk)
    base = logits + sequence * stride_lb + node * stride_lk
    # The logits of an unused node may be anything: they count as equal.
    readable = token < tl.where(score == float("-inf"), 0, vocabulary)
    values = tl.load(base + token.to(tl.int64) * stride_lv, mask=readable, other=0.0).to(tl.float32)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) has the right limits when exp overflows or vanishes.
        values = softcap * (1.0 - 2.0 / (tl.exp(values * (2.0 / softcap)) + 1.0))
    values = tl.where(mask, values * sharpness, float("-inf"))
    top = tl.max(values, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    slot = row * tl.num_programs(0) + chunk
    tl.store(tops + slot, top)
    tl.store(sums + slot, tl.sum(tl.exp(values - shift), 0))
    left = tl.where(mask, _ordered(values, token), NO_KEY)
    for place in range(width):
        best = tl.max(left, 0)
        tl.store(keys + slot * width + place, best)
        left = tl.where(left == best, NO_KEY, left)


@triton.jit
def _summed_keys(keys, score, lse, child):
    """Keys of the children by score, from keys by logit; `child` numbers a node's first child."""
    values = _value(keys)
    values = tl.where(values == float("-inf"), values, values - lse)
    values = tl.where(score == float("-inf"), float("-inf"), score + values)
    token = _index(keys)
    return tl.where(keys == NO_KEY, NO_KEY, _ordered(values, child + token))


@triton.jit
def merge_candidates_kernel(
    scores, keys, tops, sums, best_scores, parents, tokens, stride_sb, stride_sk,
    nodes, vocabulary, chunks, width, kept,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences,). The chunks' lists are sorted: only the head of each competes for the next place."""
    if EARLY:
        wait_for_predecessor()
        release_successor()
    sequence = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_K)
    chunk = tl.arange(0, BLOCK_C)
    mask = (node < nodes)[:, None] & (chunk < chunks)[None, :]
    slot = (sequence * nodes + node)[:, None] * chunks + chunk[None, :]
    chunk_top = tl.load(tops + slot, mask=mask, other=float("-inf"))
    chunk_sum = tl.load(sums + slot, mask=mask, other=0.0)
    top = tl.max(chunk_top, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(chunk_sum * tl.exp(chunk_top - shift[:, None]), 1)
    lse = shift + tl.log(tl.where(total == 0.0, 1.0, total))
    score = tl.load(scores + sequence * stride_sb + node * stride_sk, mask=node < nodes, other=float("-inf"))
    child = node.to(tl.int64) * vocabulary
    taken = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.int32)
    head = tl.load(keys + slot * width, mask=mask, other=NO_KEY)
    head = _summed_keys(head, score[:, None], lse[:, None], child[:, None])
    for place in range(kept):
        best = tl.max(tl.max(head, 1), 0)
        index = _index(best)
        at = sequence * kept + place
        tl.store(best_scores + at, _value(best))
        tl.store(parents + at, index // vocabulary)
        tl.store(tokens + at, index % vocabulary)
        chosen = head == best
        taken += chosen.to(tl.int32)
        follows = chosen & mask & (taken < width)
        following = tl.load(keys + slot * width + taken, mask=follows, other=NO_KEY)
        following = _summed_keys(following, score[:, None], lse[:, None], child[:, None])
        head = tl.where(chosen, following, head)


def choose_chunk(rows: int, vocabulary: int) -> int:
    """The largest part of the vocabulary that makes enough programs of `rows` rows, else the smallest."""
    enough = (chunk for chunk, programs in CHUNKS.items() if rows * -(-vocabulary // chunk) >= programs)
    return next(enough, min(CHUNKS))


def best_children_triton(
    scores: torch.Tensor,
    logits: torch.Tensor,
    width: int,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`best_children_torch` in two launches.

    Args:
        chunk: tokens of a part, a power of two, instead of `choose_chunk`'s.
    """
    batch, nodes, vocabulary = logits.shape
    kept = min(width, nodes * vocabulary)
    chunk = chunk or choose_chunk(batch * nodes, vocabulary)
    chunks = -(-vocabulary // chunk)
    keys = torch.empty(batch, nodes, chunks, width, dtype=torch.int64, device=logits.device)
    tops = torch.empty(batch, nodes, chunks, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops)
    best = torch.empty(batch, kept, dtype=torch.float32, device=logits.device)
    parents = torch.empty(batch, kept, dtype=torch.int64, device=logits.device)
    tokens = torch.empty_like(parents)
    if batch == 0:
        return best, parents, tokens
    early = device_limits(logits.device).dependent_launch
    chunk_candidates_kernel[(chunks, batch * nodes)](
        scores,
        logits,
        keys,
        tops,
        sums,
        *scores.stride(),
        *logits.stride(),
        nodes,
        vocabulary,
        width,
        softcap or 1.0,
        1.0 / temperature,
        CHUNK=chunk,
        SOFTCAP=softcap is not None,
        EARLY=early,
        num_warps=max(1, chunk // WARP_ELEMENTS),
        **overlapped(early),
    )
    lists = triton.next_power_of_2(nodes) * triton.next_power_of_2(chunks)
    merge_candidates_kernel[(batch,)](
        scores,
        keys,
        tops,
        sums,
        best,
        parents,
        tokens,
        *scores.stride(),
        nodes,
        vocabulary,
        chunks,
        width,
        kept,
        BLOCK_K=triton.next_power_of_2(nodes),
        BLOCK_C=triton.next_power_of_2(chunks),
        EARLY=early,
        num_warps=min(16, max(4, lists // 256)),
        **overlapped(early),
    )
    return best, parents, tokens
