"""The split kernel for Hopper in Gluon: tensor-map copies, one loading warp, two computing warpgroups.

Computes what `triton_kernels.split_attention_kernel` computes for many packed rows of half precision,
with 128 rows to a program so that each K/V tile is fetched half as often. One warp keeps the K/V tiles
coming through a ring of shared memory; two warpgroups of 64 rows each run one tile's scores under the
previous tile's second product, and each other's softmax under their products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
# Rows of one warpgroup: what one warpgroup instruction takes.
UNIT_ROWS = gl.constexpr(64)


@gluon.jit
def _wait_for_predecessor():
    """Until the kernels that write this one's inputs have finished: it may be launched before they have."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _release_successor():
    """The next kernel may be brought in; it waits for this grid before it reads."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _or(a, b):
    return a | b


@gluon.jit
def _load_tiles(key_map, value_map, rings, sequence, kv_head, row, begin, end,
                BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loading warp: tile `begin` to `end` of K and V into the rings."""
    k_ring, v_ring, k_full, v_full, k_free, v_free, _v_clean = rings
    for tile in range(begin, end):
        step = tile - begin
        slot = step % STAGES
        phase = (step // STAGES + 1) & 1  # a fresh barrier counts as having completed phase 1
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_full.index(slot), key_map.block_type.nbytes)
        tma.async_copy_global_to_shared(
            key_map, [sequence, kv_head, row + tile * BLOCK_N, 0], k_full.index(slot), k_ring.index(slot)
        )
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_full.index(slot), value_map.block_type.nbytes)
        tma.async_copy_global_to_shared(
            value_map, [sequence, kv_head, row + tile * BLOCK_N, 0], v_full.index(slot), v_ring.index(slot)
        )


@gluon.jit
def _word(words, index, num_words, row_ok):
    at = row_ok.to(gl.int32) * 0 + index
    return gl.load(words + at, mask=row_ok & (at >= 0) & (at < num_words), other=0).to(gl.uint64, bitcast=True)


@gluon.jit
def _shifted(low, high, offset):
    """64 bits from `offset` on of two words; in two steps, because a shift by 64 is undefined."""
    return (low >> offset) | ((high << (63 - offset)) << 1)


@gluon.jit
def _tree_bits(words, first_key, num_words, row_ok):
    """Ancestor bits of tree rows `first_key .. first_key + 127` (`first_key >= -128`), two words per row."""
    index = (first_key + 128) // 64 - 2
    offset = (first_key - index * 64).to(gl.uint64)
    first = _word(words, index, num_words, row_ok)
    second = _word(words, index + 1, num_words, row_ok)
    third = _word(words, index + 2, num_words, row_ok)
    return _shifted(first, second, offset), _shifted(second, third, offset)


@gluon.jit
def _bit(low, high, column):
    """Bit `column` (0 to 127) of the pair of words."""
    word = gl.where(column < 64, low, high)
    return ((word >> (column % 64).to(gl.uint64)) & 1) != 0


