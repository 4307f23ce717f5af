"""The Triton kernels: split-KV hybrid tree attention, and the reduction over its splits.

`triton_attention` launches them; `reference` defines what they compute. The query heads of one K/V
head are packed with the nodes into the rows of a tile, `row = node * GROUP + head_in_group`, so each
K/V byte is read once per K/V head and tile of rows. The work of one (sequence, K/V head, row tile) is
a list of K/V tiles cut into equal splits: first the clear tiles, prefix rows that every node sees, and
last the edge tiles, with a mask: the rest of the prefix and the tree rows behind it. Under a window
every tile is an edge tile.
Partial results are read by the next kernel and dead after it: kept in the L2 cache they never go to memory.
Scores are kept in base 2: `exp(x) = exp2(x * log2(e))`.
"""

import triton
import triton.language as tl

from .early_launch import release_successor, wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)
# Clear tiles that take about as long as an edge tile, which waits for its own loads where theirs run ahead.
EDGE_WEIGHT = tl.constexpr(3)


@triton.jit
def _load_rows(base, row, row_mask, dim, dim_mask, stride_row, stride_dim, MASK_ROWS: tl.constexpr):
    """A `[rows, dims]` tile; `row` may be a column and `dim` a row index or the other way round."""
    pointers = base + row * stride_row + dim * stride_dim
    if MASK_ROWS:
        return tl.load(pointers, mask=row_mask & dim_mask, other=0.0)
    return tl.load(pointers, mask=dim_mask, other=0.0)


