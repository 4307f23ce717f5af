"""`silu_and_multiply` in Triton."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def silu_and_multiply_kernel(
    gate, up, out, stride_gate, stride_up, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: (blocks of columns, rows)."""
    dtype = gate.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    row = tl.program_id(1).to(tl.int64)
    x = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)
    opened = (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)
    tl.store(out + row * COLUMNS + column, (opened * y).to(dtype), mask=mask)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as a matrix with a contiguous last dimension, without a copy where it has that form."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def silu_and_multiply_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu_and_multiply_torch` in one launch."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gate, up = _rows(gate), _rows(up)
    rows, columns = gate.shape
    silu_and_multiply_kernel[(-(-columns // BLOCK), rows)](
        gate, up, out, gate.stride(0), up.stride(0), COLUMNS=columns, BLOCK=BLOCK
    )
    return out
