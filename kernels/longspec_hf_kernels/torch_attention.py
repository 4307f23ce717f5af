"""Hybrid tree attention in plain PyTorch: the CPU's production path, correct on any device."""

from collections.abc import Callable
from typing import Any

import torch

from .masks import tree_visibility
from .merge import apply_sinks, explicit_attention, merge_attention
from .row_mask import build_row_mask, masked_attention

# Rows handled at once where no fused kernel applies: the fp32 copies of K and V stay this small.
CHUNK_ROWS = 2048
# Query rows times K/V rows up to which one masked call is cheaper than parts and their merge: the mask is
# read with every score, the merge costs a fixed time. In fp16 and bf16 one call is right at every size: it is
# the call plain decoding makes, so a verified token rounds like a decoded one, which a merge of parts does not.
MASKED_SCORES = 2**18


def hybrid_tree_attention_torch(
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
    shared: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """`hybrid_tree_attention_reference` without its masks over the prefix and without copies of K and V.

    Short problems on the CPU are one call of PyTorch's fused kernel with a mask. For others, per
    sequence: the prefix rows that every node sees go to PyTorch's fused CPU kernel, which
    returns the log-sum-exp too and needs no mask; the few rows whose visibility differs between
    nodes (tree rows, the edge of a window) are done explicitly; both merge by log-sum-exp. The
    query heads of a K/V head are its query rows, so K and V are read once and never repeated.

    Args:
        shared: see `hybrid_tree_attention`.

    Other arguments, shapes and result as in `hybrid_tree_attention_reference`. Reads the lengths on the
    host: on an accelerator this waits for it, and cannot be captured in a graph.

    Raises:
        ValueError: `prefix_lens` plus the tree rows exceed the buffers' capacity.
    """
    batch, heads, nodes, size = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    group = heads // kv_heads
    shared = {} if shared is None else shared
    if "rows" not in shared:
        shared["rows"] = ([0] * batch if starts is None else starts.tolist(), prefix_lens.tolist())
    begins, prefixes = shared["rows"]
    sink = None if sinks is None else sinks.view(kv_heads, group, 1).expand(-1, -1, nodes).flatten(1)
    out = torch.empty(batch, nodes, heads, size, dtype=query.dtype, device=query.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    for b in range(batch):
        begin, prefix = begins[b], prefixes[b]
        if prefix > capacity:
            raise ValueError(
                f"`prefix_lens` must not exceed the {capacity} rows of `key`, got {prefix} for sequence {b}: "
                "allocate a larger buffer."
            )
        q = query[b].reshape(kv_heads, group * nodes, size)
        most_rows = prefix - begin + (0 if ancestor_bits is None else 64 * ancestor_bits.shape[-1])
        plain = query.device.type == "cpu" and softcap is None and sink is None and _unit_strides(q, key, value)
        scores = group * nodes * (min(most_rows, window + nodes) if window else most_rows)
        if plain and (scores <= MASKED_SCORES or query.dtype in (torch.float16, torch.bfloat16)):
            name = (b, window, group, query.dtype)
            if name not in shared:
                bits, depth, key_depth = (None if t is None else t[b] for t in (ancestor_bits, depths, key_depths))
                shared[name] = build_row_mask(begin, prefix, bits, depth, key_depth, window, group, query.dtype)
            mask = shared[name]
            if mask is not None and mask.end <= capacity:
                part = masked_attention(q, key[b], value[b], mask, scale)
                if part is not None:
                    out[b] = part.view(heads, nodes, size)
                    continue
        clear, edge = begin, begin
        depth = None if depths is None else depths[b]
        if window is not None and depth is not None:
            low, high = int(depth.min()), int(depth.max())
            clear = max(begin, min(prefix, prefix + high - window + 1))  # rows every node sees start here
            edge = max(begin, min(prefix, prefix + low - window + 1))  # rows some node sees start here
        parts = []
        if prefix > clear:
            parts += _prefix_parts(q, key[b, :, clear:prefix], value[b, :, clear:prefix], scale, softcap)
        if clear > edge and window is not None and depth is not None:
            row = torch.arange(edge, clear, device=query.device)
            visible = (prefix + depth.unsqueeze(-1) - row < window).repeat(group, 1)
            k, v = key[b, :, edge:clear], value[b, :, edge:clear]
            parts.append(explicit_attention(q, k, v, visible, scale=scale, softcap=softcap))
        if ancestor_bits is not None:
            tree = tree_visibility(ancestor_bits[b], depth, None if key_depths is None else key_depths[b], window)
            used = tree.any(0)
            count = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
            if prefix + count > capacity:
                raise ValueError(
                    f"`ancestor_bits` must name rows inside `key`, got tree row {count - 1} behind a prefix of "
                    f"{prefix} with a capacity of {capacity}: allocate a larger buffer."
                )
            if count:
                # Tree rows that nobody sees may hold NaN, which 0 * NaN would let through.
                hidden = ~used[:count].unsqueeze(-1)
                k = key[b, :, prefix : prefix + count].masked_fill(hidden, 0)
                v = value[b, :, prefix : prefix + count].masked_fill(hidden, 0)
                visible = tree[:, :count].repeat(group, 1)
                parts.append(explicit_attention(q, k, v, visible, scale=scale, softcap=softcap))
        out[b] = _finish(parts, q, sink).view(heads, nodes, size)
    return out


def _prefix_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows every node sees: one fused call where PyTorch has one, else chunks of explicit softmax."""
    if softcap is None and _unit_strides(query, key, value) and (kernel := _fused_kernel(query)) is not None:
        # What F.scaled_dot_product_attention calls, called directly because only this form returns the
        # log-sum-exp. It reads strided views in place.
        result = kernel(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), scale=scale)
        return [(result[0][0], result[1][0])]
    return [
        explicit_attention(query, k, v, None, scale=scale, softcap=softcap)
        for k, v in zip(key.split(CHUNK_ROWS, dim=1), value.split(CHUNK_ROWS, dim=1), strict=True)
    ]


def _unit_strides(*tensors: torch.Tensor) -> bool:
    return all(t.stride(-1) == 1 for t in tensors)


def _fused_kernel(query: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """PyTorch's flash kernel for the device, dtype and head size of `query`, or None."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    on_matrix_units = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0
    if query.device.type == "cuda" and on_matrix_units and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention
    return None


def _finish(
    parts: list[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor, sink: torch.Tensor | None
) -> torch.Tensor:
    """Merge the parts, add the sinks, cast to the query's dtype."""
    if not parts:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    out, lse = parts[0]
    for part_out, part_lse in parts[1:]:
        out, lse = merge_attention(out, lse, part_out, part_lse)
    if sink is not None:
        out = apply_sinks(out, lse, sink.to(lse.dtype))
    return out.to(query.dtype)
