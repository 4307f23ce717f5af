"""`advance` and `rotary_rows` in Triton."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sequences"])
def advance_kernel(
    roots, root_positions, limits, lengths, window_lengths, counts, tokens, stride_count, stride_row, stride_token,
    sequences, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (1,)."""
    sequence = tl.arange(0, BLOCK)
    mask = sequence < sequences
    count = tl.load(counts + sequence * stride_count, mask=mask, other=1).to(tl.int64)
    last = tl.load(tokens + sequence.to(tl.int64) * stride_row + (count - 1) * stride_token, mask=mask, other=0)
    tl.store(roots + sequence, last, mask=mask)
    tl.store(root_positions + sequence, tl.load(root_positions + sequence, mask=mask) + count, mask=mask)
    tl.store(limits + sequence, tl.load(limits + sequence, mask=mask) - count, mask=mask)
    tl.store(lengths + sequence, tl.load(lengths + sequence, mask=mask) + count.to(tl.int32), mask=mask)
    window_length = tl.load(window_lengths + sequence, mask=mask) + count.to(tl.int32)
    tl.store(window_lengths + sequence, window_length, mask=mask)


@triton.jit(do_not_specialize=["first", "steps"])
def rotary_rows_kernel(
    cos_table, sin_table, root_positions, limits, cos, sin, positions, first, steps,
    ROTARY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences * steps,)."""
    row = tl.program_id(0)
    sequence, step = row // steps, row % steps
    root = tl.load(root_positions + sequence)
    position = root + step
    tl.store(positions + row, position)
    limit = tl.load(limits + sequence)
    at = tl.minimum(position, root + tl.where(limit > 0, limit, 0)) - first
    channel = tl.arange(0, BLOCK)
    mask = channel < ROTARY
    into = row.to(tl.int64) * ROTARY + channel
    tl.store(cos + into, tl.load(cos_table + at * ROTARY + channel, mask=mask), mask=mask)
    tl.store(sin + into, tl.load(sin_table + at * ROTARY + channel, mask=mask), mask=mask)


def advance_triton(
    roots: torch.Tensor,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    lengths: torch.Tensor,
    window_lengths: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """`advance_torch` in one launch."""
    if roots.numel() == 0:
        return
    advance_kernel[(1,)](
        roots,
        root_positions,
        limits,
        lengths,
        window_lengths,
        counts,
        tokens,
        counts.stride(0),
        *tokens.stride(),
        roots.shape[0],
        BLOCK=triton.next_power_of_2(roots.shape[0]),
        num_warps=1,
    )


def rotary_rows_triton(
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    first: int,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rotary_rows_torch` in one launch."""
    batch, rotary = root_positions.shape[0], cos_table.shape[1]
    cos = torch.empty(batch, steps, rotary, dtype=cos_table.dtype, device=cos_table.device)
    sin = torch.empty_like(cos)
    positions = torch.empty(batch, steps, dtype=torch.long, device=cos.device)
    if cos.numel() == 0:
        return cos, sin, positions
    rotary_rows_kernel[(batch * steps,)](
        cos_table,
        sin_table,
        root_positions.contiguous(),
        limits.contiguous(),
        cos,
        sin,
        positions,
        first,
        steps,
        ROTARY=rotary,
        BLOCK=triton.next_power_of_2(rotary),
        num_warps=1,
    )
    return cos, sin, positions
