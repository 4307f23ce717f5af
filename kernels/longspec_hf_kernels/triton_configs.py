"""Tile shapes and split counts of the Triton kernels: one table, its reasons, and device limits."""

import functools
import importlib.metadata
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TileConfig:
    """How one program works: `block_m` packed rows against `block_n` K/V rows at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True)
class LaunchOptions:
    """How the kernels of one call are launched; only `reduction_warps` may change bits, by the order of a sum.

    Attributes:
        early_splits: bring the split kernel in while the kernel before it is still running.
        early_hopper: bring the reduction in while the Hopper kernel is still running, as behind the other one.
        edge_stages: pipeline depth of the masked tiles.
        reduction_warps: warps that merge the splits of one row.
    """

    early_splits: bool = False
    early_hopper: bool = False
    edge_stages: int = 1
    reduction_warps: int = 4


@dataclass(frozen=True)
class DeviceLimits:
    """What the tables need to know of a device; `shared_memory` in bytes per multiprocessor."""

    multiprocessors: int
    shared_memory: int
    dependent_launch: bool
    tensor_maps: bool = False


# Rows are T * Hq / Hkv; the key is the largest number of rows an entry is meant for. Few rows: the time
# is the read of K/V, so the smallest matrix instruction (16 rows), and one program per multiprocessor with
# many rows in flight: half the splits of two programs, so half the partial results to write and merge.
# Many rows: the matrix units, whose warpgroup instruction has 64 rows; larger tiles spill registers, and
# two programs per multiprocessor let the softmax of one run under the products of the other.
HALF_TILES = {
    16: TileConfig(block_m=16, block_n=128, num_warps=4, num_stages=3, programs_per_sm=1),
    64: TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=4, programs_per_sm=1),
    128: TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=5, programs_per_sm=1),
    256: TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=3, programs_per_sm=2),
}
# Heads wider than 128: the accumulator alone fills the registers of 4 warps.
WIDE_HALF_TILES = {
    16: TileConfig(block_m=16, block_n=64, num_warps=4, num_stages=2, programs_per_sm=2),
    64: TileConfig(block_m=64, block_n=64, num_warps=8, num_stages=2, programs_per_sm=1),
}
# Up to 8 splits leave each so many K/V rows that half as many steps of the softmax outweigh coarser shares.
LONG_TILE = TileConfig(block_m=64, block_n=128, num_warps=4, num_stages=3, programs_per_sm=1)
LONG_TILE_HEAD_DIM = 128
LONG_TILE_ROWS = range(65, 129)
LONG_TILE_MOST_SPLITS = 8
# A short window leaves each program one masked tile or two, whose steps wait for one another: the fewest rows to a
# tile, and as many programs as there are tiles, two to a multiprocessor.
WINDOW_TILE = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=1, programs_per_sm=2)
WINDOW_TILE_ROWS = 128
WINDOW_TILE_KEYS = 1024
# True fp32 products run on the ordinary units with both operands in registers: small tiles only.
FLOAT_TILES = {16: TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=2, programs_per_sm=2)}
WIDE_FLOAT_TILES = {16: TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, programs_per_sm=2)}
# One program per multiprocessor: two computing warpgroups of 64 rows, two K/V tiles in flight.
HOPPER_TILE = TileConfig(block_m=128, block_n=128, num_warps=4, num_stages=2, programs_per_sm=1)
# A split shorter than this costs more in the reduction than it gains in parallel reads.
MIN_SPLIT_ROWS = 128
# From 65 rows on a tile of 64 needs K/V twice and the Hopper kernel's tile of 128 once, with half as many
# programs and so twice the splits: that pays while the partial results of those splits stay few. From 129
# rows on it always does: the products, which this kernel is faster at, are the larger part.
HOPPER_MIN_ROWS = 65
HOPPER_ALL_SPLITS_ROWS = 129
HOPPER_FEW_SPLITS = 4
# Shared memory that a program needs beside its tiles.
RESERVED_SHARED_MEMORY = 2048
# Hopper and Triton 3.4 can bring a kernel in before its predecessor has finished, and fetch tiles by tensor maps.
DEPENDENT_LAUNCH_MAJOR = 9
# The warpgroup instructions of `hopper_kernels` exist on this generation alone.
HOPPER_MAJOR = 9
DEPENDENT_LAUNCH_TRITON = (3, 4)


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton installed."""
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Read the limits of a CUDA device; a made-up small one for Triton's interpreter."""
    if device.type != "cuda":
        return DeviceLimits(multiprocessors=2, shared_memory=100 * 1024, dependent_launch=False)
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_multiprocessor,
        dependent_launch=torch.version.hip is None
        and properties.major >= DEPENDENT_LAUNCH_MAJOR
        and triton_version() >= DEPENDENT_LAUNCH_TRITON,
        tensor_maps=torch.version.hip is None
        and properties.major == HOPPER_MAJOR
        and triton_version() >= DEPENDENT_LAUNCH_TRITON,
    )


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds a head: tiles have power-of-two sides (80 and 96 become 128)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tile(rows: int, head_dim: int, dtype: torch.dtype, limits: DeviceLimits) -> TileConfig:
    """The tile for `rows` packed rows, with its pipeline cut to the device's shared memory.

    Args:
        rows: `T * Hq / Hkv`.
        head_dim: unpadded.
        dtype: of query, key and value.
        limits: of the device.
    """
    wide = padded_head_dim(head_dim) > 128
    if dtype == torch.float32:
        table = WIDE_FLOAT_TILES if wide else FLOAT_TILES
    else:
        table = WIDE_HALF_TILES if wide else HALF_TILES
    tile = next((config for most, config in table.items() if rows <= most), list(table.values())[-1])
    width = padded_head_dim(head_dim) * dtype.itemsize
    while True:
        used = width * (tile.block_m + 2 * tile.block_n * tile.num_stages) + RESERVED_SHARED_MEMORY
        if used * tile.programs_per_sm <= limits.shared_memory:
            return tile
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.programs_per_sm > 1:
            tile = replace(tile, programs_per_sm=tile.programs_per_sm - 1)
        elif tile.block_n > 16:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            return replace(tile, num_stages=1)


