"""`add_rms_norm` and `embed_rms_norm` in Triton: a program per row."""

import torch
import triton
import triton.language as tl

from .early_launch import overlapped, release_successor, wait_for_predecessor
from .triton_configs import device_limits

# Elements of a row per warp: 16 for each thread.
WARP_ELEMENTS = 512
MAX_WARPS = 16


@triton.jit(do_not_specialize=["stride_part"])
def add_rms_norm_kernel(
    x, token_ids, residual, weight, normed, summed, eps, stride_part,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). Rounds to the dtype after each sum, the scaling and the product, as PyTorch's steps do.

    With tokens `x` is their table, and what is read of it is written to `summed`.
    """
    dtype = normed.dtype.element_ty
    channel = tl.arange(0, BLOCK)
    mask = channel < HIDDEN
    if EARLY:
        wait_for_predecessor()
        release_successor()
    at = tl.program_id(0).to(tl.int64) * HIDDEN + channel
    source = at
    if HAS_TOKENS:
        source = tl.load(token_ids + tl.program_id(0)).to(tl.int64) * HIDDEN + channel
    row = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        row += tl.load(x + part * stride_part.to(tl.int64) + at, mask=mask, other=0.0).to(tl.float32)
    row = row.to(dtype).to(tl.float32)
    if HAS_TOKENS:
        tl.store(summed + at, row.to(dtype), mask=mask)
    scale = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = (row + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(summed + at, total, mask=mask)
        row = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    scaled = (row * inverse).to(dtype).to(tl.float32)
    tl.store(normed + at, (scaled * scale).to(dtype), mask=mask)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, parts: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm_torch` in one launch.

    Args:
        parts: `x` is fp32 `[S, *residual.shape]`; its sum over S, rounded to the residual's dtype, is meant.
    """
    x = x.contiguous()
    like = x if residual is None else residual.contiguous()
    normed = torch.empty_like(like)
    summed = x if residual is None else torch.empty_like(like)
    added = None if residual is None else like
    _launch(x, None, added, weight, normed, summed, eps, parts=x.shape[0] if parts else 1)
    return normed, summed


def embed_rms_norm_triton(
    table: torch.Tensor, token_ids: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`embed_rms_norm_torch` in one launch."""
    table = table.contiguous()
    normed = torch.empty(*token_ids.shape, table.shape[-1], dtype=table.dtype, device=table.device)
    embeds = torch.empty_like(normed)
    _launch(table, token_ids.contiguous(), None, weight, normed, embeds, eps)
    return normed, embeds


def _launch(
    x: torch.Tensor,
    token_ids: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    summed: torch.Tensor,
    eps: float,
    parts: int = 1,
) -> None:
    if normed.numel() == 0:
        return
    hidden = x.shape[-1]
    block = triton.next_power_of_2(hidden)
    early = device_limits(normed.device).dependent_launch
    add_rms_norm_kernel[(normed.numel() // hidden,)](
        x,
        token_ids,
        residual,
        weight.contiguous(),
        normed,
        summed,
        eps,
        normed.numel(),
        HIDDEN=hidden,
        BLOCK=block,
        PARTS=parts,
        HAS_RESIDUAL=residual is not None,
        HAS_TOKENS=token_ids is not None,
        EARLY=early,
        num_warps=min(MAX_WARPS, max(1, block // WARP_ELEMENTS)),
        **overlapped(early),
    )
