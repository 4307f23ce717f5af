"""The target's K/V cache: preallocated, written in place, committed by moving only the accepted rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache_layer import LongSpecLayer
from .draft_window import DraftWindow
from .window_layer import WindowLayer

TAKEN_OVER = (DynamicLayer, DynamicSlidingWindowLayer, LongSpecLayer, WindowLayer)
"""Kinds of layers whose rows can be taken over: they hold whatever their queries still see."""


class LongSpecCache(Cache):
    """Cache of a target that is decoded with a LongSpec draft.

    Layers with a sliding window hold little more than the window, the others every row. Behaves like a
    `DynamicCache`, so it can be passed on to the next `generate` call or `forward`. Between `begin_rounds` and
    `end_rounds` the sequences of a batch have lengths of their own, and the rows of a round's tree lie behind them,
    uncommitted.

    Attributes:
        draft_window: the draft's own constant-size K/V, `None` before the first round.
        row_lengths: committed rows of each sequence, while there are rounds.
        may_step_back: whether `set_lengths` may go back as far as to where the rounds began.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=LongSpecLayer)
        self._announced = 0
        self._limit: int | None = None
        self._tree_rows: list[torch.Tensor] | None = None  # per layer
        self.may_step_back = False
        self.draft_window: DraftWindow | None = None
        self.row_lengths: list[int] = []

    @staticmethod
    def can_take_over(cache: Cache) -> bool:
        """Whether `cache` consists of keys and values that later tokens may still need, and holds all of those."""
        return all(type(layer) in TAKEN_OVER for layer in cache.layers)

    @classmethod
    def take_over(cls, cache: Cache) -> LongSpecCache:
        """A cache with the rows of `cache`, copied once, and its windows; `cache` is left as it is.

        Raises:
            ValueError: `can_take_over` says no.
        """
        if not cls.can_take_over(cache):
            raise ValueError(
                f"`cache` must hold the keys and values of full-attention and sliding-window layers only, got "
                f"{cache!r}. Pass a `DynamicCache` of such a model, or a cache returned by a LongSpec call."
            )
        taken = cls()
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            ours = LongSpecLayer() if window is None else WindowLayer(window)
            if layer.get_seq_length():
                ours.load(layer.keys, layer.values, layer.get_seq_length())
            taken.layers.append(ours)
        return taken

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new rows `[B, Hkv, n, D]`; returns all its rows, in a `tree` its whole buffers."""
        while len(self.layers) <= layer_idx:
            self.layers.append(LongSpecLayer(self._announced, self._limit))
        layer = self.layers[layer_idx]
        if self._tree_rows is None:
            return layer.update(key_states, value_states)
        return layer.write_tree(key_states, value_states, self._tree_rows[layer_idx])

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

    def remember(self) -> None:
        """Make sure that `truncate` can go back to the present length, whatever is written until `end_rounds`."""
        for layer in self.layers:
            layer.remember()

    def begin_rounds(self, sequences: int) -> None:
        """From here on the sequences may come to differ in length."""
        self.row_lengths = [self.get_seq_length()] * sequences
        for layer in self.layers:
            layer.begin_rounds(self.may_step_back)

    @contextmanager
    def tree(self, sequences: int, nodes: int) -> Iterator[torch.Tensor]:
        """Inside the block a forward over `nodes` nodes of the first `sequences` writes behind the committed rows.

        Yields:
            int32 `[sequences]`, the committed rows.
        """
        lengths = torch.tensor(self.row_lengths[:sequences])
        rows = lengths[:, None] + torch.arange(nodes)
        for layer in self.layers:
            layer.make_room(self.row_lengths[:sequences], nodes)
        self._tree_rows = [layer.buffer_rows(rows) for layer in self.layers]
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
                layer.move_rows(layer.buffer_rows(source), layer.buffer_rows(target))
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
        for layer in self.layers:
            layer.align(self.row_lengths)
        self.row_lengths = []

    def truncate(self, rows: int) -> None:
        """Keep at most the first `rows` rows of every layer, also when a broken-off forward wrote only some layers."""
        self.row_lengths = []
        for layer in self.layers:
            layer.truncate(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `abs(tokens_to_remove)` tokens; nothing is changed if there are fewer.

        Raises:
            ValueError: `tokens_to_remove` is positive, or more than there are, or so many that a sliding window would
                need rows that are gone.
        """
        for layer in self.layers:
            layer.length_after_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
