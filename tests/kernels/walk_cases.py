"""Random trees and states for the end of a round."""

from typing import Any

import torch
from fused_cases import randoms

from longspec_hf.verification import walk

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def walk_case(batch: int, nodes: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Case:
    """Trees of different sizes, mostly along what the logits choose, as a good draft's; the last is a root alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = randoms(batch, nodes, vocabulary, seed=seed, dtype=dtype)
    best = logits.float().argmax(-1)
    ids, parents = torch.randint(vocabulary, (batch, nodes), generator=generator), torch.zeros(batch, nodes).long()
    valid = torch.zeros(batch, nodes, dtype=torch.bool)
    for row in range(batch):
        used = 1 if row == batch - 1 and batch > 1 else int(torch.randint(1, nodes + 1, (1,), generator=generator))
        valid[row, :used] = True
        taken = set()
        for node in range(1, used):
            parent = max(0, node - 1 - int(torch.randint(3, (1,), generator=generator)))
            right = torch.rand(1, generator=generator) < 0.7
            token = int(best[row, parent]) if right else int(ids[row, node])
            while (parent, token) in taken:
                token = (token + 1) % vocabulary
            taken.add((parent, token))
            ids[row, node], parents[row, node] = token, parent
        ids[row, used:] = parents[row, used:] = 0
    return ids.to(device), parents.to(device), valid.to(device), logits.to(device)


def walked_by_hand(case: Case, most: int) -> tuple[list[list[int]], list[list[int]]]:
    """`visited` and `report` as lists, by the host's walk."""
    ids, parents, valid, logits = (part.cpu() for part in case)
    best = logits.float().argmax(-1).tolist()
    every_visited, every_report = [], []
    for row, used in enumerate(valid.sum(1).tolist()):
        result = walk(
            ids[row, :used].tolist(), parents[row, :used].tolist(), lambda node, row=row: (best[row][node], False)
        )
        rest = [0] * (most - len(result.visited))
        every_visited.append(result.visited + rest)
        every_report.append([used - 1, len(result.visited), *result.tokens, *rest])
    return every_visited, every_report


def state_case(batch: int = 3, most: int = 5, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `advance`, counts and tokens as slices of a report."""
    generator = torch.Generator().manual_seed(batch)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(100, shape, generator=generator).to(device)

    report = integers(batch, 2 + most)
    report[:, 1] = torch.arange(batch) % most + 1
    return {
        "roots": integers(batch, 1),
        "root_positions": integers(batch, 1),
        "limits": integers(batch, 1),
        "lengths": integers(batch).int(),
        "window_lengths": integers(batch).int(),
        "counts": report[:, 1],
        "tokens": report[:, 2:],
    }


def advanced_by_hand(case: dict[str, Any]) -> list[list[Any]]:
    """What the five tensors then hold."""
    state = {name: tensor.flatten().tolist() for name, tensor in case.items() if name != "tokens"}
    tokens, counts = case["tokens"].tolist(), state.pop("counts")
    state["roots"] = [row[count - 1] for row, count in zip(tokens, counts, strict=True)]
    for name, sign in (("root_positions", 1), ("limits", -1), ("lengths", 1), ("window_lengths", 1)):
        state[name] = [value + sign * count for value, count in zip(state[name], counts, strict=True)]
    return list(state.values())
