"""Merged trees: their definition against a merge by hand, and the Triton kernel in the interpreter."""

import pytest
import torch
from attention_cases import needs_interpreter
from longspec_hf_kernels import merge_tree
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, uses_triton
from tree_cases import SIZES, assert_same_tree, merged_by_hand, tree_problem

# Even ones have no limits.
SEEDS = range(6)


@pytest.fixture
def in_triton(monkeypatch):
    """The public function runs the kernel, in the interpreter."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert uses_triton(torch.zeros(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_definition_is_the_merge_by_hand(sizes, batch):
    for seed in SEEDS:
        problem = tree_problem(*sizes, batch=batch, seed=seed)
        assert_same_tree(merge_tree(**problem), merged_by_hand(problem))


@needs_interpreter
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel(in_triton, sizes, batch):
    for seed in SEEDS:
        problem = tree_problem(*sizes, batch=batch, seed=seed)
        assert_same_tree(merge_tree(**problem), merged_by_hand(problem))


@needs_interpreter
def test_the_largest_tree_of_the_kernel(in_triton):
    """256 candidates, 128 nodes, and a branch that ends in the last bit of the last word."""
    problem = tree_problem((16,) * 15, 15, 128, batch=1)
    problem["branch"][:] = torch.arange(15) + 10
    expected = merged_by_hand(problem)
    assert int(expected.ancestor_bits[0, 127, 1]) < 0
    assert_same_tree(merge_tree(**problem), expected)


@needs_interpreter
def test_the_kernel_reads_any_strides(in_triton):
    problem = tree_problem((4, 8, 8), 4, 16, seed=1)
    expected = merged_by_hand(problem)
    for name in ("root", "tokens", "parents", "scores", "branch", "limits"):
        rows = problem[name]
        wide = torch.full((rows.shape[0], 2 * rows.shape[1] + 1), 77, dtype=rows.dtype)
        for view in (wide[:, : rows.shape[1]], wide[:, 1::2]):
            view.copy_(rows)
            assert_same_tree(merge_tree(**problem | {name: view}), expected)


@needs_interpreter
@pytest.mark.parametrize(
    "sizes, version, fits",
    [
        (((16,) * 15, 15, 128), (3, 3), True),
        (((16,) * 15, 16, 128), (3, 6), False),
        (((16,) * 15, 15, 129), (3, 6), False),
        (((4, 4), 2, 999), (3, 6), True),
        (((4, 4), 2, 8), (3, 2), False),
    ],
)
def test_what_the_kernel_cannot_hold_is_merged_in_pytorch(in_triton, monkeypatch, sizes, version, fits):
    """256 candidates and 128 nodes at most; Triton 3.2 has no gather."""
    from longspec_hf_kernels import fused_tree, fused_tree_kernel

    problem, called = tree_problem(*sizes, batch=1), []
    kernel = fused_tree_kernel.merge_tree_triton
    monkeypatch.setattr(fused_tree_kernel, "merge_tree_triton", lambda *args: called.append(1) or kernel(*args))
    monkeypatch.setattr(fused_tree, "triton_version", lambda: version)
    assert_same_tree(merge_tree(**problem), merged_by_hand(problem))
    assert bool(called) == fits


@needs_interpreter
def test_no_sequences(in_triton):
    tree = merge_tree(**tree_problem((4, 4), 2, 8, batch=0))
    assert [list(tensor.shape) for tensor in tree] == [[0, 8]] * 4 + [[0, 8, 1], [0, 8, 8]]


PROBLEM = tree_problem((4, 4), 2, 8, seed=1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("root", PROBLEM["root"][:, 0]),
        ("tokens", PROBLEM["tokens"].int()),
        ("parents", PROBLEM["parents"][:, 1:]),
        ("scores", PROBLEM["scores"][:1]),
        ("scores", PROBLEM["tokens"]),
        ("branch", PROBLEM["branch"][0]),
        ("branch", PROBLEM["branch"][:1]),
        ("limits", PROBLEM["limits"][:, 0]),
        ("max_nodes", 0),
        ("depth", -1),
    ],
)
def test_mistakes_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        merge_tree(**PROBLEM | {name: value})
