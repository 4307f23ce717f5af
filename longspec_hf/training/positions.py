"""Anchor-offset position ids (LongSpec, arXiv 2502.17421, section 3.2). Pure functions.

A short text trains only small positions. Moving all but the first few tokens by one random offset trains every
position
of the context, while the first tokens keep theirs, so that attention sinks stay where the target learned them.
"""

from __future__ import annotations

import torch

MAX_ANCHORS = 4


def anchor_offset_positions(length: int, anchors: int, offset: int) -> torch.Tensor:
    """Position ids `[length]`: 0 .. anchors - 1, then `anchors + offset`, `anchors + offset + 1`, ...

    Args:
        length: number of tokens.
        anchors: leading tokens that keep their positions.
        offset: what is added to the others.
    """
    positions = torch.arange(length)
    positions[anchors:] += offset
    return positions


def draw_anchor_offset(length: int, max_position: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw `(anchors, offset)`: anchors uniform in 0 .. 4, offset uniform in 0 .. max_position - length.

    Args:
        length: number of tokens.
        max_position: number of positions the target knows; no token gets position `max_position` or later.
        generator: source of randomness.
    """
    anchors = int(torch.randint(0, MAX_ANCHORS + 1, (), generator=generator))
    offset = int(torch.randint(0, max(max_position - length, 0) + 1, (), generator=generator))
    return anchors, offset


def max_positions(text_config) -> int:
    """Number of positions of the target with this text configuration.

    Raises:
        ValueError: the configuration names none.
    """
    value = getattr(text_config, "max_position_embeddings", None)
    if value is None:
        raise ValueError(
            f"`max_position` must be given: {type(text_config).__name__} has no `max_position_embeddings`. Give the "
            "longest context the draft shall be used at."
        )
    return int(value)
