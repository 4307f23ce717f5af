"""The table of tiles and splits: fits every device, depends on shapes alone."""

import pytest
import torch
from longspec_hf_kernels.triton_configs import (
    HOPPER_TILE,
    LONG_TILE,
    WINDOW_TILE,
    DeviceLimits,
    LaunchOptions,
    choose_launch,
    choose_splits,
    choose_tile,
    min_split_tiles,
    padded_head_dim,
    prefers_hopper,
    prefers_long_tile,
    reduction_chunk,
)

DEVICES = {
    "H100": DeviceLimits(multiprocessors=132, shared_memory=228 * 1024, dependent_launch=True),
    "A100": DeviceLimits(multiprocessors=108, shared_memory=164 * 1024, dependent_launch=False),
    "consumer": DeviceLimits(multiprocessors=84, shared_memory=100 * 1024, dependent_launch=False),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 448, 2048])
def test_tiles_fit_the_shared_memory(rows, head_dim, dtype, device):
    limits = DEVICES[device]
    tile = choose_tile(rows, head_dim, dtype, limits)
    stages = 2 * tile.block_n * tile.num_stages
    used = padded_head_dim(head_dim) * dtype.itemsize * (tile.block_m + stages)
    assert tile.num_stages == 1 or used * tile.programs_per_sm <= limits.shared_memory
    assert tile.block_m >= 16 and tile.block_n >= 16 and min_split_tiles(tile) >= 1


