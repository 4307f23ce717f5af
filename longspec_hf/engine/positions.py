"""Positions of a round's tokens, and their rotary rows from a table made once for all that a call may yet decode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from longspec_hf_kernels import rotary_rows

from ..target import BoundTarget

MOST_ROWS = 2**15
"""Rows of a table. A call that may decode more computes its rows in every round, as transformers does."""


class Positions(NamedTuple):
    """Positions from each sequence's root on.

    Attributes:
        cos, sin: `[b, P, rotary_dim]`, none from beyond the last position a sequence may reach.
        ids: int64 `[b, P]`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    ids: torch.Tensor


class RotaryTable:
    """Rotary rows of consecutive positions, at fixed addresses.

    Args:
        bound: whose rotary module it is; its rows depend on the position alone.
        like: in whose dtype and on whose device the rows are.
    """

    def __init__(self, bound: BoundTarget, like: torch.Tensor) -> None:
        self._bound = bound
        self._like = like
        self._first = 0
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def cover(self, first: int, last: int) -> bool:
        """Have the positions from `first` to `last`; says whether what `rows` reads has moved for it."""
        held = 0 if self._rows is None else len(self._rows[0])
        if self._first <= first and last < self._first + held:
            return False
        if last - first >= MOST_ROWS:
            moved, self._rows = self._rows is not None, None
            return moved
        ids = torch.arange(first, last + 1, device=self._like.device).unsqueeze(0)
        cos, sin = self._bound.position_embeddings(ids, self._like)
        self._first, self._rows = first, (cos[0].contiguous(), sin[0].contiguous())
        return True

    def rows(self, root_positions: torch.Tensor, limits: torch.Tensor, steps: int) -> Positions:
        """`steps` positions from the roots `[b, 1]` on; those more than `limits` `[b, 1]` behind have the last row."""
        if self._rows is not None:
            return Positions(*rotary_rows(*self._rows, self._first, root_positions, limits, steps))
        ids = root_positions + torch.arange(steps, device=root_positions.device)
        within = torch.minimum(ids, root_positions + limits.clamp(min=0))
        return Positions(*self._bound.position_embeddings(within, self._like), ids)
