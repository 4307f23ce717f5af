"""The loop: prefill, then rounds of draft, verify, walk, commit (LongSpec, arXiv 2502.17421)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from .acceptance import Outcome
from .block import Block
from .cache import LongSpecCache
from .candidate_generator import LongSpecCandidateGenerator
from .engine import Engine
from .pacing import ENGINE_CERTAIN, ENGINE_PATIENCE, Pacer
from .prompts import Prompts
from .round_cost import PairTimes, RoundCost, usual_costs
from .settings import TreeSettings
from .stats import SpeculationStats
from .text import HARD_TIE_ULPS, TokenDrawer
from .tree import TokenTree
from .tree_choice import TreeChooser
from .verification import Draw, walk


class TargetRunner(Protocol):
    """The target's forwards.

    Attributes:
        static_shapes: whether every tree shall have the same number of nodes, as a compiled target wants it.
    """

    static_shapes: bool

    def prefill(self) -> torch.Tensor:
        """Read the prompts into the cache; logits `[B, V]` of their last tokens."""

    def verify(self, tree: TokenTree, root_positions: torch.Tensor) -> torch.Tensor:
        """Run the trees' nodes, whose rows go behind the cache's; logits `[b, T, V]`."""

    def step(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Run one token `[1]` as plain decoding runs it, its row behind the cache's; logits `[1, V]`."""

    def record(self, nodes: Sequence[int]) -> None:
        """Take note of what else is asked for at these nodes of the last forward, the drawn tokens' own."""

    def swap(self, one: int, other: int) -> None:
        """Exchange two sequences of the batch."""


