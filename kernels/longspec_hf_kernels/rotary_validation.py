"""Checks of what `fused_rotary` and `fused_projection` are given: shapes and dtypes only, no device reads."""

import torch

from .validation import INT_DTYPES


def validate_heads(tensor: torch.Tensor, head_dim: int, name: str) -> tuple[int, int]:
    """Check a projection's output `[B, T, heads * D]`; returns B and T.

    Raises:
        ValueError: it is something else.
    """
    if not (tensor.dim() == 3 and tensor.shape[-1] % head_dim == 0 and tensor.stride(-1) == 1):
        raise ValueError(
            f"`{name}` must be [B, T, heads * {head_dim}] with a contiguous last dimension, got shape "
            f"{list(tensor.shape)} and strides {list(tensor.stride())}."
        )
    return tensor.shape[0], tensor.shape[1]


def validate_tables(
    cos: torch.Tensor, sin: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> None:
    """Check the rotary rows `[B, T, R]` of `shape` `(B, T)`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 and table.shape[:2] == shape and table.shape == cos.shape
        if not (fits and table.shape[-1] % 2 == 0 and table.shape[-1] <= head_dim and table.dtype == dtype):
            raise ValueError(
                f"`{name}` must be {dtype} of shape [{shape[0]}, {shape[1]}, R] with an even R of at most {head_dim}, "
                f"got {table.dtype} of shape {list(table.shape)}."
            )


def validate_head_norm(norm: torch.Tensor | None, name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Check the weight of a norm per head, `[D]`, where there is one.

    Raises:
        ValueError: its shape or dtype does not fit.
    """
    if norm is not None and not (norm.shape == (head_dim,) and norm.dtype == dtype):
        raise ValueError(
            f"`{name}` must be {dtype} of shape [{head_dim}], got {norm.dtype} of shape {list(norm.shape)}."
        )


def validate_store(
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    first_rows: torch.Tensor,
    offset: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Check where the keys and values of `batch` sequences are to be written.

    Raises:
        ValueError: a shape or dtype does not fit, or `offset` is negative.
    """
    for name, buffer in (("key_buffer", key_buffer), ("value_buffer", value_buffer)):
        fits = buffer.dim() == 4 and buffer.shape[0] >= batch and buffer.shape[1::2] == (kv_heads, head_dim)
        if not (fits and buffer.dtype == dtype and buffer.stride(-1) == 1):
            raise ValueError(
                f"`{name}` must be {dtype} of shape [{batch} or more, {kv_heads}, capacity, {head_dim}] with a "
                f"contiguous last dimension, got {buffer.dtype} of shape {list(buffer.shape)} and strides "
                f"{list(buffer.stride())}."
            )
    if value_buffer.shape[2] != key_buffer.shape[2]:
        raise ValueError(
            f"`value_buffer` must have the capacity of `key_buffer`, {key_buffer.shape[2]}, got "
            f"{value_buffer.shape[2]}."
        )
    if not (first_rows.shape == (batch,) and first_rows.dtype in INT_DTYPES):
        raise ValueError(
            f"`first_rows` must be int32 or int64 of shape [{batch}], got {first_rows.dtype} of shape "
            f"{list(first_rows.shape)}."
        )
    if offset < 0:
        raise ValueError(f"`offset` must not be negative, got {offset}.")
