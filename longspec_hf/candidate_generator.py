"""Drafts a token tree: the draft's beam plus a branch copied from the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from longspec_hf_kernels import hybrid_tree_attention, pack_ancestor_bits
from transformers import Cache
from transformers.generation.candidate_generator import CandidateGenerator

from .beam import Beam, best_children, children_visibility
from .draft_window import DraftWindow
from .modeling_longspec import LongSpecDraftModel
from .ngram_index import NgramIndex
from .settings import TreeSettings
from .target import BoundTarget
from .tree import TokenTree, longest_path_through, merge


class LongSpecCandidateGenerator(CandidateGenerator):
    """Proposes a [`TokenTree`] per round (`propose`), or a chain for transformers' own loop (`get_candidates`).

    It holds the text's n-gram index and the draft's window; the target's cache is read, never written. No random
    numbers are drawn.

    Args:
        draft: the draft model.
        bound: the target's parts, from [`bind`].
        settings: tree settings of the call.
        chain_cache, chain_max_length: only for `get_candidates`: the target's cache and the longest sequence.
    """

    def __init__(
        self,
        draft: LongSpecDraftModel,
        bound: BoundTarget,
        settings: TreeSettings,
        chain_cache: Cache | None = None,
        chain_max_length: int = 0,
    ) -> None:
        self.draft = draft
        self.bound = bound
        self.settings = settings
        self.chain_cache = chain_cache
        self.chain_max_length = chain_max_length
        self.index = NgramIndex(settings.ngram_min_match)
        # Only nodes that are expanded have K/V: the root and all levels but the last.
        tree_rows = 1 + sum(settings.tree_shape[:-1])
        config = draft.config
        self.window = DraftWindow(
            config.sliding_window,
            tree_rows,
            (1, config.num_key_value_heads, config.head_dim),
            draft.dtype,
            draft.device,
        )
        self.root = -1
        self.root_position = -1
        self._waiting: list[int] = []  # committed tokens whose K/V are not in the window yet

    def start(self, token_ids: Sequence[int], positions: torch.Tensor) -> None:
        """Read the prompt; only its last `sliding_window` tokens are projected.

        Args:
            token_ids: the prompt's ids.
            positions: `[n]` their positions.
        """
        self.index.extend(token_ids)
        tail = min(len(token_ids), self.draft.config.sliding_window)
        ids = torch.tensor([token_ids[len(token_ids) - tail :]], device=self.draft.device)
        self._project(ids, positions[-tail:].to(self.draft.device).unsqueeze(0))
        self.root_position = int(positions[-1])

    def append(self, token_ids: Sequence[int]) -> None:
        """Read newly committed tokens; the last becomes the root of the next tree."""
        self.index.extend(token_ids)
        if self.root >= 0:
            self._waiting.append(self.root)
        self._waiting.extend(token_ids[:-1])
        self.root = token_ids[-1]
        self.root_position += len(token_ids)

    def propose(self, cache: Cache, starts: torch.Tensor | None = None, max_depth: int | None = None) -> TokenTree:
        """Draft the next tree.

        Args:
            cache: the target's cache, holding the rows of all committed tokens but the root.
            starts: `[1]` first row that is not padding.
            max_depth: no node deeper than this.
        """
        settings = self.settings if max_depth is None else self.settings.limited_to(max_depth)
        self._flush()
        root = torch.tensor([[self.root]], device=self.draft.device)
        beam = self._beam(root, cache, starts, settings)
        copied = self.index.continuation(settings.ngram_branch_length)
        branch = torch.tensor([copied], dtype=torch.long, device=self.draft.device)
        return merge(root, beam, branch, settings.max_tree_nodes).trim()

    def _flush(self) -> None:
        """Project the committed tokens before the root into the window."""
        if self._waiting:
            last = self.root_position
            positions = torch.arange(last - len(self._waiting), last, device=self.draft.device)
            self._project(torch.tensor([self._waiting], device=self.draft.device), positions.unsqueeze(0))
            self._waiting = []

    def _project(self, token_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        embeds = self.bound.embed_tokens(token_ids)
        cos, sin = self.bound.position_embeddings(position_ids, embeds)
        self.window.append(*self.draft.window_keys_values(embeds, cos, sin))

    def _beam(self, root: torch.Tensor, cache: Cache, starts: torch.Tensor | None, settings: TreeSettings) -> Beam:
        """Expand level by level, keeping at each depth the paths of highest summed log-probability."""
        if not settings.tree_shape:
            return Beam.empty(1, root.device)
        tokens, parents, scores, widths = [], [], [], []
        level_ids = root
        level_scores = torch.zeros(1, 1, device=root.device)
        visible = torch.ones(1, 1, 1, dtype=torch.bool, device=root.device)
        first_row, first_node = 0, -1
        key_depths = torch.zeros(1, 1, dtype=torch.long, device=root.device)
        for depth, width in enumerate(settings.tree_shape):
            logits = self._expand(level_ids, depth, first_row, visible, key_depths, cache, starts)
            level_scores, parent, level_ids = best_children(level_scores, logits, width)
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
        token_ids: torch.Tensor,
        depth: int,
        first_row: int,
        visible: torch.Tensor,
        key_depths: torch.Tensor,
        cache: Cache,
        starts: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the draft over the `[1, k]` nodes of one level; their K/V become tree rows `first_row ..`."""
        layer = cache.layers[self.bound.layer_idx]
        rows = torch.full_like(self.window.lengths, layer.get_seq_length())
        scale = self.draft.config.head_dim**-0.5
        bits = pack_ancestor_bits(visible)
        depths = torch.full_like(token_ids, depth)

        def attend_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.window.write_tree(first_row, k, v)
            return hybrid_tree_attention(
                q,
                self.window.keys,
                self.window.values,
                self.window.lengths,
                bits,
                depths=depths,
                key_depths=key_depths,
                scale=scale,
                window=self.window.window,
            )

        def attend_target(q: torch.Tensor) -> torch.Tensor:
            return hybrid_tree_attention(q, layer.keys, layer.values, rows, None, starts=starts, scale=scale)

        position_ids = torch.full_like(token_ids, self.root_position + depth)
        embeds = self.bound.embed_tokens(token_ids)
        cos, sin = self.bound.position_embeddings(position_ids, embeds)
        hidden = self.draft.layer(embeds, cos, sin, attend_window, attend_target)
        return self.draft.next_token_logits(hidden, self.bound.logits, token_ids, position_ids)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """A chain for transformers' own loop: the longest path that begins with the draft's first choice.

        Needs `chain_cache`, the cache that loop writes to. No logits are returned: the loop then accepts a token
        exactly when the target itself chose it.
        """
        token_ids = input_ids[0].tolist()
        if not len(self.index):
            self.start(token_ids, torch.arange(len(token_ids)))
            return input_ids, None  # the cache is empty until this loop has verified once
        self.append(token_ids[len(self.index) :])
        tree = self.propose(self.chain_cache, max_depth=self.chain_max_length - len(token_ids) - 1)
        path = longest_path_through(tree, node=1) if tree.num_nodes > 1 else []
        chain = tree.token_ids[:, path].to(input_ids.device)
        return torch.cat([input_ids, chain], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to update: the tree's shape is fixed for a call."""
