"""When to speculate: a call whose rounds do not pay goes on with plain steps, and tries again later.

A token bucket, filled by every token and emptied by every round that took longer than its tokens would have taken
plainly. Speculation goes on while there is something left, so it can lose a fixed share of a call's time, and what
its first rounds cost, but no more. Time is what the clock says, so the same call may go plain on one machine and not
on another; the tokens are the same.

What a round costs in plain steps hardly depends on how busy the machine is, so a call may go by what an earlier one of
its kind has found, and need not time plain steps of its own before rounds are judged.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

PLAIN_STEPS = 2
"""Plain steps timed for the comparison, after the first round that was not used to the end; the faster one counts."""
SHARE = 0.05
"""Part of plain decoding's time that rounds may lose in the long run."""
CREDIT = 4.0
"""Most that can be saved up, in plain steps: bad luck of a few rounds is no reason to stop what has paid."""
ENGINE_PATIENCE = 8
"""Rounds of the engine before plain steps are timed, whose graph must be captured first."""
KNOWN_CREDIT = 2.0
"""What a call has saved up at its beginning where an earlier one has found what rounds cost, in plain steps."""
ENGINE_CERTAIN = 3.0
"""Mean tokens of one sequence's greedy rounds from which on they pay, untimed: up to 128k a round of 64 nodes was
measured to take about twice a plain step's time at most. With sampling the host walks, and in a batch the nodes of all
sequences add up: such rounds are timed."""
LARGEST_LOSS = 10.0
"""Most that one round is charged, in plain steps: a kernel compiled on the way is no reason to stop for long."""


class Pacer:
    """Chooses between a round and a plain step.

    Args:
        enabled: `False` always chooses the round.
        patience: rounds before plain steps are timed.
        certain: mean tokens a round from which on rounds pay for certain.
        known: what rounds cost in plain steps, by tree, from an earlier call.
    """

    def __init__(
        self,
        enabled: bool = True,
        patience: int = 1,
        certain: float = float("inf"),
        known: Mapping[Hashable, float] | None = None,
    ) -> None:
        self.enabled = enabled
        self.patience = patience
        self.certain = certain
        self.pauses = 0
        self.rounds = 0
        self.tokens = 0.0
        self.plain_seconds: float | None = None
        self._known = known or {}
        self._judged = bool(known)
        self._timed_steps = 0
        self._credit = KNOWN_CREDIT if known else 0.0
        self._paused = False
        self._always_full = True
        self._pending: list[tuple[float, float]] = []
        self._timed_rounds: dict[Hashable, tuple[float, int]] = {}

    def speculates(self) -> bool:
        """Whether the next step shall be a round."""
        if not self.enabled or self._always_full:
            return True
        if self._timed_steps < PLAIN_STEPS and not self._judged:
            return self.rounds < self.patience or self.tokens >= self.certain * self.rounds
        return self._credit >= 0

    def costs(self) -> dict[Hashable, float]:
        """What rounds of each tree have cost in plain steps; nothing where this call has timed no plain steps."""
        if self._timed_steps < PLAIN_STEPS or not self.plain_seconds:
            return {}
        means = {tree: seconds / rounds for tree, (seconds, rounds) in self._timed_rounds.items()}
        return {tree: mean / self.plain_seconds for tree, mean in means.items()}

    def add_round(self, seconds: float | None, tokens: float, full: bool, tree: Hashable = None) -> None:
        """Take note of a round.

        Args:
            seconds: its time; `None` where it was not a usual one.
            tokens: tokens it committed, the mean over the sequences.
            full: whether it could not have committed more.
            tree: what the round's tree was, to compare its time with others'.
        """
        self.rounds += 1
        self.tokens += tokens
        self._always_full &= full
        if seconds is not None:
            total, rounds = self._timed_rounds.get(tree, (0.0, 0))
            self._timed_rounds[tree] = (total + seconds, rounds + 1)
            if self._timed_steps < PLAIN_STEPS and tree in self._known:
                self._charge(self._known[tree], tokens)
            else:
                self._judged = False
                self._pending.append((seconds, tokens))
        self._settle()

    def add_plain(self, seconds: float | None) -> None:
        """Take note of a plain step and its time, `None` where it was not a usual one."""
        if seconds is None:
            return
        self._timed_steps += 1
        if self.plain_seconds is None:
            self.plain_seconds = seconds
        elif self._timed_steps <= PLAIN_STEPS:
            self.plain_seconds = min(self.plain_seconds, seconds)
        else:  # follows a growing context, not a hiccup
            self.plain_seconds += 0.1 * (min(seconds, 2 * self.plain_seconds) - self.plain_seconds)
        self._credit = min(CREDIT, self._credit + SHARE)
        self._settle()

    def _charge(self, steps: float, tokens: float) -> None:
        """Take off what a round of so many plain steps' time has lost against its tokens."""
        self._credit = min(CREDIT, self._credit + SHARE * tokens - min(steps - tokens, LARGEST_LOSS))

    def _settle(self) -> None:
        """Charge the rounds that were not compared with plain steps yet, and see whether there is something left."""
        if self._timed_steps >= PLAIN_STEPS and self.plain_seconds is not None:
            for seconds, tokens in self._pending:
                self._charge(seconds / self.plain_seconds, tokens)
            self._pending = []
        elif not self._judged:
            return
        out = self._credit < 0
        self.pauses += out and not self._paused
        self._paused = out
