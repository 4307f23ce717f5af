"""What a round takes, of any number of nodes and levels: a look-up per kind of device, corrected by the clock.

A round's time is that of a plain step, what its nodes add to the target's forward, and its draft levels. Each of the
three has a usual value for the kind of device, in plain steps, and a factor fitted to the rounds and plain steps that
were timed: least squares, pulled towards one common factor, so one kind of round corrects all and several tell which
part differs. What was learnt of a pair is kept for its next call, as long as both models live.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DECAY = 0.97
"""Of a time's weight with each later one of its kind: contexts grow, and other work on the machine comes and goes."""
SLOW_DECAY = 0.998
"""Of a time's weight with each one of other kinds, which say nothing against it."""
PULL = 0.02
"""Weight of the look-up, in rounds."""
REMEMBERED = 8.0
"""Rounds that what is known from earlier calls counts as, at most."""
OUTLIER = 3.0
"""A time this many times the expected one is taken as that many times."""


@dataclass(frozen=True)
class UsualCosts:
    """Costs in plain steps.

    Attributes:
        rows: `(rows, what they add to a forward of one row)`, in order; between them in proportion, and beyond as
            between the last two.
        level: `(of a draft level of no nodes, of each of its nodes)`.
    """

    rows: Sequence[tuple[int, float]]
    level: tuple[float, float]

    def parts(self, nodes: float, shape: Sequence[int], sequences: int) -> tuple[float, float, float]:
        """Plain step, added by nodes, and draft levels, of a round over trees of `nodes` nodes."""
        added = self._added(nodes * sequences) - self._added(sequences)
        base = 1.0 + self._added(sequences)
        expanded = [1, *shape[:-1]] if shape else []
        levels = sum(self.level[0] + self.level[1] * width * sequences for width in expanded)
        return 1.0, added / base, levels / base

    def _added(self, rows: float) -> float:
        known = [(1, 0.0), *self.rows]
        place = next((i for i in range(1, len(known)) if rows <= known[i][0]), len(known) - 1)
        (left, low), (right, high) = known[place - 1 : place + 1]
        return low + (high - low) * (rows - left) / (right - left)


CPU = UsualCosts(((4, 0.4), (8, 0.8), (16, 1.2), (32, 2.0), (64, 4.0)), (0.1, 0.01))
"""SmolLM2-135M in fp32 on two cores."""
GPU = UsualCosts(((64, 0.25), (128, 0.5)), (0.06, 0.0))
"""Shapes of 7B and 8B in bf16 on an H200, captured rounds at 32k: `docs/benchmarks/generate_h200_rounds.csv`."""


def usual_costs(device_type: str) -> UsualCosts:
    """The look-up for a kind of device."""
    return CPU if device_type == "cpu" else GPU


@dataclass
class Times:
    """Sums of a weighted least squares fit over times.

    Attributes:
        weight: of all times.
        products: sums of products of parts, `[3][3]`.
        seconds: sums of parts times seconds, `[3]`.
    """

    weight: float = 0.0
    products: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(3)])
    seconds: list[float] = field(default_factory=lambda: [0.0] * 3)

    def add(self, parts: Sequence[float], seconds: float) -> None:
        """Take note of a time, and forget as much of what is known of such parts, and little of the rest."""
        known = [_dot(row, parts) for row in self.products]
        # Directional forgetting: the solution stays as it is, and what is orthogonal to `parts` keeps its weight.
        share = (1.0 - DECAY) / strength if (strength := _dot(known, parts)) > 0.0 else 0.0
        told = _dot(self.seconds, parts)
        for i in range(3):
            self.seconds[i] = SLOW_DECAY * (self.seconds[i] - share * known[i] * told) + parts[i] * seconds
            for j in range(3):
                kept = self.products[i][j] - share * known[i] * known[j]
                self.products[i][j] = SLOW_DECAY * kept + parts[i] * parts[j]
        self.weight = DECAY * self.weight + 1.0

    def scaled(self, factor: float) -> Times:
        """The same at another weight."""
        return Times(
            self.weight * factor,
            [[value * factor for value in row] for row in self.products],
            [value * factor for value in self.seconds],
        )


class RoundCost:
    """Seconds of rounds, in plain steps as long as nothing was timed.

    Args:
        usual: of the device.
        known: from an earlier call.
    """

    def __init__(self, usual: UsualCosts, known: Times | None = None) -> None:
        self.usual = usual
        known = known or Times()
        self.times = known.scaled(min(1.0, REMEMBERED / known.weight) if known.weight else 1.0)
        self._factors = self._fit()

    def seconds(self, nodes: float, shape: Sequence[int], sequences: int = 1) -> float:
        """Expected time of a round of trees of `nodes` nodes and this beam; a plain step has one node and no beam."""
        return _dot(self._factors, self.usual.parts(nodes, shape, sequences))

    def add(self, nodes: float, shape: Sequence[int], sequences: int, seconds: float) -> None:
        """Take note of a time."""
        expected = self.seconds(nodes, shape, sequences)
        if self.times.weight >= 1.0:
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        self.times.add(self.usual.parts(nodes, shape, sequences), seconds)
        self._factors = self._fit()

    def _fit(self) -> list[float]:
        """Seconds of each part's unit; all ones where nothing was timed."""
        products, seconds = self.times.products, self.times.seconds
        total = sum(map(sum, products))
        if total <= 0.0:
            return [1.0] * 3
        common = sum(seconds) / total
        pull = PULL * self.times.weight
        matrix = [[products[i][j] + (pull if i == j else 0.0) for j in range(3)] for i in range(3)]
        solved = _solve(matrix, [seconds[i] + pull * common for i in range(3)])
        # Noise must not make a part free.
        return [min(max(factor, 0.2 * common), 5.0 * common) for factor in solved]


COSTS = "costs of rounds in plain steps"
CALLS_A_COST = 16
"""Calls that go by an earlier one's costs before one finds them out again."""
_KNOWN: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[Any, Any]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PairTimes:
    """What calls of a pair have learnt. It is kept beside the models, which are held weakly, and not on them.

    Attributes:
        target, draft: the models.
    """

    target: Any
    draft: Any

    def recall(self, kind: Any) -> Times | None:
        """What an earlier call of a kind learnt: of the same device and batch, for example."""
        return self._kept().get(kind)

    def remember(self, kind: Any, times: Times) -> None:
        """Keep what a call learnt for the next one of its kind."""
        self._kept()[kind] = times

    def recall_costs(self, kind: Any) -> dict[Any, float]:
        """What rounds cost in plain steps in an earlier call of a kind; once in a while nothing, to find out anew."""
        costs, calls = self._kept().get((COSTS, kind), ({}, 0))
        self._kept()[COSTS, kind] = (costs, calls + 1)
        return costs if calls < CALLS_A_COST else {}

    def remember_costs(self, kind: Any, costs: Mapping[Any, float]) -> None:
        """Keep what a call found rounds to cost, by tree."""
        if costs:
            self._kept()[COSTS, kind] = (dict(costs), 0)

    def _kept(self) -> dict[Any, Any]:
        return _KNOWN.setdefault(self.target, weakref.WeakKeyDictionary()).setdefault(self.draft, {})


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination of a positive definite system."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = rows[row][pivot] / rows[pivot][pivot]
            rows[row] = [value - factor * above for value, above in zip(rows[row], rows[pivot], strict=True)]
    solution = [0.0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][column] * solution[column] for column in range(row + 1, size))
        solution[row] = (rows[row][size] - known) / rows[row][row]
    return solution
