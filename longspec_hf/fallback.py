"""Calls that cannot be speculated, each with its reason in words. Plain decoding gives them the same result."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    generation,
)
from transformers.generation import EosTokenCriteria, GenerationConfig, MaxLengthCriteria

from .cache import LongSpecCache
from .prompts import Prompts
from .settings import TreeSettings
from .tensor_parallel import is_sharded_by_fsdp

ROW_WISE = (
    generation.EosTokenCriteria,
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.ExponentialDecayLengthPenalty,
    generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor,
    generation.InfNanRemoveLogitsProcessor,
    generation.LogitNormalization,
    generation.MaxLengthCriteria,
    generation.MaxTimeCriteria,
    generation.MinLengthLogitsProcessor,
    generation.MinNewTokensLengthLogitsProcessor,
    generation.MinPLogitsWarper,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.PrefixConstrainedLogitsProcessor,
    generation.RepetitionPenaltyLogitsProcessor,
    generation.SequenceBiasLogitsProcessor,
    generation.StopStringCriteria,
    generation.SuppressTokensAtBeginLogitsProcessor,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)
"""Processors and criteria that treat every sequence by itself and remember nothing of their last call: the sequences
of a batch may get ahead of one another, and candidates may be tried."""


PASSED_ON = {
    *(
        "attention_mask",
        "cache_position",
        "inputs_embeds",
        "logits_to_keep",
        "position_ids",
        "synced_gpus",
        "use_cache",
    ),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}
"""Inputs that rounds give to the target's forwards themselves."""
PREFILLED = (
    "token_type_ids",
    "_values",
    "_values_videos",
    "_sizes",
    "_thw",
    "_features",
    "_per_grid_ts",
    "_encoder_outputs",
)
"""Ends of the names of inputs that only a prefill reads: of images, videos and sounds."""
TREE_LAYER_TYPES = {"full_attention", "sliding_attention"}


def reason_of_call(
    target: PreTrainedModel,
    config: GenerationConfig,
    settings: TreeSettings,
    inputs: dict[str, Any],
    cache_argument: str,
    prompts: Prompts,
) -> str | None:
    """The first thing in a call that asks for plain decoding, or `None`.

    Args:
        target, config, settings: of the call.
        inputs: keyword arguments of the target's forwards, and `synced_gpus`.
        cache_argument: the name of the cache among them.
        prompts: of the call.
    """
    text_config = target.config.get_text_config(decoder=True)
    return (
        reason_of_sharding(target)
        or reason_of_config(config, settings, inputs["synced_gpus"])
        or reason_of_layers(text_config)
        or reason_of_modules(target)
        or reason_of_state(target)
        or reason_of_inputs(inputs, cache_argument, config)
        or reason_of_preparation(target)
        or reason_of_rope(text_config, prompts, config.max_length)
    )


def reason_of_config(config: GenerationConfig, settings: TreeSettings, synced_gpus: bool) -> str | None:
    """What in the configuration asks for plain decoding, or `None`."""
    if config.return_dict_in_generate and config.output_attentions:
        return "`output_attentions` is asked for"
    if synced_gpus:
        return "`synced_gpus` needs the same number of forwards on every GPU"
    if not config.use_cache:
        return "`use_cache` is off"
    if config.output_hidden_states and config.prefill_chunk_size is not None:
        return "`output_hidden_states` is asked for with `prefill_chunk_size`"
    return None


def reason_of_sharding(target: nn.Module) -> str | None:
    """Why a target whose weights are whole only within its own forwards lends nothing to a draft, or `None`."""
    if not is_sharded_by_fsdp(target):
        return None
    return (
        "FSDP2 (`fully_shard`) gathers the target's weights for its own forwards only, and a draft borrows some; to "
        "speculate, load the target whole in every process, or shard it by heads with `tp_plan`"
    )


def reason_of_inputs(model_kwargs: dict[str, Any], cache_argument: str, config: GenerationConfig) -> str | None:
    """What in the inputs asks for plain decoding, or `None`."""
    cache = model_kwargs.get(cache_argument)
    if cache is None:
        return "there is no cache"
    if isinstance(cache, StaticCache) and config.cache_implementation is not None:
        pass  # made by generate for this call
    elif not isinstance(cache, LongSpecCache) and (type(cache) is not DynamicCache or cache.offloading):
        return f"the cache is a {'offloaded ' if getattr(cache, 'offloading', False) else ''}{type(cache).__name__}"
    elif not LongSpecCache.can_take_over(cache):
        return "the cache has layers that hold something else than keys and values"
    others = [name for name in model_kwargs if name not in PASSED_ON and not name.endswith(PREFILLED)]
    if others := [name for name in others if name != cache_argument and model_kwargs[name] is not None]:
        return f"`{others[0]}` goes to every forward of plain decoding"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
        return "`attention_mask` has zeros behind ones"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() == 3 and bool((positions != positions[:1]).any()):
        return "`position_ids` differ from axis to axis, as they do with images"
    return None


