"""Where a draft belongs in a target whose layers lie on several devices: beside the layer whose cache it reads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_longspec import LongSpecDraftConfig, resolve_layer


def resolve_layer_idx(draft_config: LongSpecDraftConfig, text_config) -> int:
    """Index of the target layer the draft cross-attends to; -1 is the last full-attention layer.

    Raises:
        ValueError: the target has no such layer.
    """
    return resolve_layer(draft_config.target_layer_idx, text_config)


def draft_device(draft_config: LongSpecDraftConfig, target: PreTrainedModel) -> torch.device:
    """The device of the target layer the draft cross-attends to, whose K/V never leave it."""
    decoder = target.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        return decoder.device
    layer = layers[resolve_layer_idx(draft_config, target.config.get_text_config(decoder=True))]
    for module in layer.modules():
        if (running := _running_device(getattr(module, "_hf_hook", None))) is not None:
            return running
    return next((parameter.device for parameter in layer.parameters()), decoder.device)


def _running_device(hook: Any) -> torch.device | None:
    """Where accelerate lets a module run, which offloaded weights do not tell; `None` without such a hook."""
    for each in getattr(hook, "hooks", (hook,)):
        running = getattr(each, "execution_device", None)
        if running is not None:
            return torch.device(f"cuda:{running}") if isinstance(running, int) else torch.device(running)
    return None
