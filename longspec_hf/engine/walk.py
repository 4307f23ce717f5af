"""The greedy walk on the device: `longspec_hf.verification.walk` for all sequences at once, without a host read."""

from __future__ import annotations

import torch

from ..tree import TokenTree


def greedy_walk(
    tree: TokenTree, ancestors: torch.Tensor, next_tokens: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which nodes greedy decoding visits.

    Args:
        tree: `T` nodes; no two children of a node have the same token.
        ancestors: bool `[b, T, T]` from `ancestor_matrix`.
        next_tokens: `[b, T]`, the target's choice after every node.
        most: nodes on the longest path.

    Returns:
        `visited` int64 `[b, most]`, the root first and increasing; `counts` int32 `[b]`, how many of them are used;
        `tokens` `[b, most]`, the target's choice after each.
    """
    drafted = tree.token_ids == next_tokens.gather(1, tree.parents)
    wrong = ~(drafted & tree.valid)
    wrong[:, 0] = False
    on_path = tree.valid & ~(ancestors & wrong.unsqueeze(1)).any(dim=-1)
    # A stable sort puts the path's nodes first and leaves them in order.
    visited = (~on_path).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    return visited, on_path.sum(dim=1, dtype=torch.int32), next_tokens.gather(1, visited)