def reason_of_layers(config: PreTrainedConfig) -> str | None:
    """Which layers of the target cannot verify a token tree, or `None`."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - TREE_LAYER_TYPES)
    return f"the target has layers of type {', '.join(others)}, which take no token tree" if others else None


def reason_of_modules(target: nn.Module) -> str | None:
    """Which layers of the target round a token by what else is in its forward, or `None`.

    PyTorch's dynamic quantisation has one scale for all rows of a forward; bitsandbytes' int8 takes the columns where
    any row has an outlier out of the int8 product. Scales of each row by itself do no harm.
    """
    for module in target.modules():
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.quantized.dynamic"):
            return "its dynamically quantised layers scale their inputs by the whole forward"
        if kind.__name__ == "Linear8bitLt" and getattr(module.state, "threshold", 0.0) > 0.0:
            return "its int8 layers find outliers in the whole forward (`llm_int8_threshold=0.0` would not)"
    return None


def reason_of_rope(config: PreTrainedConfig, prompts: Prompts, max_length: int) -> str | None:
    """Whether plain decoding would rotate tokens of this call by tables that depend on how far it had got."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    if not kinds & {"dynamic", "longrope"}:
        return None
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    lengths = prompts.positions.amax(dim=1) + 1  # cached tokens counted, padding not
    longest = int(lengths.max()) + max_length - prompts.ids_length
    depends = "dynamic" in kinds and longest > limit
    cached = int(prompts.positions.amin())
    depends |= "longrope" in kinds and (int(lengths.min()) <= limit < longest or 0 < cached <= limit < longest)
    return "the target's rotary table changes with the length of the text" if depends else None


def reason_of_state(target: nn.Module) -> str | None:
    """Whether forwards of the target right now are not its weights' alone, or `None`."""
    if target.training:
        rates = [module.p for module in target.modules() if isinstance(module, nn.Dropout)]
        rates += [getattr(module, "attention_dropout", 0.0) for module in target.modules()]
        if any(isinstance(rate, float) and rate > 0.0 for rate in rates):
            return "the target is in training mode and drops out at random"
    kind = next((weight.device.type for weight in target.parameters() if not weight.is_meta), "cpu")
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != target.dtype:
        return f"`torch.autocast` computes in {torch.get_autocast_dtype(kind)}, the target is in {target.dtype}"
    return None


def reason_of_attention(chosen: str) -> str | None:
    """Whether the target's attention is computed by something that trees know nothing of, or `None`."""
    function = AttentionInterface().get(chosen)
    while isinstance(function, functools.partial):
        function = function.func
    if chosen == "eager" or function is None or function.__module__.split(".")[0] in ("transformers", "kernels"):
        return None
    return f"the attention {chosen!r} is registered by {function.__module__}, and a tree is verified by another"


def reason_of_preparation(target: PreTrainedModel) -> str | None:
    """Whether a wrapper of the target puts something of its own into plain decoding's forwards, or `None`."""
    if "alora_offsets" in _handed_by_hooks(target):
        return "activated LoRA begins within the prompt"
    owner = getattr(target.prepare_inputs_for_generation, "__self__", target)
    if owner is target:
        return None
    adapters = getattr(owner, "active_peft_config", None)
    if adapters is None:
        return f"{type(owner).__name__} prepares the inputs of the target's forwards"
    return "PEFT's prompt learning puts tokens of its own before the text" if adapters.is_prompt_learning else None


def _handed_by_hooks(target: nn.Module) -> set[str]:
    """Names of what PEFT hands to its layers by hooks for the length of a call."""
    hooks = (hook for module in target.modules() for hook in module._forward_pre_hooks.values())
    return {name for hook in hooks if isinstance(hook, functools.partial) for name in hook.keywords}


def reason_of_batch(
    target: nn.Module,
    config: GenerationConfig,
    settings: TreeSettings,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    streams: bool,
) -> str | None:
    """Why several sequences must go on in step, or `None`."""
    criteria = list(criteria)
    if "adapter_names" in _handed_by_hooks(target):
        return "`adapter_names` belong to the rows of a batch that goes on whole"
    if streams:
        return "a streamer takes the tokens of a batch in step"
    if config.return_dict_in_generate and config.output_hidden_states:
        return "`output_hidden_states` is asked for with a batch"
    if settings.recheck_near_ties:
        return "`recheck_near_ties` works on one sequence"
    for function in [*processors, *criteria]:
        if type(function) not in ROW_WISE:
            return f"{type(function).__name__} may tie the sequences of a batch together"
    if not any(isinstance(rule, EosTokenCriteria) for rule in criteria):
        others = [type(rule).__name__ for rule in criteria if not isinstance(rule, MaxLengthCriteria)]
        if others:
            return f"without an end token, {others[0]} ends all sequences of a batch together"
    return None


def reason_of_chain(
    cache: Cache,
    prompts: Prompts,
    config: GenerationConfig,
    settings: TreeSettings,
    processors: Iterable[Any],
    criteria: Iterable[Any],
) -> str | None:
    """Why transformers' assisted loop, which verifies chains, would refuse a call or give another text, or `None`."""
    if len(prompts.token_ids) > 1:
        return "the target takes no token tree, and a chain is verified for one sequence at a time"
    if isinstance(cache, StaticCache) or cache.get_seq_length() > 0:
        return "the target takes no token tree, and a chain begins with an empty cache that can grow"
    if settings.recheck_near_ties:
        return "the target takes no token tree, and `recheck_near_ties` works on trees"
    if prompts.embeds is not None:
        return "the target takes no token tree, and a chain needs ids, not `inputs_embeds`"
    for processor in processors:
        if type(processor) not in ROW_WISE:
            return f"{type(processor).__name__} would be called for every token of a chain"
    for rule in criteria:
        if not _is_of_config(rule, config):
            return f"{type(rule).__name__} would be asked behind every chain, not behind every token"
    return None


def _is_of_config(rule: Any, config: GenerationConfig) -> bool:
    """Whether a criterion says no more than the end tokens and the length that chains are cut by."""
    if type(rule) is MaxLengthCriteria:
        return rule.max_length == config.max_length
    return type(rule) is EosTokenCriteria and end_tokens(config).issuperset(rule.eos_token_id.tolist())


def end_tokens(config: GenerationConfig) -> set[int]:
    """The tokens that end a text."""
    given = config.eos_token_id
    return set() if given is None else {given} if isinstance(given, int) else set(given)
