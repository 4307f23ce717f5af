"""Which rows a whole tree sees, as one mask: what short problems on the CPU are done with in one call."""

from dataclasses import dataclass

import torch

from .masks import tree_visibility


@dataclass(frozen=True)
class RowMask:
    """Rows `[begin, end)` of one sequence that some node sees.

    Attributes:
        begin, end: of the K/V rows.
        bias: `[group * T, end - begin]`, 0 where a node sees a row and `-inf` elsewhere; None if all is seen.
        hidden: rows among them that no node sees, or None.
    """

    begin: int
    end: int
    bias: torch.Tensor | None
    hidden: torch.Tensor | None


def build_row_mask(
    begin: int,
    prefix: int,
    ancestor_bits: torch.Tensor | None,
    depths: torch.Tensor | None,
    key_depths: torch.Tensor | None,
    window: int | None,
    group: int,
    dtype: torch.dtype,
) -> RowMask | None:
    """The mask of one sequence, or None where some node sees nothing at all.

    Args:
        begin, prefix: first visible and first tree row.
        ancestor_bits: int64 `[T, W]` or None.
        depths, key_depths: int `[T]`, `[C]` or None.
        window: as in `hybrid_tree_attention_reference`.
        group: query heads of a K/V head; the mask repeats for each.
        dtype: of the bias.
    """
    parts, end = [], prefix
    if window is not None and depths is not None:
        begin = max(begin, min(prefix, prefix + int(depths.min()) - window + 1))
        row = torch.arange(begin, prefix, device=depths.device)
        parts.append(prefix + depths.unsqueeze(-1) - row < window)
    if ancestor_bits is not None:
        tree = tree_visibility(ancestor_bits, depths, key_depths, window)
        used = tree.any(0).nonzero()
        end += int(used[-1]) + 1 if len(used) else 0
        if not parts:
            parts.append(tree.new_ones(tree.shape[0], prefix - begin))
        parts.append(tree[:, : end - prefix])
    if not parts:
        return RowMask(begin, end, None, None) if end > begin else None
    visible = torch.cat(parts, dim=1)
    if bool(visible.all()):
        return RowMask(begin, end, None, None) if end > begin else None
    if not bool(visible.any(1).all()):
        return None
    seen = visible.any(0)
    hidden = None if bool(seen.all()) else (~seen).nonzero().squeeze(-1) + begin
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
    return RowMask(begin, end, bias.repeat(group, 1), hidden)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: RowMask, scale: float
) -> torch.Tensor | None:
    """One call of PyTorch's fused CPU kernel; None where rows that nobody sees hold NaN or infinities.

    Such rows would pass through a weight of 0; the caller then takes the parts one by one.

    Args:
        query: `[Hkv, group * T, D]`.
        key, value: `[Hkv, capacity, D]`, last stride 1.

    Returns:
        `[Hkv, group * T, D]` in the query's dtype.
    """
    if mask.hidden is not None and not all(bool(rows[:, mask.hidden].isfinite().all()) for rows in (key, value)):
        return None
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(0),
        key[:, mask.begin : mask.end].unsqueeze(0),
        value[:, mask.begin : mask.end].unsqueeze(0),
        attn_mask=mask.bias,
        scale=scale,
    )[0][0]
