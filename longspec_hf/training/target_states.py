"""One forward of the frozen target, keeping what the draft learns from: one layer's K/V and the final hidden state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from ..hook import CACHE_ARG


class TargetStates(NamedTuple):
    """What the draft sees and what it imitates.

    Attributes:
        key, value: `[B, Hkv, T, D]` of the layer the draft cross-attends to, the keys rotated.
        hidden: `[B, T, hidden]`, the input of the target's head (its final norm applied).
    """

    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor


class OneLayerCache(DynamicCache):
    """A cache of an empty past that keeps the rows of one layer only.

    Handing over a cache is also what tells transformers that position ids which jump are not several texts packed into
    one row.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == self.layer_idx:
            self.kept = (key_states, value_states)
        return key_states, value_states


@torch.no_grad()
def read_target(
    target: PreTrainedModel, layer_idx: int, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> TargetStates:
    """Run the target over whole texts.

    Args:
        target: the frozen target.
        layer_idx: the layer to keep.
        input_ids, position_ids: `[B, T]`, padded on the right if at all.
    """
    cache = OneLayerCache(layer_idx)
    outputs = target.get_decoder()(
        input_ids=input_ids, position_ids=position_ids, use_cache=True, return_dict=True, **{CACHE_ARG: cache}
    )
    if cache.kept is None:
        raise ValueError(
            f"`target_layer_idx` {layer_idx} of {type(target).__name__} writes no keys and values. Choose a layer "
            "that has attention."
        )
    return TargetStates(*cache.kept, outputs.last_hidden_state)
