"""An attention's projections together with the rotation of their heads and the write into the K/V buffers.

The products are one launch, and the splits of their depth are added up where the heads are rotated: no launch for a
sum, and none that waits for another weight's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .backends import uses_triton
from .fused_rotary import rotate_and_store_torch, rotate_torch
from .linear_configs import LinearConfig, choose_linear, is_for_few_rows
from .rotary_validation import validate_head_norm, validate_store, validate_tables
from .triton_configs import device_limits


def projections_fit(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the steps of this module run as kernels on `x` `[..., K]` and `weights` `[N, K]`, and are made for them.

    As `few_rows_fit`, but for small weights too, where the launches saved count most.
    """
    return uses_triton(x) and all(is_for_few_rows(x, weight, saves_launches=True) for weight in weights)


def project_rotate_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The definition of `project_rotate`."""
    return rotate_torch(F.linear(x, weight, bias), cos, sin, **options)


def project_rotate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    query_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`rotate` of the projection `x @ weight.T + bias`, which is rounded once before. Inference only.

    Args:
        x: `[B, T, K]`.
        weight: `[Hq * D, K]` in the dtype of `x`.
        bias: `[Hq * D]` in that dtype, or `None`.

    Others, and the result, as in `rotate`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _validate_projection(x, weight, bias, head_dim, "weight", "bias")
    validate_tables(cos, sin, (x.shape[0], x.shape[1]), x.dtype, head_dim)
    validate_head_norm(query_norm, "query_norm", x.dtype, head_dim)
    options: dict[str, Any] = {"head_dim": head_dim, "query_norm": query_norm, "eps": eps}
    if not projections_fit(x, weight):
        return project_rotate_torch(x, weight, bias, cos, sin, **options)
    from .fused_linear_kernel import split_products
    from .fused_rotary_kernel import Heads, launch_rotation

    parts = split_products(x, weight, _config(x, weight), torch.float32)
    return launch_rotation(Heads(parts, query_norm, bias), cos, sin, x.dtype, head_dim=head_dim, eps=eps)


def project_rotate_and_store_torch(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *rest: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The definition of `project_rotate_and_store`."""
    projected = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return rotate_and_store_torch(*projected, *rest, **options)


def project_rotate_and_store(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
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
    """`rotate_and_store` of three projections of `x`, each rounded once before. Inference only.

    Args:
        x: `[B, T, K]`.
        weights: of queries `[Hq * D, K]`, keys and values `[Hkv * D, K]`, in the dtype of `x`.
        biases: theirs, `[N]` in that dtype, or `None`.

    Others, and the result, as in `rotate_and_store`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    for name, given in (("weights", weights), ("biases", biases)):
        if len(given) != 3:
            raise ValueError(f"`{name}` must be those of queries, keys and values, got {len(given)}.")
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _validate_projection(x, weight, bias, head_dim, f"weights[{index}]", f"biases[{index}]")
    key, value = weights[1:]
    if value.shape != key.shape:
        raise ValueError(f"`weights[2]` must be {list(key.shape)} like `weights[1]`, got {list(value.shape)}.")
    validate_tables(cos, sin, (x.shape[0], x.shape[1]), x.dtype, head_dim)
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        validate_head_norm(norm, name, x.dtype, head_dim)
    kv_heads = key.shape[0] // head_dim
    validate_store(key_buffer, value_buffer, first_rows, offset, x.shape[0], kv_heads, head_dim, x.dtype)
    rest = (cos, sin, key_buffer, value_buffer, first_rows)
    if not projections_fit(x, *weights):
        options: dict[str, Any] = {"query_norm": query_norm, "key_norm": key_norm, "eps": eps}
        return project_rotate_and_store_torch(x, weights, biases, *rest, head_dim=head_dim, offset=offset, **options)
    from .fused_projection_kernel import joined_triton
    from .fused_rotary_kernel import Heads, Store, launch_rotation

    parts = joined_triton(x, weights, _config(x, *weights))
    query, key, value = parts.split([weight.shape[0] for weight in weights], dim=-1)
    store = Store(Heads(key, key_norm, biases[1]), Heads(value, None, biases[2]), *rest[2:], offset)
    return launch_rotation(Heads(query, query_norm, biases[0]), cos, sin, x.dtype, store, head_dim=head_dim, eps=eps)


def _config(x: torch.Tensor, *weights: torch.Tensor) -> LinearConfig:
    rows, columns = x.shape[:-1].numel(), sum(weight.shape[0] for weight in weights)
    return choose_linear(rows, columns, x.shape[-1], device_limits(x.device), split=True)


def _validate_projection(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head_dim: int, name: str, bias_name: str
) -> None:
    if x.dim() != 3:
        raise ValueError(f"`x` must be [B, T, K], got shape {list(x.shape)}.")
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.shape[0] % head_dim == 0
    if not (fits and weight.dtype == x.dtype):
        raise ValueError(
            f"`{name}` must be {x.dtype} of shape [heads * {head_dim}, {x.shape[-1]}], the latter the last "
            f"dimension of `x`, got {weight.dtype} of shape {list(weight.shape)}."
        )
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.dtype == x.dtype):
        raise ValueError(
            f"`{bias_name}` must be {x.dtype} of shape {list(weight.shape[:1])} like the rows of `{name}`, got "
            f"{bias.dtype} of shape {list(bias.shape)}."
        )
