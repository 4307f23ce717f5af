"""The CPU path against the definition, and what it promises about memory."""

import pytest
import torch
from attention_cases import TOLERANCE, make_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from longspec_hf_kernels import hybrid_tree_attention
from longspec_hf_kernels.merge import explicit_attention, merge_attention
from longspec_hf_kernels.torch_attention import hybrid_tree_attention_torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prefixes=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    nodes=st.integers(1, 9),
    extra_keys=st.sampled_from([0, 3, 70, 140]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 80]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, None, 1, 4, 512]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    padded=st.booleans(),
    tree=st.booleans(),
    strided=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_matches_the_definition(prefixes, nodes, extra_keys, padded, dtype, **options):
    starts = [prefix // 3 for prefix in prefixes] if padded else None
    case = make_case(
        prefixes=prefixes, nodes=nodes, tree_keys=nodes + extra_keys, starts=starts, dtype=dtype, **options
    )
    assert case.error(hybrid_tree_attention) < TOLERANCE[dtype]


def test_prefix_longer_than_a_chunk_of_the_explicit_path():
    case = make_case(prefixes=[5000], softcap=5.0, head_dim=16)
    assert case.error(hybrid_tree_attention_torch) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 21, 69])
def test_merge_of_two_parts_equals_one_softmax(rows, head_dim):
    """C73: fp32 statistics, one log-sum-exp per row."""
    generator = torch.Generator().manual_seed(rows)
    query, key, value = (torch.randn(2, n, head_dim, generator=generator) for n in (rows, 50, 50))
    whole, whole_lse = explicit_attention(query, key, value, None, scale=0.1)
    parts = [explicit_attention(query, key[:, s], value[:, s], None, scale=0.1) for s in (slice(0, 31), slice(31, 50))]
    out, lse = merge_attention(*parts[0], *parts[1])
    assert lse.dtype == torch.float32 and lse.shape == (2, rows)
    assert relative_error(out, whole) < TOLERANCE[torch.float32]
    assert relative_error(lse, whole_lse) < TOLERANCE[torch.float32]


def test_merge_with_an_empty_part_is_the_other_part():
    query, key, value = torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    full = explicit_attention(query, key, value, None, scale=1.0)
    hidden = torch.zeros(2, 3, dtype=torch.bool)
    empty = explicit_attention(query, key, value, hidden, scale=1.0)
    assert torch.equal(empty[0], torch.zeros(1, 2, 4)) and torch.isneginf(empty[1]).all()
    torch.testing.assert_close(merge_attention(*full, *empty), full)
    assert not merge_attention(*empty, *empty)[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_equal_to_rows_are_not_mixed_up(dtype):
    """C74: 16 heads and 16 nodes, where swapped axes keep the shapes."""
    case = make_case(prefixes=[40], nodes=16, kv_heads=16, group=1, head_dim=16, dtype=dtype)
    assert case.error(hybrid_tree_attention_torch) < TOLERANCE[dtype]


def test_key_and_value_are_neither_copied_nor_repeated():
    """The largest tensor made along the way is far smaller than the K/V buffers."""
    case = make_case(prefixes=[4000], nodes=4, group=4, head_dim=64)
    with torch.profiler.profile(profile_memory=True) as profile:
        case.run(hybrid_tree_attention_torch)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < case.arguments[1].numel() * 4 / 8


def test_lengths_beyond_the_capacity_are_named():
    case = make_case(prefixes=[4], spare=0, nodes=3)
    query, key, value, _, bits = case.arguments
    with pytest.raises(ValueError, match=r"`ancestor_bits`.*capacity of 7"):
        hybrid_tree_attention(query, key, value, torch.tensor([5]), bits, scale=1.0)
    with pytest.raises(ValueError, match=r"`prefix_lens` must not exceed the 7 rows"):
        hybrid_tree_attention(query, key, value, torch.tensor([8]), None, scale=1.0)


def test_no_nodes_and_no_sequences_give_empty_results():
    assert hybrid_tree_attention(
        torch.zeros(2, 4, 0, 16),
        torch.zeros(2, 2, 8, 16),
        torch.zeros(2, 2, 8, 16),
        torch.tensor([1, 2]),
        None,
        scale=1.0,
    ).shape == (2, 4, 0, 16)


@pytest.mark.parametrize("window", [None, 8])
def test_layers_of_a_round_share_what_depends_on_the_tree_alone(window):
    case = make_case(prefixes=[40, 21], starts=[3, 0], nodes=6, tree_keys=9, window=window, strided=False)
    query, key, value, *rest = case.arguments
    key, value = key.nan_to_num(0.5), value.nan_to_num(0.5)
    shared: dict = {}
    for layer in range(3):
        expected = hybrid_tree_attention(query + layer, key, value, *rest, **case.options)
        assert torch.equal(
            hybrid_tree_attention(query + layer, key, value, *rest, **case.options, shared=shared), expected
        )
    assert shared


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_nobody_sees_are_not_used_whatever_they_hold(poison):
    """The one masked call would let them through a weight of 0."""
    case = make_case(prefixes=[30], nodes=3, tree_keys=20)
    query, key, value, *rest = case.arguments
    clean = hybrid_tree_attention(query, key.nan_to_num(0.5), value.nan_to_num(0.5), *rest, **case.options)
    poisoned = hybrid_tree_attention(query, key.nan_to_num(poison), value.nan_to_num(poison), *rest, **case.options)
    assert relative_error(poisoned, clean) < TOLERANCE[torch.float32]
