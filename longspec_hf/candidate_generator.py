"""Drafts a token tree: the draft's beam plus a branch copied from the context."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from longspec_hf_kernels import hybrid_tree_attention, pack_ancestor_bits
from transformers import Cache
from transformers.generation.candidate_generator import CandidateGenerator

from .acceptance import DraftedBeam
from .beam import Beam, best_children, children_visibility
from .cache import LongSpecCache
from .draft_window import DraftWindow
from .modeling_longspec import LongSpecDraftModel
from .ngram_index import NgramIndex
from .settings import TreeSettings
from .target import BoundTarget
from .tree import TokenTree, longest_path_through, merge


@dataclass
class DraftedSequence:
    """What drafting knows on the host of one sequence.

    Attributes:
        index: n-gram index of its text.
        root, root_position: newest committed token, which the next tree grows from.
        waiting: committed tokens before it whose K/V are not in the draft's window yet.
    """

    index: NgramIndex
    root: int = -1
    root_position: int = -1
    waiting: list[int] = field(default_factory=list)


class LongSpecCandidateGenerator(CandidateGenerator):
    """Proposes a [`TokenTree`] per round (`propose`), or a chain for transformers' own loop (`get_candidates`).

    It holds the texts' n-gram indices and the draft's window; the target's cache is read, never written. No random
    numbers are drawn.

    Args:
        draft: the draft model.
        bound: the target's parts, from [`bind`].
        settings: tree settings of the call.
        sequences: sequences of the batch. Those that go on come first (`swap`).
        chain_cache, chain_max_length, chain_end_tokens: only for `get_candidates`: the target's cache, the longest
            sequence, and the tokens that end it.

    Attributes:
        longest_branch: tokens that the branch of any tree of the call can have.
        branches: of the last round, per sequence what the context continued with, up to `longest_branch` tokens.
        beam: of the last tree that `propose` drafted.
    """

    def __init__(
        self,
        draft: LongSpecDraftModel,
        bound: BoundTarget,
        settings: TreeSettings,
        sequences: int = 1,
        chain_cache: Cache | None = None,
        chain_max_length: int = 0,
        chain_end_tokens: Collection[int] = (),
    ) -> None:
        self.draft = draft
        self.bound = bound
        self.settings = settings
        self.chain_cache = chain_cache
        self.chain_max_length = chain_max_length
        self.chain_end_tokens = chain_end_tokens
        self.rows = [DraftedSequence(NgramIndex(settings.ngram_min_match)) for _ in range(sequences)]
        self.longest_branch = max(tree.ngram_branch_length for tree in settings.trees)
        self.branches: list[list[int]] = [[] for _ in range(sequences)]
        self.beam: Beam | None = None
        config = draft.config
        self.window = DraftWindow(
            config.sliding_window,
            max(tree.draft_rows for tree in settings.trees),
            (sequences, config.num_key_value_heads, config.head_dim),
            draft.dtype,
            draft.device,
        )

    def start(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: torch.Tensor,
        embeds: torch.Tensor | None = None,
    ) -> None:
        """Read the prompts.

        Args:
            token_ids: each prompt's ids, padding left out.
            positions: `[B, n]` the prompts' positions; the last ones belong to the ids.
            embeds: `[B, n, hidden]`, where the prompts are given as embeddings; then the ids may be fewer, or none.
        """
        self.project_prompts(token_ids, positions, embeds)
        self.index_prompts(token_ids)

    def index_prompts(self, token_ids: Sequence[Sequence[int]]) -> None:
        """The host's half of `start`: find n-grams in the prompts from now on."""
        for row, ids in zip(self.rows, token_ids, strict=True):
            row.index.extend(ids)

    def project_prompts(
        self,
        token_ids: Sequence[Sequence[int]],
        positions: torch.Tensor,
        embeds: torch.Tensor | None = None,
    ) -> None:
        """The device's half of `start`: fill the window with the prompts' last tokens; arguments as there."""
        window = self.draft.config.sliding_window
        tails: list[torch.Tensor] = []
        last_positions = positions[:, -1].tolist()
        for number, (row, ids, last) in enumerate(zip(self.rows, token_ids, last_positions, strict=True)):
            row.root_position = last
            if embeds is None:
                tail = torch.tensor(list(ids[-window:]), dtype=torch.long, device=self.draft.device)
                tails.append(self.bound.embed(tail))
            else:
                # No more than there are positions: what lies before position 0 is padding.
                tails.append(embeds[number, -min(window, row.root_position + 1) :].to(self.draft.device))
        lasts = torch.tensor([row.root_position for row in self.rows], device=self.draft.device)
        self._project(tails, lasts)

    def append(self, token_ids: Sequence[Sequence[int]], projected: bool = False) -> None:
        """Read newly committed tokens of the first sequences; the last becomes the root of the next tree.

        Args:
            token_ids: of each sequence.
            projected: whether the window holds the rows of all but the last already.
        """
        for row, ids in zip(self.rows, token_ids, strict=False):
            row.index.extend(ids)
            if not projected:
                if row.root >= 0:
                    row.waiting.append(row.root)
                row.waiting.extend(ids[:-1])
            # What the window cannot hold need not be remembered.
            del row.waiting[: -self.draft.config.sliding_window]
            row.root = ids[-1]
            row.root_position += len(ids)

    def swap(self, one: int, other: int) -> None:
        """Exchange two sequences."""
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self.window.swap(one, other)

    def root_positions(self, sequences: int) -> torch.Tensor:
        """`[sequences, 1]` positions of the roots."""
        return torch.tensor([[row.root_position] for row in self.rows[:sequences]], device=self.draft.device)

    def root_only(self, sequences: int) -> TokenTree:
        """The trees that propose nothing: a plain step."""
        roots = torch.tensor([[row.root] for row in self.rows[:sequences]], device=self.draft.device)
        return TokenTree.root_only(roots)

    def propose(
        self,
        cache: Cache,
        max_depths: Sequence[int],
        starts: torch.Tensor | None = None,
        static_shape: bool = False,
        settings: TreeSettings | None = None,
    ) -> TokenTree:
        """Draft the next tree of the first `len(max_depths)` sequences.

        Args:
            cache: the target's cache, holding the rows of all committed tokens but the roots.
            max_depths: per sequence, no node deeper than this.
            starts: int32, first cache row of each sequence that is not padding.
            static_shape: give every tree the most nodes the settings allow, unused ones included.
            settings: of this round; by default the call's.
        """
        count = len(max_depths)
        whole = settings or self.settings
        settings = whole if static_shape else whole.limited_to(max(max_depths))
        rows = self.rows[:count]
        device = self.draft.device
        self._flush(rows)
        root = torch.tensor([[row.root] for row in rows], device=device)
        limits = torch.tensor(max_depths, device=device).unsqueeze(1)
        beam = self._beam(root, limits, cache, None if starts is None else starts[:count], settings)
        self.beam = beam
        copied = self.copy_branches(count, settings.ngram_branch_length)
        longest = settings.ngram_branch_length if static_shape else max(map(len, copied))
        branch = [[*tokens, *[-1] * (longest - len(tokens))] for tokens in copied]
        tree = merge(
            root,
            beam,
            torch.tensor(branch, dtype=torch.long, device=device).view(count, longest),
            settings.max_tree_nodes,
            limits if static_shape or min(max_depths) < settings.depth else None,
        )
        if self.bound.parallel is not None:  # all processes must verify the same tree
            tree = TokenTree(*self.bound.parallel.agree([tree.token_ids, tree.parents, tree.depths, tree.valid]))
        return tree if static_shape else tree.trim()

    def drafted_beams(self) -> list[DraftedBeam]:
        """The sequences' beams that `propose` drafted last, on the host."""
        assert self.beam is not None
        return [DraftedBeam.of_integers(row, self.beam.widths) for row in self.beam.as_integers().tolist()]

    def copy_branches(self, sequences: int, length: int) -> list[list[int]]:
        """What the context continues the first sequences with, up to `length` tokens each."""
        self.branches = [row.index.continuation(self.longest_branch) for row in self.rows[:sequences]]
        return [branch[:length] for branch in self.branches]

    def _flush(self, rows: Sequence[DraftedSequence]) -> None:
        """Project the committed tokens before the roots into the window."""
        if not any(row.waiting for row in rows):
            return
        device = self.draft.device
        embeds = [self.bound.embed(torch.tensor(row.waiting, dtype=torch.long, device=device)) for row in rows]
        self._project(embeds, torch.tensor([row.root_position - 1 for row in rows], device=device))
        for row in rows:
            row.waiting = []

    def _project(self, embeds: Sequence[torch.Tensor], last_positions: torch.Tensor) -> None:
        """Append K/V of `embeds`, `[n, hidden]` a sequence, whose last ones stand at `last_positions` `[b]`."""
        counts = [len(part) for part in embeds]
        padded = torch.nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
        first = last_positions + 1 - torch.tensor(counts, device=self.draft.device)
        steps = torch.arange(max(counts), device=self.draft.device)
        positions = torch.minimum(first.unsqueeze(1) + steps, last_positions.clamp(min=0).unsqueeze(1))
        cos, sin = self.bound.position_embeddings(positions, padded)
        self.window.append(*self.draft.window_keys_values(padded, cos, sin), counts)

    def _beam(
        self,
        root: torch.Tensor,
        limits: torch.Tensor,
        cache: Cache,
        starts: torch.Tensor | None,
        settings: TreeSettings,
    ) -> Beam:
        """Expand level by level, keeping at each depth the paths of highest summed log-probability."""
        count, device = root.shape[0], root.device
        if not settings.tree_shape:
            return Beam.empty(count, device)
        context = _Context.of(cache, self.bound.layer_idx, self.root_positions(count), limits, starts)
        tokens, parents, scores, widths = [], [], [], []
        level_ids = root
        level_scores = torch.zeros(count, 1, device=device)
        visible = torch.ones(count, 1, 1, dtype=torch.bool, device=device)
        first_row, first_node = 0, -1
        key_depths = torch.zeros(count, 1, dtype=torch.long, device=device)
        for depth, width in enumerate(settings.tree_shape):
            logits = self._expand(level_ids, depth, first_row, visible, key_depths, context)
            level_scores, parent, level_ids = best_children(level_scores, logits, width, settings.beam_temperature)
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
        context: _Context,
    ) -> torch.Tensor:
        """Run the draft over the `[b, k]` nodes of one level; their K/V become tree rows `first_row ..`."""
        count = token_ids.shape[0]
        scale = self.draft.config.head_dim**-0.5
        bits = pack_ancestor_bits(visible)
        depths = torch.full_like(token_ids, depth)

        def attend_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.window.write_tree(first_row, k, v)
            return hybrid_tree_attention(
                q,
                self.window.keys[:count],
                self.window.values[:count],
                self.window.lengths[:count],
                bits,
                depths=depths,
                key_depths=key_depths,
                scale=scale,
                window=self.window.window,
            )

        def attend_rows(q: torch.Tensor) -> torch.Tensor:
            return hybrid_tree_attention(
                q, context.keys, context.values, context.lengths, None, starts=context.starts, scale=scale
            )

        def attend_target(q: torch.Tensor) -> torch.Tensor:
            parallel = self.bound.parallel
            if parallel is None or context.keys.shape[1] == self.draft.config.num_key_value_heads:
                return attend_rows(q)
            return parallel.attend(attend_rows, q)

        position_ids = torch.minimum(context.root_positions + depth, context.last_positions).expand_as(token_ids)
        embeds = self.bound.embed(token_ids)
        cos, sin = self.bound.position_embeddings(position_ids, embeds)
        hidden = self.draft.layer(embeds, cos, sin, attend_window, attend_target)
        return self.draft.next_token_logits(hidden, self.bound.logits, token_ids, position_ids)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """A chain for transformers' own loop: the longest path that begins with the draft's first choice.

        Needs `chain_cache`, the cache that loop writes to. No logits are returned: the loop then accepts a token
        exactly when the target itself chose it. It asks whether the text has ended behind whole chains only, so none
        holds an end token: the target's own choice behind the chain may be one.
        """
        token_ids = input_ids[0].tolist()
        read = len(self.rows[0].index)
        if not read:
            self.start([token_ids], torch.arange(len(token_ids)).unsqueeze(0))
            return input_ids, None  # the cache is empty until this loop has verified once
        self.append([token_ids[read:]])
        tree = self.propose(self.chain_cache, [self.chain_max_length - len(token_ids) - 1])
        path = longest_path_through(tree, node=1) if tree.num_nodes > 1 else []
        tokens = tree.token_ids[0, path].tolist()
        chain = list(takewhile(lambda token: token not in self.chain_end_tokens, tokens))
        return torch.cat([input_ids, input_ids.new_tensor([chain])], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to update: a chain's tree is fixed for a call."""


@dataclass(frozen=True)
class _Context:
    """The target's rows as the cross-attention of one tree's levels reads them.

    Attributes:
        keys, values: `[b, Hkv, rows, D]` of the target layer, read in place.
        lengths: int32 `[b]`, where the committed rows end.
        starts: int32 `[b]`, first row that is not padding and, in a layer with a window, that it still sees; `None`
            for all of them.
        root_positions, last_positions: `[b, 1]` position of the root, and the last one a node may have.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None
    root_positions: torch.Tensor
    last_positions: torch.Tensor

    @classmethod
    def of(
        cls,
        cache: Cache,
        layer_idx: int,
        root_positions: torch.Tensor,
        limits: torch.Tensor,
        starts: torch.Tensor | None,
    ) -> _Context:
        count = root_positions.shape[0]
        layer: Any = cache.layers[layer_idx]
        if isinstance(cache, LongSpecCache):
            keys, values = layer.buffers(count)
            lengths = torch.tensor(cache.row_lengths[:count], dtype=torch.int32, device=root_positions.device)
            lengths, starts = layer.visible_rows(lengths, starts)
        else:
            keys, values = layer.keys, layer.values
            lengths = torch.tensor([keys.shape[2]], dtype=torch.int32, device=root_positions.device)
        return cls(
            keys,
            values,
            lengths,
            starts,
            root_positions,
            root_positions + limits,
        )
