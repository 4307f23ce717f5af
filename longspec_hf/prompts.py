"""The prompts of a call as drafting needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Prompts:
    """What the target reads first.

    Attributes:
        token_ids: per sequence, without padding; may lack what only `embeds` hold.
        positions: `[B, n]`, the last ones are the ids'.
        embeds: `[B, n, hidden]` where the prompts are given as embeddings.
        ids_length: columns of the call's `input_ids`, padding included; 0 where there are embeddings alone.
        starts: int32 `[B]`, first cache row of each sequence that is not padding, `None` without padding.
    """

    token_ids: list[list[int]]
    positions: torch.Tensor
    ids_length: int = 0
    embeds: torch.Tensor | None = None
    starts: torch.Tensor | None = None


def read_prompts(input_ids: torch.LongTensor, model_kwargs: dict[str, Any], device: torch.device) -> Prompts:
    """The prompts as drafting needs them; padding on the left is taken off."""
    embeds = model_kwargs.get("inputs_embeds")
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    length = input_ids.shape[1] if embeds is None else embeds.shape[1]
    if positions is not None and positions.dim() == 3:
        positions = positions[0]  # without images all axes are the same
    if positions is None:
        positions = torch.arange(length, device=input_ids.device).expand(input_ids.shape[0], -1)
    rows = input_ids.tolist()
    starts = None
    if mask is not None and bool((mask == 0).any()):
        starts = (mask == 0).sum(dim=1)
        shown = mask[:, mask.shape[1] - length :][:, length - input_ids.shape[1] :].tolist()
        rows = [[token for token, seen in zip(*row, strict=True) if seen] for row in zip(rows, shown, strict=True)]
        starts = starts.to(device=device, dtype=torch.int32)
    return Prompts(rows, positions.expand(input_ids.shape[0], -1), input_ids.shape[1], embeds, starts)
