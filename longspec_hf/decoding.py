"""The loop: prefill, then rounds of draft, verify, walk, commit (LongSpec, arXiv 2502.17421)."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from .cache import LongSpecCache
from .candidate_generator import LongSpecCandidateGenerator
from .stats import SpeculationStats
from .text import TokenDrawer
from .tree import TokenTree
from .verification import Draw, walk


class TargetRunner(Protocol):
    """The target's forwards."""

    def prefill(self) -> torch.Tensor:
        """Read the prompt into the cache; logits `[1, V]` of its last token."""

    def verify(self, tree: TokenTree, root_position: int) -> torch.Tensor:
        """Run the tree's nodes, whose rows go behind the cache's; logits `[T, V]`."""

    def step(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Run one token `[1]` as plain decoding runs it, its row behind the cache's; logits `[1, V]`."""


def decode(
    target: TargetRunner,
    generator: LongSpecCandidateGenerator,
    cache: LongSpecCache,
    drawer: TokenDrawer,
    prompt_positions: torch.Tensor,
    max_length: int,
    starts: torch.Tensor | None = None,
) -> SpeculationStats:
    """Generate until a stopping criterion holds. The text grows in `drawer`, the cache ends one row short of it.

    Args:
        target: the target's forwards.
        generator: drafts trees; has not read the prompt yet.
        cache: the cache `target` writes; may hold the rows of a part of the prompt.
        drawer: draws and commits tokens; its text is the prompt.
        prompt_positions: `[n]` positions of the prompt's ids.
        max_length: longest text, prompt included. No tree reaches past it.
        starts: `[1]` first cache row that is not padding.

    If anything raises, the rows written by this call are dropped from the cache.
    """
    rows_before = cache.get_seq_length()
    try:
        return _decode(target, generator, cache, drawer, prompt_positions, max_length, starts)
    except BaseException:
        cache.truncate(rows_before)
        raise


def _decode(
    target: TargetRunner,
    generator: LongSpecCandidateGenerator,
    cache: LongSpecCache,
    drawer: TokenDrawer,
    prompt_positions: torch.Tensor,
    max_length: int,
    starts: torch.Tensor | None,
) -> SpeculationStats:
    text, stats = drawer.text, SpeculationStats()
    began = time.perf_counter()
    logits = target.prefill()
    prompt = text.ids[0].tolist()
    token, stopped = drawer.draw(logits)
    stats.committed = stats.committed_by_prefill = 1
    stats.prefill_seconds = time.perf_counter() - began
    generator.start(prompt, prompt_positions)
    generator.append([token])
    while not stopped:
        # Plain decoding would not read a token at position max_length - 1 or later, so no tree does.
        tree = generator.propose(cache, starts, max_depth=max_length - text.length - 1)
        logits = target.verify(tree, generator.root_position)
        result = walk(*tree.path_lists(), _node_drawer(drawer, logits, generator.settings.recheck_near_ties))
        cache.commit(result.visited, tree.num_nodes)
        tokens, stopped = result.tokens, result.stopped
        if result.undecided:
            cache.crop(-1)
            logits = target.step(text.ids[0, -1:], generator.root_position + len(tokens))
            token, stopped = drawer.draw(logits)
            tokens.append(token)
            stats.rechecks += 1
        generator.append(tokens)
        stats.add_round(drafted=tree.num_nodes - 1, committed=len(tokens))
    stats.decode_seconds = time.perf_counter() - began - stats.prefill_seconds
    return stats


def _node_drawer(drawer: TokenDrawer, logits: torch.Tensor, leave_near_ties: bool) -> Draw:
    """The walk's `draw`: from a node's row of the logits `[T, V]`."""
    if leave_near_ties:
        return lambda node: drawer.draw_unless_tied(logits[node : node + 1])
    if not drawer.is_plain_argmax:
        return lambda node: drawer.draw(logits[node : node + 1])
    # In fp32, as plain decoding compares them: in fp64 two logits may differ that are equal there.
    best = logits.float().argmax(dim=-1)
    return lambda node: drawer.commit(best[node : node + 1].to(drawer.text.ids.device))
