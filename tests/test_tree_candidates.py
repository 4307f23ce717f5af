"""Trees to choose among."""

import pytest
import torch
from models import tiny_target
from transformers import GenerationConfig

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel
from longspec_hf.settings import resolve_tree_settings
from longspec_hf.tree_candidates import MOST_BEAM_NODES, cpu_candidates, packed_candidates, tree_sizes


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("branch", [0, 4, 8])
@pytest.mark.parametrize("depth", [1, 2, 4, 7, 8, 20])
def test_packed_rows_fill_their_tiles(heads, branch, depth):
    trees = packed_candidates(tree_sizes(64, branch), depth, heads)
    for tree in trees:
        nodes = min(tree.nodes, 1 + sum(tree.shape) + tree.branch)
        assert heads * nodes >= 0.75 * (-(-heads * nodes // 64) * 64), tree
        assert nodes in (16, 32, 64) and tree.branch <= branch
    assert len(trees) == len(set(trees)) and 64 in {tree.nodes for tree in trees}
    assert (16 in {tree.nodes for tree in trees}) == (heads in (3, 4, 7, 8, 12, 16))
    assert (32 in {tree.nodes for tree in trees}) == (heads != 1)


def test_where_no_size_is_packed_the_largest_are_taken():
    assert {tree.nodes for tree in packed_candidates(tree_sizes(40, 8), 8, 1)} == {16, 32}
    assert {tree.nodes for tree in packed_candidates(tree_sizes(9, 8), 8, 7)} == {8}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, 33, 64, 500])
def test_trees_for_cpus_stay_within_their_nodes(limit):
    for tree in cpu_candidates(tree_sizes(limit, 8), 8):
        assert tree.nodes <= limit and len(tree.shape) < tree.nodes and tree.branch < tree.nodes
        assert tree.shape or tree.branch, "a round without a draft is a plain step"


def test_the_draft_expands_no_more_than_a_word_of_bits_holds():
    for tree in [*cpu_candidates(tree_sizes(64, 8), 8), *packed_candidates(tree_sizes(64, 8), 8, 4)]:
        assert 1 + sum(tree.shape[:-1]) <= MOST_BEAM_NODES


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_call_begins_with_one_of_them(device):
    with torch.device(device):
        draft = LongSpecDraftModel(LongSpecDraftConfig.from_target(tiny_target().config))
    settings = resolve_tree_settings(draft, GenerationConfig())
    assert settings.of_tree(None) in settings.trees
    assert len(set(settings.trees)) == len(settings.trees)


def test_a_batch_may_have_small_trees_and_begins_with_them():
    with torch.device("meta"):
        draft = LongSpecDraftModel(LongSpecDraftConfig.from_target(tiny_target().config))
    for sequences, nodes in ((1, 64), (2, 32), (8, 8), (100, 4)):
        settings = resolve_tree_settings(draft, GenerationConfig(), sequences)
        sizes = {tree.max_tree_nodes for tree in settings.trees}
        assert settings.max_tree_nodes == nodes and 64 in sizes and settings.of_tree(None) in settings.trees
        assert min(sizes) == (32 if sequences == 1 else max(4, 16 // sequences))  # two heads share keys and values
        assert all(len(tree.tree_shape) < tree.max_tree_nodes for tree in settings.trees)
