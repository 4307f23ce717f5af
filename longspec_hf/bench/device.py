"""Timing on a device, and what its memory can do."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

COPY_BYTES = 2**31
WARM_UPS = 3


def measure(function: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds of a call, by CUDA events around each."""
    for _ in range(WARM_UPS):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes counted."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (measure(lambda: target.copy_(source)) / 1e3)


def device_name(device: torch.device) -> str:
    """Name of the device, as tables show it."""
    return torch.cuda.get_device_name(device)
