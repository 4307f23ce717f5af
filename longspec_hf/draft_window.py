"""Self-attention keys and values of the draft: constant memory whatever the length of the text."""

from __future__ import annotations

import torch


class DraftWindow:
    """The last `window` committed rows of the draft's K/V, with room for the rows of one token tree behind them.

    Rows stay in order of position, so a window is a distance in rows. Committed rows are appended; when twice the
    window is full the last `window` rows move to the front, once every `window` tokens. Bytes never change.

    Args:
        window: number of keys a query sees.
        tree_rows: rows kept for the nodes of one tree.
        shape: `(batch, kv_heads, head_dim)`.

    Attributes:
        keys, values: `[B, Hkv, 2 * window + tree_rows, D]`; rows `[0, length)` are committed, the tree's follow.
        length: number of committed rows held.
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
        self.length = 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held, the same at every context length."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append committed rows `[B, Hkv, n, D]`; of more than `window` only the last ones are kept."""
        if keys.shape[2] >= self.window:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
            self.length = 0  # nothing older is in any window, and rows must stay next to one another
        count = keys.shape[2]
        if self.length + count > 2 * self.window:
            kept = slice(self.length - self.window, self.length)
            for buffer in (self.keys, self.values):
                buffer[:, :, : self.window] = buffer[:, :, kept].clone()
            self.length = self.window
        rows = slice(self.length, self.length + count)
        self.keys[:, :, rows] = keys
        self.values[:, :, rows] = values
        self.length += count
        self.lengths.fill_(self.length)

    def write_tree(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tree rows `first ..` `[B, Hkv, n, D]` behind the committed ones."""
        rows = slice(self.length + first, self.length + first + keys.shape[2])
        self.keys[:, :, rows] = keys
        self.values[:, :, rows] = values
