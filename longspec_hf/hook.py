"""The seam with transformers' `generate`: dispatch of `assistant_model=draft`. The only file with private names of it.

Tested with transformers 5.17.0 and the newest 5.x; `install` and `uninstall` are inverse to each other.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.pipelines import base as pipelines_base
from transformers.utils import logging

from .attention import TREE_KWARG, TreeAttention, tree_attention_forward
from .attention_switch import AttentionSwitch
from .cache import LongSpecCache
from .cache_layer import GROWTH_ROWS
from .candidate_generator import LongSpecCandidateGenerator
from .decoding import Decoder
from .engine import make_engine
from .fallback import end_tokens, reason_of_attention, reason_of_batch, reason_of_call, reason_of_chain
from .few_rows_linear import few_rows_view
from .modeling_longspec import LongSpecDraftModel
from .pipeline_loading import wrap_pipeline_loading
from .prompts import read_prompts
from .round_cost import PairTimes
from .settings import resolve_tree_settings
from .stats import LongSpecGenerateOutput, SpeculationStats
from .takeover import adopt, hand_back, prepare_cache
from .target import bind, is_compiled
from .text import OneByOne, TextBuffer, TokenDrawer, pad_texts, stack_scores
from .tree import TokenTree
from .tree_probe import WatchedTrees, reason_of_trees

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
_ORIGINALS: dict[tuple[Any, str], Callable] = {}


def install() -> None:
    """Let `generate` accept a LongSpec draft as `assistant_model`. Calls without one reach transformers untouched."""
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _attention_mask)
    if _ORIGINALS:
        return
    for owner, name, wrap in (
        (GenerationMixin, "_assisted_decoding", _wrap_decoding),
        (GenerationMixin, "_get_candidate_generator", _wrap_generator),
        (GenerationMixin, "_validate_generation_mode", _wrap_validation),
        (pipelines_base, "load_assistant_model", wrap_pipeline_loading),
    ):
        _ORIGINALS[owner, name] = getattr(owner, name)
        setattr(owner, name, wrap(_ORIGINALS[owner, name]))


def uninstall() -> None:
    """Undo `install`."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(ATTENTION_NAME, None)
    for (owner, name), original in _ORIGINALS.items():
        setattr(owner, name, original)
    _ORIGINALS.clear()


def _wrap_decoding(original: Callable) -> Callable:
    @functools.wraps(original)
    def _assisted_decoding(self, *args: Any, assistant_model: Any = None, **kwargs: Any) -> Any:
        if not isinstance(assistant_model, LongSpecDraftModel):
            return original(self, *args, assistant_model=assistant_model, **kwargs)
        return _longspec_decoding(original, assistant_model, self, *args, **kwargs)

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
            chain_end_tokens=end_tokens(config),
        )

    return _get_candidate_generator


def _wrap_validation(original: Callable) -> Callable:
    @functools.wraps(original)
    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, kwargs: Any
    ) -> None:
        draft = kwargs.get("assistant_model")
        if not isinstance(draft, LongSpecDraftModel):
            return original(self, generation_mode, generation_config, kwargs)
        bind(draft, self)
        resolve_tree_settings(draft, generation_config)
        # What transformers refuses for other drafts only: several sequences, and tokenizers it would compare.
        general = copy.copy(generation_config)
        general.num_return_sequences = 1
        if self._is_stateful:  # decoded plainly, and refused as assisted decoding
            generation_mode = GenerationMode.SAMPLE if general.do_sample else GenerationMode.GREEDY_SEARCH
        rest = {name: value for name, value in kwargs.items() if name != "assistant_model"}
        return original(self, generation_mode, general, rest)

    return _validate_generation_mode


