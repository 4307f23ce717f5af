"""Random beams and branches for `merge_tree`, and their trees node by node."""

from typing import Any

import torch
from longspec_hf_kernels.fused_tree import MergedTree

TOKENS = 5
UNUSED = 0.1

# Widths of the levels, the branch's length, nodes of the tree.
SIZES = [
    ((4, 16, 16, 16, 16), 8, 64),
    ((4, 16, 16, 16, 16), 8, 20),
    ((3, 1, 7, 2, 5, 1, 1), 3, 21),
    ((8,) * 12, 11, 100),
    ((1,), 1, 2),
    ((4, 4, 4), 3, 1),
    ((4, 4, 4), 0, 64),
    ((), 8, 64),
    ((), 0, 64),
]


def tree_problem(
    widths: tuple[int, ...], length: int, max_nodes: int, *, batch: int = 3, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of `merge_tree`: scores that tie, unused nodes, branches that leave the beam at any depth."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, below, shape, generator=generator)

    count, levels = sum(widths), len(widths)
    tokens = draw(TOKENS, batch, count)
    parents, scores = torch.full((batch, count), -1), torch.zeros(batch, count)
    starts = [sum(widths[:level]) for level in range(levels)]
    for level, (start, width) in enumerate(zip(starts, widths, strict=True)):
        drop = draw(4, batch, width).float()
        drop[torch.rand(batch, width, generator=generator) < UNUSED] = float("inf")
        scores[:, start : start + width] = -drop
        if level:
            above = starts[level - 1] + draw(widths[level - 1], batch, width)
            parents[:, start : start + width] = above
            scores[:, start : start + width] += scores.gather(1, above)
    branch = draw(TOKENS, batch, length)
    for b in range(batch):
        shared = int(draw(levels + 1))
        node = starts[shared - 1] + int(draw(widths[shared - 1])) if shared else -1
        for depth in reversed(range(shared)):
            branch[b, depth : depth + 1] = tokens[b, node]
            node = int(parents[b, node])
        branch[b, int(draw(length + 1)) if b % 2 else length :] = -1
    depth = max(levels, length)
    problem = {
        "root": draw(TOKENS, batch, 1),
        "tokens": tokens,
        "parents": parents,
        "scores": scores,
        "branch": branch,
        "limits": torch.tensor([depth, depth // 2, -1, 0])[draw(4, batch, 1)] if seed % 2 else None,
    }
    on_device = {name: tensor if tensor is None else tensor.to(device) for name, tensor in problem.items()}
    return on_device | {"widths": widths, "max_nodes": max_nodes, "depth": depth}


def merged_by_hand(problem: dict[str, Any]) -> MergedTree:
    """What `merge_tree` makes of a problem, with lists and dictionaries, on the CPU."""
    rows = [_merged_row(problem, b) for b in range(problem["root"].shape[0])]
    ids, parents, depths, valid, bits, ancestors = (torch.tensor(column) for column in zip(*rows, strict=True))
    return MergedTree(ids, parents, depths, valid, bits, ancestors)


def _merged_row(problem: dict[str, Any], b: int) -> tuple[list, ...]:
    tokens, parents, scores, branch = (problem[name][b].tolist() for name in ("tokens", "parents", "scores", "branch"))
    limit = problem["depth"] if problem["limits"] is None else int(problem["limits"][b])
    size = min(problem["max_nodes"], 1 + len(tokens) + len(branch))
    branch = tuple(token for token in branch if token >= 0)
    # Candidates: path below the root, parent, score.
    found: list[tuple[tuple[int, ...], int, float]] = [((), 0, float("inf"))]
    last_shared = 0
    for i, (token, parent, score) in enumerate(zip(tokens, parents, scores, strict=True), 1):
        path = (*found[parent + 1][0], token)
        shared = path == branch[: len(path)]
        found.append((path, parent + 1, float("inf") if shared else score))
        last_shared = i if shared else last_shared
    parent = last_shared
    for depth in range(len(found[last_shared][0]) + 1, len(branch) + 1):
        found.append((branch[:depth], parent, float("inf")))
        parent = len(found) - 1
    usable = [i for i, (path, _, score) in enumerate(found) if score > -float("inf") and len(path) <= limit]
    kept = sorted(sorted(usable, key=lambda i: -found[i][2])[:size])
    node = {candidate: i for i, candidate in enumerate(kept)}
    seen: dict[int, set[int]] = {}
    for i in kept:
        seen[i] = {node[i]} | seen.get(found[i][1], set())
    matrix = [[j in seen[i] for j in range(size)] for i in kept] + [[False] * size] * (size - len(kept))
    unused = [0] * (size - len(kept))
    return (
        [(found[i][0] or (int(problem["root"][b]),))[-1] for i in kept] + unused,
        [node[found[i][1]] for i in kept] + unused,
        [len(found[i][0]) for i in kept] + unused,
        [True] * len(kept) + [False] * len(unused),
        [[_word(row[first : first + 64]) for first in range(0, size, 64)] for row in matrix],
        matrix,
    )


def _word(bits: list[bool]) -> int:
    """The int64 with these bits, the lowest first."""
    value = sum(bit << i for i, bit in enumerate(bits))
    return value - 2**64 if value >= 2**63 else value


def assert_same_tree(got: MergedTree, expected: MergedTree) -> None:
    """Every number and dtype."""
    for name, run, right in zip(got._fields, got, expected, strict=True):
        assert run.dtype == right.dtype and torch.equal(run.cpu(), right), name
