"""Rounds of the engine: draft, verify, walk and commit on the device (LongSpec, arXiv 2502.17421)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from longspec_hf_kernels import RowMover, greedy_walk, merge_tree
from transformers import PreTrainedModel

from ..acceptance import DraftedBeam
from ..beam import Beam
from ..cache import LongSpecCache
from ..candidate_generator import LongSpecCandidateGenerator
from ..settings import TreeSettings
from ..tree import TokenTree
from .capture import Captured, WarmKeys
from .draft_forward import DraftForward
from .host_copies import HostCopies
from .positions import Positions, RotaryTable
from .state import RoundState
from .target_forward import NodeAttention, target_logits

DRAFTS_AHEAD = {"cuda"}
"""Kinds of devices that draft the next round's beam while the host still looks at this one's tokens."""


@dataclass(frozen=True)
class Proposed:
    """What the draft proposes, from the newest committed tokens on.

    Attributes:
        positions: of the root and those after it.
        beam: `None` where only the root is asked for.
    """

    positions: Positions
    beam: Beam | None = None


@dataclass(frozen=True)
class Drafted:
    """Trees of a round.

    Attributes:
        tree: T nodes a sequence.
        ancestor_bits: int64 `[b, T, words]`, what each node sees of the others.
        positions: of the root and those after it.
        beam: that the trees were made of; `None` for roots alone.
    """

    tree: TokenTree
    ancestor_bits: torch.Tensor
    positions: Positions
    beam: Beam | None = None


class Engine:
    """Decodes the rounds of one call.

    A round is a beam, and all that follows from it and from the n-grams' branch: verification, walk and commit. The
    host reads a round's tokens, and nothing else; while it does what is to be done with them, the device drafts the
    next round's beam. Where tokens are drawn by processors or by chance, the walk is the caller's.

    Args:
        target: its forwards.
        generator: knows the sequences; has read the prompts.
        cache: the target's K/V, `begin_rounds` called.
    """

    def __init__(self, target: PreTrainedModel, generator: LongSpecCandidateGenerator, cache: LongSpecCache) -> None:
        self.target = target
        self.generator = generator
        self.cache = cache
        self.forward = DraftForward(generator.draft, generator.bound, generator.window, cache)
        self.device = generator.draft.device
        self.pool: Any = None
        self._rotary = RotaryTable(generator.bound, torch.empty(0, dtype=target.dtype, device=self.device))
        self._copies = HostCopies(self.device)
        self._ahead: TreeSettings | None = None
        self._warm = WarmKeys(generator.draft)
        self._graphs: dict[tuple, Captured] = {}
        self._addresses: tuple[int, ...] = ()
        self._room = 0
        self._mover: RowMover | None = None
        self._state: RoundState | None = None
        self._widths: dict[TreeSettings, tuple[int, ...]] = {}
        self._beams: Callable[[], list[list[int]]] = list
        self._walks: dict[tuple[int, int], torch.Tensor] = {}

    def load(self, limits: Sequence[int], starts: torch.Tensor | None) -> None:
        """Take over where the first `len(limits)` sequences stand, from the host's books."""
        self._drop_ahead()
        self._room = 0
        rows = self.generator.rows[: len(limits)]
        most = self.generator.longest_branch
        begins = [row.root_position for row in rows]
        # The last token of a text is never read, but the beam behind it may be drafted ahead.
        ends = [begin + max(limit, 0) + 1 for begin, limit in zip(begins, limits, strict=True)]
        if self._rotary.cover(min(begins), max(ends)):
            self._forget_graphs()
        wide = [[row.root, row.root_position, limit] for row, limit in zip(rows, limits, strict=True)]
        narrow = [self.cache.row_lengths[: len(rows)], self.generator.window.row_lengths[: len(rows)]]
        roots, positions, depths = self._copies.tensor(wide).unsqueeze(-1).unbind(1)
        lengths, window_lengths = self._copies.tensor(narrow).int().unbind(0)
        fresh = RoundState(
            roots.clone(),
            positions.clone(),
            depths.clone(),
            lengths.clone(),
            window_lengths.clone(),
            None if starts is None else starts[: len(rows)].clone(),
            torch.full((len(rows), most), -1, device=self.device),
        )
        old = self._state
        if old is None or old.sequences != fresh.sequences:
            self._state = fresh
            self._forget_graphs()
            return
        for name in ("roots", "root_positions", "limits", "lengths", "window_lengths", "starts"):
            if (tensor := getattr(old, name)) is not None:
                tensor.copy_(getattr(fresh, name))

    def close(self) -> None:
        """Free the graphs now; they hold themselves, and a collection in somebody's capture would break that."""
        self._drop_ahead()
        self._graphs.clear()
        self._state = None

    def replays(self, settings: TreeSettings, greedy: bool) -> bool:
        """Whether the next such round is a replay, and so worth timing."""
        names = (["beam"] if settings.depth else []) + ["greedy" if greedy else "verify"]
        return all(self._captured(name, settings).replays for name in names)

    def prepare_ahead(self, rounds: Sequence[TreeSettings], greedy: bool) -> None:
        """Prepare such rounds for as long as the device has other work, which hides what captures take."""
        for settings in rounds:
            if not self._copies.device_is_busy():
                return
            self.prepare(settings, greedy)

    def prepare(self, settings: TreeSettings, greedy: bool) -> None:
        """Do what a round needs done beforehand and now and then: room in the buffers, the window's move, captures."""
        state = self.state
        if self._ahead != settings:
            self._drop_ahead()
        if self.generator.window.make_room(state.sequences, settings.longest_path):
            state.window_lengths.copy_(self.generator.window.lengths[: state.sequences])
        lengths = self.cache.row_lengths[: state.sequences]
        if max(lengths) + settings.max_nodes > self._room:
            self._make_room(lengths, settings.max_nodes)
        self.forward.levels(settings.tree_shape, state.sequences)
        beam = self._prepare("beam", settings) if settings.depth else None
        if greedy:
            self._prepare("greedy", settings, beam)
            return
        self._given(settings.longest_path)
        self._prepare("commit", settings, self._prepare("verify", settings, beam))

    def _make_room(self, lengths: Sequence[int], nodes: int) -> None:
        """Let the cache take so many nodes behind committed rows of these lengths."""
        for layer in self.cache.layers:
            layer.make_room(lengths, nodes)
        buffers = [buffer for layer in self.cache.layers for buffer in layer.buffers(len(lengths))]
        self._room = min(buffer.shape[2] for buffer in buffers)
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        if addresses != self._addresses:
            self._addresses = addresses
            self._mover = RowMover(buffers)
            self._forget_graphs()

    def greedy_round(self, settings: TreeSettings) -> tuple[list[int], list[list[int]]]:
        """A whole round; returns how many nodes were drafted for every sequence, and its new tokens."""
        self._draft(settings)
        read = self._copies.fetch(self._run("greedy", settings))
        self._draft_ahead(settings)
        rows = read()
        tokens = [row[2 : 2 + row[1]] for row in rows]
        beams = [row[2 + settings.longest_path :] for row in rows]
        self._beams = lambda: beams
        self.generator.window.advance([len(row) for row in tokens])
        return [row[0] for row in rows], tokens

    def draft_and_verify(self, settings: TreeSettings) -> tuple[TokenTree, torch.Tensor]:
        """The first half of a round; returns the trees and their logits `[b, T, V]`, for the caller to walk."""
        self._draft(settings)
        drafted, logits = self._run("verify", settings)
        if drafted.beam is not None and self.generator.settings.choices is not None:
            self._beams = self._copies.fetch(drafted.beam.as_integers())
        return drafted.tree, logits

    def beams(self, settings: TreeSettings) -> list[DraftedBeam]:
        """The sequences' beams of the last round, which had these settings; only where trees are chosen."""
        return [DraftedBeam.of_integers(row, self._widths[settings]) for row in self._beams()]

    def commit(
        self, settings: TreeSettings, visited: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Commit what the caller's walks visited and drew."""
        most = settings.longest_path
        padded = [
            [len(new), *nodes, *[0] * (most - len(nodes)), *new, *[0] * (most - len(new))]
            for nodes, new in zip(visited, tokens, strict=True)
        ]
        self._copies.send(padded, self._given(most))
        self._run("commit", settings)
        self._draft_ahead(settings)
        self.generator.window.advance([len(row) for row in tokens])

    @property
    def state(self) -> RoundState:
        """Where the call stands."""
        if self._state is None:
            raise RuntimeError("the engine has no state yet: `load` comes first")
        return self._state

    def _forget_graphs(self) -> None:
        """Their tensors are no longer the state's or the cache's."""
        self._drop_ahead()
        self._graphs.clear()
        # A pool cannot be used again once its graphs are gone.
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def _captured(self, name: str, settings: TreeSettings) -> Captured:
        key = (name, settings)
        if key not in self._graphs:
            functions = {
                "beam": self.propose,
                "greedy": self._greedy,
                "verify": self._grow_and_verify,
                "commit": self._commit,
            }
            function, warm = functions[name], self._kind(name, settings) in self._warm
            self._graphs[key] = Captured(lambda: function(settings), self.device, self.pool, warm)
        return self._graphs[key]

    def _run(self, name: str, settings: TreeSettings) -> Any:
        captured = self._captured(name, settings)
        result = captured()
        if captured.calls == 1 and captured.can_capture:
            self._warm.add(self._kind(name, settings))
        return result

    def _prepare(self, name: str, settings: TreeSettings, before: Captured | None = None) -> Captured:
        """Capture what can be captured of a part of a round, which reads the result of the part before it."""
        captured = self._captured(name, settings)
        if before is not None:  # without a graph its result lies elsewhere in every round
            captured.can_capture &= before.can_capture
            captured.warm &= before.graph is not None
        captured.prepare()
        if not captured.can_capture:
            self._warm.discard(self._kind(name, settings))
        return captured

    def _kind(self, name: str, settings: TreeSettings) -> tuple:
        """What decides which kernels a part of a round needs, for one target and draft."""
        settings = replace(settings, beam_temperature=1.0)
        return (name, settings, type(self.target), self.state.sequences, self.state.starts is None)

    def _greedy(self, settings: TreeSettings) -> torch.Tensor:
        """A round from the beam on; `[b, 2 + P]`: nodes drafted, tokens drawn, and which.

        The beam follows where trees are chosen.
        """
        drafted = self._grow(settings)
        visited, report = self.walk(drafted, self.verify(drafted), settings)
        self.commit_paths(drafted, visited, report[:, 1], report[:, 2:])
        if drafted.beam is None or self.generator.settings.choices is None:
            return report
        return torch.cat([report, drafted.beam.as_integers()], dim=1)

    def _grow_and_verify(self, settings: TreeSettings) -> tuple[Drafted, torch.Tensor]:
        drafted = self._grow(settings)
        return drafted, self.verify(drafted)

    def _commit(self, settings: TreeSettings) -> None:
        most = settings.longest_path
        counts, visited, tokens = self._given(most).split([1, most, most], dim=1)
        counts = counts.squeeze(1).int()
        drafted, _ = self._captured("verify", settings).result
        self.commit_paths(drafted, visited, counts, tokens)

    def _draft(self, settings: TreeSettings) -> None:
        """Have the beam drafted, if it is not yet, and tell the device what the context's n-grams propose."""
        if settings.depth and self._ahead is None:
            self._run("beam", settings)
        self._ahead = None
        if length := settings.ngram_branch_length:
            copied = self.generator.copy_branches(self.state.sequences, length)
            branches = [[*tokens, *[-1] * (length - len(tokens))] for tokens in copied]
            self._copies.send(branches, self.state.branches[:, :length])

    def _draft_ahead(self, settings: TreeSettings) -> None:
        """Have the next round's beam drafted, from what this one has committed: mostly it has the same settings."""
        if self.device.type not in DRAFTS_AHEAD or not settings.depth:
            return
        # Nobody knows yet how much was committed. More than a window may leave no room for the beam's rows behind it.
        fits = settings.longest_path <= self.generator.window.window
        if fits and self._captured("beam", settings).replays:
            self._run("beam", settings)
            self._ahead = settings

    def _drop_ahead(self) -> None:
        """Wait for a beam that was drafted ahead, and do without it."""
        if self._ahead is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._ahead = None

    def draft(self, settings: TreeSettings) -> Drafted:
        """The trees of a round, on the device."""
        return self.grow(self.propose(settings), settings)

    def propose(self, settings: TreeSettings) -> Proposed:
        """The beams of a round."""
        state, steps = self.state, max(settings.longest_path, len(settings.tree_shape))
        positions = self._rotary.rows(state.root_positions, state.limits, steps)
        if not settings.depth:
            return Proposed(positions)
        beam = self.forward.beam(state, settings, positions)
        self._widths[settings] = beam.widths
        return Proposed(positions, beam)

    def _grow(self, settings: TreeSettings) -> Drafted:
        """The trees of the beam that was drafted last."""
        return self.grow(
            self._captured("beam", settings).result if settings.depth else self.propose(settings), settings
        )

    def grow(self, proposed: Proposed, settings: TreeSettings) -> Drafted:
        """The trees of a beam and of the n-grams' branch."""
        state, beam = self.state, proposed.beam
        if beam is None:
            root = TokenTree.root_only(state.roots)
            itself = root.valid.unsqueeze(-1)
            return Drafted(root, itself.long(), proposed.positions)
        branch = state.branches[:, : settings.ngram_branch_length]
        *nodes, bits, _ = merge_tree(
            state.roots,
            beam.token_ids,
            beam.parents,
            beam.scores,
            beam.widths,
            branch,
            state.limits,
            settings.max_tree_nodes,
            settings.depth,
        )
        return Drafted(TokenTree(*nodes), bits, proposed.positions, beam)

    def verify(self, drafted: Drafted) -> torch.Tensor:
        """The target's logits `[b, T, V]` after every node."""
        return target_logits(self.target, self.cache, drafted.tree.token_ids, self.attention_of(drafted))

    def attention_of(self, drafted: Drafted) -> NodeAttention:
        """What the target's layers need to know of the trees."""
        depths, (cos, sin, _) = drafted.tree.depths, drafted.positions
        at_depth = depths.unsqueeze(-1).expand(-1, -1, cos.shape[-1])
        return NodeAttention(
            self.state.lengths,
            drafted.ancestor_bits,
            depths,
            self.state.starts,
            cos.gather(1, at_depth),
            sin.gather(1, at_depth),
        )

    def walk(
        self, drafted: Drafted, logits: torch.Tensor, settings: TreeSettings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What greedy decoding visits, and the report of it; see `greedy_walk`."""
        tree = drafted.tree
        return greedy_walk(tree.token_ids, tree.parents, tree.valid, logits, settings.longest_path)

    def commit_paths(
        self, drafted: Drafted, visited: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Move the visited nodes' rows behind the committed ones, and everything else on by `counts` tokens."""
        assert self._mover is not None
        self._mover.move(self.state.lengths, visited, counts)
        most = visited.shape[1]
        ids = drafted.tree.token_ids.gather(1, visited)
        cos, sin, _ = drafted.positions
        self.forward.append(self.state, ids, cos[:, :most], sin[:, :most])
        self.state.advance(counts, tokens)

    def _given(self, most: int) -> torch.Tensor:
        """`[b, 1 + 2 P]`: where a walk on the host puts the number of its tokens, the visited nodes and the tokens."""
        shape = (self.state.sequences, 1 + 2 * most)
        if shape not in self._walks:
            self._walks[shape] = torch.zeros(shape, dtype=torch.long, device=self.device)
        return self._walks[shape]
