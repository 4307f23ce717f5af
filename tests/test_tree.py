"""The token tree: merging, cutting, ancestors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspec_hf_kernels import unpack_ancestor_bits

from longspec_hf.beam import Beam
from longspec_hf.tree import TokenTree, ancestor_matrix, longest_path_through, merge


@st.composite
def beams(draw):
    """Beams as drafting makes them: children of nodes of the level above, scores that only fall, distinct siblings."""
    widths = draw(st.lists(st.integers(1, 4), max_size=4))
    tokens, parents, scores, level, first = [], [], [], [(-1, 0.0)], 0
    for width in widths:
        children = [(p, t, s - draw(st.integers(0, 3))) for p, s in level for t in range(4)]
        picked = draw(st.permutations(children))[:width]
        for parent, token, score in picked:
            parents.append(parent)
            tokens.append(token)
            scores.append(float(score))
        level = [(first + i, picked[i][2]) for i in range(len(picked))]
        first += len(picked)
        widths[widths.index(width)] = width
    counted, done = [], 0
    for width in widths:
        counted.append(min(width, len(tokens) - done))
        done += counted[-1]
    as_row = [torch.tensor([x]) for x in (tokens, parents)]
    return Beam(as_row[0].long(), as_row[1].long(), torch.tensor([scores]), tuple(counted))


def paths(tree: TokenTree) -> dict[tuple[int, ...], int]:
    """Path of tokens below the root -> node."""
    [(tokens, parents)] = tree.path_lists()
    found: dict[int, tuple[int, ...]] = {0: ()}
    for i in range(1, tree.num_nodes):
        assert parents[i] < i, "a parent comes before its children"
        found[i] = (*found[parents[i]], tokens[i])
    return {path: node for node, path in found.items()}


def beam_paths(beam: Beam) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(beam.token_ids[0].tolist(), beam.parents[0].tolist(), strict=True):
        found.append((*(() if parent < 0 else found[parent]), token))
    return dict(zip(found, beam.scores[0].tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(beams(), st.lists(st.integers(0, 3), max_size=5), st.integers(1, 24))
def test_merge(beam, branch, max_nodes):
    root = torch.tensor([[7]])
    tree = merge(root, beam, torch.tensor([branch], dtype=torch.long), max_nodes).trim()
    got, drafted = paths(tree), beam_paths(beam)
    on_branch = {tuple(branch[:i]) for i in range(len(branch) + 1)}
    assert len(got) == tree.num_nodes, "no node stands twice"
    assert tree.num_nodes == min(max_nodes, len(on_branch | drafted.keys()))
    assert got.keys() <= on_branch | drafted.keys()
    assert tree.token_ids[0, 0] == 7
    # Root and branch come first, then the best scores.
    assert sum(path in got for path in on_branch) == min(max_nodes, len(on_branch))
    left_out = [score for path, score in drafted.items() if path not in got]
    kept = [drafted[path] for path in got if path not in on_branch]
    assert not left_out or not kept or max(left_out) <= min(kept)
    assert [tree.depths[0, node].item() for node in got.values()] == [len(path) for path in got]


def test_merge_pads_rows_of_different_size():
    beam = Beam(torch.tensor([[1], [1]]), torch.tensor([[-1], [-1]]), torch.zeros(2, 1), (1,))
    tree = merge(torch.tensor([[7], [8]]), beam, torch.tensor([[1, 2], [3, -1]]), 16)
    assert tree.valid.tolist() == [[True, True, True, False], [True, True, True, False]]
    assert tree.token_ids[:, :3].tolist() == [[7, 1, 2], [8, 1, 3]]
    assert tree.parents[:, :3].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert not ancestor_matrix(tree.parents, tree.valid)[:, 3].any()


def test_impossible_nodes_are_dropped():
    beam = Beam(torch.tensor([[1, 2]]), torch.tensor([[-1, -1]]), torch.tensor([[-1.0, float("-inf")]]), (2,))
    tree = merge(torch.tensor([[7]]), beam, torch.empty(1, 0, dtype=torch.long), 16).trim()
    assert tree.token_ids.tolist() == [[7, 1]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ancestors(data):
    count = data.draw(st.integers(1, 150))
    parents = [0] + [data.draw(st.integers(0, i - 1)) for i in range(1, count)]
    tree = TokenTree(*(torch.tensor([parents]) for _ in range(3)), valid=torch.ones(1, count, dtype=torch.bool))
    expected = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        expected[i] = expected[parents[i]] if i else False
        expected[i, i] = True
    bits = tree.ancestor_bits()
    assert bits.shape == (1, count, (count + 63) // 64)
    assert torch.equal(unpack_ancestor_bits(bits, count)[0], expected)


def test_longest_path():
    parents = torch.tensor([[0, 0, 0, 1, 3, 2]])
    depths = torch.tensor([[0, 1, 1, 2, 3, 2]])
    tree = TokenTree(torch.arange(6).view(1, 6), parents, depths, torch.ones(1, 6, dtype=torch.bool))
    assert longest_path_through(tree, 1) == [1, 3, 4]
    assert longest_path_through(tree, 2) == [2, 5]
