"""The product in the middle of a gated feed-forward layer."""

import torch
import torch.nn.functional as F

from .backends import uses_triton


def silu_and_multiply_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition of `silu_and_multiply`."""
    return F.silu(gate) * up


def silu_and_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gate / (1 + exp(-gate)) * up`, with the quotient (fp32 inside) rounded to the dtype before the product.

    Args:
        gate, up: `[..., N]` of one shape and dtype; both may be slices of one projection's output.

    Returns:
        A fresh contiguous tensor of that shape. Inference only.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if not (gate.shape == up.shape and gate.dtype == up.dtype):
        raise ValueError(
            f"`up` must be {gate.dtype} of shape {list(gate.shape)} like `gate`, got {up.dtype} of shape "
            f"{list(up.shape)}."
        )
    if uses_triton(gate):
        from .fused_gate_kernel import silu_and_multiply_triton

        return silu_and_multiply_triton(gate, up)
    return silu_and_multiply_torch(gate, up)
