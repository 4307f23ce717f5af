"""Linear layers over a few rows in Triton: each weight is read once, by programs that are all resident together."""

from typing import Any

import torch
import triton
import triton.language as tl

from .early_launch import overlapped, release_successor, wait_for_predecessor
from .fused_norm_kernel import add_rms_norm_triton
from .linear_configs import LinearConfig
from .triton_configs import device_limits

# What a tensor map asks of addresses, in bytes.
MAP_ALIGNMENT = 16
# Elements of half precision in a line of the cache, and lines of each weight row that a program asks for while its
# predecessor runs: measured from 1 to 8, see docs/kernels.md.
LINE = tl.constexpr(64)
LINES_AHEAD = tl.constexpr(2)


@triton.jit
def _fetch_ahead(weight, row, column, rows, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Have the beginning of a program's weight rows brought to the L2 cache."""
    n = tl.minimum(row + tl.arange(0, BLOCK_N), rows - 1)
    k = tl.minimum(column + LINE * tl.arange(0, LINES_AHEAD), DEPTH - 1)
    at = n.to(tl.int64)[:, None] * DEPTH + k[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weight + at], dtype=tl.int32, is_pure=False, pack=1
    )


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


@triton.jit
def few_rows_products(
    x, weight, other, weight_data, other_data, rows, column, columns, first, last,
    DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, INPUTS_MAPPED: tl.constexpr, WEIGHTS_MAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, BLOCK_M]` of the product with one weight, and with the other of a gate, over tiles of the depth.

    The weights' rows stand where a product has its rows, 64 to an instruction; the few inputs stand where it has its
    columns.
    """
    if EARLY:
        _fetch_ahead(weight_data, column, first * BLOCK_K, columns, DEPTH, BLOCK_N)
        if GATED:
            _fetch_ahead(other_data, column, first * BLOCK_K, columns, DEPTH, BLOCK_N)
        wait_for_predecessor()
    product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        at = block * BLOCK_K
        inputs = _input_tile(x, at, rows, DEPTH, BLOCK_M, BLOCK_K, INPUTS_MAPPED)
        tile = _weight_tile(weight, column, at, columns, DEPTH, BLOCK_N, BLOCK_K, WEIGHTS_MAPPED)
        product = tl.dot(tile, inputs, product)
        if GATED:
            tile = _weight_tile(other, column, at, columns, DEPTH, BLOCK_N, BLOCK_K, WEIGHTS_MAPPED)
            second = tl.dot(tile, inputs, second)
    if EARLY:
        release_successor()
    return product, second


@triton.jit(do_not_specialize=["rows", "share"])
def few_rows_kernel(
    x, weight, other, weight_data, other_data, out, rows, share, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, MAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of output columns, splits of the depth).

    Writes split s of a plain product to `out[s]`; a gated one has one split. The next kernel reads that, so it is to
    stay in the L2 cache, which weights stream through. Weights are given twice: as what tiles are loaded by, and as
    tensors.
    """
    column = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first = split * share
    last = tl.minimum(first + share, DEPTH // BLOCK_K)
    product, second = few_rows_products(
        x, weight, other, weight_data, other_data, rows, column, COLUMNS, first, last,
        DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GATED, MAPPED, MAPPED, EARLY,
    )  # fmt: skip
    n = column + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (n < COLUMNS)[:, None] & (m < rows)[None, :]
    at = m[None, :].to(tl.int64) * COLUMNS + n[:, None]
    dtype = out.dtype.element_ty
    if GATED:
        gate = product.to(dtype).to(tl.float32)
        opened = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = (opened * second.to(dtype).to(tl.float32)).to(dtype)
        tl.store(out + at, result, mask=mask, eviction_policy="evict_last")
    else:
        out += split.to(tl.int64) * rows * COLUMNS
        tl.store(out + at, product.to(dtype), mask=mask, eviction_policy="evict_last")


def operands_of(x: torch.Tensor, weights: list[torch.Tensor | None], config: LinearConfig) -> tuple[list[Any], bool]:
    """What tiles of the inputs and the weights are loaded by, and whether that is tensor maps."""
    given = [x, *weights]
    if not config.mapped or any(part is not None and part.data_ptr() % MAP_ALIGNMENT for part in (x, *weights)):
        return given, False
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in Triton 3.2 and 3.3, nor used with them

    block = [config.block_n, config.block_k]
    maps = [None if part is None else TensorDescriptor.from_tensor(part, block) for part in weights]
    return [TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]), *maps], True


def shares_of(depth: int, config: LinearConfig) -> tuple[int, int]:
    """Tiles of the depth to a split, and splits: none is empty."""
    blocks = depth // config.block_k
    share = -(-blocks // config.splits)
    return share, -(-blocks // share)


def split_products(
    x: torch.Tensor, weight: torch.Tensor, config: LinearConfig, dtype: torch.dtype, other: torch.Tensor | None = None
) -> torch.Tensor:
    """Products `[splits, ..., N]` of `x` `[..., K]`, opened by those of the other weight if there is one."""
    leading = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]).contiguous()
    rows, depth = x.shape
    columns = weight.shape[0]
    share, splits = shares_of(depth, config)
    out = torch.empty(splits, rows, columns, dtype=dtype, device=x.device)
    operands, mapped = operands_of(x, [weight, other], config)
    early = device_limits(x.device).dependent_launch
    few_rows_kernel[(-(-columns // config.block_n), splits)](
        *operands,
        weight,
        other,
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
        EARLY=early,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlapped(early),
    )
    return out.view(splits, *leading, columns)


def linear_triton(x: torch.Tensor, weight: torch.Tensor, config: LinearConfig) -> torch.Tensor:
    """`x @ weight.T` in one launch; `config` has one split."""
    return split_products(x, weight, config, x.dtype)[0]


def gated_linear_triton(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, config: LinearConfig) -> torch.Tensor:
    """`gated_linear_torch` in one launch."""
    return split_products(x, gate, config, x.dtype, up)[0]


def linear_add_rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    config: LinearConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_add_rms_norm_torch` in two launches; the norm's adds up the splits."""
    parts = split_products(x, weight, config, torch.float32)
    return add_rms_norm_triton(parts, residual, norm_weight, eps, parts=True)
