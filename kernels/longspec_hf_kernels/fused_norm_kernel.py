"""`add_rms_norm` in Triton: a program per row."""

import torch
import triton
import triton.language as tl

# Elements of a row per warp: 16 for each thread.
WARP_ELEMENTS = 512
MAX_WARPS = 16


@triton.jit
def add_rms_norm_kernel(
    x, residual, weight, normed, summed, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). Rounds to the dtype after the sum, the scaling and the product, as PyTorch's steps do."""
    dtype = x.dtype.element_ty
    channel = tl.arange(0, BLOCK)
    mask = channel < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + channel
    row = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = (row + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(summed + at, total, mask=mask)
        row = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    scaled = (row * inverse).to(dtype).to(tl.float32)
    tl.store(normed + at, (scaled * scale).to(dtype), mask=mask)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm_torch` in one launch."""
    x = x.contiguous()
    hidden = x.shape[-1]
    normed = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return normed, summed
    block = triton.next_power_of_2(hidden)
    add_rms_norm_kernel[(x.numel() // hidden,)](
        x,
        None if residual is None else residual.contiguous(),
        weight.contiguous(),
        normed,
        summed,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(MAX_WARPS, max(1, block // WARP_ELEMENTS)),
    )
    return normed, summed
