"""What trees of any depth and size would commit, from the rounds of the trees that were in use. Pure Python.

A tree keeps the best-scored nodes of its beam. So it is known of each committed node how small a tree would still have
held it (`outcome_of`). [`Acceptance`] keeps decayed shares of the rounds in which a node of a depth was committed that
a size holds. What the trees in use cannot tell, deeper and larger trees, is estimated from what they can. Shares that
are not seen any more return to that estimate, so what was given up is tried again after a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tree_candidates import TreeSize

DECAY = 0.96
"""Of a round's weight from one to the next: about 25 rounds count."""
DOUBT = 2.0
"""Rounds that the estimate of a share counts as."""
FIRST_SHARE = 0.5
"""Estimate for the first node in the smallest tree, where nothing is known."""
GAIN = 0.2
"""Share of the misses of a size that the next one catches, where nothing is known; low, as a try costs time."""
NOWHERE = 10**9
FIRST_COPY, NEXT_COPY = 0.2, 0.7
"""Estimates for the branch: that its first token is committed, and each further one."""


@dataclass(frozen=True)
class DraftedBeam:
    """The beam of one sequence as the host sees it: nodes level after level, best first in each.

    Attributes:
        token_ids: of the nodes.
        parents: index of each node's parent, -1 for the root.
        scores: summed log-probabilities, or others in their order.
        widths: nodes of each level.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    scores: Sequence[float]
    widths: Sequence[int]

    @classmethod
    def of_integers(cls, row: Sequence[int], widths: Sequence[int]) -> DraftedBeam:
        """From a row of `Beam.as_integers`."""
        count = sum(widths)
        return cls(row[:count], row[count : 2 * count], row[2 * count :], widths)


@dataclass(frozen=True)
class Outcome:
    """What one sequence's round says.

    Attributes:
        sizes: per committed node of the tree, root aside, the index of the smallest size that holds it and its
            ancestors; sizes above the one in use count as that.
        copied: tokens of the branch that the text followed.
        copied_to_end: whether it went on following it where the round ended.
        branch: length of the branch, the longest that was asked for.
    """

    sizes: tuple[int, ...]
    copied: int
    copied_to_end: bool
    branch: int


def outcome_of(
    beam: DraftedBeam, branch: Sequence[int], tokens: Sequence[int], sizes: Sequence[TreeSize], used: int
) -> Outcome:
    """Read a round.

    Args:
        beam: of the tree in use.
        branch: tokens copied from the context, as many as the largest size takes.
        tokens: committed by the round; the last one is the target's own.
        sizes: smallest first.
        used: index of the size in use.
    """
    copied = _common_start(branch, tokens)
    accepted = tokens[:-1]
    children = {(beam.parents[i], beam.token_ids[i]): i for i in range(len(beam.token_ids) - 1, -1, -1)}
    budgets = [size.nodes - 1 - min(size.branch, len(branch)) for size in sizes]
    starts = [sum(beam.widths[:level]) for level in range(len(beam.widths))]
    found, node, needed = [], -1, 0
    for depth, token in enumerate(accepted, 1):
        node = children.get((node, token), -2)  # -2: no node's parent
        # Neither fits any size where the beam has no such node.
        order = sum(score > beam.scores[node] for score in beam.scores) if node >= 0 else NOWHERE
        rank = node - starts[depth - 1] if node >= 0 else NOWHERE
        while needed < used:
            size = sizes[needed]
            if depth <= min(copied, size.branch) or (order < budgets[needed] and rank < size.width):
                break
            needed += 1
        found.append(needed)
    return Outcome(tuple(found), copied, copied == len(tokens) < len(branch), len(branch))


@dataclass(frozen=True)
class Promise:
    """Expected shares of rounds.

    Attributes:
        beam: per depth and size, that commit a node of that depth which the size holds.
        copied: per depth, that commit the branch's token there.
    """

    beam: list[list[float]]
    copied: list[float]

    def tokens(self, depth: int, size: int, branch: int) -> float:
        """Tokens a round commits with a beam of `depth` levels, a size and a branch; the target's own counts."""
        return 1.0 + sum(row[size] for row in self.beam[:depth]) + sum(self.copied[depth:branch])


class Acceptance:
    """Decayed shares of rounds, and what they promise.

    Args:
        sizes: smallest first.
        depth: deepest beam.
    """

    def __init__(self, sizes: Sequence[TreeSize], depth: int) -> None:
        self.sizes = tuple(sizes)
        self.beam = [[_Share() for _ in self.sizes] for _ in range(depth)]
        self.copied = [_Share() for _ in range(max(size.branch for size in sizes))]
        self.has_branch = _Share()

    def add(self, outcomes: Sequence[Outcome], depth: int, used: int) -> None:
        """Take note of a round, drafted with a beam of `depth` levels and the size of index `used`."""
        for share in (self.has_branch, *self.copied, *(share for row in self.beam for share in row)):
            share.decay()
        for outcome in outcomes:
            self.has_branch.add(outcome.branch > 0)
            for level in range(depth):
                for size in range(used + 1):
                    self.beam[level][size].add(level < len(outcome.sizes) and outcome.sizes[level] <= size)
            for level, share in enumerate(self.copied):
                if level >= outcome.copied and outcome.copied_to_end:
                    break
                share.add(level < outcome.copied)

    def promise(self) -> Promise:
        """What is expected of the next rounds."""
        return Promise(self._beam_shares(), self._copied_shares())

    def branch_share(self) -> float:
        """Share of the rounds that had a branch."""
        return self.has_branch.mean(FIRST_SHARE)

    def _beam_shares(self) -> list[list[float]]:
        above, before = [1.0] * len(self.sizes), [1.0] * len(self.sizes)
        rows: list[list[float]] = []
        for depth, row in enumerate(self.beam):
            shares: list[float] = []
            for size, share in enumerate(row):
                # Deeper: as likely as the level above was, given its parent. Larger: some of the misses.
                guesses = [above[size] * above[size] / max(before[size], 1e-9)] if depth else []
                if size:
                    guesses.append(shares[-1] + GAIN * (above[size] - shares[-1]))
                guess = min(guesses, default=FIRST_SHARE)
                shares.append(min(above[size], max(share.mean(guess), shares[-1] if size else 0.0)))
            rows.append(shares)
            above, before = shares, above
        return rows

    def _copied_shares(self) -> list[float]:
        shares: list[float] = []
        for share in self.copied:
            shares.append(share.mean(NEXT_COPY * shares[-1] if shares else FIRST_COPY))
        return shares


class _Share:
    """A decayed mean of yes and no."""

    def __init__(self) -> None:
        self.yes = self.all = 0.0

    def decay(self) -> None:
        self.yes *= DECAY
        self.all *= DECAY

    def add(self, value: bool) -> None:
        self.yes += value
        self.all += 1.0

    def mean(self, guess: float) -> float:
        return (DOUBT * guess + self.yes) / (DOUBT + self.all)


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
