"""The walk: which nodes of a verified tree are committed.

From the root on, the target's next token is drawn exactly as plain decoding draws it. The tree is only used to know
whether the logits after that token are already there: if the token is a child of the current node the walk goes on
from that child, else it ends. So the output is the target's own whatever the tree holds, and for a fixed set of
candidates no rule accepts more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Draw = Callable[[int], tuple[int, bool] | None]
"""Draws the token after a node, appends it to the text and says `(token, stop)`; `None` leaves it undecided."""


@dataclass(frozen=True)
class Walk:
    """Outcome of one walk.

    Attributes:
        visited: nodes whose tokens are part of the text, the root first; their cache rows are to be kept.
        tokens: newly drawn tokens, one per visited node that is decided; the last one has no cache row yet.
        stopped: whether a stopping criterion ended generation.
        undecided: whether the token after the last visited node is still to be drawn.
    """

    visited: list[int]
    tokens: list[int]
    stopped: bool
    undecided: bool = False


def walk(token_ids: list[int], parents: list[int], draw: Draw) -> Walk:
    """Commit tokens from the root down.

    Args:
        token_ids, parents: of the tree's nodes, the root first.
        draw: called once per committed position, in order of the text.
    """
    children = {(parents[i], token_ids[i]): i for i in range(len(token_ids) - 1, 0, -1)}
    visited: list[int] = [0]
    tokens: list[int] = []
    while True:
        drawn = draw(visited[-1])
        if drawn is None:
            return Walk(visited, tokens, False, undecided=True)
        token, stop = drawn
        tokens.append(token)
        child = children.get((visited[-1], token))
        if stop or child is None:
            return Walk(visited, tokens, stop)
        visited.append(child)