@gluon.jit
def _hide(scores, bits, start, prefix, exists, num_words, row_ok, HAS_TREE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Scores of an edge tile with `-inf` where a node does not see a row."""
    layout: gl.constexpr = scores.type.layout
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    visible = ((start + column) < prefix)[None, :]
    if HAS_TREE:
        low, high = _tree_bits(bits, start - prefix, num_words, row_ok)
        in_tree = _bit(low[:, None], high[:, None], column[None, :])
        visible = visible | (in_tree & ((start + column) < exists)[None, :])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _clear_hidden_rows(tile, bits, start, prefix, exists, nodes, num_words, HAS_TREE: gl.constexpr,
                       ROWS: gl.constexpr, FIRST: gl.constexpr):  # fmt: skip
    """Zero the rows of V that no node sees: they may hold NaN, which a weight of 0 would let through."""
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    # Laid out so that every warp holds all of it: the reduction below stays inside a warp.
    spread: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([4, 1], [32, 1], [1, 4], [1, 0]))
    low = start.to(gl.uint64) * 0
    high = start.to(gl.uint64) * 0
    if HAS_TREE:
        for first_node in range(0, nodes, 128):
            node = first_node + gl.arange(0, 128, layout=spread)
            a, b = _tree_bits(bits + node.to(gl.int64) * num_words, start - prefix, num_words, node < nodes)
            low = low | gl.reduce(a, 0, _or)
            high = high | gl.reduce(b, 0, _or)
    for chunk in gl.static_range(ROWS // CHUNK):
        part = tile.slice(FIRST + chunk * CHUNK, CHUNK, 0)
        column = FIRST + chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
        row = start + column
        seen = row < prefix
        if HAS_TREE:
            seen = seen | (_bit(low, high, column) & (row < exists))
        part.store(gl.where(seen[:, None], part.load(layout), 0.0))


@gluon.jit
def _softmax(scores, top, total, score_scale):
    """Running maximum, sum, weights of this tile and the decay of what was summed before; base 2."""
    factor = score_scale * LOG2E
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet
    weights = gl.exp2(scores * factor - shift[:, None])
    decay = gl.exp2(top - shift)
    return weights, new_top, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _take_value(rings, tree, job, tile, step, edges, UNIT: gl.constexpr, EDGE: gl.constexpr,
                HAS_TREE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Wait for a tile of V; of an edge tile, each warpgroup clears its half of the hidden rows."""
    _k_ring, v_ring, _k_full, v_full, _k_free, _v_free, v_clean = rings
    all_bits, _bits, nodes, num_words, _row_ok = tree
    row, prefix, exists, clear_tiles, _begin, _end = job
    BLOCK_N: gl.constexpr = v_ring.shape[3]
    slot = step % STAGES
    mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
    v = v_ring.index(slot).reshape([BLOCK_N, v_ring.shape[4]])
    if EDGE:  # noqa: SIM102 (decided when compiled; the condition inside is not)
        if tile >= clear_tiles:
            _clear_hidden_rows(v, all_bits, row + tile * BLOCK_N, prefix, exists, nodes, num_words, HAS_TREE,
                               BLOCK_N // 2, UNIT * (BLOCK_N // 2))  # fmt: skip
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(v_clean, count=1)
            mbarrier.wait(v_clean, edges & 1)
            edges += 1
    return v, edges


@gluon.jit
def _take_scores(scores, tree, job, tile, EDGE: gl.constexpr, HAS_TREE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The scores of a tile, hidden ones at `-inf`."""
    _all_bits, bits, _nodes, num_words, row_ok = tree
    row, prefix, exists, clear_tiles, _begin, _end = job
    if EDGE:  # noqa: SIM102 (decided when compiled; the condition inside is not)
        if tile >= clear_tiles:
            scores = _hide(scores, bits, row + tile * BLOCK_N, prefix, exists, num_words, row_ok, HAS_TREE, BLOCK_N)
    return scores


@gluon.jit
def _step(q, rings, tree, job, state, tile, score_scale, UNIT: gl.constexpr, EDGE: gl.constexpr,
          HAS_TREE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """This tile's scores and softmax under the last tile's second product."""
    k_ring, _v_ring, k_full, _v_full, k_free, v_free, _v_clean = rings
    acc, p, top, total, edges = state
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    layout: gl.constexpr = _scores_layout(BLOCK_N)
    step = tile - job[4]
    slot = step % STAGES
    v, edges = _take_value(rings, tree, job, tile - 1, step - 1, edges, UNIT, EDGE, HAS_TREE, STAGES)
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    k = k_ring.index(slot).reshape([BLOCK_N, k_ring.shape[4]]).permute((1, 0))
    blank = gl.zeros([UNIT_ROWS, BLOCK_N], gl.float32, layout)
    scores = warpgroup_mma(q, k, blank, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(slot), count=1)
    scores = _take_scores(scores, tree, job, tile, EDGE, HAS_TREE, BLOCK_N)
    weights, top, total, decay = _softmax(scores, top, total, score_scale)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index((step - 1) % STAGES), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(weights.to(k_ring.dtype), p.type.layout)
    return acc, p, top, total, edges


@gluon.constexpr_function
def _scores_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _attend(q_tile, rings, job, partial_out, partial_lse, ancestor_bits, sequence, kv_head, row_tile, split, nodes,
            num_splits, num_words, kv_heads, score_scale, UNIT: gl.constexpr, GROUP: gl.constexpr,
            STAGES: gl.constexpr, HAS_TREE: gl.constexpr, RELEASE: gl.constexpr):  # fmt: skip
    """One computing warpgroup: rows `UNIT * 64` to `UNIT * 64 + 63` of the program's 128."""
    k_ring, _v_ring, k_full, _v_full, k_free, _v_free, _v_clean = rings
    _row, _prefix, _exists, clear_tiles, begin, end = job
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    HEAD_DIM: gl.constexpr = k_ring.shape[4]
    scores_layout: gl.constexpr = _scores_layout(BLOCK_N)
    acc_layout: gl.constexpr = _scores_layout(HEAD_DIM)
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc_layout, k_width=2)
    q = q_tile.index(UNIT)
    rows = (row_tile * 2 + UNIT) * UNIT_ROWS + gl.arange(0, UNIT_ROWS, layout=gl.SliceLayout(1, scores_layout))
    row_ok = rows < nodes * GROUP
    all_bits = ancestor_bits + sequence.to(gl.int64) * nodes * num_words
    tree = (all_bits, all_bits + (rows // GROUP) * num_words, nodes, num_words, row_ok)
    acc = gl.zeros([UNIT_ROWS, HEAD_DIM], gl.float32, acc_layout)
    top = gl.full([UNIT_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    total = gl.zeros([UNIT_ROWS], gl.float32, gl.SliceLayout(1, scores_layout))

    mbarrier.wait(k_full.index(0), 0)
    k = k_ring.index(0).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    blank = gl.zeros([UNIT_ROWS, BLOCK_N], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k, blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0), count=1)
    scores = _take_scores(scores, tree, job, begin, True, HAS_TREE, BLOCK_N)
    weights, top, total, _decay = _softmax(scores, top, total, score_scale)
    p = gl.convert_layout(weights.to(k_ring.dtype), weights_layout)
    state = (acc, p, top, total, 0)
    # Two loops: the code of the edge tiles would cost the clear ones registers.
    for tile in range(begin + 1, gl.minimum(end, clear_tiles)):
        state = _step(q, rings, tree, job, state, tile, score_scale, UNIT, False, HAS_TREE, STAGES)
    for tile in range(gl.maximum(begin + 1, clear_tiles), end):
        state = _step(q, rings, tree, job, state, tile, score_scale, UNIT, True, HAS_TREE, STAGES)
    acc, p, top, total, edges = state
    v, edges = _take_value(rings, tree, job, end - 1, end - 1 - begin, edges, UNIT, True, HAS_TREE, STAGES)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    if RELEASE:
        _release_successor()
    empty = total == 0.0
    lse = gl.where(empty, float("-inf"), top + gl.log2(gl.where(empty, 1.0, total)))
    scale = gl.convert_layout(1.0 / gl.where(empty, 1.0, total), gl.SliceLayout(1, acc_layout))
    acc = acc * scale[:, None]
    heads = kv_heads * GROUP
    slots = (sequence * nodes + rows // GROUP) * heads + kv_head * GROUP + rows % GROUP
    slots = slots.to(gl.int64) * num_splits + split
    gl.store(partial_lse + slots, lse, mask=row_ok, eviction_policy="evict_last")
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, acc_layout))
    slots = gl.convert_layout(slots, gl.SliceLayout(1, acc_layout))
    kept = gl.convert_layout(row_ok & (lse > float("-inf")), gl.SliceLayout(1, acc_layout))
    places = (slots * HEAD_DIM)[:, None] + dims[None, :]
    gl.store(partial_out + places, acc, mask=kept[:, None], eviction_policy="evict_last")


@gluon.jit(do_not_specialize=["nodes", "capacity", "num_splits", "min_tiles", "num_words", "num_tree_keys"])
def hopper_split_attention_kernel(
    query, key_map, value_map, prefix_lens, starts, ancestor_bits, partial_out, partial_lse,
    stride_qb, stride_qh, stride_qt, nodes, capacity, num_splits, min_tiles, num_words, num_tree_keys, kv_heads,
    score_scale,
    HEAD_DIM: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    HAS_TREE: gl.constexpr, HAS_STARTS: gl.constexpr, WAIT: gl.constexpr, RELEASE: gl.constexpr,
):  # fmt: skip
    """Grid and splits as in `triton_kernels.split_attention_kernel`, with 128 rows to a row tile.

    `key_map` and `value_map` are tensor maps over `[B, Hkv, capacity, HEAD_DIM]` with blocks of
    `[1, 1, BLOCK_N, HEAD_DIM]`. Every split runs at least one tile; one without work hides all of it.
    """
    if WAIT:
        _wait_for_predecessor()
    row_tile = gl.program_id(0)
    sequence = gl.program_id(1) // kv_heads
    kv_head = gl.program_id(1) % kv_heads
    split = gl.program_id(2)
    prefix = gl.minimum(gl.load(prefix_lens + sequence).to(gl.int32), capacity)
    row = prefix * 0
    if HAS_STARTS:
        row = gl.minimum(gl.load(starts + sequence).to(gl.int32), prefix)
    exists = gl.minimum(prefix + num_tree_keys, capacity)
    clear_tiles = (prefix - row) // BLOCK_N
    work = (exists - row + BLOCK_N - 1) // BLOCK_N
    # The last split, which has the masked tile, gets what is left over. Even shares were not faster.
    share = gl.maximum((work + num_splits - 1) // num_splits, min_tiles)
    begin = split * share
    end = gl.maximum(gl.minimum(begin + share, work), begin + 1)

    dtype: gl.constexpr = key_map.dtype
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([UNIT_ROWS, HEAD_DIM], dtype)
    q_tile = gl.allocate_shared_memory(dtype, [2, UNIT_ROWS, HEAD_DIM], q_layout)
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, rows_layout))
    for unit in gl.static_range(2):
        rows = (row_tile * 2 + unit) * UNIT_ROWS + gl.arange(0, UNIT_ROWS, layout=gl.SliceLayout(1, rows_layout))
        offsets = (kv_head * GROUP + rows % GROUP) * stride_qh + rows // GROUP * stride_qt
        source = query + sequence.to(gl.int64) * stride_qb + offsets[:, None] + dims[None, :]
        q_tile.index(unit).store(gl.load(source, mask=(rows < nodes * GROUP)[:, None], other=0.0))

    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], key_map.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], value_map.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
        mbarrier.init(v_free.index(slot), count=2)
    mbarrier.init(v_clean, count=2)
    fence_async_shared()
    gl.thread_barrier()
    rings = (k_ring, v_ring, k_full, v_full, k_free, v_free, v_clean)
    job = (row, prefix, exists, clear_tiles, begin, end)
    # The tuples are written in place: a constant put in a variable becomes a tensor.
    gl.warp_specialize(
        [
            (_attend, (q_tile, rings, job, partial_out, partial_lse, ancestor_bits, sequence, kv_head, row_tile, split,
                       nodes, num_splits, num_words, kv_heads, score_scale, gl.constexpr(0), GROUP, STAGES, HAS_TREE,
                       RELEASE)),
            (_attend, (q_tile, rings, job, partial_out, partial_lse, ancestor_bits, sequence, kv_head, row_tile, split,
                       nodes, num_splits, num_words, kv_heads, score_scale, gl.constexpr(1), GROUP, STAGES, HAS_TREE,
                       RELEASE)),
            (_load_tiles, (key_map, value_map, rings, sequence, kv_head, row, begin, end, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
