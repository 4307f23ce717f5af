"""The definition itself: against hand-made numbers, single paths and the promises of its docstring."""

import pytest
import torch
from attention_cases import make_case, random_parents, tree_from_parents
from longspec_hf_kernels import hybrid_tree_attention_reference, pack_ancestor_bits, unpack_ancestor_bits

# Two orders of the same fp64 sum.
SAME_SUM = 1e-12


def one_hot_case(prefix: int, window: int, tree_depth: int) -> torch.Tensor:
    """Zero queries and values that are one-hot by position: the output says which rows were seen."""
    capacity = prefix + tree_depth + 1
    value = torch.eye(capacity).view(1, 1, capacity, capacity).double()
    depths = torch.tensor([[tree_depth]])
    bits = pack_ancestor_bits(torch.ones(1, 1, tree_depth + 1, dtype=torch.bool))
    out = hybrid_tree_attention_reference(
        torch.zeros(1, 1, 1, capacity).double(),
        torch.zeros(1, 1, capacity, capacity).double(),
        value,
        torch.tensor([prefix]),
        bits,
        scale=1.0,
        window=window,
        depths=depths,
        key_depths=torch.arange(tree_depth + 1).unsqueeze(0),
    )
    return (out[0, 0, 0] > 0).nonzero().flatten()


@pytest.mark.parametrize("tree_depth", [0, 1, 2, 5])
def test_window_ends_one_row_short_of_its_width_and_moves_with_depth(tree_depth):
    """C77: a node at position p with window 4 sees p - 3 and not p - 4."""
    position = 10 + tree_depth
    assert one_hot_case(prefix=10, window=4, tree_depth=tree_depth).tolist() == list(range(position - 3, position + 1))


@pytest.mark.parametrize("seed", range(20))
def test_a_node_gets_what_its_own_path_would_get_alone(seed):
    """C80: any tree, in any row order; each node against a plain causal softmax over prefix and path."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 41, (1,), generator=generator))
    parents = random_parents(count, generator)
    visible, _ = tree_from_parents(parents)
    prefix, size = 9, 8
    query, key, value = (
        torch.randn(1, 1, n, size, generator=generator).double() for n in (count, 9 + count, 9 + count)
    )
    out = hybrid_tree_attention_reference(
        query, key, value, torch.tensor([prefix]), pack_ancestor_bits(visible.unsqueeze(0)), scale=0.3
    )
    for node in range(count):
        path, at = [], node
        while at != -1:
            path.append(prefix + at)
            at = parents[at]
        rows = list(range(prefix)) + path
        weights = torch.softmax(query[0, 0, node] @ key[0, 0, rows].T * 0.3, -1)
        torch.testing.assert_close(out[0, 0, node], weights @ value[0, 0, rows], rtol=SAME_SUM, atol=SAME_SUM)


def test_perturbing_a_tree_row_changes_its_descendants_only():
    """C81: exactly no difference elsewhere."""
    case = make_case(prefixes=[6], nodes=12, dtype=torch.float32, seed=3)
    before = case.run(hybrid_tree_attention_reference)
    query, key, value, prefix_lens, bits = case.arguments
    row = int(case.visible[0].sum(0).argmax())
    key, value = key.clone(), value.clone()
    key[0, :, 6 + row] += 1.0
    value[0, :, 6 + row] += 1.0
    after = hybrid_tree_attention_reference(query, key, value, prefix_lens, bits, **case.options)
    changed = (before != after).any(-1).any(1)[0]
    assert torch.equal(changed, case.visible[0, :, row])


def test_sinks_only_dilute():
    case = make_case(prefixes=[5, 3], dtype=torch.float64)
    plain = case.run(hybrid_tree_attention_reference)
    case.options["sinks"] = torch.full((4,), -1e9)
    torch.testing.assert_close(case.run(hybrid_tree_attention_reference), plain)
    case.options["sinks"] = torch.full((4,), 1e9)
    assert case.run(hybrid_tree_attention_reference).abs().max() == 0


def test_a_node_that_sees_nothing_gets_zeros():
    case = make_case(prefixes=[0], tree=False)
    assert torch.equal(case.run(hybrid_tree_attention_reference), torch.zeros(1, 4, 5, 64))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 130])
def test_bits_round_trip(count):
    visible = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(count)) < 0.5
    visible[..., -1] = True
    words = pack_ancestor_bits(visible)
    assert words.shape == (2, 3, (count + 63) // 64)
    assert torch.equal(unpack_ancestor_bits(words, count), visible)
    assert not unpack_ancestor_bits(words)[..., count:].any()
