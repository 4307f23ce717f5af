"""What a round gave: tokens per sequence, and what is to be known of the trees they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .acceptance import DraftedBeam
from .settings import TreeSettings


@dataclass(frozen=True)
class Block:
    """One round's outcome, in the order that the sequences had in it.

    Attributes:
        settings: of the trees.
        tokens: committed, per sequence.
        stopped: whether they ended the sequence.
        limits: deepest node that each tree could have.
        nodes: of the trees, unused ones included.
        beams: reads the beams from the device.
    """

    settings: TreeSettings
    tokens: list[list[int]]
    stopped: list[bool]
    limits: list[int]
    nodes: int
    beams: Callable[[], list[DraftedBeam]]

    @property
    def full(self) -> bool:
        """Whether no sequence could have got more tokens."""
        depths = [self.settings.limited_to(limit).depth for limit in self.limits]
        return all(len(new) > d or s for new, d, s in zip(self.tokens, depths, self.stopped, strict=True))

    @property
    def cut(self) -> list[bool]:
        """Per sequence, whether its length or its end cut the tree or the walk short."""
        depth = self.settings.depth
        return [stop or limit < depth for stop, limit in zip(self.stopped, self.limits, strict=True)]
