"""The products that belong to one attention, in one launch of Triton."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .early_launch import overlapped
from .fused_linear_kernel import few_rows_products, operands_of, shares_of
from .linear_configs import LinearConfig
from .triton_configs import device_limits


@triton.jit(do_not_specialize=["rows", "share"])
def joined_rows_kernel(
    x, query, key, value, out, rows, share,
    QUERY_COLUMNS: tl.constexpr, KEY_COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    INPUTS_MAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of output columns of the first weight, then of the second and the third, splits of the depth).

    Writes split s of all products, side by side, to `out[s]` `[rows, QUERY_COLUMNS + 2 * KEY_COLUMNS]`.
    """
    query_tiles: tl.constexpr = (QUERY_COLUMNS + BLOCK_N - 1) // BLOCK_N
    key_tiles: tl.constexpr = (KEY_COLUMNS + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    split = tl.program_id(1)
    of_query = tile < query_tiles
    of_key = tile < query_tiles + key_tiles
    weight = tl.where(of_query, query, tl.where(of_key, key, value))
    before = tl.where(of_query, 0, tl.where(of_key, query_tiles, query_tiles + key_tiles))
    place = tl.where(of_query, 0, tl.where(of_key, QUERY_COLUMNS, QUERY_COLUMNS + KEY_COLUMNS))
    columns = tl.where(of_query, QUERY_COLUMNS, KEY_COLUMNS)
    column = (tile - before) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, DEPTH // BLOCK_K)
    product, _ = few_rows_products(
        x, weight, None, weight, None, rows, column, columns, first, last,
        DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, False, INPUTS_MAPPED, False, EARLY,
    )  # fmt: skip
    width: tl.constexpr = QUERY_COLUMNS + 2 * KEY_COLUMNS
    n = column + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    at = (split.to(tl.int64) * rows + m[None, :]) * width + place + n[:, None]
    mask = (n < columns)[:, None] & (m < rows)[None, :]
    tl.store(out + at, product, mask=mask, eviction_policy="evict_last")  # as in `few_rows_kernel`


def joined_triton(x: torch.Tensor, weights: Sequence[torch.Tensor], config: LinearConfig) -> torch.Tensor:
    """Products of `x` `[..., K]` with three weights, of which the last two are alike, in one launch.

    Returns:
        fp32 `[splits, ..., N]`, those of all weights side by side; their sum over the splits is meant.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, depth = rows.shape
    columns = [weight.shape[0] for weight in weights]
    share, splits = shares_of(depth, config)
    out = torch.empty(splits, count, sum(columns), dtype=torch.float32, device=x.device)
    inputs, mapped = operands_of(rows, [], config)
    early = device_limits(x.device).dependent_launch
    joined_rows_kernel[(sum(-(-width // config.block_n) for width in columns), splits)](
        *inputs,
        *weights,
        out,
        count,
        share,
        QUERY_COLUMNS=columns[0],
        KEY_COLUMNS=columns[1],
        DEPTH=depth,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        INPUTS_MAPPED=mapped,
        EARLY=early,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlapped(early),
    )
    return out.view(splits, *x.shape[:-1], -1)
