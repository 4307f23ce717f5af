"""The draft's beam in few kernels, from and to tensors at fixed addresses (LongSpec, arXiv 2502.17421, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from longspec_hf_kernels import (
    add_rms_norm,
    append_children,
    best_children_fused,
    hybrid_tree_attention,
    linear_few_rows,
    pack_ancestor_bits,
)

from ..beam import Beam
from ..cache import LongSpecCache
from ..draft_window import DraftWindow
from ..modeling_longspec import LongSpecAttention, LongSpecDraftModel
from ..settings import TreeSettings
from ..target import BoundTarget
from .linears import embedded_normed, opened_gate, project_add_norm, project_and_store, project_queries
from .positions import Positions
from .state import RoundState


@dataclass(frozen=True)
class Level:
    """Nodes of one depth that are expanded.

    Attributes:
        first_row: where their rows begin among the tree rows of the window.
        own_bits: int64 `[b, k, words]`, each node's own tree row.
        depths, key_depths: `[b, k]` theirs, and `[b, rows]` those of all tree rows up to theirs.
    """

    first_row: int
    own_bits: torch.Tensor
    depths: torch.Tensor
    key_depths: torch.Tensor


@dataclass(frozen=True)
class DraftForward:
    """The draft of one call.

    Attributes:
        draft, bound: the draft and what it borrows.
        window: its own K/V.
        cache: the target's K/V.
        known: levels by tree shape and sequences.
    """

    draft: LongSpecDraftModel
    bound: BoundTarget
    window: DraftWindow
    cache: LongSpecCache
    known: dict[tuple[tuple[int, ...], int], list[Level]] = field(default_factory=dict)

    def beam(self, state: RoundState, settings: TreeSettings, positions: Positions) -> Beam:
        """Expand level by level, keeping at each depth the paths of highest summed log-probability.

        Args:
            state: where the call stands.
            settings: nodes to keep at each depth, and the temperature of their scores.
            positions: of the root and those after it.
        """
        count, device, tree_shape = state.sequences, state.roots.device, settings.tree_shape
        if not tree_shape:
            return Beam.empty(count, device)
        levels = self.levels(tree_shape, count)
        widths = self._sizes((*tree_shape, 1))[1:]
        tokens, parents = torch.empty(2, count, sum(widths), dtype=torch.long, device=device)
        scores = torch.empty(count, sum(widths), device=device)
        level_ids, level_scores = state.roots, torch.zeros(count, 1, device=device)
        bits: Any = levels[0].own_bits
        first_node, place = -1, 0
        for depth, (width, level) in enumerate(zip(tree_shape, levels, strict=True)):
            here = Positions(*(rows[:, depth : depth + 1] for rows in positions))
            logits = self._expand(state, level_ids, bits, level, here)
            children = best_children_fused(level_scores, logits, width, temperature=settings.beam_temperature)
            own_bits = levels[depth + 1].own_bits if depth + 1 < len(levels) else None
            names = self.bound.token_ids
            bits = append_children((tokens, parents, scores), children, place, first_node, names, bits, own_bits)
            level_scores, level_ids = children[0], tokens[:, place : place + widths[depth]]
            first_node, place = place, place + widths[depth]
        return Beam(tokens, parents, scores, tuple(widths))

    def levels(self, tree_shape: tuple[int, ...], sequences: int) -> list[Level]:
        """What is known of each level's nodes beforehand; made once, so that captured rounds only read it."""
        key = (tree_shape, sequences)
        if key not in self.known:
            sizes = self._sizes(tree_shape)
            visible = torch.eye(sum(sizes), dtype=torch.bool, device=self.window.keys.device)
            own_bits = pack_ancestor_bits(visible.unsqueeze(0)).expand(sequences, -1, -1).split(sizes, dim=1)
            device = self.window.keys.device
            row_depths = [torch.full((sequences, size), depth, device=device) for depth, size in enumerate(sizes)]
            self.known[key] = [
                Level(
                    sum(sizes[:depth]),
                    bits.contiguous(),
                    row_depths[depth],
                    torch.cat(row_depths[: depth + 1], 1),
                )
                for depth, bits in enumerate(own_bits)
            ]
        return self.known[key]

    def _sizes(self, tree_shape: tuple[int, ...]) -> list[int]:
        """Nodes of the levels that are expanded, the root's first."""
        proposable = self.draft.config.draft_vocab_size or self.draft.config.vocab_size
        sizes = [1]
        for width in tree_shape[:-1]:
            sizes.append(min(width, sizes[-1] * min(width, proposable)))
        return sizes

    def _expand(
        self,
        state: RoundState,
        token_ids: torch.Tensor,
        bits: torch.Tensor,
        level: Level,
        position: Positions,
    ) -> torch.Tensor:
        """Scores of the token after each node `[b, k]` of one level; their K/V become tree rows of the window."""
        draft, count = self.draft, state.sequences
        scale = draft.config.head_dim**-0.5
        cos, sin = (rows.expand(-1, token_ids.shape[1], -1) for rows in position[:2])
        norm = _norm_of(draft.input_layernorm, draft)
        hidden, summed = embedded_normed(self.bound.embed_tokens, token_ids, *norm)
        query = self._store(state, hidden, cos, sin, level.first_row)
        attended = hybrid_tree_attention(
            query,
            self.window.keys[:count],
            self.window.values[:count],
            state.window_lengths,
            bits,
            depths=level.depths,
            key_depths=level.key_depths,
            scale=scale,
            window=self.window.window,
        )
        norm = _norm_of(draft.post_self_attention_layernorm, draft)
        hidden, summed = project_add_norm(draft.self_attn.o_proj, _joined(attended), summed, *norm)
        cross = draft.cross_attn
        query = project_queries(
            cross, hidden, cos, sin, head_dim=cross.head_dim, **_head_norm(cross, "query_norm", "q_norm")
        )
        keys, values = self.cache.layers[self.bound.layer_idx].buffers(count)
        attended = hybrid_tree_attention(query, keys, values, state.lengths, None, starts=state.starts, scale=scale)
        norm = _norm_of(draft.post_cross_attention_layernorm, draft)
        hidden, summed = project_add_norm(cross.o_proj, _joined(attended), summed, *norm)
        opened = opened_gate(draft.mlp, hidden)
        return self._next_token_logits(opened, summed, token_ids, position.ids.expand_as(token_ids))

    def append(self, state: RoundState, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Write the K/V of tokens `[b, P]` from the root on behind the window's rows; the caller counts them.

        Args:
            state: where the call stood before those tokens.
            token_ids: committed tokens. Where a sequence has fewer, the rest is not counted, and overwritten later.
            cos, sin: `[b, P, rotary_dim]`.
        """
        norm = _norm_of(self.draft.input_layernorm, self.draft)
        hidden, _ = embedded_normed(self.bound.embed_tokens, token_ids, *norm)
        self._store(state, hidden, cos, sin, 0)

    def _store(
        self, state: RoundState, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """Write the window's rows of normed hidden states; returns their rotated queries."""
        attention = self.draft.self_attn
        return project_and_store(
            attention,
            hidden,
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

    def _next_token_logits(
        self, opened: torch.Tensor, summed: torch.Tensor, token_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """The rest of the layer and the target's norm and head over the draft vocabulary, in the model's dtype."""
        draft, final = self.draft, self.bound.norm
        if final is None:
            return draft.next_token_logits(summed + draft.mlp.down_proj(opened), self._scores, token_ids, position_ids)
        norm: Any = (final.weight, final.variance_epsilon)
        normed, output = project_add_norm(draft.mlp.down_proj, opened, summed, *norm)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            # The norm of what the layer gave came with it.
            return self._scores(normed if hidden is output else add_rms_norm(hidden, None, *norm)[0])

        return draft.next_token_logits(output, head, token_ids, position_ids)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.bound.head
        if head.weight is None or head.bias is not None:
            return head.scores(hidden)
        return linear_few_rows(hidden, head.weight)


def _joined(attended: torch.Tensor) -> torch.Tensor:
    """Heads `[b, Hq, k, D]` side by side, `[b, k, Hq * D]`."""
    return attended.transpose(1, 2).flatten(2)


def _norm_of(norm: torch.nn.RMSNorm, draft: LongSpecDraftModel) -> tuple[torch.Tensor, float]:
    """Weight and epsilon of one of the draft's norms."""
    return norm.weight, draft.config.rms_norm_eps


def _head_norm(attention: LongSpecAttention, argument: str, name: str) -> dict[str, Any]:
    """The keyword arguments for a norm per head, where the attention has one."""
    if not attention.qk_norm:
        return {}
    norm = getattr(attention, name)
    return {argument: norm.weight, "eps": norm.eps}
