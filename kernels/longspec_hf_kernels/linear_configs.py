"""Tiles and splits of the few-rows linear kernel: one rule, its reasons, and which products it is for."""

from dataclasses import dataclass

import torch

from .triton_configs import DeviceLimits

LINEAR_DTYPES = (torch.float16, torch.bfloat16)
# Rows whose products the matrix units do while the weights arrive. From 65 on the libraries' kernels are as fast.
MOST_ROWS = 64
# Above so many rows, weights of up to so many elements are read no faster than by the libraries' kernels.
FEW_ROWS = 32
SMALL_MATRIX = 2**24
# Output columns of a program: the rows of one warpgroup instruction. Wider tiles leave multiprocessors without work.
BLOCK_N = 64
# Depth of a tile and tiles in flight, best first: long rows are read best, and deep pipelines need fewer programs.
PIPELINES = ((128, 3), (128, 2), (64, 3))
# Splits of a product whose sums are added up later: more are more partial results to write and read.
MOST_SPLITS = 4
# Programs a multiprocessor shall have: two hide each other's beginning and end.
PROGRAMS_PER_SM = 2


@dataclass(frozen=True)
class LinearConfig:
    """How the kernel works.

    Attributes:
        block_m, block_n, block_k: inputs, output columns and depth of a tile.
        stages: tiles in flight.
        splits: parts of the depth.
        mapped: whether tiles are fetched through tensor maps.
        warps: of a program.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    splits: int = 1
    mapped: bool = False
    warps: int = 4


def is_for_few_rows(x: torch.Tensor, weight: torch.Tensor, *, saves_launches: bool = False) -> bool:
    """Whether the kernel is made for `x @ weight.T`: few rows of half precision and whole tiles of depth.

    Args:
        saves_launches: it stands for several launches of the libraries' kernels, which small weights wait for.
    """
    rows = x.numel() // max(1, x.shape[-1])
    return (
        0 < rows <= MOST_ROWS
        and (saves_launches or rows <= FEW_ROWS or weight.numel() > SMALL_MATRIX)
        and x.dtype == weight.dtype
        and x.dtype in LINEAR_DTYPES
        and weight.is_contiguous()
        and weight.shape[1] % PIPELINES[-1][0] == 0
    )


def choose_linear(
    rows: int, columns: int, depth: int, limits: DeviceLimits, *, gated: bool = False, split: bool = False
) -> LinearConfig:
    """Tiles for a product of `rows` inputs with a weight `[columns, depth]`.

    All programs shall be resident at once: what is left over for a second round would have the memory to itself, and
    not use it. Among the pipelines with which they are, the first; else the one with the smallest tiles.

    Args:
        limits: of the device.
        gated: there are two such weights.
        split: whether the depth may be split.
    """
    block_m = max(16, 1 << (rows - 1).bit_length())
    tiles = -(-columns // BLOCK_N)
    splits = min(MOST_SPLITS, max(1, PROGRAMS_PER_SM * limits.multiprocessors // tiles)) if split else 1
    usable = [(block_k, stages) for block_k, stages in PIPELINES if depth % block_k == 0]
    for block_k, stages in usable:
        used = 2 * stages * block_k * (block_m + BLOCK_N * (1 + gated))
        if tiles * splits <= limits.multiprocessors * (limits.shared_memory // used):
            break
    mapped = limits.tensor_maps and block_m > 16
    return LinearConfig(block_m, BLOCK_N, block_k, stages, splits, mapped)
