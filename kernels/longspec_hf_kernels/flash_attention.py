"""The paper's own scheme: prefix by a flash-attention kernel, tree by a masked one, merged by log-sum-exp.

Kept beside the fused kernel so that the two can be compared on one card.
"""

from collections.abc import Sequence

import torch

from .backends import has_flash_attn
from .triton_attention import count_tree_keys, launch_splits, plan_splits
from .triton_configs import LaunchOptions, padded_head_dim
from .triton_kernels import merge_prefix_and_tree_kernel


def hybrid_tree_attention_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    *,
    starts: torch.Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    packed: bool = False,
    host_lens: Sequence[int] | None = None,
    package: bool | None = None,
) -> torch.Tensor:
    """`hybrid_tree_attention_reference` without windows, as the paper computes it.

    Args:
        packed: hand the query heads of a K/V head to the prefix kernel as rows of one head (the paper
            does not); False is the paper's scheme.
        host_lens: `prefix_lens` as the caller knows them, to spare PyTorch's kernel the wait (below).
        package: read the prefix with the flash-attn package's kernel or with PyTorch's; by default with the
            package's where it is installed.

    Others, and the result, as in `hybrid_tree_attention_reference`; fp16 and bf16; a soft-cap with flash-attn
    only. With flash-attn all lengths are read on the device; PyTorch's kernel takes views cut on the host, so
    without `host_lens` it waits for the device, and it cannot be captured with changing lengths.

    Raises:
        ValueError: a soft-cap without flash-attn.

    Source: LongSpec (arXiv 2502.17421), hybrid tree attention.
    """
    package = has_flash_attn() if package is None else package
    if softcap is not None and not package:
        raise ValueError(
            f"`softcap` must be None without the flash-attn package, whose kernel has it; got {softcap}: install and "
            "use flash-attn, or choose another backend."
        )
    batch, heads, nodes, head_dim = query.shape
    prefix_out, prefix_lse = prefix_attention(
        query, key, value, prefix_lens, starts, scale, softcap, packed, package, host_lens
    )
    out = torch.empty(batch, nodes, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    tree_out = query.new_empty((batch, nodes, heads, head_dim), dtype=torch.float32)
    tree_lse = query.new_empty((batch, nodes, heads), dtype=torch.float32)
    if ancestor_bits is not None:
        plan = plan_splits(query, key, count_tree_keys(ancestor_bits, None), None, 1, options=LaunchOptions())
        launch_splits(
            query,
            key,
            value,
            prefix_lens,
            ancestor_bits,
            prefix_lens,  # as starts: nothing of the prefix is left
            None,
            None,
            None,
            out,
            tree_out,
            tree_lse,
            plan,
            scale=scale,
            window=None,
            softcap=softcap,
            direct=False,
        )
    merge_prefix_and_tree_kernel[(batch * nodes * heads,)](
        prefix_out,
        prefix_lse,
        tree_out,
        tree_lse,
        sinks,
        out,
        *prefix_out.stride(),
        *prefix_lse.stride(),
        *out.stride(),
        nodes,
        heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        HAS_TREE=ancestor_bits is not None,
        HAS_SINKS=sinks is not None,
        num_warps=1,
    )
    return out


def prefix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    packed: bool,
    package: bool,
    host_lens: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[start, prefix_len)` by a flash kernel.

    Returns:
        `(out [B, Hq, T, D] in the query's dtype, lse [B, Hq, T] fp32, natural)`. A sequence without
        rows has a log-sum-exp of `-inf` or `+inf`, by kernel; its rows of `out` are to be ignored.
    """
    batch, heads, nodes, head_dim = query.shape
    kv_heads = key.shape[1]
    if packed:
        query = query.reshape(batch, kv_heads, -1, head_dim)
    if package:
        from flash_attn import flash_attn_with_kvcache

        out, lse = flash_attn_with_kvcache(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=prefix_lens.to(torch.int32),
            cache_leftpad=None if starts is None else starts.to(torch.int32),
            softmax_scale=scale,
            causal=False,
            softcap=softcap or 0.0,
            return_softmax_lse=True,
        )
        out = out.transpose(1, 2)
    else:
        begins = [0] * batch if starts is None else starts.tolist()
        ends = host_lens or prefix_lens.tolist()
        parts = [
            _torch_flash(query[b : b + 1], key[b : b + 1, :, begin:end], value[b : b + 1, :, begin:end], scale)
            for b, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        out, lse = parts[0] if batch == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    return out.reshape(batch, heads, nodes, head_dim), lse.reshape(batch, heads, nodes)


def _torch_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash kernel on one sequence `[1, H, T, D]`; zeros and `-inf` where there are no rows."""
    if key.shape[2] == 0:
        lse = torch.full(query.shape[:3], float("-inf"), dtype=torch.float32, device=query.device)
        return torch.zeros_like(query, memory_format=torch.contiguous_format), lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    return out, lse