@pytest.mark.parametrize("rows, kv_heads, batch", [(1, 1, 1), (7, 4, 1), (448, 4, 1), (64, 32, 1), (64, 32, 64)])
def test_all_programs_are_resident_at_once_unless_there_are_too_many_for_that(rows, kv_heads, batch):
    limits = DEVICES["H100"]
    tile = choose_tile(rows, 128, torch.bfloat16, limits)
    splits = choose_splits(tile, rows, kv_heads, batch, limits)
    programs = -(-rows // tile.block_m) * kv_heads * batch * splits
    assert splits >= 1
    assert splits == 1 or programs <= tile.programs_per_sm * limits.multiprocessors


@pytest.mark.parametrize(
    "rows, kv_heads, batch, expected",
    [
        (64, 32, 1, False),  # one tile of 64 rows holds them
        (65, 32, 1, True),  # 4 splits of Hopper's tile: little to merge
        (65, 26, 1, False),  # 5 splits
        (128, 8, 1, False),  # 16 splits
        (128, 8, 4, True),  # the sequences of a batch leave 4
        (129, 1, 1, True),  # many rows, however many splits
        (448, 4, 1, True),
    ],
)
def test_hopper_is_preferred_for_many_rows_or_for_two_tiles_of_few_splits(rows, kv_heads, batch, expected):
    assert prefers_hopper(rows, kv_heads, batch, DEVICES["H100"]) == expected


@pytest.mark.parametrize(
    "rows, head_dim, splits, device, expected",
    [
        (128, 128, 8, "H100", True),
        (65, 128, 1, "H100", True),
        (64, 128, 4, "H100", False),  # one tile of rows holds them
        (129, 128, 4, "H100", False),  # more than two
        (112, 128, 16, "H100", False),  # shares of few tiles would differ much
        (128, 64, 8, "H100", False),  # not measured
        (128, 128, 8, "A100", False),  # no room for three stages
    ],
)
def test_long_tiles_are_for_two_row_tiles_of_few_splits(rows, head_dim, splits, device, expected):
    assert prefers_long_tile(rows, head_dim, torch.bfloat16, splits, DEVICES[device]) == expected
    assert not prefers_long_tile(rows, head_dim, torch.float32, splits, DEVICES[device])


@pytest.mark.parametrize(
    "nodes, window, tree_keys, dtype, splits",
    [
        (1, 512, 1, torch.bfloat16, 17),  # a program for each masked tile
        (4, 512, 5, torch.bfloat16, 17),
        (16, 512, 53, torch.bfloat16, 9),  # two to a multiprocessor: 28 row tiles of 9
        (16, 4096, 53, torch.bfloat16, None),
        (64, 512, 64, torch.bfloat16, None),  # 448 rows
        (16, 512, 53, torch.float32, None),
        (16, None, 53, torch.bfloat16, None),
    ],
)
def test_short_windows_have_small_tiles(monkeypatch, nodes, window, tree_keys, dtype, splits):
    triton_attention = pytest.importorskip("longspec_hf_kernels.triton_attention", reason="it launches Triton kernels")
    monkeypatch.setattr(triton_attention, "device_limits", lambda _: DEVICES["H100"])
    query, key = torch.zeros(1, 28, nodes, 128, dtype=dtype), torch.zeros(1, 4, 2048, 128, dtype=dtype)
    plan = triton_attention.plan_splits(query, key, tree_keys, None, None, window=window)
    assert (plan.tile == WINDOW_TILE) == (splits is not None)
    if splits is not None:
        assert (plan.launched, plan.min_tiles, plan.early) == (splits, 1, True)
    given = choose_tile(16, 128, dtype, DEVICES["H100"])
    assert triton_attention.plan_splits(query, key, tree_keys, given, None, window=window).tile == given


@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("splits", [1, 4, 16, 17, 33, 128])
def test_calls_come_in_early_alone_on_a_multiprocessor_and_reduce_in_registers(rows, splits):
    tile = choose_tile(rows, 128, torch.bfloat16, DEVICES["H100"])
    options = choose_launch(tile, splits)
    assert options.early_splits == (rows <= 128) == (tile.programs_per_sm == 1)
    assert options.reduction_warps == (1 if splits <= 16 else 4)
    assert choose_launch(HOPPER_TILE, splits).reduction_warps == options.reduction_warps
    for head_dim in (64, 128, 256):
        values = reduction_chunk(splits) * head_dim // (32 * options.reduction_warps)
        assert values <= 128, "half of a thread's registers"


def test_the_reduction_reads_as_many_splits_at_once_as_there_are():
    assert [reduction_chunk(splits) for splits in (1, 3, 8, 9, 16, 17, 132)] == [1, 4, 8, 16, 16, 64, 64]


@pytest.mark.parametrize("hopper", [True, False])
def test_a_call_without_options_is_launched_as_the_table_says(monkeypatch, hopper):
    triton_attention = pytest.importorskip("longspec_hf_kernels.triton_attention", reason="it launches Triton kernels")
    monkeypatch.setattr(triton_attention, "device_limits", lambda _: DEVICES["H100"])
    for nodes in (4, 64):
        query, key = torch.zeros(1, 8, nodes, 64, dtype=torch.half), torch.zeros(1, 2, 65536, 64, dtype=torch.half)
        plan = triton_attention.plan_splits(query, key, nodes, None, None, hopper=hopper)
        assert plan.options == choose_launch(plan.tile, plan.planned)
        assert plan.early == (nodes == 4) and plan.dependent


def test_a_call_has_long_tiles_where_they_are_preferred_and_none_is_given(monkeypatch):
    triton_attention = pytest.importorskip("longspec_hf_kernels.triton_attention", reason="it launches Triton kernels")
    monkeypatch.setattr(triton_attention, "device_limits", lambda _: DEVICES["H100"])
    query, key = torch.zeros(1, 32, 32, 128, dtype=torch.half), torch.zeros(1, 8, 65536, 128, dtype=torch.half)
    assert triton_attention.plan_splits(query, key, 32, None, None).tile == LONG_TILE
    given = choose_tile(128, 128, torch.half, DEVICES["H100"])
    assert triton_attention.plan_splits(query, key, 32, given, None).tile == given != LONG_TILE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("hopper", [True, False])
def test_launches_overlap_where_asked_and_the_device_can(monkeypatch, device, splits, hopper):
    triton_attention = pytest.importorskip("longspec_hf_kernels.triton_attention", reason="it launches Triton kernels")
    limits = DEVICES[device]
    monkeypatch.setattr(triton_attention, "device_limits", lambda _: limits)
    query, key = torch.zeros(1, 8, 4, 64), torch.zeros(1, 2, 4096, 64)
    both = LaunchOptions(early_splits=True, early_hopper=True)
    for options in (LaunchOptions(), both):
        plan = triton_attention.plan_splits(query, key, 4, None, splits, hopper=hopper, options=options)
        assert plan.early == (limits.dependent_launch and options is both)
        # Without a second split the portable kernel has no reduction behind it; the Hopper kernel always has.
        reduction = options is both if hopper else splits > 1
        assert plan.dependent == (limits.dependent_launch and reduction)
