"""Where a draft belongs in a target whose layers lie on several devices: beside the layer whose cache it reads."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .configuration_longspec import LongSpecDraftConfig


def resolve_layer_idx(draft_config: LongSpecDraftConfig, text_config) -> int:
    """Index of the target layer the draft cross-attends to; -1 is the last full-attention layer.

    Raises:
        ValueError: the target has no such layer.
    """
    count = text_config.num_hidden_layers
    types = getattr(text_config, "layer_types", None) or ["full_attention"] * count
    if draft_config.target_layer_idx == -1:
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
        return full[-1] if full else count - 1
    if not -count <= draft_config.target_layer_idx < count:
        raise ValueError(
            f"`target_layer_idx` must be -1 or name one of the target's {count} layers, got "
            f"{draft_config.target_layer_idx}."
        )
    return draft_config.target_layer_idx % count


def draft_device(draft_config: LongSpecDraftConfig, target: PreTrainedModel) -> torch.device:
    """The device of the target layer the draft cross-attends to, whose K/V never leave it."""
    decoder = target.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        return decoder.device
    layer = layers[resolve_layer_idx(draft_config, target.config.get_text_config(decoder=True))]
    # Offloaded weights lie elsewhere than where accelerate lets the layer run.
    running = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if running is not None:
        return torch.device(f"cuda:{running}") if isinstance(running, int) else torch.device(running)
    return next((parameter.device for parameter in layer.parameters()), decoder.device)
