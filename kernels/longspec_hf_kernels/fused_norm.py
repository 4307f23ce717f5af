"""Residual addition, or the look-up of embeddings, and RMS norm in one step."""

import torch
from torch.nn import functional as F

from .backends import uses_triton
from .validation import INT_DTYPES


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` over the last dimension; the quotient is rounded before the product."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `add_rms_norm`."""
    summed = x if residual is None else residual + x
    return rms_norm_torch(summed, weight, eps), summed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream, and norm the sum for the next layer.

    Rounds where transformers' `LlamaRMSNorm` does: the sum to its dtype, the sum over its root mean square
    (fp32 inside) to the dtype, and the product with `weight` to the dtype. Inference only.

    Args:
        x: `[..., hidden]`.
        residual: like `x`, or None for nothing to add.
        weight: `[hidden]`, in the dtype of `x`.
        eps: added to the mean square.

    Returns:
        The normed sum and the sum (`x` itself without a residual), both like `x`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if residual is not None and not (residual.shape == x.shape and residual.dtype == x.dtype):
        raise ValueError(
            f"`residual` must be {x.dtype} of shape {list(x.shape)} like `x`, got {residual.dtype} of shape "
            f"{list(residual.shape)}."
        )
    _expect_weight(weight, x, "x")
    if uses_triton(x):
        from .fused_norm_kernel import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_torch(x, residual, weight, eps)


def embed_rms_norm_torch(
    table: torch.Tensor, token_ids: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `embed_rms_norm`."""
    return add_rms_norm_torch(F.embedding(token_ids, table), None, weight, eps)


def embed_rms_norm(
    table: torch.Tensor, token_ids: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up embeddings and norm them for the first layer, as `add_rms_norm` does. Inference only.

    Args:
        table: `[V, hidden]`.
        token_ids: int32 or int64 `[...]`, from 0 to V - 1.
        weight: `[hidden]`, in the dtype of `table`.
        eps: added to the mean square.

    Returns:
        The normed embeddings and the embeddings, both `[..., hidden]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if table.dim() != 2:
        raise ValueError(f"`table` must be of shape [V, hidden], got shape {list(table.shape)}.")
    if token_ids.dtype not in INT_DTYPES:
        raise ValueError(f"`token_ids` must be int32 or int64, got {token_ids.dtype}.")
    _expect_weight(weight, table, "table")
    if uses_triton(table):
        from .fused_norm_kernel import embed_rms_norm_triton

        return embed_rms_norm_triton(table, token_ids, weight, eps)
    return embed_rms_norm_torch(table, token_ids, weight, eps)


def _expect_weight(weight: torch.Tensor, like: torch.Tensor, name: str) -> None:
    if not (weight.shape == like.shape[-1:] and weight.dtype == like.dtype):
        raise ValueError(
            f"`weight` must be {like.dtype} of shape {list(like.shape[-1:])} like the last dimension of `{name}`, got "
            f"{weight.dtype} of shape {list(weight.shape)}."
        )
