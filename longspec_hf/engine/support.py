"""Which calls the engine can decode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from ..cache import LongSpecCache
from ..cache_layer import LongSpecLayer
from ..modeling_longspec import LongSpecDraftModel
from ..settings import TreeSettings
from ..target import BoundTarget, is_compiled

ENGINE_DEVICES = {"cuda"}
"""Kinds of devices on which rounds are bound by launches rather than by memory."""
ENGINE_TARGETS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Models whose layers are exactly the one that `target_forward` writes out."""
ORDINARY_MODULES = ("torch.nn.", "transformers.", "peft.")
"""Where the classes of modules come from that run the same in a captured graph."""
TABLES_BY_LENGTH = {"dynamic", "longrope"}
"""Rotary tables that transformers chooses by reading positions from the device."""


def reason_against_engine(
    target: PreTrainedModel,
    draft: LongSpecDraftModel,
    bound: BoundTarget,
    settings: TreeSettings,
    cache: LongSpecCache,
    wants_hidden_states: bool,
) -> str | None:
    """Why rounds of this call run through transformers' own forward, or `None` where the engine takes them."""
    config = target.config
    if target.device.type not in ENGINE_DEVICES:
        return f"a {target.device.type} device is not bound by launches"
    if not settings.capture_rounds:
        return "`capture_rounds` is off"
    if settings.recheck_near_ties:
        return "`recheck_near_ties` decides positions by forwards of one token"
    if wants_hidden_states:
        return "`output_hidden_states` is asked for"
    if type(target) not in ENGINE_TARGETS:
        return f"{type(target).__name__} has layers of its own"
    if bound.parallel is not None:
        return "the target is sharded over processes"
    if is_compiled(target):
        return "the target is compiled"
    if config.hidden_act != "silu" or draft.config.hidden_act != "silu":
        return "the gated MLP's activation is not silu"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in TABLES_BY_LENGTH:
        return "the rotary table depends on the length"
    if any(type(layer) is not LongSpecLayer for layer in cache.layers):
        return "the target has layers with a sliding window"
    if bound.logit_softcap is not None or bound.rotary_layer_type is not None or bound.rotary_axes != 1:
        return "the target's head or rotary module is of another kind"
    return _reason_of_modules(target)


def _reason_of_modules(target: nn.Module) -> str | None:
    """What in the target is not as its class made it, or `None`."""
    if len({parameter.device for parameter in target.parameters()}) > 1:
        return "the target's parameters are on several devices"
    if any(type(parameter) not in (nn.Parameter, torch.Tensor) for parameter in target.parameters()):
        return "the target's parameters are quantised"
    for module in target.modules():
        if not type(module).__module__.startswith(ORDINARY_MODULES):
            return f"the target holds a {type(module).__name__}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own hooks record states for calls that ask for them; those calls do not come here.
        if "forward" in vars(module) or any(not _made_by_transformers(hook) for hook in hooks):
            return f"the target's {type(module).__name__} has a forward or hooks of its own"
    return None


def _made_by_transformers(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")
