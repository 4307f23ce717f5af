"""Moves the K/V rows of accepted tree nodes together, in all layers at once."""

import math
from collections.abc import Sequence

import torch

from .backends import uses_triton
from .validation import INT_DTYPES


def move_rows_torch(buffer: torch.Tensor, lengths: torch.Tensor, visited: torch.Tensor, counts: torch.Tensor) -> None:
    """The definition of `RowMover.move`, for one buffer."""
    batch, most = visited.shape
    step = torch.arange(1, most, device=buffer.device)
    used = step < counts.unsqueeze(1)
    # A step that is not used copies row `lengths[b]`, which no step overwrites, to itself.
    first = lengths.unsqueeze(1).long()
    source = first + torch.where(used, visited[:, 1:], 0)
    target = first + torch.where(used, step, 0)
    sequence = torch.arange(batch, device=buffer.device).unsqueeze(1)
    buffer[sequence, :, target] = buffer[sequence, :, source]


class RowMover:
    """Commits the accepted nodes of a round: copies their rows behind the prefix, in every layer.

    Args:
        buffers: the key and value buffers of all layers, each `[B, Hkv, capacity, D]`. Those of one dtype, shape and
            strides share a launch. The mover holds them: build a new one when a buffer is replaced.

    Raises:
        ValueError: no buffers, or one that is not 4-dimensional with a contiguous last dimension.
    """

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        if not buffers:
            raise ValueError("`buffers` must hold at least one buffer, got none.")
        self._groups: dict[tuple, list[torch.Tensor]] = {}
        for buffer in buffers:
            if not (buffer.dim() == 4 and buffer.stride(-1) == 1):
                raise ValueError(
                    f"`buffers` must be [B, Hkv, capacity, D] with a contiguous last dimension, got shape "
                    f"{list(buffer.shape)} and strides {list(buffer.stride())}."
                )
            layout = (buffer.device, buffer.dtype, buffer.shape, buffer.stride())
            self._groups.setdefault(layout, []).append(buffer)
        self._addresses, self._alignments = [], []
        for group in self._groups.values():
            addresses = [buffer.data_ptr() for buffer in group]
            # From pinned memory: a copy from any other would wait for the device.
            pinned = torch.tensor(addresses, dtype=torch.int64, pin_memory=group[0].is_cuda)
            self._addresses.append(pinned.to(group[0].device, non_blocking=True))
            self._alignments.append(math.gcd(*addresses))

    def move(self, lengths: torch.Tensor, visited: torch.Tensor, counts: torch.Tensor) -> None:
        """Copy row `lengths[b] + visited[b, i]` to row `lengths[b] + i`, for `1 <= i < counts[b]` in this order.

        Reads its arguments on the device only; a captured call follows what they hold at a replay.

        Args:
            lengths: int32 or int64 `[b]`, b at most B: where the tree's rows begin.
            visited: int64 `[b, P]` node indices of the accepted path: 0 first, strictly increasing in the part used.
            counts: int32 or int64 `[b]`: entries used of each row of `visited`.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        smallest = min(shape[0] for _, _, shape, _ in self._groups)
        if not (visited.dim() == 2 and visited.shape[0] <= smallest and visited.dtype == torch.int64):
            raise ValueError(
                f"`visited` must be int64 of shape [{smallest} or fewer, P], got {visited.dtype} of shape "
                f"{list(visited.shape)}."
            )
        for name, tensor in (("lengths", lengths), ("counts", counts)):
            if not (tensor.shape == visited.shape[:1] and tensor.dtype in INT_DTYPES):
                raise ValueError(
                    f"`{name}` must be int32 or int64 of shape [{visited.shape[0]}], got {tensor.dtype} of shape "
                    f"{list(tensor.shape)}."
                )
        if visited.numel() == 0:
            return
        for group, addresses, alignment in zip(self._groups.values(), self._addresses, self._alignments, strict=True):
            if uses_triton(group[0]):
                from .commit_rows_kernel import move_rows_triton

                move_rows_triton(group[0], addresses, alignment, lengths, visited, counts)
            else:
                for buffer in group:
                    move_rows_torch(buffer, lengths, visited, counts)
