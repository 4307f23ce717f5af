"""The target's K/V cache: preallocated, written in place, committed by moving only the accepted rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .draft_window import DraftWindow

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

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all; copies the buffers when they are too small."""
        if rows <= self.capacity:
            return
        grown = self.announced if self.capacity == 0 else max(self.announced, self.capacity + GROWTH_ROWS)
        wanted = max(rows, grown if self.limit is None else min(grown, self.limit))
        self._key_buffer = _grown(self._key_buffer, wanted, self.length)
        self._value_buffer = _grown(self._value_buffer, wanted, self.length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows behind the ones in use and return all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.reserve(end)
        self._key_buffer[:, :, self.length : end] = key_states
        self._value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]

    def move_rows(self, source: torch.Tensor, first: int) -> None:
        """Copy rows `source` `[n]` to `first ..` in place."""
        rows = slice(first, first + source.shape[0])
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[:, :, rows] = buffer[:, :, source.to(buffer.device)]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `abs(tokens_to_remove)` rows; their memory is kept."""
        self.length = _length_after_crop(self.length, tokens_to_remove)

    def reset(self) -> None:
        self.length = 0


class LongSpecCache(Cache):
    """Cache of a target that is decoded with a LongSpec draft.

    Behaves like a `DynamicCache`, so it can be passed on to the next `generate` call or `forward`. Per layer it holds
    rows for committed tokens, and during a round the rows of the tree behind them.

    Attributes:
        draft_window: the draft's own constant-size K/V, `None` before the first round.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=LongSpecLayer)
        self._announced = 0
        self._limit: int | None = None
        self.draft_window: DraftWindow | None = None

    @staticmethod
    def can_take_over(cache: Cache) -> bool:
        """Whether every row of `cache` is still there: no layer has begun to forget, or never keeps any."""
        return all(isinstance(layer, DynamicLayer) and _keeps_every_row(layer) for layer in cache.layers)

    @classmethod
    def take_over(cls, cache: Cache) -> LongSpecCache:
        """A cache with the rows of `cache`, copied once; `cache` is left as it is.

        Raises:
            ValueError: `can_take_over` says no.
        """
        if not cls.can_take_over(cache):
            raise ValueError(
                f"`cache` must keep every row of the text, got {cache!r}. Pass a cache without window or recurrent "
                "layers, or one returned by a LongSpec call."
            )
        taken = cls()
        for index, layer in enumerate(cache.layers):
            if layer.get_seq_length():
                taken.update(layer.keys, layer.values, index)
        return taken

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(LongSpecLayer(self._announced, self._limit))
        return self.layers[layer_idx].update(key_states, value_states)

    def reserve(self, rows: int, limit: int | None = None) -> None:
        """Make room for `rows` rows in every layer; a layer that has none yet gets them at its first write.

        Args:
            rows: rows to hold without growing.
            limit: most rows the text can come to need.
        """
        self._announced, self._limit = rows, limit
        for layer in self.layers:
            layer.announced, layer.limit = rows, limit
            if layer.is_initialized:
                layer.reserve(rows)

    def commit(self, visited: Sequence[int], num_nodes: int) -> None:
        """Keep the rows of the visited nodes of the tree written last, forget the others.

        Args:
            visited: indices of the nodes on the committed path, the root (0) first, increasing.
            num_nodes: rows the tree was written to.
        """
        base = self.get_seq_length() - num_nodes
        # Nodes that already lie in place (a chain always does) are not moved.
        in_place = next((i for i, node in enumerate(visited) if node != i), len(visited))
        if in_place < len(visited):
            source = torch.tensor(visited[in_place:]) + base
            for layer in self.layers:
                layer.move_rows(source, base + in_place)
        self.crop(len(visited) - num_nodes)

    def truncate(self, rows: int) -> None:
        """Keep at most the first `rows` rows of every layer, also when a broken-off forward wrote only some layers."""
        for layer in self.layers:
            layer.length = min(layer.length, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `abs(tokens_to_remove)` tokens; nothing is changed if there are fewer.

        Raises:
            ValueError: `tokens_to_remove` is positive, or more than there are.
        """
        _length_after_crop(self.get_seq_length(), tokens_to_remove)
        super().crop(tokens_to_remove)


def _length_after_crop(length: int, tokens_to_remove: int) -> int:
    if not -length <= tokens_to_remove <= 0:
        raise ValueError(
            f"`tokens_to_remove` must be a negative count of at most {length} tokens (the cache's length), got "
            f"{tokens_to_remove}. `crop(-n)` removes the last n tokens."
        )
    return length + tokens_to_remove


def _grown(buffer: torch.Tensor, rows: int, used: int) -> torch.Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], rows, buffer.shape[-1])
    grown[:, :, :used] = buffer[:, :, :used]
    return grown


def _keeps_every_row(layer: DynamicLayer) -> bool:
    if type(layer) in (DynamicLayer, LongSpecLayer):
        return True
    held = layer.keys.shape[-2] if layer.is_initialized else 0
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() == held
