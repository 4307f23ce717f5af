"""Head norms, rotary positions and the write into the K/V buffers in one step."""

from typing import Any

import torch

from .backends import uses_triton
from .fused_norm import rms_norm_torch
from .validation import INT_DTYPES


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
    validate_rotation(query, cos, sin, head_dim, query_norm, "query_norm")
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
    validate_store(
        query, key, value, cos, sin, key_buffer, value_buffer, first_rows,
        head_dim=head_dim, offset=offset, query_norm=query_norm, key_norm=key_norm,
    )  # fmt: skip
    buffers = (key_buffer, value_buffer, first_rows)
    options: dict[str, Any] = {"query_norm": query_norm, "key_norm": key_norm, "eps": eps}
    if uses_triton(query):
        from .fused_rotary_kernel import rotate_and_store_triton

        return rotate_and_store_triton(
            query, key, value, cos, sin, *buffers, head_dim=head_dim, offset=offset, **options
        )
    return rotate_and_store_torch(query, key, value, cos, sin, *buffers, head_dim=head_dim, offset=offset, **options)


def validate_store(
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
    offset: int,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
) -> None:
    """Check the arguments of `rotate_and_store`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    validate_rotation(query, cos, sin, head_dim, query_norm, "query_norm")
    batch, heads = key.shape[0], key.shape[-1] // head_dim
    for name, tensor in (("key", key), ("value", value)):
        if not (tensor.shape == key.shape and tensor.dtype == query.dtype and tensor.stride(-1) == 1):
            raise ValueError(
                f"`{name}` must be {query.dtype} of shape {list(key.shape)} with a contiguous last dimension, got "
                f"{tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}."
            )
    validate_rotation(key, cos, sin, head_dim, key_norm, "key_norm", name="key")
    for name, buffer in (("key_buffer", key_buffer), ("value_buffer", value_buffer)):
        fits = buffer.dim() == 4 and buffer.shape[0] >= batch and tuple(buffer.shape[1::2]) == (heads, head_dim)
        if not (fits and buffer.dtype == query.dtype and buffer.stride(-1) == 1):
            raise ValueError(
                f"`{name}` must be {query.dtype} of shape [{batch} or more, {heads}, capacity, {head_dim}] with a "
                f"contiguous last dimension, got {buffer.dtype} of shape {list(buffer.shape)} and strides "
                f"{list(buffer.stride())}."
            )
    if value_buffer.shape[2] != key_buffer.shape[2]:
        raise ValueError(
            f"`value_buffer` must have the capacity of `key_buffer`, {key_buffer.shape[2]}, got "
            f"{value_buffer.shape[2]}."
        )
    if not (tuple(first_rows.shape) == (batch,) and first_rows.dtype in INT_DTYPES):
        raise ValueError(
            f"`first_rows` must be int32 or int64 of shape [{batch}], got {first_rows.dtype} of shape "
            f"{list(first_rows.shape)}."
        )
    if offset < 0:
        raise ValueError(f"`offset` must not be negative, got {offset}.")


def validate_rotation(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm: torch.Tensor | None,
    norm_name: str,
    name: str = "query",
) -> None:
    """Check the arguments of `rotate`; `name` is what is rotated.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    fits = query.dim() == 3 and query.shape[-1] % head_dim == 0 and query.stride(-1) == 1
    if not fits:
        raise ValueError(
            f"`{name}` must be [B, T, heads * {head_dim}] with a contiguous last dimension, got shape "
            f"{list(query.shape)} and strides {list(query.stride())}."
        )
    batch, nodes = query.shape[:2]
    for label, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 and tuple(table.shape[:2]) == (batch, nodes) and table.shape == cos.shape
        if not (fits and table.shape[-1] % 2 == 0 and table.shape[-1] <= head_dim and table.dtype == query.dtype):
            raise ValueError(
                f"`{label}` must be {query.dtype} of shape [{batch}, {nodes}, R] with an even R of at most "
                f"{head_dim}, got {table.dtype} of shape {list(table.shape)}."
            )
    if norm is not None and not (tuple(norm.shape) == (head_dim,) and norm.dtype == query.dtype):
        raise ValueError(
            f"`{norm_name}` must be {query.dtype} of shape [{head_dim}], got {norm.dtype} of shape {list(norm.shape)}."
        )
