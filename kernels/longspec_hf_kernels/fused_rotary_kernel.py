"""`rotate` and `rotate_and_store` in Triton: a program per token and head."""

import torch
import triton
import triton.language as tl


@triton.jit
def _normed(base, channel, mask, norm, inverse, dtype: tl.constexpr, HAS_NORM: tl.constexpr):
    """Channels of one head, in fp32; with a norm, scaled by `inverse` and then by the weight, rounding after both."""
    x = tl.load(base + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm + channel, mask=mask, other=0.0).to(tl.float32)
        x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return x


@triton.jit
def _rotated(
    base, cos, sin, norm, eps, channel,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One head after its norm and its rotation, in its dtype; `base`, `cos` and `sin` point to the token's rows."""
    dtype = base.dtype.element_ty
    mask = channel < HEAD_DIM
    turned = channel < ROTARY
    inverse = 1.0
    if HAS_NORM:
        whole = tl.load(base + channel, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(whole * whole, 0) / HEAD_DIM + eps)
    x = _normed(base, channel, mask, norm, inverse, dtype, HAS_NORM)
    if ROTARY > 0:
        low = channel < ROTARY // 2
        partner = tl.where(low, channel + ROTARY // 2, channel - ROTARY // 2)
        other = _normed(base, partner, turned, norm, inverse, dtype, HAS_NORM)
        other = tl.where(low, -other, other)
        c = tl.load(cos + channel, mask=turned, other=0.0).to(tl.float32)
        s = tl.load(sin + channel, mask=turned, other=0.0).to(tl.float32)
        sum = (x * c).to(dtype).to(tl.float32) + (other * s).to(dtype).to(tl.float32)
        x = tl.where(turned, sum, x)
    return x.to(dtype)


@triton.jit(do_not_specialize=["nodes", "capacity", "offset"])
def rotate_and_store_kernel(
    query, key, value, cos, sin, key_buffer, value_buffer, first_rows, query_norm, key_norm, out,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
    stride_cb, stride_ct, stride_sb, stride_st,
    stride_kbb, stride_kbh, stride_kbn, stride_vbb, stride_vbh, stride_vbn,
    nodes, capacity, offset, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr, HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, query heads, then key heads, then value heads); no K/V heads where nothing is stored."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    sequence = (token // nodes).to(tl.int64)
    node = (token % nodes).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    mask = channel < HEAD_DIM
    cos += sequence * stride_cb + node * stride_ct
    sin += sequence * stride_sb + node * stride_st
    if head < HEADS:
        base = query + sequence * stride_qb + node * stride_qt + head * HEAD_DIM
        rotated = _rotated(base, cos, sin, query_norm, eps, channel, HEAD_DIM, ROTARY, HAS_QUERY_NORM)
        tl.store(out + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + channel, rotated, mask=mask)
    elif KV_HEADS > 0:
        row = tl.load(first_rows + sequence).to(tl.int64) + offset + node
        if row < capacity:
            if head < HEADS + KV_HEADS:
                kv_head = head - HEADS
                base = key + sequence * stride_kb + node * stride_kt + kv_head * HEAD_DIM
                target = key_buffer + sequence * stride_kbb + kv_head.to(tl.int64) * stride_kbh + row * stride_kbn
                stored = _rotated(base, cos, sin, key_norm, eps, channel, HEAD_DIM, ROTARY, HAS_KEY_NORM)
                tl.store(target + channel, stored, mask=mask)
            else:
                kv_head = head - HEADS - KV_HEADS
                base = value + sequence * stride_vb + node * stride_vt + kv_head * HEAD_DIM
                target = value_buffer + sequence * stride_vbb + kv_head.to(tl.int64) * stride_vbh + row * stride_vbn
                tl.store(target + channel, tl.load(base + channel, mask=mask), mask=mask)


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
    return _launch(query, None, None, cos, sin, None, None, None, head_dim, 0, query_norm, None, eps)


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
    return _launch(
        query, key, value, cos, sin, key_buffer, value_buffer, first_rows, head_dim, offset, query_norm, key_norm, eps
    )


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


def _unit(table: torch.Tensor) -> torch.Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()


def _launch(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_buffer: torch.Tensor | None,
    value_buffer: torch.Tensor | None,
    first_rows: torch.Tensor | None,
    head_dim: int,
    offset: int,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    batch, nodes, width = query.shape
    heads, kv_heads = width // head_dim, 0 if key is None else key.shape[-1] // head_dim
    out = torch.empty(batch, nodes, heads, head_dim, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out.transpose(1, 2)
    cos, sin = _unit(cos), _unit(sin)
    rotate_and_store_kernel[(batch * nodes, heads + 2 * kv_heads)](
        query,
        key,
        value,
        cos,
        sin,
        key_buffer,
        value_buffer,
        first_rows,
        query_norm,
        key_norm,
        out,
        *_strides(query, 2),
        *_strides(key, 2),
        *_strides(value, 2),
        *_strides(cos, 2),
        *_strides(sin, 2),
        *_strides(key_buffer, 3),
        *_strides(value_buffer, 3),
        nodes,
        0 if key_buffer is None else key_buffer.shape[2],
        offset,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROTARY=cos.shape[-1],
        HAS_QUERY_NORM=query_norm is not None,
        HAS_KEY_NORM=key_norm is not None,
        num_warps=1,
        enable_fp_fusion=False,  # a product and a sum in one step would round once where PyTorch rounds twice
    )
    return out.transpose(1, 2)
