"""Maths of the draft's attention over a whole text: rotation, masks, masked attention. Pure functions."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` channels of `x` `[B, heads, T, D]` by half-split RoPE (RoFormer, 2104.09864).

    cos, sin: `[B, T, rotary_dim]`, `rotary_dim <= D`; channels beyond it pass through.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated


def window_mask(
    length: int, window: int, device: torch.device, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Boolean `[1 or B, 1, T, T]`: query p sees keys p - window + 1 .. p that are not padding."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    mask = ((distance >= 0) & (distance < window))[None, None]
    return mask if attention_mask is None else mask & attention_mask[:, None, None, :].bool()


def cross_attention_mask(
    length: int,
    shift: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    target_window: int | None = None,
) -> torch.Tensor:
    """Boolean `[1 or B, 1, T, T]`: query p sees target rows 0 .. p - shift that are not padding.

    At inference a node `shift` tokens behind the newest target row sees what the next token of the target's layer
    would: of a layer with a window, the newest `target_window - 1` of those rows.
    """
    position = torch.arange(length, device=device)
    behind = position[:, None] - shift - position[None, :]
    mask = ((behind >= 0) if target_window is None else (behind >= 0) & (behind < target_window - 1))[None, None]
    return mask if attention_mask is None else mask & attention_mask[:, None, None, :].bool()


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention `[B, Hq, T, D]` under a boolean mask; a query that sees nothing yields exactly zero."""
    sees_any = mask.any(dim=-1, keepdim=True)
    # Softmax over an empty row is NaN, in the gradient too: let such a row see everything, then drop its output.
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | ~sees_any, scale=scale, enable_gqa=True
    )
    return attended.masked_fill(~sees_any, 0.0)


def shifted_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shift: int, scale: float
) -> torch.Tensor:
    """`masked_attention` under `cross_attention_mask` without padding, through a causal kernel and without a mask.

    Dropping the first `shift` queries and the last `shift` keys turns "rows 0 .. p - shift" into plain causality.
    """
    kept = query.shape[2] - shift
    if kept <= 0:
        return query * 0.0
    attended = F.scaled_dot_product_attention(
        query[:, :, shift:], key[:, :, :kept], value[:, :, :kept], is_causal=True, scale=scale, enable_gqa=True
    )
    return F.pad(attended, (0, 0, shift, 0))


def shifted_window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shift: int, target_window: int, scale: float
) -> torch.Tensor:
    """`masked_attention` under `cross_attention_mask` with a target window and without padding, in linear time."""
    kept = query.shape[2] - shift
    if target_window > kept:
        return shifted_causal_attention(query, key, value, shift, scale)
    if target_window == 1:
        return query * 0.0
    attended = blocked_window_attention(
        query[:, :, shift:], key[:, :, :kept], value[:, :, :kept], target_window - 1, scale
    )
    return F.pad(attended, (0, 0, shift, 0))


def blocked_window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """`masked_attention` under `window_mask` without padding, in time and memory linear in the length.

    The text is cut into blocks of `window` tokens; a block's queries see keys of their own block and the one before.
    """
    batch, _, length, _ = query.shape
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # memory-efficient kernels with a mask take no grouped heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    blocks = -(-length // window)
    padding = blocks * window - length

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, padding)) if padding else x
        return x.unflatten(2, (blocks, window)).transpose(1, 2)  # [B, blocks, heads, window, D]

    def with_previous(x: torch.Tensor) -> torch.Tensor:
        x = cut(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3).flatten(0, 1)

    row = torch.arange(window, device=query.device)
    column = torch.arange(2 * window, device=query.device)
    distance = row[:, None] + window - column[None, :]
    seen = (distance >= 0) & (distance < window)
    seen = seen.expand(blocks, window, 2 * window).clone()
    seen[0, :, :window] = False  # the first block has none before it
    mask = seen[None].expand(batch, -1, -1, -1).reshape(batch * blocks, 1, window, 2 * window)
    attended = F.scaled_dot_product_attention(
        cut(query).flatten(0, 1), with_previous(key), with_previous(value), attn_mask=mask, scale=scale
    )
    attended = attended.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return attended[:, :, :length] if padding else attended
