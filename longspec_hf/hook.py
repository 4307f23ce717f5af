"""The seam with transformers: dispatch of `assistant_model=draft`. The only file that uses its private names.

Tested with transformers 5.17.0 and the newest 5.x; `install` and `uninstall` are inverse to each other.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .attention import TREE_KWARG, TreeAttention, tree_attention_forward
from .attention_switch import AttentionSwitch
from .cache import GROWTH_ROWS, LongSpecCache
from .candidate_generator import LongSpecCandidateGenerator
from .decoding import decode
from .modeling_longspec import LongSpecDraftModel
from .settings import resolve_tree_settings
from .stats import LongSpecGenerateOutput, SpeculationStats
from .target import bind
from .text import TextBuffer, TokenDrawer
from .tree import TokenTree

logger = logging.get_logger(__name__)

ATTENTION_NAME = "longspec"
# Renamed from `past_key_values` in transformers 5.23.
CACHE_ARG = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

_SWITCH = AttentionSwitch(
    ATTENTION_NAME,
    read=lambda config: config._attn_implementation,
    write=lambda config, name: setattr(config, "_attn_implementation", name),
)
_ORIGINALS: dict[str, Callable] = {}
_OUTPUT_FIELDS_OF_PLAIN = ("output_attentions", "output_hidden_states")


def install() -> None:
    """Let `generate` accept a LongSpec draft as `assistant_model`. Calls without one reach transformers untouched."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _attention_mask)
    if _ORIGINALS:
        return
    for name, wrap in (("_assisted_decoding", _wrap_decoding), ("_get_candidate_generator", _wrap_generator)):
        _ORIGINALS[name] = getattr(GenerationMixin, name)
        setattr(GenerationMixin, name, wrap(_ORIGINALS[name]))


def uninstall() -> None:
    """Undo `install`."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(ATTENTION_NAME, None)
    for name, original in _ORIGINALS.items():
        setattr(GenerationMixin, name, original)
    _ORIGINALS.clear()


def _wrap_decoding(original: Callable) -> Callable:
    @functools.wraps(original)
    def _assisted_decoding(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if not isinstance(assistant_model, LongSpecDraftModel):
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        if not self._supports_attention_backend:
            logger.warning_once(
                f"{type(self).__name__} has its own attention code, which cannot take a token tree. LongSpec drafts a "
                "chain for it and leaves the rest to transformers' assisted generation."
            )
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        return _longspec_decoding(assistant_model, self, *args, **kwargs)

    return _assisted_decoding


def _wrap_generator(original: Callable) -> Callable:
    @functools.wraps(original)
    def _get_candidate_generator(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if not isinstance(assistant_model, LongSpecDraftModel):
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
        return LongSpecCandidateGenerator(
            assistant_model,
            bind(assistant_model, self),
            resolve_tree_settings(assistant_model, config),
            chain_cache=model_kwargs[CACHE_ARG],
            chain_max_length=config.max_length,
        )

    return _get_candidate_generator


def _longspec_decoding(
    draft: LongSpecDraftModel,
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    inputs_tensor: torch.Tensor | None = None,
    assistant_tokenizer: Any = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Stands in for `GenerationMixin._assisted_decoding`; the same arguments behind the draft, the same outputs."""
    settings = resolve_tree_settings(draft, generation_config)
    bound = bind(draft, target)
    reason = _reason_for_plain(input_ids, generation_config, synced_gpus, model_kwargs)
    if _rope_depends_on_length(
        target.config.get_text_config(decoder=True), input_ids.shape[1], generation_config.max_length
    ):
        reason = reason or "the target's rotary table changes with the length of the text"
    if reason is not None:
        logger.warning_once(f"LongSpec decodes this call without speculation: {reason}.")
        output = target._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )
        if not generation_config.return_dict_in_generate:
            return output
        committed = output.sequences.shape[0] * (output.sequences.shape[1] - input_ids.shape[1])
        stats = SpeculationStats(committed=committed, fallback_reason=reason)
        return LongSpecGenerateOutput(**output, speculation_stats=stats)

    given: Cache = model_kwargs[CACHE_ARG]
    needed = generation_config.max_length - 1 + settings.max_nodes + _rows_before(input_ids, model_kwargs)
    cache = _prepare_cache(given, needed, input_ids.shape[1] + settings.max_nodes + GROWTH_ROWS)
    model_kwargs[CACHE_ARG] = cache
    starts = _starts(model_kwargs.get("attention_mask"), draft.device)
    generator = LongSpecCandidateGenerator(draft, bound, settings)
    cache.draft_window = generator.window
    drawer = TokenDrawer(TextBuffer(input_ids), logits_processor, stopping_criteria, generation_config, streamer)
    runner = _Runner(target, input_ids, generation_config, model_kwargs, cache, starts)
    stats = decode(
        runner,
        generator,
        cache,
        drawer,
        _prompt_positions(input_ids, model_kwargs),
        generation_config.max_length,
        starts,
    )
    if streamer is not None:
        streamer.end()
    if given is not cache and getattr(given, "_is_user_defined", False):
        _hand_back(cache, given)
        cache = given
    if not generation_config.return_dict_in_generate:
        return drawer.text.ids
    return LongSpecGenerateOutput(
        sequences=drawer.text.ids,
        scores=drawer.scores,
        logits=drawer.logits,
        speculation_stats=stats,
        **{CACHE_ARG: cache},
    )