class Decoder:
    """Generates until a stopping criterion holds for every sequence.

    The texts grow in `drawers`; the cache ends one row short of the longest. A sequence that has ended costs neither
    draft nor target work: those that go on are kept in front. When all have ended and the cache is kept, one more
    forward reads the last tokens of the shorter texts, whose rows plain decoding's cache holds too.

    Args:
        target: the target's forwards.
        generator: drafts trees; has not read the prompts yet.
        cache: the cache `target` writes; may hold the rows of a part of the prompts.
        drawers: per sequence, draws and commits tokens; their texts are the prompts.
        prompts: the prompts.
        max_length: longest text, prompt included. No tree reaches past it.
        make_engine: gives, after the prefill, what runs the rounds on the device, or `None` and why nothing can.
        known: what earlier calls of the pair learnt of the times of rounds.
        keeps_cache: whether anybody has the cache after the call.
    """

    def __init__(
        self,
        target: TargetRunner,
        generator: LongSpecCandidateGenerator,
        cache: LongSpecCache,
        drawers: Sequence[TokenDrawer],
        prompts: Prompts,
        max_length: int,
        make_engine: Callable[[], tuple[Engine | None, str | None]] = lambda: (None, None),
        known: PairTimes | None = None,
        keeps_cache: bool = True,
    ) -> None:
        self.target = target
        self.generator = generator
        self.cache = cache
        self.drawers = list(drawers)
        self.prompts = prompts
        self.starts = prompts.starts
        self.max_length = max_length
        self.settings = generator.settings
        self.pacer = Pacer(self.settings.fallback_to_plain)
        self.stats = SpeculationStats()
        self.active = len(self.drawers)
        self.make_engine = make_engine
        self.known = known
        self.keeps_cache = keeps_cache
        self.engine: Engine | None = None
        self._swaps: list[tuple[int, int]] = []
        self._exact_rows = 0

    def run(self) -> SpeculationStats:
        """Generate. If anything raises, the rows written by this call are dropped from the cache."""
        rows_before = self.cache.get_seq_length()
        try:
            self._prefill()
            began = time.perf_counter()
            while self.active:
                self._step()
            if self.keeps_cache:
                self._read_last_tokens()
            self.stats.decode_seconds = time.perf_counter() - began
            if self.known is not None and not self.trees.fixed:
                self.known.remember(self._kind, self.trees.cost.times)
            if self.known is not None and self.engine is not None:
                self.known.remember_costs(self._kind, self.pacer.costs())
            self._restore_order()
            self.cache.end_rounds()
        except BaseException:
            self._restore_order()
            self.cache.truncate(rows_before)
            raise
        finally:
            if self.engine is not None:
                self.engine.close()
        if self.pacer.pauses:
            self.stats.pauses = self.pacer.pauses
            self.stats.fallback_reason = (
                f"speculation did not pay: {self.stats.plain_steps} tokens were decoded plainly after "
                f"{self.stats.rounds} rounds of {self.stats.tau:.2f} tokens"
            )
        return self.stats

    def _prefill(self) -> None:
        began, prompts = time.perf_counter(), self.prompts
        self.generator.project_prompts(prompts.token_ids, prompts.positions, prompts.embeds)
        logits = self.target.prefill()
        self.cache.begin_rounds(self.active)
        self._exact_rows = self.cache.row_lengths[0]
        # A GPU is still at the prefill. What the host does until the first token is drawn takes no time, then.
        self.generator.index_prompts(prompts.token_ids)
        self._prepare_rounds()
        drawn = [drawer.draw(logits[row : row + 1]) for row, drawer in enumerate(self.drawers)]
        self.stats.committed = self.stats.committed_by_prefill = self.active
        self.stats.prefill_seconds = time.perf_counter() - began
        self.generator.append([[token] for token, _ in drawn])
        self._retire([stopped for _, stopped in drawn])
        if self.engine is not None and self.active:
            self.engine.load(self._limits(), self.starts)

    def _prepare_rounds(self) -> None:
        """All that rounds need beforehand, but the first token; nothing here waits for the device."""
        self.engine, self.stats.uncaptured_reason = self.make_engine()
        context = self.cache.row_lengths[0].bit_length()
        place = (str(self.generator.draft.device), self.engine is not None, torch.get_num_threads())
        self._kind = (*place, self.active, context, self._is_greedy())
        if self.engine is not None:
            certain = ENGINE_CERTAIN if self._is_greedy() and len(self.drawers) == 1 else float("inf")
            costs = {} if self.known is None else self.known.recall_costs(self._kind)
            self.pacer = Pacer(self.settings.fallback_to_plain, ENGINE_PATIENCE, certain, costs)
        self.trees = self._make_chooser()
        limits = self._limits()
        if self.engine is not None and max(limits) > 1:
            self.engine.load(limits, self.starts)
            plain = [self.settings.limited_to(0)] if self.pacer.enabled else []
            self.engine.prepare_ahead([self.trees.settings, *plain], self._is_greedy())

    def _make_chooser(self) -> TreeChooser:
        """What chooses the rounds' trees; compiled targets keep one, and so do processes, which must have the same."""
        device, captured = self.generator.draft.device, self.engine is not None
        keeps_one = self.target.static_shapes or self.generator.bound.parallel is not None
        known = None if self.known is None else self.known.recall(self._kind)
        settings = self.settings.of_tree(None) if keeps_one else self.settings
        return TreeChooser(settings, RoundCost(usual_costs(device.type), known), captured)

    def _step(self) -> None:
        """One forward of the target and what belongs to it."""
        sequences, speculates, limits = self.active, self.pacer.speculates(), self._limits()
        settings = self.trees.choose(max(limits), sequences) if speculates else self.settings.limited_to(0)
        usual, prepared = True, time.perf_counter()
        if self.engine is not None:
            greedy = self._is_greedy()
            self.engine.prepare(settings, greedy)
            usual = self.engine.replays(settings, greedy)
        began, block = time.perf_counter(), None
        if self.engine is not None:
            block = self._engine_round(self.engine, settings, limits)
        elif speculates:
            block = self._round(settings, limits)
        else:
            self._plain_step()
        seconds = self._seconds_since(began) if usual else None
        if block is None or not speculates:
            self.pacer.add_plain(seconds)
            self.trees.add_plain(sequences, seconds)
            return
        if not usual:
            self.trees.add_setup(time.perf_counter() - prepared)
        self.pacer.add_round(seconds, sum(map(len, block.tokens)) / sequences, block.full, settings)
        self.trees.add_round(self._outcomes(block), block.nodes, sequences, seconds)

    def _outcomes(self, block: Block) -> list[Outcome]:
        """What a round says of other trees, by those of its sequences that neither length nor end cut short."""
        if not self.trees.looks or all(block.cut):
            return []
        rows = zip(block.beams(), self.generator.branches, block.tokens, block.cut, strict=False)
        return [self.trees.outcome(beam, branch, tokens) for beam, branch, tokens, cut in rows if not cut]

    def _seconds_since(self, began: float) -> float:
        seconds, parallel = time.perf_counter() - began, self.generator.bound.parallel
        if parallel is None or not self.pacer.enabled:
            return seconds
        return parallel.agree_on_seconds(seconds)  # else processes would go over to plain steps at different times

    def _limits(self) -> list[int]:
        """Deepest node that each sequence's tree may have."""
        # Plain decoding would not read a token at position max_length - 1 or later, so no tree does.
        return [self.max_length - drawer.text.length - 1 for drawer in self.drawers[: self.active]]

    def _is_greedy(self) -> bool:
        return all(drawer.is_plain_argmax for drawer in self.drawers[: self.active])

    def _engine_round(self, engine: Engine, settings: TreeSettings, limits: list[int]) -> Block:
        """`_round` on the device; a plain step where the settings allow the root alone."""
        drawers = self.drawers[: self.active]
        if self._is_greedy():
            drafted, proposed = engine.greedy_round(settings)
            tokens, stopped = map(list, zip(*map(TokenDrawer.commit_all, drawers, proposed), strict=True))
        else:
            tree, logits = engine.draft_and_verify(settings)
            paths = tree.path_lists()
            walks = [walk(*paths[row], _node_drawer(drawer, logits[row], False)) for row, drawer in enumerate(drawers)]
            tokens, stopped = [result.tokens for result in walks], [result.stopped for result in walks]
            drafted = [len(ids) - 1 for ids, _ in paths]
            engine.commit(settings, [result.visited for result in walks], tokens)
        counts = list(map(len, tokens))
        self.cache.set_lengths([old + new for old, new in zip(self.cache.row_lengths, counts, strict=False)])
        self.generator.append(tokens, projected=True)
        if settings.depth:
            self.stats.add_round(drafted, counts, settings.name)
        else:
            self.stats.add_plain_step(self.active)
        self._retire(stopped)
        if any(stopped) and self.active:
            engine.load(self._limits(), self.starts)
        return Block(settings, tokens, stopped, limits, settings.max_nodes, lambda: engine.beams(settings))

    def _round(self, settings: TreeSettings, limits: list[int]) -> Block:
        """Draft, verify, walk, commit."""
        tree = self.generator.propose(self.cache, limits, self.starts, self.target.static_shapes, settings)
        logits = self.target.verify(tree, self.generator.root_positions(self.active))
        paths = tree.path_lists()
        walks = [
            walk(*paths[row], _node_drawer(drawer, logits[row], self.settings.recheck_near_ties))
            for row, drawer in enumerate(self.drawers[: self.active])
        ]
        self.cache.commit([result.visited for result in walks])
        tokens, stopped = [result.tokens for result in walks], [result.stopped for result in walks]
        self.target.record(walks[0].visited[: len(tokens[0])])
        if walks[0].undecided:
            token, stopped[0] = self._decide_again(tokens[0])
            tokens[0].append(token)
        self.generator.append(tokens)
        self.stats.add_round([len(ids) - 1 for ids, _ in paths], list(map(len, tokens)), settings.name)
        self._retire(stopped)
        return Block(settings, tokens, stopped, limits, tree.num_nodes, self.generator.drafted_beams)

    def _plain_step(self) -> None:
        sequences = self.active
        if len(self.drawers) == 1 and not self.target.static_shapes:
            row = self.generator.rows[0]
            logits = self._one_token(row.root, row.root_position)
        else:
            tree = self.generator.root_only(sequences)
            logits = self.target.verify(tree, self.generator.root_positions(sequences))[:, 0]
            self.cache.commit([[0]] * sequences)
        drawn = [drawer.draw(logits[row : row + 1]) for row, drawer in enumerate(self.drawers[:sequences])]
        self.target.record([0])
        self.generator.append([[token] for token, _ in drawn])
        self.stats.add_plain_step(sequences)
        self._retire([stopped for _, stopped in drawn])

    def _one_token(self, token: int, position: int) -> torch.Tensor:
        logits = self.target.step(torch.tensor([token]), position)
        self.cache.set_lengths([self.cache.row_lengths[0] + 1])
        return logits

    def _decide_again(self, tokens: list[int]) -> tuple[int, bool]:
        """Draw the token after a near-tie from a forward of one token, as plain decoding does.

        Where it is a tie even then, what decides are the last bits of the cache, and those that rounds have written
        are not plain decoding's: all since the last exact row are written again, one by one.
        """
        text, drawer = self.drawers[0].text, self.drawers[0]
        position = self.generator.rows[0].root_position + len(tokens)
        rows = self.cache.row_lengths[0]
        self.cache.set_lengths([rows - 1])
        logits = self._one_token(int(text.ids[0, -1]), position)
        self.stats.rechecks += 1
        drawn = drawer.draw_unless_tied(logits, HARD_TIE_ULPS)
        if drawn is None:
            again = text.ids[0, text.length - (rows - self._exact_rows) :].tolist()
            self.cache.set_lengths([self._exact_rows])
            for place, token in enumerate(again):
                logits = self._one_token(token, position - len(again) + 1 + place)
            self.stats.rechecks += len(again)
            self._exact_rows = rows
            drawn = drawer.draw(logits)
        self.target.record([0])
        return drawn

    def _retire(self, stopped: Sequence[bool]) -> None:
        """Put the sequences that have ended behind those that go on."""
        for row in reversed([row for row, ended in enumerate(stopped) if ended]):
            self.active -= 1
            if row != self.active:
                self._swap(row, self.active)
                self._swaps.append((row, self.active))

    def _read_last_tokens(self) -> None:
        """Write the rows of the shorter texts' last tokens: a later turn on the cache may see them."""
        lengths = self.cache.row_lengths
        shorter = [row for row, length in enumerate(lengths) if length < max(lengths)]
        if not shorter:
            return
        for place, row in enumerate(shorter):
            if place != row:
                self._swap(place, row)
                self._swaps.append((place, row))
        count = len(shorter)
        if self.target.static_shapes:
            tree = self.generator.propose(self.cache, [0] * count, self.starts, True, self.trees.settings)
        else:
            tree = self.generator.root_only(count)
        self.target.verify(tree, self.generator.root_positions(count))
        self.cache.commit([[0]] * count)

    def _restore_order(self) -> None:
        while self._swaps:
            self._swap(*self._swaps.pop())

    def _swap(self, one: int, other: int) -> None:
        self.cache.swap(one, other)
        self.generator.swap(one, other)
        self.target.swap(one, other)
        self.drawers[one], self.drawers[other] = self.drawers[other], self.drawers[one]
        if self.starts is not None:
            self.starts = self.starts.clone()
            self.starts[[one, other]] = self.starts[[other, one]]


def _node_drawer(drawer: TokenDrawer, logits: torch.Tensor, leave_near_ties: bool) -> Draw:
    """The walk's `draw`: from a node's row of the logits `[T, V]`."""
    if leave_near_ties:
        return lambda node: drawer.draw_unless_tied(logits[node : node + 1])
    if not drawer.is_plain_argmax:
        return lambda node: drawer.draw(logits[node : node + 1])
    # In fp32, as plain decoding compares them: in fp64 two logits may differ that are equal there.
    best = logits.float().argmax(dim=-1).tolist()
    return lambda node: drawer.commit(best[node])
