"""Launches the Triton kernels of hybrid tree attention."""

from dataclasses import dataclass

import torch
import triton

from .early_launch import overlapped
from .hopper_attention import hopper_fits, launch_hopper_splits
from .triton_configs import (
    HOPPER_TILE,
    LONG_TILE,
    WINDOW_TILE,
    LaunchOptions,
    TileConfig,
    choose_launch,
    choose_splits,
    choose_tile,
    device_limits,
    min_split_tiles,
    padded_head_dim,
    prefers_hopper,
    prefers_long_tile,
    prefers_window_tile,
    reduction_chunk,
)
from .triton_kernels import combine_splits_kernel, split_attention_kernel

# K/V rows per masked tile at most: the kernel unpacks 32 ancestor bits at a time.
EDGE_BLOCK = 32


@dataclass
class SplitPlan:
    """One launch of the split kernel: its tile, the splits its shares count and those it launches.

    `early`: the split kernel is brought in while its predecessor runs; `dependent`: the reduction is while
    the split kernel does.
    """

    tile: TileConfig
    options: LaunchOptions
    planned: int
    launched: int
    min_tiles: int
    early: bool
    dependent: bool


def plan_splits(
    query: torch.Tensor,
    key: torch.Tensor,
    tree_keys: int,
    tile: TileConfig | None,
    splits: int | None,
    *,
    window: int | None = None,
    hopper: bool = False,
    options: LaunchOptions | None = None,
) -> SplitPlan:
    """Choose tile and splits from shapes and device alone (no lengths: a launch can be captured)."""
    batch, heads, nodes, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    rows = nodes * (heads // kv_heads)
    limits = device_limits(query.device)
    given, seen = tile, capacity if window is None else min(capacity, window + tree_keys)
    short = window is not None and prefers_window_tile(rows, seen, head_dim, query.dtype, limits)
    tile = given or (WINDOW_TILE if short else choose_tile(rows, head_dim, query.dtype, limits))
    planned = splits or choose_splits(tile, rows, kv_heads, batch, limits)
    if given is None and not short and prefers_long_tile(rows, head_dim, query.dtype, planned, limits):
        tile = LONG_TILE
    min_tiles = 1 if splits or short else min_split_tiles(tile)
    # Splits that no length could fill are not launched; the shares, and so the bits, stay the same.
    most_tiles = capacity // tile.block_n + -(-(tile.block_n + tree_keys) // EDGE_BLOCK)
    if short:
        most_tiles = -(-seen // EDGE_BLOCK)
    launched = min(planned, max(1, -(-most_tiles // min_tiles)))
    options = options or choose_launch(tile, planned)
    early = options.early_splits and limits.dependent_launch
    dependent = limits.dependent_launch and (options.early_hopper if hopper else launched > 1)
    return SplitPlan(tile, options, planned, launched, min_tiles, early, dependent)


def hybrid_tree_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    *,
    starts: torch.Tensor | None = None,
    depths: torch.Tensor | None = None,
    key_depths: torch.Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tile: TileConfig | None = None,
    splits: int | None = None,
    hopper: bool | None = None,
    options: LaunchOptions | None = None,
) -> torch.Tensor:
    """`hybrid_tree_attention_reference` as a fused split-KV kernel and a reduction.

    Every length is read on the device, so a captured launch can be replayed after the lengths, starts
    or ancestor words have changed.

    Args:
        tile, splits, options: override the tables of `triton_configs`, for tests and benchmarks.
        hopper: force or forbid the kernel of `hopper_kernels`; by default it runs where it fits and
            `prefers_hopper` says so.

    Others, and the result, as in `hybrid_tree_attention_reference`; fp16, bf16 and fp32 (true fp32
    products), head sizes up to 256.
    """
    batch, heads, nodes, head_dim = query.shape
    out = torch.empty(batch, nodes, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    if hopper is None:
        kv_heads = key.shape[1]
        preferred = prefers_hopper(nodes * (heads // kv_heads), kv_heads, batch, device_limits(query.device))
        hopper = tile is None and preferred and hopper_fits(query, key, value, window, softcap)
    tree_keys = count_tree_keys(ancestor_bits, key_depths)
    tile = (tile or HOPPER_TILE) if hopper else tile
    plan = plan_splits(query, key, tree_keys, tile, splits, window=window, hopper=hopper, options=options)
    direct = plan.launched == 1 and not hopper
    partial_shape = (batch, nodes, heads, plan.launched)
    partial_lse = out if direct else query.new_empty(partial_shape, dtype=torch.float32)
    partial_out = out if direct else query.new_empty((*partial_shape, head_dim), dtype=torch.float32)
    if hopper:
        launch_hopper_splits(
            query,
            key,
            value,
            prefix_lens,
            ancestor_bits,
            starts,
            partial_out,
            partial_lse,
            tree_keys,
            plan.tile,
            scale=scale,
            early=plan.early,
            dependent=plan.dependent,
        )
    else:
        launch_splits(
            query,
            key,
            value,
            prefix_lens,
            ancestor_bits,
            starts,
            depths,
            key_depths,
            sinks,
            out,
            partial_out,
            partial_lse,
            plan,
            scale=scale,
            window=window,
            softcap=softcap,
            direct=direct,
        )
    if not direct:
        combine_splits_kernel[(batch * nodes * heads,)](
            partial_out,
            partial_lse,
            sinks,
            out,
            *out.stride(),
            nodes,
            heads,
            plan.launched,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            MAX_SPLITS=triton.next_power_of_2(plan.launched),
            BLOCK_S=reduction_chunk(plan.planned),
            HAS_SINKS=sinks is not None,
            WAIT=plan.dependent,
            RELEASE=plan.early,
            num_warps=plan.options.reduction_warps,
            **overlapped(plan.dependent),
        )
    return out


def count_tree_keys(ancestor_bits: torch.Tensor | None, key_depths: torch.Tensor | None) -> int:
    """Tree rows to look at: exact with `key_depths`, else as many as the words have bits."""
    if ancestor_bits is None:
        return 0
    return 64 * ancestor_bits.shape[-1] if key_depths is None else key_depths.shape[-1]


def launch_splits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    starts: torch.Tensor | None,
    depths: torch.Tensor | None,
    key_depths: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    plan: SplitPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    direct: bool,
) -> None:
    """Launch the split kernel.

    Args:
        out: `[B, Hq, T, D]`, written with `direct` (one split).
        partial_out, partial_lse: fp32 `[B, T, Hq, splits, D]` and `[B, T, Hq, splits]` (base 2), written
            otherwise; the rows of an empty split may stay unwritten and its log-sum-exp is `-inf`.

    Others as in `hybrid_tree_attention_reference`.
    """
    batch, heads, nodes, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    group, tile = heads // kv_heads, plan.tile
    split_attention_kernel[(-(-nodes * group // tile.block_m), batch * kv_heads, plan.launched)](
        query,
        key,
        value,
        prefix_lens,
        starts,
        None if ancestor_bits is None else ancestor_bits.contiguous(),
        None if depths is None else depths.contiguous(),
        None if key_depths is None else key_depths.contiguous(),
        sinks,
        out,
        partial_out,
        partial_lse,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *out.stride(),
        nodes,
        capacity,
        plan.launched,
        plan.min_tiles,
        0 if ancestor_bits is None else ancestor_bits.shape[-1],
        count_tree_keys(ancestor_bits, key_depths),
        kv_heads,
        scale,
        softcap or 1.0,
        window or 0,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        GROUP=group,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        EDGE_BLOCK=min(EDGE_BLOCK, tile.block_n),
        STAGES=tile.num_stages,
        EDGE_STAGES=plan.options.edge_stages,
        HAS_TREE=ancestor_bits is not None,
        HAS_STARTS=starts is not None,
        HAS_SINKS=sinks is not None,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        DIRECT=direct,
        PRECISION="ieee",
        WAIT=plan.early,
        RELEASE=plan.dependent,
        num_warps=tile.num_warps,
        **overlapped(plan.early),
    )
