"""The greedy walk down verified trees, from the target's logits on."""

import torch

from .backends import uses_triton
from .validation import FLOAT_DTYPES

# Nodes that one program of the kernel holds.
MAX_NODES = 1024


def greedy_walk_torch(
    token_ids: torch.Tensor, parents: torch.Tensor, valid: torch.Tensor, logits: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `greedy_walk`."""
    # In fp32, as plain decoding compares them: in fp64 two logits may differ that are equal there.
    best = (logits.float() if logits.dtype == torch.float64 else logits).argmax(dim=-1)
    batch, nodes = token_ids.shape
    index = torch.arange(nodes, device=token_ids.device)
    node = torch.zeros(batch, 1, dtype=torch.long, device=token_ids.device)
    goes_on = torch.ones_like(node, dtype=torch.bool)
    visited, tokens = torch.zeros(2, batch, most, dtype=torch.long, device=token_ids.device)
    count = torch.zeros_like(node)
    for step in range(most):
        token = best.gather(1, node)
        visited[:, step] = torch.where(goes_on, node, 0).squeeze(1)
        tokens[:, step] = torch.where(goes_on, token, 0).squeeze(1)
        count += goes_on
        child = valid & (parents == node) & (token_ids == token) & (index > 0)
        goes_on = goes_on & child.any(dim=1, keepdim=True)
        node = torch.where(goes_on, child.long().argmax(dim=1, keepdim=True), 0)
    drafted = valid.sum(dim=1, keepdim=True) - 1
    return visited, torch.cat([drafted, count, tokens], dim=1)


def greedy_walk(
    token_ids: torch.Tensor, parents: torch.Tensor, valid: torch.Tensor, logits: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which nodes greedy decoding visits: from the root on, the child that has the token of the largest logit.

    Of equal logits the lowest token is taken, as `argmax` does; NaN is larger than every number there and here.

    Args:
        token_ids, parents: int64 `[B, T]`, the root first; no two children of a node have the same token.
        valid: bool `[B, T]`, whether the node is used; unused nodes come last.
        logits: `[B, T, V]` of the token after each node, in any float dtype, the last dimension contiguous.
        most: nodes on the longest path, the root included.

    Returns:
        visited: int64 `[B, most]`, the nodes from the root down, then zeros.
        report: int64 `[B, 2 + most]`: nodes drafted, nodes visited, and the token after each of these, then zeros.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int64),
        ("parents", parents, torch.int64),
        ("valid", valid, torch.bool),
    ):
        if not (tensor.dim() == 2 and tensor.shape == token_ids.shape and tensor.dtype == dtype):
            raise ValueError(
                f"`{name}` must be {dtype} of shape {list(token_ids.shape)}, [B, T], got {tensor.dtype} of shape "
                f"{list(tensor.shape)}."
            )
    if not (logits.dim() == 3 and logits.shape[:2] == token_ids.shape and logits.dtype in FLOAT_DTYPES):
        raise ValueError(
            f"`logits` must be floats of shape {[*token_ids.shape, 'V']} like `token_ids`, got {logits.dtype} of "
            f"shape {list(logits.shape)}."
        )
    if most < 1:
        raise ValueError(f"`most` must be at least 1, the root, got {most}.")
    if uses_triton(logits) and token_ids.shape[1] <= MAX_NODES and logits.stride(-1) == 1:
        from .fused_walk_kernel import greedy_walk_triton

        return greedy_walk_triton(token_ids, parents, valid, logits, most)
    return greedy_walk_torch(token_ids, parents, valid, logits, most)