@triton.jit
def _tree_bits(words, first_key, num_words, row_ok):
    """The bits of tree rows `first_key .. first_key + 31`, an int32 for each row; none lie before row 0."""
    first_key = tl.maximum(first_key, -64)  # a window begins far before the tree: no word there
    index = (first_key + 64) // 64 - 1
    offset = (first_key - index * 64).to(tl.uint64)
    at = row_ok.to(tl.int32) * 0 + index  # a vector: the interpreter mixes up vector & scalar masks
    low = tl.load(words + at, mask=row_ok & (at >= 0) & (at < num_words), other=0)
    high = tl.load(words + at + 1, mask=row_ok & (at + 1 < num_words), other=0)
    low = low.to(tl.uint64, bitcast=True) >> offset
    # In two steps, because a shift by 64 is undefined.
    high = (high.to(tl.uint64, bitcast=True) << (63 - offset)) << 1
    return (low | high).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _softmax_step(
    query, key, value, acc, top, total, visible, score_scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One K/V tile of the online softmax: running maximum `top`, sum `total`, unnormalised `acc`."""
    scores = tl.dot(query, key, input_precision=PRECISION)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1) has the right limits when exp overflows or vanishes.
        doubled = tl.exp2(scores * (2.0 * LOG2E * score_scale / softcap))
        scores = softcap * (1.0 - 2.0 / (doubled + 1.0))
        factor = LOG2E
    else:
        factor = score_scale * LOG2E
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    # The factor is positive, so it commutes with max and folds into one multiply-add below.
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    shift = new_top
    if MASKED:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
    weights = tl.exp2(scores * factor - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


COUNTS = ["nodes", "capacity", "num_splits", "min_tiles", "num_words", "num_tree_keys", "window"]


@triton.jit(do_not_specialize=COUNTS)  # no compilation per length or tree size
def split_attention_kernel(
    query, key, value, prefix_lens, starts, ancestor_bits, depths, key_depths, sinks,
    out, partial_out, partial_lse,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_ot, stride_od,
    nodes, capacity, num_splits, min_tiles, num_words, num_tree_keys, kv_heads,
    score_scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EDGE_STAGES: tl.constexpr, HAS_TREE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Attention of one row tile of one K/V head over one split of its K/V tiles.

    Grid: (row tiles, sequences * K/V heads, splits). Row tiles run fastest, so the programs that
    share K and V are resident together and the second reader finds them in the L2 cache. Lengths
    come from device tensors; splits beyond a sequence's work write a log-sum-exp of -inf only.
    """
    if WAIT:
        wait_for_predecessor()  # launched before the kernels that write its inputs have finished
    row_tile = tl.program_id(0)
    sequence = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    split = tl.program_id(2)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < nodes * GROUP
    node = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    sequence_wide = sequence.to(tl.int64)

    prefix = tl.load(prefix_lens + sequence).to(tl.int32)
    prefix = tl.minimum(prefix, capacity)
    first_row = prefix * 0
    if HAS_STARTS:
        first_row = tl.load(starts + sequence).to(tl.int32)
    position = rows * 0
    if WINDOW:
        depth = tl.load(depths + sequence * nodes + node, mask=row_ok, other=2147483647).to(tl.int64)
        lowest = tl.min(depth, 0).to(tl.int32)
        first_row = tl.maximum(first_row, prefix + lowest - window + 1)
        position = prefix + tl.where(row_ok, depth, 0).to(tl.int32)
    first_row = tl.minimum(first_row, prefix)
    clear_tiles = prefix * 0  # tiles that every row sees whole
    if not WINDOW:
        clear_tiles = (prefix - first_row) // BLOCK_N
    edge_row = first_row + clear_tiles * BLOCK_N
    edge_tiles = (prefix + num_tree_keys - edge_row + EDGE_BLOCK - 1) // EDGE_BLOCK
    # Even shares of no fewer tiles than `min_tiles`; what divides unevenly comes last, where the tiles are small.
    tiles = clear_tiles + edge_tiles
    filled = tl.maximum(tl.minimum(tiles // min_tiles, num_splits), 1)
    # An edge tile counts as several clear ones, as far as that makes no share larger.
    spare = (tiles + filled - 1) // filled * filled - clear_tiles
    edge_weight = tl.maximum(tl.minimum(spare // tl.maximum(edge_tiles, 1), EDGE_WEIGHT), 1)
    work = clear_tiles + edge_tiles * edge_weight
    begin = tl.minimum(split, filled) * work // filled
    end = tl.minimum(split + 1, filled) * work // filled
    first_edge = (tl.maximum(begin - clear_tiles, 0) + edge_weight - 1) // edge_weight
    last_edge = (tl.maximum(end - clear_tiles, 0) + edge_weight - 1) // edge_weight

    q = tl.load(
        query + sequence_wide * stride_qb
        + (head * stride_qh + node * stride_qt)[:, None] + (dims * stride_qd)[None, :],
        mask=row_ok[:, None] & dim_ok[None, :], other=0.0,
    )  # fmt: skip
    key_base = key + sequence_wide * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_base = value + sequence_wide * stride_vb + kv_head.to(tl.int64) * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if not WINDOW:
        tile_rows = tl.arange(0, BLOCK_N)
        for tile in tl.range(begin, tl.minimum(end, clear_tiles), num_stages=STAGES):
            # 64-bit only for the tile's start: the offsets inside a tile are small.
            start = first_row.to(tl.int64) + tile * BLOCK_N
            k = _load_rows(key_base + start * stride_kn, tile_rows[None, :], True, dims[:, None],
                           dim_ok[:, None], stride_kn, stride_kd, False)  # fmt: skip
            v = _load_rows(value_base + start * stride_vn, tile_rows[:, None], True, dims[None, :],
                           dim_ok[None, :], stride_vn, stride_vd, False)  # fmt: skip
            acc, top, total = _softmax_step(
                q, k, v, acc, top, total, True, score_scale, softcap, False, SOFTCAP, PRECISION
            )
    edge_rows = tl.arange(0, EDGE_BLOCK)
    for tile in tl.range(first_edge, last_edge, num_stages=EDGE_STAGES):
        start = edge_row + tile * EDGE_BLOCK
        row = start + edge_rows
        row_exists = row < tl.minimum(prefix + num_tree_keys, capacity)
        start_wide = start.to(tl.int64)
        k = _load_rows(key_base + start_wide * stride_kn, edge_rows[None, :], row_exists[None, :], dims[:, None],
                       dim_ok[:, None], stride_kn, stride_kd, True)  # fmt: skip
        v = _load_rows(value_base + start_wide * stride_vn, edge_rows[:, None], row_exists[:, None], dims[None, :],
                       dim_ok[None, :], stride_vn, stride_vd, True)  # fmt: skip
        visible = row[None, :] < prefix
        if WINDOW:
            visible = visible & (position[:, None] - row[None, :] < window)
        if HAS_TREE:
            words = ancestor_bits + (sequence_wide * nodes + node) * num_words
            bits = _tree_bits(words, start - prefix, num_words, row_ok)
            in_tree = (((bits[:, None] >> edge_rows[None, :]) & 1) != 0) & row_exists[None, :]
            if WINDOW:
                tree_key = row - prefix
                depth_ok = row_exists & (tree_key >= 0)
                key_depth = tl.load(key_depths + sequence * num_tree_keys + tree_key, mask=depth_ok, other=0)
                distance = position[:, None] - (prefix + key_depth.to(tl.int32))[None, :]
                in_tree = in_tree & (distance < window)
            visible = visible | in_tree
        # Rows that no node of this tile sees may hold NaN, which a weight of 0 would let through.
        seen = tl.max(visible.to(tl.int32), 0) != 0
        v = tl.where(seen[:, None], v, 0.0)
        acc, top, total = _softmax_step(
            q, k, v, acc, top, total, visible, score_scale, softcap, True, SOFTCAP, PRECISION
        )
    if RELEASE:
        release_successor()  # the reduction may be brought in; it waits for this grid
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    mask = row_ok[:, None] & dim_ok[None, :]
    if DIRECT:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
            acc = acc / (1.0 + tl.exp2(sink - lse))[:, None]
        offsets = (head * stride_oh + node * stride_ot)[:, None] + (dims * stride_od)[None, :]
        tl.store(out + sequence_wide * stride_ob + offsets, acc.to(out.dtype.element_ty), mask=mask)
    else:
        # Partials: [sequence, node, head, split, HEAD_DIM]; an empty split leaves its rows unwritten.
        slot = ((sequence_wide * nodes + node) * (kv_heads * GROUP) + head) * num_splits + split
        tl.store(partial_lse + slot, lse, mask=row_ok, eviction_policy="evict_last")
        if end > begin:
            tl.store(
                partial_out + slot[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask, eviction_policy="evict_last"
            )


@triton.jit(do_not_specialize=["nodes", "heads", "num_splits"])
def combine_splits_kernel(
    partial_out, partial_lse, sinks, out, stride_ob, stride_oh, stride_ot, stride_od,
    nodes, heads, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one (sequence, node, head) row by their log-sum-exp. Grid: (rows,)."""
    slot = tl.program_id(0)
    head = slot % heads
    node = slot // heads % nodes
    sequence = (slot // heads // nodes).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    if WAIT:
        wait_for_predecessor()  # launched before the splits have finished: see triton_attention
    if RELEASE:
        release_successor()  # whatever is brought in waits for this grid before it reads
    first = slot.to(tl.int64) * num_splits
    splits = tl.arange(0, MAX_SPLITS)
    every_lse = tl.load(partial_lse + first + splits, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(every_lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = shift * 0.0
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        part = begin + tl.arange(0, BLOCK_S)
        lse = tl.load(partial_lse + first + part, mask=part < num_splits, other=float("-inf"))
        partial = tl.load(
            partial_out + (first + part)[:, None] * HEAD_DIM + dims[None, :],
            mask=(part < num_splits)[:, None] & dim_ok[None, :], other=0.0,
        )  # fmt: skip
        # The rows of empty splits were never written. They are read all the same: waiting to know them costs more.
        partial = tl.where((lse > float("-inf"))[:, None], partial, 0.0)
        weight = tl.exp2(lse - shift)
        total += tl.sum(weight, 0)
        acc += tl.sum(partial * weight[:, None], 0)
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - shift)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    offsets = sequence * stride_ob + head * stride_oh + node * stride_ot + dims * stride_od
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=dim_ok)


@triton.jit(do_not_specialize=["nodes", "heads"])
def merge_prefix_and_tree_kernel(
    prefix_out, prefix_lse, tree_out, tree_lse, sinks, out,
    stride_pb, stride_ph, stride_pt, stride_pd, stride_lb, stride_lh, stride_lt,
    stride_ob, stride_oh, stride_ot, stride_od,
    nodes, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_TREE: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge a flash kernel's prefix part (natural log-sum-exp) with a tree part (base 2). Grid: (rows,)."""
    slot = tl.program_id(0)
    head = slot % heads
    node = slot // heads % nodes
    sequence = (slot // heads // nodes).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    lse = tl.load(prefix_lse + sequence * stride_lb + head * stride_lh + node * stride_lt) * LOG2E
    lse = tl.where(lse == float("inf"), float("-inf"), lse)  # how flash-attn marks an empty prefix
    top = lse
    if HAS_TREE:
        other = tl.load(tree_lse + slot)
        top = tl.maximum(lse, other)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - shift)
    offsets = sequence * stride_pb + head * stride_ph + node * stride_pt + dims * stride_pd
    acc = tl.load(prefix_out + offsets, mask=dim_ok, other=0.0).to(tl.float32)
    acc = tl.where(lse == float("-inf"), 0.0, acc * weight)
    total = weight
    if HAS_TREE:
        weight = tl.exp2(other - shift)
        part = tl.load(tree_out + slot.to(tl.int64) * HEAD_DIM + dims, mask=dim_ok, other=0.0)
        acc += part * weight
        total += weight
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - shift)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    offsets = sequence * stride_ob + head * stride_oh + node * stride_ot + dims * stride_od
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=dim_ok)
