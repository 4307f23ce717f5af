"""K/V of a target layer with a sliding window: what the window still needs, and room for a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cache_layer import LongSpecLayer, grown

SLACK_ROWS = 256
"""Rows beyond the window: a window is copied to the front once every so many tokens."""


class WindowLayer(LongSpecLayer):
    """Rows of one target layer whose queries see `window` keys, their own included.

    The rows lie in order, as in [`LongSpecLayer`]. When the buffer is full, the last `window - 1` move to its front
    and the others are dropped, so a buffer holds about a window and a tree whatever the length of the text. Forwards
    outside of rounds see what transformers' `DynamicSlidingWindowLayer` would show them.

    Attributes:
        length: rows of the text, dropped ones included.
        offsets: per sequence, rows dropped; all equal while there are no rounds.
        floor: the layer may be set back to this length at any time, `None` if it never will.
    """

    def __init__(self, window: int, capacity: int = 0, limit: int | None = None) -> None:
        self.window = window
        self.offsets = [0]
        self.floor: int | None = None
        self._remembered: tuple[int, torch.Tensor, torch.Tensor] | None = None
        super().__init__(capacity, limit)

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        return True

    @property
    def _used(self) -> int:
        return self.length - min(self.offsets)

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._key_buffer is None else self._key_buffer[:, :, : self._used]

    @keys.setter
    def keys(self, rows: torch.Tensor | None) -> None:
        self._key_buffer = rows
        offset = 0 if rows is None else self.offsets[0]
        self.offsets = [offset] * (1 if rows is None else rows.shape[0])
        self.length = 0 if rows is None else offset + rows.shape[-2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._value_buffer is None else self._value_buffer[:, :, : self._used]

    @values.setter
    def values(self, rows: torch.Tensor | None) -> None:
        self._value_buffer = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.offsets = [0] * key_states.shape[0]

    def load(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().lazy_initialization(keys, values)
        self._key_buffer, self._value_buffer = keys.clone(), values.clone()
        self.length, self.offsets = length, [length - keys.shape[-2]] * keys.shape[0]

    def reserve(self, rows: int) -> None:
        """Nothing: the buffer does not grow with the text."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows behind the others and return them with the rows that the first of them sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.own_buffers()
        count, end = key_states.shape[-2], self.length + key_states.shape[-2]
        first = max(self.length - self.window + 1, 0)
        if self.floor is None and count > self.window - 1 + SLACK_ROWS:
            return self._update_by_more_than_fits(key_states, value_states, first, end)
        self.make_room([self.length] * len(self.offsets), count)
        into = slice(self.length - self.offsets[0], end - self.offsets[0])
        self._key_buffer[:, :, into] = key_states
        self._value_buffer[:, :, into] = value_states
        self.length = end
        shown = slice(first - self.offsets[0], into.stop)
        return self._key_buffer[:, :, shown], self._value_buffer[:, :, shown]

    def make_room(self, lengths: Sequence[int], rows: int) -> None:
        """Let `rows` rows more fit behind the first sequences, which have these lengths."""
        self.own_buffers()
        needed = 0
        for sequence, length in enumerate(lengths):
            if length + rows - self.offsets[sequence] > self.capacity:
                self._drop_before(sequence, length, self._first_needed(length))
            needed = max(needed, length + rows - self.offsets[sequence])
        if needed > self.capacity:
            room = max(needed, self.window - 1) + SLACK_ROWS
            self._grow(max(needed, room if self.limit is None else min(room, self.limit)))

    def buffer_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - torch.tensor(self.offsets[: rows.shape[0]])[:, None]).to(self.device)

    def dropped_rows(self, sequences: int) -> tuple[int, ...]:
        return tuple(self.offsets[:sequences])

    def visible_rows(
        self, lengths: torch.Tensor, starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        offsets = torch.tensor(self.offsets[: len(lengths)], dtype=torch.int32, device=lengths.device)
        first = (lengths - self.window + 1).clamp(min=0)
        first = first if starts is None else torch.maximum(first, starts)
        return lengths - offsets, first - offsets

    def swap(self, one: int, other: int) -> None:
        super().swap(one, other)
        self.offsets[one], self.offsets[other] = self.offsets[other], self.offsets[one]

    def align(self, lengths: Sequence[int]) -> None:
        self.floor = self._remembered = None
        if len(set(lengths)) == len(set(self.offsets)) == 1:
            return
        first = max(max(lengths) - self.window + 1, 0)
        for sequence, length in enumerate(lengths):
            self._drop_before(sequence, length, min(first, length))
            for buffer in (self._key_buffer, self._value_buffer):
                buffer[sequence, :, max(length - first, 0) :] = 0
            self.offsets[sequence] = first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = max(self.length - self.window + 1, 0)
        return self.length - offset + query_length, offset

    def activate_past_recording(self) -> None:
        """Called by transformers' own assisted generation, which crops what it rejects."""
        self.floor = self.length

    def begin_rounds(self, may_step_back: bool) -> None:
        self.floor = self.length if may_step_back else None

    def remember(self) -> None:
        super().remember()
        self.floor = None
        self._remembered = None
        if self.length:
            last = slice(self._used - min(self.length, self.window - 1), self._used)
            self._remembered = (
                self.length,
                self._key_buffer[:, :, last].clone(),
                self._value_buffer[:, :, last].clone(),
            )

    def truncate(self, rows: int) -> None:
        self.floor, remembered, self._remembered = None, self._remembered, None
        if remembered is not None and remembered[0] == rows:
            length, keys, values = remembered
            self.load(keys, values, length)
        elif rows == 0:
            self.reset()
        elif rows < self.length:
            self.crop(rows - self.length)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.floor is not None:
            self.floor = min(self.floor, self.length)

    def length_after_crop(self, tokens_to_remove: int) -> int:
        left = super().length_after_crop(tokens_to_remove)
        gone = max(self.offsets)
        if tokens_to_remove and gone > max(left - self.window + 1, 0):
            raise ValueError(
                f"`tokens_to_remove` must be at least {gone + self.window - 1 - self.length}, got {tokens_to_remove}: "
                f"of {self.length} tokens, a layer with a sliding window of {self.window} no longer holds the first "
                f"{gone}. Keep a copy of the cache from before, or read the text again."
            )
        return left

    def reset(self) -> None:
        self.length = 0
        self.offsets = [0] * len(self.offsets)

    def _first_needed(self, length: int) -> int:
        """First row that a token behind `length` rows may see, now or when the layer has been set back."""
        return max((length if self.floor is None else min(length, self.floor)) - self.window + 1, 0)

    def _drop_before(self, sequence: int, length: int, first: int) -> None:
        offset = self.offsets[sequence]
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[sequence, :, : length - first] = buffer[sequence, :, first - offset : length - offset].clone()
        self.offsets[sequence] = first

    def _update_by_more_than_fits(
        self, key_states: torch.Tensor, value_states: torch.Tensor, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows from `first` on for this one forward; of them the last `window - 1` are kept."""
        seen = slice(first - self.offsets[0], self.length - self.offsets[0])
        keys = torch.cat([self._key_buffer[:, :, seen], key_states], dim=2)
        values = torch.cat([self._value_buffer[:, :, seen], value_states], dim=2)
        kept = self.window - 1
        if self.capacity < kept:
            self._grow(kept + SLACK_ROWS)
        self._key_buffer[:, :, :kept] = keys[:, :, keys.shape[2] - kept :]
        self._value_buffer[:, :, :kept] = values[:, :, values.shape[2] - kept :]
        self.length, self.offsets = end, [end - kept] * len(self.offsets)
        return keys, values

    def _grow(self, rows: int) -> None:
        self._key_buffer = grown(self._key_buffer, rows, self.capacity)
        self._value_buffer = grown(self._value_buffer, rows, self._value_buffer.shape[-2])