def prefers_long_tile(rows: int, head_dim: int, dtype: torch.dtype, splits: int, limits: DeviceLimits) -> bool:
    """Whether `LONG_TILE` is faster than the table's tile, which has the same height and so as many splits."""
    tile, width = LONG_TILE, head_dim * dtype.itemsize
    used = width * (tile.block_m + 2 * tile.block_n * tile.num_stages) + RESERVED_SHARED_MEMORY
    return (
        rows in LONG_TILE_ROWS
        and head_dim == LONG_TILE_HEAD_DIM
        and dtype != torch.float32
        and splits <= LONG_TILE_MOST_SPLITS
        and used <= limits.shared_memory
    )


def prefers_window_tile(rows: int, keys: int, head_dim: int, dtype: torch.dtype, limits: DeviceLimits) -> bool:
    """Whether `WINDOW_TILE` is for so many packed rows and K/V rows that a window and the tree leave to see."""
    tile = WINDOW_TILE
    used = padded_head_dim(head_dim) * dtype.itemsize * (tile.block_m + 2 * tile.block_n) + RESERVED_SHARED_MEMORY
    return (
        rows <= WINDOW_TILE_ROWS
        and keys <= WINDOW_TILE_KEYS
        and padded_head_dim(head_dim) <= LONG_TILE_HEAD_DIM
        and dtype != torch.float32
        and used * tile.programs_per_sm <= limits.shared_memory
    )


def choose_splits(tile: TileConfig, rows: int, kv_heads: int, batch: int, limits: DeviceLimits) -> int:
    """Splits of the K/V rows such that all programs are resident at once.

    A function of shapes and device only, never of lengths: the launch can be captured in a graph,
    and a sequence's bits do not depend on its neighbours' lengths.
    """
    programs = -(-rows // tile.block_m) * kv_heads * batch
    return max(1, tile.programs_per_sm * limits.multiprocessors // programs)


def min_split_tiles(tile: TileConfig) -> int:
    """Fewest K/V tiles of a split."""
    return max(1, MIN_SPLIT_ROWS // tile.block_n)


def prefers_hopper(rows: int, kv_heads: int, batch: int, limits: DeviceLimits) -> bool:
    """Whether so many packed rows are faster in the Hopper kernel, where it can run."""
    few_splits = choose_splits(HOPPER_TILE, rows, kv_heads, batch, limits) <= HOPPER_FEW_SPLITS
    return rows >= HOPPER_MIN_ROWS and (few_splits or rows >= HOPPER_ALL_SPLITS_ROWS)


def choose_launch(tile: TileConfig, splits: int) -> LaunchOptions:
    """How to launch a call with this tile and so many splits.

    A split kernel may come in early where it has a multiprocessor to itself, or little work; else two programs to one
    were measured up to 5 % slower that way with grouped heads. One warp holds the partial results of up to 16 splits,
    and most rows are merged at once that way; wider chunks need the registers of four.
    """
    warps = 1 if splits <= 16 else 4
    early = tile.programs_per_sm == 1 or tile == WINDOW_TILE
    return LaunchOptions(early_splits=early, early_hopper=True, reduction_warps=warps)


def reduction_chunk(splits: int) -> int:
    """Splits the reduction reads at once: no wasted lanes for few splits, few trips for many."""
    return 1 << (splits - 1).bit_length() if splits <= 16 else 64
