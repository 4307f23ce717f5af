"""Small copies between host and device that neither side waits for before it has to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class HostCopies:
    """Copies through pinned memory, which a device reads and writes in the order of its stream.

    Args:
        device: the other side. On a CPU the copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._sent: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}

    def tensor(self, values: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of integers as an int64 tensor on the device, there behind what its stream still has to do."""
        return torch.tensor(values, pin_memory=self._on_gpu).to(self._device, non_blocking=True)

    def device_is_busy(self) -> bool:
        """Whether the device's stream still has something to do."""
        return self._on_gpu and not torch.cuda.current_stream(self._device).query()

    def send(self, values: Sequence[Sequence[int]], target: torch.Tensor) -> None:
        """Write rows of integers to an int64 tensor on the device, behind what its stream still has to do."""
        if not self._on_gpu:
            target.copy_(torch.tensor(values))
            return
        if (shape := tuple(target.shape)) not in self._sent:
            self._sent[shape] = (torch.empty(shape, dtype=torch.long, pin_memory=True), torch.cuda.Event())
        buffer, copied = self._sent[shape]
        copied.synchronize()  # the copy before has been read; new events do not wait
        buffer.copy_(torch.tensor(values))
        target.copy_(buffer, non_blocking=True)
        copied.record(torch.cuda.current_stream(target.device))

    def fetch(self, source: torch.Tensor) -> Callable[[], list[Any]]:
        """Begin to read a tensor as it is at this point of the stream; the result waits for that and no later work."""
        if not self._on_gpu:
            values = source.tolist()
            return lambda: values
        buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        buffer.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(source.device))

        def read() -> list[Any]:
            copied.synchronize()
            return buffer.tolist()

        return read
