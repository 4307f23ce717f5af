"""`rotate` and `rotate_and_store` in Triton: a program per token and head."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .early_launch import overlapped, release_successor, wait_for_predecessor
from .triton_configs import device_limits


@dataclass(frozen=True)
class Heads:
    """Projections of one kind, side by side in the last dimension.

    Attributes:
        values: `[B, T, heads * D]`, or fp32 `[S, B, T, heads * D]`, whose sum over S and the bias, rounded, is meant.
        norm: `[D]` weight of an RMS norm of each head, or `None`.
        bias: `[heads * D]` for sums, or `None`.
    """

    values: torch.Tensor
    norm: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def parts(self) -> int:
        """S; 0 where the values are no sums."""
        return self.values.shape[0] if self.values.dim() == 4 else 0


@dataclass(frozen=True)
class Store:
    """Where keys and values go, as in `rotate_and_store`."""

    key: Heads
    value: Heads
    key_buffer: torch.Tensor
    value_buffer: torch.Tensor
    first_rows: torch.Tensor
    offset: int = 0


@triton.jit
def _projected(
    base, bias, channel, mask, stride_part, dtype: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Channels of one head as the projection gives them, in its dtype; of splits the sum, rounded once."""
    x = tl.load(base + channel, mask=mask, other=0.0)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            x += tl.load(base + part * stride_part + channel, mask=mask, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
        x = x.to(dtype)
    return x


@triton.jit
def _normed(x, channel, mask, norm, inverse, dtype: tl.constexpr, HAS_NORM: tl.constexpr):
    """Channels of one head, in fp32; with a norm, scaled by `inverse` and then by the weight, rounding after both."""
    x = x.to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm + channel, mask=mask, other=0.0).to(tl.float32)
        x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return x


