"""Where a call stands, in tensors that captured rounds read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from longspec_hf_kernels import advance


@dataclass(frozen=True)
class RoundState:
    """State of the `b` sequences that go on; every tensor keeps its address from round to round.

    Attributes:
        roots: int64 `[b, 1]`, newest committed tokens, which have no row yet.
        root_positions: int64 `[b, 1]`.
        limits: int64 `[b, 1]`, deepest node a tree may have.
        lengths: int32 `[b]`, committed rows of the target's cache.
        window_lengths: int32 `[b]`, committed rows of the draft's window.
        starts: int32 `[b]`, first row that is not padding, or `None`.
        branches: int64 `[b, L]`, tokens copied from the context, -1 where there are none.
    """

    roots: torch.Tensor
    root_positions: torch.Tensor
    limits: torch.Tensor
    lengths: torch.Tensor
    window_lengths: torch.Tensor
    starts: torch.Tensor | None
    branches: torch.Tensor

    @property
    def sequences(self) -> int:
        """b."""
        return self.roots.shape[0]

    def advance(self, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        """Move on by the first `counts` `[b]` of the drawn `tokens` `[b, P]`, in place."""
        advance(self.roots, self.root_positions, self.limits, self.lengths, self.window_lengths, counts, tokens)
