"""Linear layers over a few rows in Triton: each weight is read once, by programs that are all resident together."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .fused_norm_kernel import add_rms_norm_triton
from .linear_configs import LinearConfig

# What a tensor map asks of addresses, in bytes.
MAP_ALIGNMENT = 16


@triton.jit
def _weight_tile(
    weight, row, column, rows, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    MAPPED: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, BLOCK_K]` of a weight `[rows, DEPTH]`; it passes through the cache once and need not stay there."""
    if MAPPED:
        return weight.load([row, column])
    else:
        n = row + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64)[:, None] * DEPTH + (column + tl.arange(0, BLOCK_K))[None, :]
        return tl.load(weight + at, mask=(n < rows)[:, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def _input_tile(
    x, column, rows, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, MAPPED: tl.constexpr
):  # fmt: skip
    """`[BLOCK_K, BLOCK_M]` of the inputs `[rows, DEPTH]`."""
    if MAPPED:
        return tl.trans(x.load([0, column]))
    else:
        m = tl.arange(0, BLOCK_M)
        at = m[:, None] * DEPTH + (column + tl.arange(0, BLOCK_K))[None, :]
        return tl.trans(tl.load(x + at, mask=(m < rows)[:, None], other=0.0))


@triton.jit(do_not_specialize=["rows", "share"])
def few_rows_kernel(
    x, weight, other, out, rows, share, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of output columns, splits of the depth).

    The weights' rows stand where a product has its rows, 64 to an instruction; the few inputs stand where it has its
    columns. Writes split s of a plain product to `out[s]`; a gated one has one split.
    """
    column = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first = split * share
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, tl.minimum(first + share, DEPTH // BLOCK_K), num_stages=STAGES):
        at = block * BLOCK_K
        inputs = _input_tile(x, at, rows, DEPTH, BLOCK_M, BLOCK_K, MAPPED)
        product = tl.dot(_weight_tile(weight, column, at, COLUMNS, DEPTH, BLOCK_N, BLOCK_K, MAPPED), inputs, product)
        if GATED:
            second = tl.dot(_weight_tile(other, column, at, COLUMNS, DEPTH, BLOCK_N, BLOCK_K, MAPPED), inputs, second)
    n = column + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (n < COLUMNS)[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * COLUMNS + n[:, None]
    dtype = out.dtype.element_ty
    if GATED:
        gate = product.to(dtype).to(tl.float32)
        opened = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(out + at, (opened * second.to(dtype).to(tl.float32)).to(dtype), mask=mask)
    else:
        tl.store(out + split.to(tl.int64) * rows * COLUMNS + at, product.to(dtype), mask=mask)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None, config: LinearConfig, dtype: torch.dtype
) -> torch.Tensor:
    """Products `[splits, rows, N]` of `x` `[rows, K]`."""
    rows, depth = x.shape
    columns = weight.shape[0]
    blocks = depth // config.block_k
    share = -(-blocks // config.splits)
    splits = -(-blocks // share)  # no split is empty
    out = torch.empty(splits, rows, columns, dtype=dtype, device=x.device)
    operands = [x, weight, other]
    mapped = config.mapped and all(part is None or part.data_ptr() % MAP_ALIGNMENT == 0 for part in operands)
    if mapped:
        block = [config.block_n, config.block_k]
        operands = [
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, block),
            None if other is None else TensorDescriptor.from_tensor(other, block),
        ]
    few_rows_kernel[(-(-columns // config.block_n), splits)](
        *operands,
        out,
        rows,
        share,
        COLUMNS=columns,
        DEPTH=depth,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        GATED=other is not None,
        MAPPED=mapped,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def linear_triton(x: torch.Tensor, weight: torch.Tensor, config: LinearConfig) -> torch.Tensor:
    """`x @ weight.T` in one launch; `config` has one split."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _launch(rows, weight, None, config, x.dtype).view(*x.shape[:-1], -1)


def gated_linear_triton(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, config: LinearConfig) -> torch.Tensor:
    """`gated_linear_torch` in one launch."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _launch(rows, gate, up, config, x.dtype).view(*x.shape[:-1], -1)


def linear_add_rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    config: LinearConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_add_rms_norm_torch` in two launches; the norm's adds up the splits."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    parts = _launch(rows, weight, None, config, torch.float32)
    return add_rms_norm_triton(parts.view(-1, *residual.shape), residual, norm_weight, eps, parts=True)
