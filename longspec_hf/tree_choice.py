"""`tree_shape="auto"`: the tree that promises the most tokens a second, chosen anew during a call.

Tokens a round come from the rounds so far (`acceptance.py`), seconds from a look-up that the clock corrects
(`round_cost.py`). The clock may choose since tokens never depend on the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from .acceptance import Acceptance, DraftedBeam, Outcome, outcome_of
from .round_cost import RoundCost
from .settings import TreeSettings
from .tree_candidates import Candidate

MARGIN = 0.05
"""How much faster another tree must promise to be."""
ROUNDS_A_TREE = 4
"""Rounds that a tree is kept at least."""
CAPTURED_ROUNDS_A_TREE = 16
"""The same where rounds are captured, and a tree's first two are slow."""
CAPTURED_ROUNDS_A_LOOK = 4
"""Of so many captured rounds one is looked at, which costs the host a tenth of a millisecond."""
SHARE_LEFT = 0.5
"""Part of the tokens left to `max_length` that a call is taken to use: it may end before."""


class TreeChooser:
    """The tree of each round of one call.

    Args:
        settings: of the call; without `choices` they hold for all rounds.
        cost: of rounds.
        captured: whether rounds are captured: then all trees have all their nodes, and a new tree has slow rounds.
    """

    def __init__(self, settings: TreeSettings, cost: RoundCost, captured: bool = False) -> None:
        choices = settings.choices
        self.cost = cost
        self.captured = captured
        self.settings = settings.of_tree(None)
        self.trees: dict[TreeSettings, Candidate] = {}
        if choices is not None:
            self.sizes = choices.sizes
            self.trees = {settings.of_tree(candidate): candidate for candidate in choices.candidates}
            self.acceptance = Acceptance(self.sizes, max(len(tree.shape) for tree in choices.candidates))
        self._rounds = 0
        self._setup: dict[TreeSettings, float] = {}

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return not self.trees

    @property
    def looks(self) -> bool:
        """Whether the next round is worth looking at."""
        return not self.fixed and not (self.captured and self._rounds % CAPTURED_ROUNDS_A_LOOK)

    def outcome(self, beam: DraftedBeam, branch: Sequence[int], tokens: Sequence[int]) -> Outcome:
        """What the last round says of one sequence; arguments as of `outcome_of`."""
        return outcome_of(beam, branch, tokens, self.sizes, self.trees[self.settings].size)

    def add_round(self, outcomes: Sequence[Outcome], nodes: int, sequences: int, seconds: float | None) -> None:
        """Take note of a round of the current tree.

        Args:
            outcomes: of those sequences whose trees were neither cut short nor ended the text; may be empty.
            nodes: of the trees.
            sequences: that took part.
            seconds: its time, `None` where it says nothing.
        """
        self._rounds += 1
        if self.fixed:
            return
        tree = self.trees[self.settings]
        if outcomes:
            self.acceptance.add(outcomes, len(tree.shape), tree.size)
            if seconds is not None:
                self.cost.add(nodes, tree.shape, sequences, seconds)

    def add_plain(self, sequences: int, seconds: float | None) -> None:
        """Take note of a plain step."""
        if not self.fixed and seconds is not None:
            self.cost.add(1, (), sequences, seconds)

    def add_setup(self, seconds: float) -> None:
        """Take note of a round that the current tree was set up in."""
        self._setup[self.settings] = self._setup.get(self.settings, 0.0) + seconds

    def choose(self, tokens_left: int, sequences: int = 1) -> TreeSettings:
        """The tree of the next round; `tokens_left` each sequence may still get."""
        patience = CAPTURED_ROUNDS_A_TREE if self.captured else ROUNDS_A_TREE
        if self.fixed or self._rounds < patience or self._rounds % patience:
            return self.settings
        seconds = self._seconds_a_token(sequences)
        now, best = seconds[self.settings], min(seconds, key=seconds.__getitem__)
        saved = SHARE_LEFT * tokens_left * (now - seconds[best])
        if seconds[best] * (1.0 + MARGIN) < now and saved > self._setup_seconds(best):
            self.settings = best
            self._rounds = 0
        return self.settings

    def _seconds_a_token(self, sequences: int) -> dict[TreeSettings, float]:
        branch_share = 1.0 if self.captured else self.acceptance.branch_share()
        promised = self.acceptance.promise()
        found = {}
        for settings, tree in self.trees.items():
            nodes = min(tree.nodes, 1 + sum(tree.shape) + branch_share * tree.branch)
            seconds = self.cost.seconds(nodes, tree.shape, sequences)
            found[settings] = seconds / promised.tokens(len(tree.shape), tree.size, tree.branch)
        return found

    def _setup_seconds(self, settings: TreeSettings) -> float:
        """What the first rounds of a tree cost beside what they bring."""
        if not self.captured or settings in self._setup:
            return 0.0
        return min(self._setup.values(), default=float("inf"))
