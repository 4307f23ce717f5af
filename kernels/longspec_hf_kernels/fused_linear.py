"""Linear layers over a few rows, with what stands around them in a decoder layer.

A round multiplies every weight by at most some tens of rows, so its time is the weights' way from memory. These steps
read each weight once and near the memory's rate, and leave no result in between to another launch.
"""

import torch
from torch.nn import functional as F

from .backends import uses_triton
from .fused_gate import silu_and_multiply_torch
from .fused_norm import add_rms_norm_torch
from .linear_configs import LinearConfig, choose_linear, is_for_few_rows
from .triton_configs import device_limits


def few_rows_fit(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the steps of this module run as kernels on `x` `[..., K]` and `weight` `[N, K]`, and are made for them.

    On a GPU, in half precision, up to 64 rows and for K a multiple of 64. Elsewhere they compute what their
    definitions say by PyTorch's own products.
    """
    return uses_triton(x) and is_for_few_rows(x, weight)


def linear_few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`. Inference only.

    Args:
        x: `[..., K]`.
        weight: `[N, K]` in the dtype of `x`.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _validate(x, weight, "weight")
    if not few_rows_fit(x, weight):
        return F.linear(x, weight)
    from .fused_linear_kernel import linear_triton

    return linear_triton(x, weight, _config(x, weight))


def gated_linear_torch(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition of `gated_linear`."""
    return silu_and_multiply_torch(F.linear(x, gate), F.linear(x, up))


def gated_linear(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, rounded where transformers' gated MLPs round. Inference only.

    Args:
        x: `[..., K]`.
        gate, up: `[N, K]` in the dtype of `x`.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _validate(x, gate, "gate")
    if up.shape != gate.shape:
        raise ValueError(f"`up` must be {list(gate.shape)} like `gate`, got {list(up.shape)}.")
    _validate(x, up, "up")
    if not (few_rows_fit(x, gate) and up.is_contiguous()):
        return gated_linear_torch(x, gate, up)
    from .fused_linear_kernel import gated_linear_triton

    return gated_linear_triton(x, gate, up, _config(x, gate, gated=True))


def linear_add_rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `linear_add_rms_norm`."""
    return add_rms_norm_torch(F.linear(x, weight), residual, norm_weight, eps)


def linear_add_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x @ weight.T`, rounded to its dtype, to the residual stream and norm the sum as `add_rms_norm` does.

    Args:
        x: `[..., K]`.
        weight: `[N, K]` in the dtype of `x`.
        residual: `[..., N]` in the dtype of `x`.
        norm_weight: `[N]` in the dtype of `x`.
        eps: added to the mean square.

    Returns:
        The normed sum and the sum, both like `residual`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _validate(x, weight, "weight")
    shape = (*x.shape[:-1], weight.shape[0])
    for name, tensor, wanted in (("residual", residual, shape), ("norm_weight", norm_weight, shape[-1:])):
        if not (tuple(tensor.shape) == wanted and tensor.dtype == x.dtype):
            raise ValueError(
                f"`{name}` must be {x.dtype} of shape {list(wanted)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}."
            )
    if not few_rows_fit(x, weight):
        return linear_add_rms_norm_torch(x, weight, residual, norm_weight, eps)
    from .fused_linear_kernel import linear_add_rms_norm_triton

    return linear_add_rms_norm_triton(x, weight, residual, norm_weight, eps, _config(x, weight, split=True))


def _config(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False, split: bool = False) -> LinearConfig:
    columns, depth = weight.shape
    return choose_linear(x.numel() // depth, columns, depth, device_limits(x.device), gated=gated, split=split)


def _validate(x: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    fits = weight.dim() == 2 and weight.shape[1:] == x.shape[-1:] and weight.dtype == x.dtype
    if not fits:
        raise ValueError(
            f"`{name}` must be {x.dtype} of shape [N, {x.shape[-1]}] like the last dimension of `x`, got "
            f"{weight.dtype} of shape {list(weight.shape)}."
        )