class _Runner:
    """The target's forwards for [`decode`]."""

    def __init__(
        self,
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        cache: LongSpecCache,
        starts: torch.Tensor | None,
    ) -> None:
        self.target = target
        self.input_ids = input_ids
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.cache = cache
        self.starts = starts
        self.text_config = target.config.get_text_config(decoder=True)

    def prefill(self) -> torch.Tensor:
        outputs = self.target._prefill(self.input_ids, self.generation_config, self.model_kwargs)
        return outputs.logits[:, -1]

    def step(self, token: torch.Tensor, position: int) -> torch.Tensor:
        token = token.to(self.target.device)  # the text may lie on the CPU
        mask = None
        if self.starts is not None:
            rows = torch.arange(self.cache.get_seq_length() + 1, device=token.device)
            mask = (rows >= self.starts.unsqueeze(1)).long()
        outputs = self.target(
            input_ids=token.unsqueeze(0),
            position_ids=torch.full((1, 1), position, device=token.device),
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{CACHE_ARG: self.cache},
        )
        return outputs.logits[:, -1]

    def verify(self, tree: TokenTree, root_position: int) -> torch.Tensor:
        device = tree.token_ids.device
        # A mask of four dimensions is passed on as it is; ours is in the metadata.
        placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        metadata = TreeAttention.of(tree, self.cache.get_seq_length(), self.starts)
        with _SWITCH.pointed(self.text_config):
            outputs = self.target(
                input_ids=tree.token_ids,
                position_ids=root_position + tree.depths,
                attention_mask=placeholder,
                use_cache=True,
                return_dict=True,
                **{CACHE_ARG: self.cache, TREE_KWARG: metadata},
            )
        return outputs.logits[0]


def _reason_for_plain(
    input_ids: torch.LongTensor, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> str | None:
    """Why this call cannot be speculated, in words, or `None`. Plain decoding gives the same result."""
    if input_ids.shape[0] > 1:
        return f"the batch has {input_ids.shape[0]} rows"
    if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        return "the prompt is given as `inputs_embeds`"
    for name in _OUTPUT_FIELDS_OF_PLAIN:
        if getattr(config, name) and config.return_dict_in_generate:
            return f"`{name}` is asked for"
    if synced_gpus:
        return "`synced_gpus` needs the same number of forwards on every GPU"
    cache = model_kwargs.get(CACHE_ARG)
    if not config.use_cache or cache is None:
        return "`use_cache` is off"
    if not isinstance(cache, LongSpecCache) and (type(cache) is not DynamicCache or cache.offloading):
        return f"the cache is a {'offloaded ' if getattr(cache, 'offloading', False) else ''}{type(cache).__name__}"
    if not LongSpecCache.can_take_over(cache):
        return "the given cache does not keep every row"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "`attention_mask` has zeros behind ones"
    if (positions := model_kwargs.get("position_ids")) is not None and positions.dim() != 2:
        return "`position_ids` has several axes"
    return None


def _rope_depends_on_length(config: PreTrainedConfig, prompt_length: int, max_length: int) -> bool:
    """Whether plain decoding would rotate tokens of this call by tables that depend on how far it had got."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if "dynamic" in kinds:
        return max_length > limit
    return "longrope" in kinds and prompt_length <= limit < max_length


def _rows_before(input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> int:
    """Cache rows that `input_ids` does not cover, when only the new turn's ids are given."""
    mask_length = model_kwargs["attention_mask"].shape[1] if model_kwargs.get("attention_mask") is not None else 0
    return max(0, mask_length - input_ids.shape[1])


def _prepare_cache(given: Cache, needed: int, at_once: int) -> LongSpecCache:
    """The call's cache: the given one if it is ours, else a new one with its rows."""
    cache = given if isinstance(given, LongSpecCache) else LongSpecCache.take_over(given)
    cache.reserve(min(needed, at_once), limit=needed)
    return cache


def _hand_back(cache: LongSpecCache, given: Cache) -> None:
    """Let the caller's cache hold the rows, as views: plain decoding would have written them there."""
    for ours, theirs in zip(cache.layers, _layers_for(given, len(cache.layers)), strict=True):
        if not theirs.is_initialized:
            theirs.lazy_initialization(ours.keys, ours.values)
        theirs.keys, theirs.values = ours.keys, ours.values


def _layers_for(cache: Cache, count: int) -> list[Any]:
    while len(cache.layers) < count:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers


def _starts(attention_mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """`[1]` first row that is not padding, `None` without padding."""
    if attention_mask is None:
        return None
    return (attention_mask == 0).sum(dim=1).to(device=device, dtype=torch.int32)


def _prompt_positions(input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> torch.Tensor:
    """`[n]` positions of the given ids."""
    length = input_ids.shape[1]
    if (positions := model_kwargs.get("position_ids")) is not None:
        return positions[0, -length:]
    return torch.arange(length, device=input_ids.device)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The "longspec" attention function: over a tree where the call brings one, else the one the user chose."""
    if (tree := kwargs.pop(TREE_KWARG, None)) is not None:
        taken = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")}
        return tree_attention_forward(query, key, value, tree, **taken), None
    chosen = _SWITCH.chosen(module.config)
    if chosen == "eager":
        # Every model has its own eager function, in its own file, under this name.
        forward = sys.modules[type(module).__module__].eager_attention_forward
    else:
        forward = AttentionInterface()[chosen]
    return forward(module, query, key, value, attention_mask, **kwargs)


def _attention_mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
    """The "longspec" mask function: the one of the attention the user chose; a verification brings its own mask."""
    make_mask = AttentionMaskInterface().get(_SWITCH.chosen(config))
    return None if make_mask is None else make_mask(*args, config=config, **kwargs)
