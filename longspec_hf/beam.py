"""The draft's beam: scored nodes level by level. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from longspec_hf_kernels import level_depths


@dataclass(frozen=True)
class Beam:
    """Nodes of the beam, all depths after one another, shallow first.

    Attributes:
        token_ids: `[B, N]`.
        parents: `[B, N]` index in this list of each node's parent, -1 for the root.
        scores: `[B, N]` summed log-probability of the path.
        widths: number of nodes at each depth; the sum is N.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor
    widths: tuple[int, ...]

    @property
    def depths(self) -> torch.Tensor:
        """`[B, N]` depth of each node, 1 for the root's children."""
        return level_depths(self.token_ids, self.widths)

    def as_integers(self) -> torch.Tensor:
        """`[B, 3 N]`: tokens, parents and scores in millionths, for one read by the host."""
        scores = (self.scores.float().clamp(min=-1e9) * 1e6).long()
        return torch.cat([self.token_ids, self.parents, scores], dim=1)

    @staticmethod
    def empty(batch_size: int, device: torch.device) -> Beam:
        """A beam without nodes."""
        ids = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        return Beam(ids, ids, torch.zeros(batch_size, 0, device=device), ())


def best_children(
    scores: torch.Tensor, logits: torch.Tensor, width: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `width` children, over all nodes of a level, by summed log-probability.

    Args:
        scores: `[B, k]` of the level's nodes.
        logits: `[B, k, V]` of their next token.
        width: children to keep; fewer are returned when there are only `k * V`.
        temperature: that the logits are divided by.

    Returns:
        scores, parent (0 .. k - 1) and token of the children, each `[B, min(width, k * V)]`, best first.
    """
    per_node = min(width, logits.shape[-1])
    logits = logits if temperature == 1.0 else logits / temperature
    # Only the kept entries are normalised: the softmax over the vocabulary is never written out.
    values, tokens = logits.topk(per_node, dim=-1)
    log_probs = values - logits.logsumexp(dim=-1, keepdim=True)
    summed = (scores.unsqueeze(-1) + log_probs).flatten(1)
    best, index = summed.topk(min(width, summed.shape[1]), dim=1)
    return best, index // per_node, tokens.flatten(1).gather(1, index)


def children_visibility(visible: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """What children see of the tree rows: all their parent sees, and themselves as new rows.

    Args:
        visible: `[B, k, C]` of the parents' level.
        parent: `[B, m]` each child's parent, 0 .. k - 1.

    Returns:
        bool `[B, m, C + m]`.
    """
    inherited = visible.gather(1, parent.unsqueeze(-1).expand(-1, -1, visible.shape[-1]))
    own = torch.eye(parent.shape[1], dtype=torch.bool, device=parent.device).expand(parent.shape[0], -1, -1)
    return torch.cat([inherited, own], dim=-1)
