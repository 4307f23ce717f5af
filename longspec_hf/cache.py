"""The target's K/V cache: preallocated, written in place, committed by moving only the accepted rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    def clear_rows(self, sequence: int, first: int) -> None:
        """Zero the rows of a sequence from `first` on."""
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[sequence, :, first:] = 0

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

    Behaves like a `DynamicCache`, so it can be passed on to the next `generate` call or `forward`. Between
    `begin_rounds` and `end_rounds` the sequences of a batch have lengths of their own, and the rows of a round's tree
    lie behind them, uncommitted.

    Attributes:
        draft_window: the draft's own constant-size K/V, `None` before the first round.
        row_lengths: committed rows of each sequence, while there are rounds.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=LongSpecLayer)
        self._announced = 0
        self._limit: int | None = None
        self._tree_rows: dict[torch.device, torch.Tensor] | None = None
        self.draft_window: DraftWindow | None = None
        self.row_lengths: list[int] = []

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
        layer = self.layers[layer_idx]
        if self._tree_rows is None:
            return layer.update(key_states, value_states)
        return layer.write_tree(key_states, value_states, self._tree_rows[key_states.device])

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

    def begin_rounds(self, sequences: int) -> None:
        """From here on the sequences may come to differ in length."""
        self.row_lengths = [self.get_seq_length()] * sequences

    @contextmanager
    def tree(self, sequences: int, nodes: int) -> Iterator[torch.Tensor]:
        """Inside the block a forward over `nodes` nodes of the first `sequences` writes behind the committed rows.

        Yields:
            int32 `[sequences]`, the committed rows.
        """
        for layer in self.layers:
            layer.reserve(max(self.row_lengths[:sequences]) + nodes)
        devices = {layer.device for layer in self.layers}
        lengths = torch.tensor(self.row_lengths[:sequences])
        rows = lengths[:, None] + torch.arange(nodes)
        self._tree_rows = {device: rows.to(device) for device in devices}
        try:
            yield lengths.to(torch.int32)
        finally:
            self._tree_rows = None

    def commit(self, visited: Sequence[Sequence[int]]) -> None:
        """Keep the rows of the visited nodes of the tree written last, forget the others.

        Args:
            visited: per sequence, indices of the nodes on the committed path, the root (0) first, increasing.
        """
        # Nodes that already lie in place (a chain always does) are not moved.
        if any(node != place for path in visited for place, node in enumerate(path)):
            most = max(map(len, visited))
            base = torch.tensor(self.row_lengths[: len(visited)])[:, None]
            # Shorter paths are filled up with the root, which is moved onto itself.
            source = base + torch.tensor([[*path, *[0] * (most - len(path))] for path in visited])
            target = base + torch.tensor([[*range(len(path)), *[0] * (most - len(path))] for path in visited])
            for layer in self.layers:
                layer.move_rows(source.to(layer.device), target.to(layer.device))
        self.set_lengths([length + len(path) for length, path in zip(self.row_lengths, visited, strict=False)])

    def set_lengths(self, rows: Sequence[int]) -> None:
        """Say how many rows of the first sequences are committed."""
        self.row_lengths[: len(rows)] = rows
        for layer in self.layers:
            layer.length = max(self.row_lengths)

    def swap(self, one: int, other: int) -> None:
        """Exchange two sequences."""
        for layer in self.layers:
            layer.swap(one, other)
        lengths = self.row_lengths
        lengths[one], lengths[other] = lengths[other], lengths[one]

    def end_rounds(self) -> None:
        """All sequences have one length again, the longest one's; the rows the others lack are zero."""
        for sequence, length in enumerate(self.row_lengths):
            if length < max(self.row_lengths):
                for layer in self.layers:
                    layer.clear_rows(sequence, length)
        self.row_lengths = []

    def truncate(self, rows: int) -> None:
        """Keep at most the first `rows` rows of every layer, also when a broken-off forward wrote only some layers."""
        self.row_lengths = []
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