def _longspec_decoding(
    original: Callable,
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
    """Stands in for `original`, `GenerationMixin._assisted_decoding`; its arguments behind the draft, its outputs."""
    settings = resolve_tree_settings(draft, generation_config, input_ids.shape[0])
    bound = bind(draft, target)
    prompts = read_prompts(input_ids, model_kwargs, draft.device)
    inputs = {**model_kwargs, "synced_gpus": synced_gpus}
    rules = logits_processor, stopping_criteria
    reason = reason_of_call(target, generation_config, settings, inputs, CACHE_ARG, prompts)
    if not target._supports_attention_backend:
        reason = reason or reason_of_chain(model_kwargs[CACHE_ARG], prompts, generation_config, settings, *rules)
    else:
        if input_ids.shape[0] > 1:
            reason = reason or reason_of_batch(target, generation_config, settings, *rules, streamer is not None)
        reason = reason or reason_of_attention(_SWITCH.chosen(target.config.get_text_config(decoder=True)))
        reason = reason or reason_of_trees(target, input_ids.device, _SWITCH, CACHE_ARG)
    if reason is not None:
        return _plain_decoding(
            target, reason, input_ids, *rules, generation_config, synced_gpus, streamer, **model_kwargs
        )
    if not target._supports_attention_backend:
        logger.warning_once(
            f"{type(target).__name__} has its own attention code, which cannot take a token tree. LongSpec drafts a "
            "chain for it and leaves the rest to transformers' assisted generation."
        )
        blocks = None if streamer is None else OneByOne(streamer)
        return original(
            target, input_ids, *rules, generation_config, streamer=blocks, assistant_model=draft, **model_kwargs
        )

    given: Cache = model_kwargs[CACHE_ARG]
    rows = max(prompts.positions.shape[1], given.get_seq_length() + input_ids.shape[1])
    nodes = max(tree.max_nodes for tree in settings.trees)
    needed = rows + generation_config.max_length - input_ids.shape[1] - 1 + nodes
    cache = prepare_cache(target, given, needed, rows + nodes + GROWTH_ROWS)
    cache.may_step_back = settings.recheck_near_ties
    model_kwargs[CACHE_ARG] = cache
    generator = LongSpecCandidateGenerator(few_rows_view(draft), bound, settings, input_ids.shape[0])
    cache.draft_window = generator.window
    drawers = [
        TokenDrawer(
            TextBuffer(input_ids[row : row + 1]),
            logits_processor if input_ids.shape[0] == 1 else _processors_of_row(logits_processor, row),
            stopping_criteria,
            generation_config,
            streamer,
        )
        for row in range(input_ids.shape[0])
    ]
    runner = _Runner(target, input_ids, generation_config, model_kwargs, cache, prompts.starts)
    engine = functools.partial(make_engine, target, generator, cache, runner.hidden_states is not None)
    known = PairTimes(target, draft)
    users = given is cache or getattr(given, "_is_user_defined", False)
    kept = users or generation_config.return_dict_in_generate
    length = generation_config.max_length
    stats = Decoder(runner, generator, cache, drawers, prompts, length, engine, known, kept).run()
    if streamer is not None:
        streamer.end()
    if users and given is not cache:
        hand_back(cache, given)
        cache = given
    sequences = pad_texts([drawer.text for drawer in drawers], generation_config._pad_token_tensor)
    if not generation_config.return_dict_in_generate:
        return sequences
    return LongSpecGenerateOutput(
        sequences=sequences,
        scores=stack_scores([drawer.scores for drawer in drawers]),
        logits=stack_scores([drawer.logits for drawer in drawers]),
        hidden_states=runner.hidden_states,
        speculation_stats=stats,
        **{CACHE_ARG: cache},
    )


def _plain_decoding(
    target: PreTrainedModel,
    reason: str,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    streamer: Any,
    **model_kwargs: Any,
) -> Any:
    """What the call would give without a draft, with the reason in the statistics."""
    logger.warning_once(f"LongSpec decodes this call without speculation: {reason}.")
    output = target._sample(
        input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
    )
    if not generation_config.return_dict_in_generate:
        return output
    committed = output.sequences.shape[0] * (output.sequences.shape[1] - input_ids.shape[1])
    stats = SpeculationStats(committed=committed, fallback_reason=reason)
    return LongSpecGenerateOutput(**output, speculation_stats=stats)


class _Runner:
    """The target's forwards for [`Decoder`]."""

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
        self.static_shapes = is_compiled(target)
        self.verifier = target if self.static_shapes else few_rows_view(target)
        wanted = generation_config.return_dict_in_generate and generation_config.output_hidden_states
        self.hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = () if wanted else None
        self._asked = {"output_hidden_states": True} if wanted else {}
        self._last_states: tuple[torch.Tensor, ...] = ()

    def prefill(self) -> torch.Tensor:
        outputs = self.target._prefill(self.input_ids, self.generation_config, self.model_kwargs)
        # Phi-3 leaves the cache where its rotary table changes, and makes one of its own.
        adopt(self.cache, outputs[CACHE_ARG])
        if self.hidden_states is not None:
            self.hidden_states += (outputs.hidden_states,)
        return outputs.logits[:, -1]

    def step(self, token: torch.Tensor, position: int) -> torch.Tensor:
        token = token.to(self.input_ids.device)
        mask = None
        if self.starts is not None:
            rows = torch.arange(self.cache.get_seq_length() + 1, device=token.device)
            mask = (rows >= self.starts.unsqueeze(1).to(rows.device)).long()
        outputs = self.target(
            input_ids=token.unsqueeze(0),
            position_ids=torch.full((1, 1), position, device=token.device),
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{CACHE_ARG: self.cache},
            **self._asked,
        )
        self._last_states = outputs.get("hidden_states") or ()
        return outputs.logits[:, -1]

    def verify(self, tree: TokenTree, root_positions: torch.Tensor) -> torch.Tensor:
        device = tree.token_ids.device
        sequences, nodes = tree.token_ids.shape
        # A mask of four dimensions is passed on as it is; ours is in the metadata.
        placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        with self.cache.tree(sequences, nodes) as lengths, _SWITCH.pointed(self.text_config):
            trees = TreeAttention.per_layer(
                tree,
                lengths.to(device),
                None if self.starts is None else self.starts[:sequences],
                [layer.dropped_rows(sequences) for layer in self.cache.layers],
                [layer.device for layer in self.cache.layers],
                [getattr(layer, "window", None) for layer in self.cache.layers],
                # Left out by PyTorch's attention in transformers 5.17; 5.24 refuses it there, at the prefill already.
                soft_capped=_SWITCH.chosen(self.text_config) != "sdpa",
            )
            outputs = self.verifier(
                input_ids=tree.token_ids,
                position_ids=root_positions + tree.depths,
                attention_mask=placeholder,
                use_cache=True,
                return_dict=True,
                **{CACHE_ARG: self.cache, TREE_KWARG: trees},
                **self._asked,
            )
        self._last_states = outputs.get("hidden_states") or ()
        return outputs.logits

    def record(self, nodes: Sequence[int]) -> None:
        if self.hidden_states is not None:
            self.hidden_states += tuple(
                tuple(state[:, node : node + 1] for state in self._last_states) for node in nodes
            )

    def swap(self, one: int, other: int) -> None:
        if self.starts is not None:
            self.starts = self.starts.clone()
            self.starts[[one, other]] = self.starts[[other, one]]


def _processors_of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors for one sequence of a batch; two kinds know which one they have before them."""
    return LogitsProcessorList(_of_row(processor, row) for processor in processors)


def _of_row(processor: Any, row: int) -> Any:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    if isinstance(ignored := getattr(processor, "prompt_ignore_length", None), torch.Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The "longspec" attention function: over a tree where the call brings one, else the one the user chose."""
    if (trees := kwargs.pop(TREE_KWARG, None)) is not None:
        taken = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")}
        if isinstance(trees, WatchedTrees):
            trees.see(attention_mask)
        return tree_attention_forward(query, key, value, trees[module.layer_idx], **taken), None
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