@triton.jit
def _rotated(
    base, bias, cos, sin, norm, eps, channel, stride_part, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PARTS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One head after its norm and its rotation, in its dtype; `base`, `cos` and `sin` point to the token's rows."""
    mask = channel < HEAD_DIM
    turned = channel < ROTARY
    plain = _projected(base, bias, channel, mask, stride_part, dtype, PARTS, HAS_BIAS)
    inverse = 1.0
    if HAS_NORM:
        whole = plain.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(whole * whole, 0) / HEAD_DIM + eps)
    x = _normed(plain, channel, mask, norm, inverse, dtype, HAS_NORM)
    if ROTARY > 0:
        low = channel < ROTARY // 2
        partner = tl.where(low, channel + ROTARY // 2, channel - ROTARY // 2)
        other = _projected(base, bias, partner, turned, stride_part, dtype, PARTS, HAS_BIAS)
        other = _normed(other, partner, turned, norm, inverse, dtype, HAS_NORM)
        other = tl.where(low, -other, other)
        c = tl.load(cos + channel, mask=turned, other=0.0).to(tl.float32)
        s = tl.load(sin + channel, mask=turned, other=0.0).to(tl.float32)
        sum = (x * c).to(dtype).to(tl.float32) + (other * s).to(dtype).to(tl.float32)
        x = tl.where(turned, sum, x)
    return x.to(dtype)


@triton.jit(do_not_specialize=["nodes", "capacity", "offset"])
def rotate_and_store_kernel(
    query, key, value, query_bias, key_bias, value_bias, query_norm, key_norm,
    cos, sin, key_buffer, value_buffer, first_rows, out,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt, stride_part,
    stride_cb, stride_ct, stride_sb, stride_st,
    stride_kbb, stride_kbh, stride_kbn, stride_vbb, stride_vbh, stride_vbn,
    nodes, capacity, offset, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr, PARTS: tl.constexpr, HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr,
    HAS_QUERY_BIAS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, query heads, then key heads, then value heads); no K/V heads where nothing is stored."""
    if EARLY:
        wait_for_predecessor()
        release_successor()
    token = tl.program_id(0)
    head = tl.program_id(1)
    sequence = (token // nodes).to(tl.int64)
    node = (token % nodes).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    mask = channel < HEAD_DIM
    dtype = out.dtype.element_ty
    cos += sequence * stride_cb + node * stride_ct
    sin += sequence * stride_sb + node * stride_st
    if head < HEADS:
        base = query + sequence * stride_qb + node * stride_qt + head * HEAD_DIM
        rotated = _rotated(
            base, query_bias + head * HEAD_DIM if HAS_QUERY_BIAS else None, cos, sin, query_norm, eps, channel,
            stride_part, dtype, HEAD_DIM, ROTARY, PARTS, HAS_QUERY_NORM, HAS_QUERY_BIAS,
        )  # fmt: skip
        tl.store(out + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + channel, rotated, mask=mask)
    elif KV_HEADS > 0:
        row = tl.load(first_rows + sequence).to(tl.int64) + offset + node
        if row < capacity:
            if head < HEADS + KV_HEADS:
                kv_head = head - HEADS
                base = key + sequence * stride_kb + node * stride_kt + kv_head * HEAD_DIM
                target = key_buffer + sequence * stride_kbb + kv_head.to(tl.int64) * stride_kbh + row * stride_kbn
                stored = _rotated(
                    base, key_bias + kv_head * HEAD_DIM if HAS_KEY_BIAS else None, cos, sin, key_norm, eps, channel,
                    stride_part, dtype, HEAD_DIM, ROTARY, PARTS, HAS_KEY_NORM, HAS_KEY_BIAS,
                )  # fmt: skip
                tl.store(target + channel, stored, mask=mask)
            else:
                kv_head = head - HEADS - KV_HEADS
                base = value + sequence * stride_vb + node * stride_vt + kv_head * HEAD_DIM
                target = value_buffer + sequence * stride_vbb + kv_head.to(tl.int64) * stride_vbh + row * stride_vbn
                stored = _projected(
                    base, value_bias + kv_head * HEAD_DIM if HAS_VALUE_BIAS else None, channel, mask, stride_part,
                    dtype, PARTS, HAS_VALUE_BIAS,
                )  # fmt: skip
                tl.store(target + channel, stored, mask=mask)


def rotate_triton(
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    query_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`rotate_torch` in one launch."""
    return launch_rotation(Heads(query, query_norm), cos, sin, query.dtype, head_dim=head_dim, eps=eps)


def rotate_and_store_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    first_rows: torch.Tensor,
    *,
    head_dim: int,
    offset: int = 0,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """`rotate_and_store_torch` in one launch; rows beyond the capacity are left out."""
    store = Store(Heads(key, key_norm), Heads(value), key_buffer, value_buffer, first_rows, offset)
    return launch_rotation(Heads(query, query_norm), cos, sin, query.dtype, store, head_dim=head_dim, eps=eps)


def launch_rotation(
    query: Heads,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    store: Store | None = None,
    *,
    head_dim: int,
    eps: float = 0.0,
) -> torch.Tensor:
    """One launch of the kernel; `[B, Hq, T, D]` in `dtype`, a transposed view of a fresh `[B, T, Hq, D]`."""
    batch, nodes, width = query.values.shape[-3:]
    heads, kv_heads = width // head_dim, 0 if store is None else store.key.values.shape[-1] // head_dim
    out = torch.empty(batch, nodes, heads, head_dim, dtype=dtype, device=query.values.device)
    if out.numel() == 0:
        return out.transpose(1, 2)
    cos, sin = _unit(cos), _unit(sin)
    key, value = (None, None) if store is None else (store.key, store.value)
    buffers = (None, None) if store is None else (store.key_buffer, store.value_buffer)
    kinds = (query, key, value)
    early = device_limits(out.device).dependent_launch
    rotate_and_store_kernel[(batch * nodes, heads + 2 * kv_heads)](
        *(None if kind is None else kind.values for kind in kinds),
        *(None if kind is None else kind.bias for kind in kinds),
        query.norm,
        None if key is None else key.norm,
        cos,
        sin,
        *buffers,
        None if store is None else store.first_rows,
        out,
        *(stride for kind in kinds for stride in ((0, 0) if kind is None else kind.values.stride()[-3:-1])),
        query.values.stride(0) if query.parts else 0,
        *cos.stride()[:2],
        *sin.stride()[:2],
        *(stride for buffer in buffers for stride in ((0, 0, 0) if buffer is None else buffer.stride()[:3])),
        nodes,
        0 if store is None else store.key_buffer.shape[2],
        0 if store is None else store.offset,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROTARY=cos.shape[-1],
        PARTS=query.parts,
        HAS_QUERY_NORM=query.norm is not None,
        HAS_KEY_NORM=key is not None and key.norm is not None,
        HAS_QUERY_BIAS=query.bias is not None,
        HAS_KEY_BIAS=key is not None and key.bias is not None,
        HAS_VALUE_BIAS=value is not None and value.bias is not None,
        EARLY=early,
        num_warps=1,
        enable_fp_fusion=False,  # a product and a sum in one step would round once where PyTorch rounds twice
        **overlapped(early),
    )
    return out.transpose(1, 2)


def _unit(table: torch.Tensor) -> torch.Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()
