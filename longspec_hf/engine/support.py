"""Which calls the engine can decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from ..cache import LongSpecCache
from ..cache_layer import LongSpecLayer
from ..modeling_longspec import LongSpecDraftModel
from ..settings import TreeSettings
from ..target import BoundTarget, is_compiled
from .linears import hooks_of_all_modules

ENGINE_DEVICES = {"cuda"}
"""Kinds of devices on which rounds are bound by launches rather than by memory."""
ENGINE_TARGETS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Models whose layers are exactly the one that `target_forward` writes out."""
ORDINARY_MODULES = ("torch.nn.", "transformers.", "peft.")
"""Where the classes of modules come from that run the same in a captured graph."""
SILU = (nn.SiLU, type(ACT2FN["silu"]))
"""Modules that compute what the kernels do between the projections of a gated MLP."""
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
    # Where the draft is, the target runs too; its weights may be elsewhere.
    if draft.device.type not in ENGINE_DEVICES:
        return f"a {draft.device.type} device is not bound by launches"
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
    if {config.hidden_act, draft.config.hidden_act} != {"silu"} or not (_is_silu(target) and _is_silu(draft)):
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
    if hooks_of_all_modules():
        return "a hook is registered for all modules"
    for module in target.modules():
        if not type(module).__module__.startswith(ORDINARY_MODULES):
            return f"the target holds a {type(module).__name__}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own hooks record states for calls that ask for them; those calls do not come here.
        if "forward" in vars(module) or any(not _made_by_transformers(hook) for hook in hooks):
            return f"the target's {type(module).__name__} has a forward or hooks of its own"
    for module in _written_out(target):
        if type(module).__module__ != type(target).__module__:
            return f"the target holds a {type(module).__name__}"
    return None


def _written_out(target: Any) -> Iterator[nn.Module]:
    """The modules that `target_forward` does not call: it computes what those of the target's own file do."""
    yield from (target.model, target.model.norm)
    for layer in target.model.layers:
        yield layer
        yield from (layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        norms = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
        yield from (norm for norm in norms if norm is not None)


def _is_silu(model: nn.Module) -> bool:
    """Whether every activation is silu by what it is, whatever the configuration says."""
    return all(type(module.act_fn) in SILU for module in model.modules() if hasattr(module, "act_fn"))


def _made_by_transformers(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")
