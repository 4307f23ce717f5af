"""K/V of one target layer: preallocated, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

GROWTH_ROWS = 4096
"""Rows added at once when a buffer is full: large enough to be rare, small against a long context."""


class LongSpecLayer(DynamicLayer):
    """K/V of one target layer in a buffer with spare rows.

    `keys` and `values` are views of the rows in use, `[B, Hkv, length, D]`; the buffers behind them are only replaced
    when they are full.

    Args:
        capacity: rows to allocate at the first write, if known.
        limit: rows beyond which growing by whole chunks makes no sense, if known.
    """

    is_croppable = True

    def __init__(self, capacity: int = 0, limit: int | None = None) -> None:
        self.announced = capacity
        self.limit = limit
        self.length = 0
        self._key_buffer: Any = None  # a tensor once there is a row
        self._value_buffer: Any = None
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._key_buffer is None else self._key_buffer[:, :, : self.length]

    @keys.setter
    def keys(self, rows: torch.Tensor | None) -> None:
        self._key_buffer = rows
        self.length = 0 if rows is None else rows.shape[-2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._value_buffer is None else self._value_buffer[:, :, : self.length]

    @values.setter
    def values(self, rows: torch.Tensor | None) -> None:
        self._value_buffer = rows

    @property
    def capacity(self) -> int:
        """Rows the buffers hold."""
        return 0 if self._key_buffer is None else self._key_buffer.shape[-2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self._value_buffer = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def own_buffers(self) -> None:
        """Replace buffers that were made in inference mode, which only lets them be written there, by copies."""
        # A compiled forward cannot ask; calls with a draft have been here before it (`remember`).
        if self._key_buffer is None or torch.compiler.is_compiling():
            return
        if torch.is_inference_mode_enabled() or not self._key_buffer.is_inference():
            return
        self._key_buffer, self._value_buffer = self._key_buffer.clone(), self._value_buffer.clone()

    def load(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take copies of the rows `[B, Hkv, n, D]` that end a text of `length` rows; n < length in windows only."""
        self.update(keys, values)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all; copies the buffers when they are too small."""
        if rows <= self.capacity:
            return
        at_once = self.announced if self.capacity == 0 else max(self.announced, self.capacity + GROWTH_ROWS)
        wanted = max(rows, at_once if self.limit is None else min(at_once, self.limit))
        self._key_buffer = grown(self._key_buffer, wanted, self.length)
        self._value_buffer = grown(self._value_buffer, wanted, self.length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows behind the ones in use and return all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.own_buffers()
        end = self.length + key_states.shape[-2]
        self.reserve(end)
        self._key_buffer[:, :, self.length : end] = key_states
        self._value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]

    def make_room(self, lengths: Sequence[int], rows: int) -> None:
        """Let `rows` rows more fit behind the first sequences, which have these lengths."""
        self.own_buffers()
        self.reserve(max(lengths) + rows)

    def buffer_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Where rows `[b, n]` of the texts lie in the buffers, on the layer's device."""
        return rows.to(self.device)

    def write_tree(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a tree's rows `[b, Hkv, T, D]` of the first b sequences to rows `[b, T]`, which stay uncommitted.

        Returns the whole buffers of those sequences: nothing here depends on a length, so a compiled target is
        compiled once.
        """
        buffers = self.buffers(rows.shape[0])
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            if rows.shape[0] == 1:
                buffer.index_copy_(2, rows[0], states)
            else:
                buffer.scatter_(2, rows[:, None, :, None].expand_as(states), states)
        return buffers

    def buffers(self, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[sequences, Hkv, capacity, D]` of the first sequences, spare rows included."""
        return self._key_buffer[:sequences], self._value_buffer[:sequences]

    def move_rows(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows `source` to rows `target`, `[b, n]` each, in place."""
        for buffer in self.buffers(source.shape[0]):
            if source.shape[0] == 1:
                buffer.index_copy_(2, target[0], buffer.index_select(2, source[0]))
            else:
                shape = (-1, buffer.shape[1], -1, buffer.shape[3])
                moved = buffer.gather(2, source[:, None, :, None].expand(shape))
                buffer.scatter_(2, target[:, None, :, None].expand(shape), moved)

    def swap(self, one: int, other: int) -> None:
        """Exchange two sequences."""
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[[one, other]] = buffer[[other, one]]

    def align(self, lengths: Sequence[int]) -> None:
        """Give all sequences, which have these lengths, the longest one's; the rows the others lack become zero."""
        for sequence, length in enumerate(lengths):
            if length < max(lengths):
                for buffer in (self._key_buffer, self._value_buffer):
                    buffer[sequence, :, length:] = 0

    def dropped_rows(self, sequences: int) -> tuple[int, ...] | None:
        """Rows of the first sequences that are no longer in the buffers; `None` for a layer that never drops any."""
        return None

    def visible_rows(
        self, lengths: torch.Tensor, starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the rows of `buffers` that the next token sees end and start, int32 `[b]` each.

        Args:
            lengths: int32 `[b]`, rows of the texts.
            starts: int32 `[b]`, first row of each text that is not padding, `None` without padding.

        Returns:
            `(ends, starts)`.
        """
        return lengths, starts

    def remember(self) -> None:
        """Make sure that `truncate` can go back to the present length, and that the layer can be written."""
        self.own_buffers()

    def begin_rounds(self, may_step_back: bool) -> None:
        """Tell whether the length may be set back, later on, to what it is now."""

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `abs(tokens_to_remove)` rows; their memory is kept."""
        self.length = self.length_after_crop(tokens_to_remove)

    def length_after_crop(self, tokens_to_remove: int) -> int:
        """What `crop` leaves.

        Raises:
            ValueError: `tokens_to_remove` is positive, or more than there are.
        """
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be a negative count of at most {self.length} tokens (the cache's length), "
                f"got {tokens_to_remove}. `crop(-n)` removes the last n tokens."
            )
        return self.length + tokens_to_remove

    def truncate(self, rows: int) -> None:
        """Keep at most the first `rows` rows."""
        self.length = min(self.length, rows)

    def reset(self) -> None:
        self.length = 0


def grown(buffer: torch.Tensor, rows: int, used: int) -> torch.Tensor:
    """A buffer of `rows` rows that begins with the first `used` rows of this one."""
    new = buffer.new_empty(*buffer.shape[:2], rows, buffer.shape[-1])
    new[:, :, :used] = buffer[:, :, :used]
    return new
