"""Head norms, rotary positions and the write into the K/V buffers in one step."""

from typing import Any

import torch

from .backends import uses_triton
from .fused_norm import rms_norm_torch
from .rotary_validation import validate_head_norm, validate_heads, validate_store, validate_tables


def rotate_torch(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    query_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The definition of `rotate`."""
    heads = query.unflatten(-1, (-1, head_dim))
    if query_norm is not None:
        heads = rms_norm_torch(heads, query_norm, eps)
    size = cos.shape[-1]
    turned = heads[..., :size]
    halves = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    turned = turned * cos.unsqueeze(2) + halves * sin.unsqueeze(2)
    return torch.cat([turned, heads[..., size:]], dim=-1).transpose(1, 2)


def rotate_and_store_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    first_rows: torch.Tensor,
    *,
    head_dim: int,
    offset: int = 0,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The definition of `rotate_and_store`."""
    batch, nodes = query.shape[:2]
    rotated_key = rotate_torch(key, cos, sin, head_dim=head_dim, query_norm=key_norm, eps=eps)
    sequence = torch.arange(batch, device=query.device).unsqueeze(1)
    rows = first_rows.unsqueeze(1).long() + offset + torch.arange(nodes, device=query.device)
    key_buffer[sequence, :, rows] = rotated_key.transpose(1, 2)
    value_buffer[sequence, :, rows] = value.unflatten(-1, (-1, head_dim))
    return rotate_torch(query, cos, sin, head_dim=head_dim, query_norm=query_norm, eps=eps)


def rotate(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    query_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Turn queries by their positions: `x * cos + rotate_half(x) * sin` on the first R channels of each head.

    Rounds where transformers' `apply_rotary_pos_emb` does: both products and the sum. Inference only.

    Args:
        query: `[B, T, Hq * D]`, a projection's output; any strides but a contiguous last dimension.
        cos, sin: `[B, T, R]` in the dtype of `query`, R even and at most D; the other channels pass through.
        head_dim: D.
        query_norm: `[D]` weight of an RMS norm of each head before the rotation, rounded as in `add_rms_norm`.
        eps: of that norm.

    Returns:
        `[B, Hq, T, D]`, a transposed view of a fresh `[B, T, Hq, D]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    validate_tables(cos, sin, validate_heads(query, head_dim, "query"), query.dtype, head_dim)
    validate_head_norm(query_norm, "query_norm", query.dtype, head_dim)
    if uses_triton(query):
        from .fused_rotary_kernel import rotate_triton

        return rotate_triton(query, cos, sin, head_dim=head_dim, query_norm=query_norm, eps=eps)
    return rotate_torch(query, cos, sin, head_dim=head_dim, query_norm=query_norm, eps=eps)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    first_rows: torch.Tensor,
    *,
    head_dim: int,
    offset: int = 0,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to rows `first_rows[b] + offset + t` of the buffers.

    Args:
        key, value: `[B, T, Hkv * D]`, strides as `query`.
        key_buffer, value_buffer: `[B', Hkv, capacity, D]` with B' >= B, any strides but a contiguous last dimension.
        first_rows: int32 or int64 `[B]` on the device: a replayed launch writes where it says then. Every row written
            must lie inside the capacity.
        offset: added to every row.
        key_norm: as `query_norm`, for the keys.

    Others, and the result (the rotated query), as in `rotate`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    shape = validate_heads(query, head_dim, "query")
    for name, tensor in (("key", key), ("value", value)):
        validate_heads(tensor, head_dim, name)
        if not (tensor.shape == key.shape and tensor.shape[:2] == shape and tensor.dtype == query.dtype):
            raise ValueError(
                f"`{name}` must be {query.dtype} of shape {[*shape, key.shape[-1]]} like `query` and `key`, got "
                f"{tensor.dtype} of shape {list(tensor.shape)}."
            )
    validate_tables(cos, sin, shape, query.dtype, head_dim)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        validate_head_norm(norm, name, query.dtype, head_dim)
    kv_heads = key.shape[-1] // head_dim
    validate_store(key_buffer, value_buffer, first_rows, offset, shape[0], kv_heads, head_dim, query.dtype)
    buffers = (key_buffer, value_buffer, first_rows)
    options: dict[str, Any] = {"query_norm": query_norm, "key_norm": key_norm, "eps": eps}
    if uses_triton(query):
        from .fused_rotary_kernel import rotate_and_store_triton

        return rotate_and_store_triton(
            query, key, value, cos, sin, *buffers, head_dim=head_dim, offset=offset, **options
        )
    return rotate_and_store_torch(query, key, value, cos, sin, *buffers, head_dim=head_dim, offset=offset, **options)
