"""Self-attention keys and values of the draft: constant memory whatever the length of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class DraftWindow:
    """The last `window` committed rows of the draft's K/V, with room for the rows of one token tree behind them.

    Rows stay in order of position, so a window is a distance in rows. Committed rows are appended; when twice the
    window is full the last `window` rows move to the front, once every `window` tokens. Bytes never change. The
    sequences of a batch have lengths of their own.

    Args:
        window: number of keys a query sees.
        tree_rows: rows kept for the nodes of one tree.
        shape: `(batch, kv_heads, head_dim)`.

    Attributes:
        keys, values: `[B, Hkv, 2 * window + tree_rows, D]`; rows `[0, lengths[b])` are committed, the tree's follow.
        lengths: `[B]` int32, number of committed rows held.
    """

    def __init__(
        self,
        window: int,
        tree_rows: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        batch, heads, head_dim = shape
        self.window = window
        self.tree_rows = tree_rows
        rows = 2 * window + tree_rows
        self.keys = torch.zeros(batch, heads, rows, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._lengths = [0] * batch  # the same on the host

    @property
    def nbytes(self) -> int:
        """Bytes held, the same at every context length."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: torch.Tensor, values: torch.Tensor, counts: Sequence[int]) -> None:
        """Append committed rows; of more than `window` only the last ones are kept.

        Args:
            keys, values: `[b, Hkv, n, D]` of the first b sequences.
            counts: how many of the n rows are each sequence's, from the first on.
        """
        for row, count in enumerate(counts):
            first = max(0, count - self.window)
            if first or count == self.window:
                self._lengths[row] = 0  # nothing older is in any window, and rows must stay next to one another
            elif self._lengths[row] + count > 2 * self.window:
                self._move_to_front(row)
            into = slice(self._lengths[row], self._lengths[row] + count - first)
            self.keys[row, :, into] = keys[row, :, first:count]
            self.values[row, :, into] = values[row, :, first:count]
            self._lengths[row] = into.stop
        self._publish_lengths()

    @property
    def row_lengths(self) -> list[int]:
        """`lengths`, known without asking the device."""
        return self._lengths

    def make_room(self, sequences: int, rows: int) -> bool:
        """Let the first sequences take so many rows (at most `tree_rows`) without a move; says whether one moved."""
        # With no more than a window there is room: that and a tree's rows fit, whatever their proportion.
        lengths = self._lengths[:sequences]
        full = [row for row, held in enumerate(lengths) if held > self.window and held + rows > 2 * self.window]
        for row in full:
            self._move_to_front(row)
        if full:
            self._publish_lengths()
        return bool(full)

    def advance(self, counts: Sequence[int]) -> None:
        """Take note of rows of the first sequences that were written behind the others, as `write_tree` does."""
        for row, count in enumerate(counts):
            self._lengths[row] += count

    def write_tree(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tree rows `first ..` `[b, Hkv, n, D]` of the first b sequences behind the committed ones."""
        batch, _, count, _ = keys.shape
        if batch == 1:
            rows = slice(self._lengths[0] + first, self._lengths[0] + first + count)
            self.keys[:1, :, rows] = keys
            self.values[:1, :, rows] = values
            return
        index = self.lengths[:batch, None] + torch.arange(first, first + count, device=keys.device)
        index = index.long()[:, None, :, None].expand_as(keys)
        self.keys[:batch].scatter_(2, index, keys)
        self.values[:batch].scatter_(2, index, values)

    def swap(self, one: int, other: int) -> None:
        """Exchange two sequences."""
        for buffer in (self.keys, self.values):
            buffer[[one, other]] = buffer[[other, one]]
        self._lengths[one], self._lengths[other] = self._lengths[other], self._lengths[one]
        self._publish_lengths()

    def _move_to_front(self, row: int) -> None:
        kept = slice(self._lengths[row] - self.window, self._lengths[row])
        for buffer in (self.keys, self.values):
            buffer[row, :, : self.window] = buffer[row, :, kept].clone()
        self._lengths[row] = self.window

    def _publish_lengths(self) -> None:
        if len(self._lengths) == 1:
            self.lengths.fill_(self._lengths[0])
        else:
            self.lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32))
