"""The Triton kernels in the interpreter (fp32 and fp16), against the definition."""

import pytest
import torch
from attention_cases import TOLERANCE, WRONG_MASK_ERROR, make_case, needs_interpreter, relative_error

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton
import triton.language as tl
from longspec_hf_kernels import pack_ancestor_bits
from longspec_hf_kernels.triton_attention import hybrid_tree_attention_triton
from longspec_hf_kernels.triton_configs import LaunchOptions, TileConfig

pytestmark = needs_interpreter

# Bits of the same sum in another order of splits, in fp32.
SPLIT_TOLERANCE = 1e-6
SMALL = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=2, programs_per_sm=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim, dtype):
    case = make_case(prefixes=[70], head_dim=head_dim, dtype=dtype, strided=True)
    assert case.error(hybrid_tree_attention_triton) < TOLERANCE[dtype]


@pytest.mark.parametrize("prefix", [0, 1, 31, 32, 65, 200])
@pytest.mark.parametrize("tree_keys", [0, 1, 64, 65, 130])
def test_lengths_around_tile_and_word_edges(prefix, tree_keys):
    nodes = max(1, min(tree_keys, 4))
    case = make_case(prefixes=[prefix], nodes=nodes, tree_keys=tree_keys, tree=tree_keys > 0, kv_heads=1, head_dim=16,
                     spare=0, seed=prefix)  # fmt: skip
    assert case.error(hybrid_tree_attention_triton, tile=SMALL) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("key_depths", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_batch_rows_of_different_lengths_and_starts(index_dtype, key_depths):
    case = make_case(prefixes=[90, 0, 33], starts=[17, 0, 33], nodes=3, tree_keys=70, key_depths=key_depths,
                     index_dtype=index_dtype, strided=True, group=3)  # fmt: skip
    assert case.error(hybrid_tree_attention_triton) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("prefix", [3, 4, 5, 40])
@pytest.mark.parametrize("window", [1, 4, 512])
def test_windows(window, prefix):
    """C77, C78: the same window as the definition on both sides of its edge."""
    case = make_case(prefixes=[prefix, 100], nodes=6, tree_keys=66, window=window, starts=[1, 0])
    assert case.error(hybrid_tree_attention_triton) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tree_keys", [6, 66])
def test_windows_that_reach_far_before_the_tree(tree_keys):
    """No word before a tree's first is read for rows that lie far before it."""
    case = make_case(prefixes=[600, 300], nodes=6, tree_keys=tree_keys, window=512, kv_heads=1, head_dim=16)
    query, key, value, prefix_lens, bits = case.arguments
    guarded = torch.full((bits.numel() + 512,), -1, dtype=torch.int64)
    bits = guarded[256 : 256 + bits.numel()].view_as(bits).copy_(bits)
    out = hybrid_tree_attention_triton(query, key, value, prefix_lens, bits, **case.options)
    assert relative_error(out, case.expected()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("window", [None, 40])
def test_masked_tiles_go_to_one_split_each(window, splits):
    """A masked tile counts as several clear ones, so that a split may end within it; some splits get none."""
    case = make_case(prefixes=[0, 40, 200], nodes=5, tree_keys=100, kv_heads=1, head_dim=16, window=window)
    assert case.error(hybrid_tree_attention_triton, tile=SMALL, splits=splits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 4])
def test_softcap_and_sinks(splits):
    case = make_case(prefixes=[90, 0], softcap=3.0, sinks=True, strided=True)
    assert case.error(hybrid_tree_attention_triton, splits=splits) < TOLERANCE[torch.float32]
    case = make_case(prefixes=[9, 0], sinks=True, tree=False)  # the second sequence sees nothing
    assert case.error(hybrid_tree_attention_triton, splits=splits) < TOLERANCE[torch.float32]


def test_heads_equal_to_rows_are_not_mixed_up():
    """C74."""
    case = make_case(prefixes=[40], nodes=16, kv_heads=16, group=1, head_dim=16)
    assert case.error(hybrid_tree_attention_triton) < TOLERANCE[torch.float32]


def test_result_hardly_depends_on_the_splits_and_repeats_bit_for_bit():
    """C76, at a size for the interpreter; empty splits included."""
    case = make_case(prefixes=[300, 20], kv_heads=1, head_dim=16)
    runs = [case.run(hybrid_tree_attention_triton, tile=SMALL, splits=n) for n in (1, 2, 4, 8, 16)]
    for run in runs[1:]:
        assert relative_error(run, runs[0]) < SPLIT_TOLERANCE
    assert torch.equal(case.run(hybrid_tree_attention_triton, tile=SMALL, splits=8), runs[3])


def test_launch_options_do_not_change_the_bits():
    case = make_case(prefixes=[300, 20], nodes=9, tree_keys=70, kv_heads=1, head_dim=16)
    options = LaunchOptions(early_splits=True, early_hopper=True, edge_stages=2, reduction_warps=1)
    plain, changed = (
        case.run(hybrid_tree_attention_triton, tile=SMALL, splits=4, options=o) for o in (LaunchOptions(), options)
    )
    assert torch.equal(plain, changed)
    assert relative_error(plain, case.expected()) < TOLERANCE[torch.float32]


def test_a_sequence_keeps_its_bits_whatever_its_neighbours_length_and_the_capacity():
    """C76: splits are a function of shapes, never of lengths."""
    case = make_case(prefixes=[100, 90], kv_heads=1, head_dim=16, spare=9)
    query, key, value, _, bits = case.arguments
    before = case.run(hybrid_tree_attention_triton)
    other = torch.tensor([100, 3])
    key[1, :, :14] = value[1, :, :14] = 0.5
    after = hybrid_tree_attention_triton(query, key, value, other, bits, **case.options)
    assert torch.equal(before[0], after[0])
    wider = [torch.cat([t, torch.full_like(t[:, :, :300], float("nan")).repeat(1, 1, 3, 1)], 2) for t in (key, value)]
    assert torch.equal(hybrid_tree_attention_triton(query, *wider, other, bits, **case.options), after)


def test_a_broken_mask_is_noticed():
    """Causal bits instead of the ancestors' give another result: the comparisons above can fail."""
    case = make_case(prefixes=[20], nodes=24, head_dim=32)
    query, key, value, prefix_lens, bits = case.arguments
    key, value = key.nan_to_num(0.3), value.nan_to_num(0.3)
    causal = pack_ancestor_bits(torch.ones(1, 24, 24, dtype=torch.bool).tril())
    broken = hybrid_tree_attention_triton(query, key, value, prefix_lens, causal, **case.options)
    assert relative_error(broken, case.expected()) > WRONG_MASK_ERROR
    right = hybrid_tree_attention_triton(query, key, value, prefix_lens, bits, **case.options)
    assert relative_error(right, case.expected()) < TOLERANCE[torch.float32]


def test_perturbing_a_tree_row_changes_its_descendants_only():
    """C81: exactly no difference elsewhere."""
    case = make_case(prefixes=[6], nodes=12, head_dim=16, seed=3)
    query, key, value, prefix_lens, bits = case.arguments
    before = case.run(hybrid_tree_attention_triton)
    row = int(case.visible[0].sum(0).argmax())
    value = value.clone()
    value[0, :, 6 + row] += 1.0
    after = hybrid_tree_attention_triton(query, key, value, prefix_lens, bits, **case.options)
    assert torch.equal((before != after).any(-1).any(1)[0], case.visible[0, :, row])


@triton.jit
def _square_kernel(source, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tile = tl.load(source + at)
    tl.store(out + at, tl.dot(tile, tile))


def test_the_interpreter_still_cannot_multiply_bf16():
    """C84: why bf16 is tested on a GPU only. When this fails, add bf16 to the tests above."""
    source = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(16, 16)
    _square_kernel[(1,)](source, out)
    assert not relative_error(out, source.double() @ source.double()) < TOLERANCE[torch.bfloat16]
