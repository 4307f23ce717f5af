"""When the Hopper kernel may run, and its launch; Gluon is imported only where it does."""

from typing import Any

import torch

from .early_launch import overlapped
from .triton_configs import TileConfig, device_limits, triton_version

# Registers of the two computing warpgroups hold scores and result up to this head size.
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
# Gluon is experimental: only the version that the kernel was tested with.
GLUON_TRITON = (3, 6)
# What a tensor map asks of addresses and strides, in bytes.
MAP_ALIGNMENT = 16


def hopper_fits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, softcap: float | None
) -> bool:
    """Whether the Hopper kernel can run this problem: device, Triton, dtype, head size, strides, options."""
    return (
        query.device.type == "cuda"
        and device_limits(query.device).tensor_maps
        and triton_version() == GLUON_TRITON
        and query.dtype in HOPPER_DTYPES
        and query.shape[-1] in HOPPER_HEAD_DIMS
        and window is None
        and softcap is None
        and query.stride(-1) == 1
        and _can_be_mapped(key)
        and _can_be_mapped(value)
    )


def _can_be_mapped(rows: torch.Tensor) -> bool:
    aligned = all(stride * rows.element_size() % MAP_ALIGNMENT == 0 for stride in rows.stride()[:-1])
    return aligned and rows.stride(-1) == 1 and rows.data_ptr() % MAP_ALIGNMENT == 0 and rows.numel() > 0


def launch_hopper_splits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    starts: torch.Tensor | None,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    tree_keys: int,
    tile: TileConfig,
    *,
    scale: float,
    early: bool = False,
    dependent: bool = False,
) -> None:
    """Launch the Hopper split kernel.

    Args:
        partial_out, partial_lse: fp32 `[B, T, Hq, splits, D]` and `[B, T, Hq, splits]` (base 2); the rows
            of an empty split stay unwritten and its log-sum-exp is `-inf`.
        tree_keys: tree rows to look at behind each prefix.
        early, dependent: as in `SplitPlan`.

    Others as in `hybrid_tree_attention_reference`.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_kernels import hopper_split_attention_kernel

    batch, heads, nodes, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    group, splits = heads // kv_heads, partial_lse.shape[-1]
    block = [1, 1, tile.block_n, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16)

    def tensor_map(rows: torch.Tensor) -> Any:
        return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, layout)

    hopper_split_attention_kernel[(-(-nodes * group // tile.block_m), batch * kv_heads, splits)](
        query,
        tensor_map(key),
        tensor_map(value),
        prefix_lens,
        starts,
        prefix_lens if ancestor_bits is None else ancestor_bits.contiguous(),  # unread without a tree
        partial_out,
        partial_lse,
        *query.stride()[:3],
        nodes,
        capacity,
        splits,
        1,
        0 if ancestor_bits is None else ancestor_bits.shape[-1],
        tree_keys,
        kv_heads,
        scale,
        HEAD_DIM=head_dim,
        GROUP=group,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        HAS_TREE=ancestor_bits is not None,
        HAS_STARTS=starts is not None,
        WAIT=early,
        RELEASE=dependent,
        num_warps=tile.num_warps,
        **overlapped(early),
    )
