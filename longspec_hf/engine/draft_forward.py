"""The draft's beam in few kernels, from and to tensors at fixed addresses (LongSpec, arXiv 2502.17421, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from longspec_hf_kernels import (
    add_rms_norm,
    best_children_fused,
    hybrid_tree_attention,
    pack_ancestor_bits,
    rotate,
    rotate_and_store,
)

from ..beam import Beam, children_visibility
from ..cache import LongSpecCache
from ..draft_window import DraftWindow
from ..modeling_longspec import LongSpecAttention, LongSpecDraftModel
from ..target import BoundTarget
from .state import RoundState
from .target_forward import gated_mlp, queries_keys_values


@dataclass(frozen=True)
class DraftForward:
    """The draft of one call.

    Attributes:
        draft, bound: the draft and what it borrows.
        window: its own K/V.
        cache: the target's K/V.
    """

    draft: LongSpecDraftModel
    bound: BoundTarget
    window: DraftWindow
    cache: LongSpecCache

    def beam(self, state: RoundState, tree_shape: tuple[int, ...], cos: torch.Tensor, sin: torch.Tensor) -> Beam:
        """Expand level by level, keeping at each depth the paths of highest summed log-probability.

        Args:
            state: where the call stands.
            tree_shape: nodes to keep at each depth.
            cos, sin: `[b, depths, rotary_dim]` of the root's position and those after it.
        """
        count, device = state.sequences, state.roots.device
        if not tree_shape:
            return Beam.empty(count, device)
        tokens, parents, scores, widths = [], [], [], []
        level_ids = state.roots
        level_scores = torch.zeros(count, 1, device=device)
        visible = torch.ones(count, 1, 1, dtype=torch.bool, device=device)
        key_depths = torch.zeros(count, 1, dtype=torch.long, device=device)
        first_row, first_node = 0, -1
        for depth, width in enumerate(tree_shape):
            rotary = (cos[:, depth : depth + 1], sin[:, depth : depth + 1])
            logits = self._expand(state, level_ids, depth, first_row, visible, key_depths, rotary)
            level_scores, parent, level_ids = best_children_fused(level_scores, logits, width)
            if self.bound.token_ids is not None:
                level_ids = self.bound.token_ids[level_ids]
            tokens.append(level_ids)
            parents.append(parent + first_node)
            scores.append(level_scores)
            widths.append(level_ids.shape[1])
            first_row += visible.shape[1]
            first_node = 0 if depth == 0 else first_node + widths[-2]
            visible = children_visibility(visible, parent)
            key_depths = torch.cat([key_depths, torch.full_like(level_ids, depth + 1)], dim=1)
        return Beam(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), tuple(widths))

    def _expand(
        self,
        state: RoundState,
        token_ids: torch.Tensor,
        depth: int,
        first_row: int,
        visible: torch.Tensor,
        key_depths: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Scores of the token after each node `[b, k]` of one level; their K/V become tree rows `first_row ..`."""
        draft, count = self.draft, state.sequences
        scale = draft.config.head_dim**-0.5
        cos, sin = (table.expand(-1, token_ids.shape[1], -1) for table in rotary)
        embeds = self.bound.embed_tokens(token_ids)
        hidden, summed = self._norm(embeds, None, draft.input_layernorm)
        query = self._store(state, hidden, cos, sin, first_row)
        attended = hybrid_tree_attention(
            query,
            self.window.keys[:count],
            self.window.values[:count],
            state.window_lengths,
            pack_ancestor_bits(visible),
            depths=torch.full_like(token_ids, depth),
            key_depths=key_depths,
            scale=scale,
            window=self.window.window,
        )
        hidden, summed = self._norm(draft.self_attn.output(attended), summed, draft.post_self_attention_layernorm)
        cross = draft.cross_attn
        query = rotate(
            cross.q_proj(hidden), cos, sin, head_dim=cross.head_dim, **_head_norm(cross, "query_norm", "q_norm")
        )
        keys, values = self.cache.layers[self.bound.layer_idx].buffers(count)
        attended = hybrid_tree_attention(query, keys, values, state.lengths, None, starts=state.starts, scale=scale)
        hidden, summed = self._norm(cross.output(attended), summed, draft.post_cross_attention_layernorm)
        output = summed + gated_mlp(draft.mlp, hidden)
        return draft.next_token_logits(
            output, self._head, token_ids, (state.root_positions + depth).expand_as(token_ids)
        )

    def append(self, state: RoundState, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Write the K/V of tokens `[b, P]` from the root on behind the window's rows; the caller counts them.

        Args:
            state: where the call stood before those tokens.
            token_ids: committed tokens. Where a sequence has fewer, the rest is not counted, and overwritten later.
            cos, sin: `[b, P, rotary_dim]`.
        """
        hidden, _ = self._norm(self.bound.embed_tokens(token_ids), None, self.draft.input_layernorm)
        self._store(state, hidden, cos, sin, 0)

    def _store(
        self, state: RoundState, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """Write the window's rows of normed hidden states; returns their rotated queries."""
        attention = self.draft.self_attn
        query, key, value = queries_keys_values(attention, hidden)
        return rotate_and_store(
            query,
            key,
            value,
            cos,
            sin,
            self.window.keys,
            self.window.values,
            state.window_lengths,
            head_dim=attention.head_dim,
            offset=offset,
            **_head_norm(attention, "query_norm", "q_norm"),
            key_norm=attention.k_norm.weight if attention.qk_norm else None,
        )

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's norm and head over the draft vocabulary, in the model's dtype."""
        if self.bound.norm is not None:
            norm = self.bound.norm
            hidden, _ = add_rms_norm(hidden, None, norm.weight, norm.variance_epsilon)  # type: ignore[arg-type]
        return self.bound.head.scores(hidden)

    def _norm(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: torch.nn.RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(hidden, residual, norm.weight, self.draft.config.rms_norm_eps)


def _head_norm(attention: LongSpecAttention, argument: str, name: str) -> dict[str, Any]:
    """The keyword arguments for a norm per head, where the attention has one."""
    if not attention.qk_norm:
        return {}
    norm = getattr(attention, name)
    return {argument: norm.weight, "eps": norm.eps}
