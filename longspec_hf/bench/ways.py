"""Ways to decode the same prompt, and how long each takes."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling_longspec import LongSpecDraftModel
from ..settings import with_tree_settings

PLAIN = "transformers, default"
COMPILED = "transformers, static cache + compile"
LOOKUP = "transformers, prompt lookup"
CAPTURED_PLAIN = "longspec_hf, plain (captured)"
UNCAPTURED = "longspec_hf, LongSpec (not captured)"
LONGSPEC = "longspec_hf, LongSpec"
WAYS = (PLAIN, COMPILED, LOOKUP, CAPTURED_PLAIN, UNCAPTURED, LONGSPEC)
LOOKUP_TOKENS = 10
SEED = 0


@dataclass(frozen=True)
class Decoded:
    """One way's measurement.

    Attributes:
        prefill_ms: milliseconds of a call for one token.
        token_ms: milliseconds a token (of one sequence) after the first.
        warm_up_s: seconds of the first call, beyond the later ones.
        tau: tokens a forward, where there is speculation.
        plain_steps: tokens decoded without it.
        sequences: the output.
    """

    way: str
    prefill_ms: float
    token_ms: float
    warm_up_s: float
    tau: float | None
    plain_steps: int
    sequences: torch.Tensor
    peak_bytes: int


def decode(
    way: str,
    target: PreTrainedModel,
    draft: LongSpecDraftModel,
    input_ids: torch.Tensor,
    new_tokens: int,
    warm_up: bool = True,
    repeats: int = 1,
    **options: Any,
) -> Decoded:
    """Measure a way.

    Args:
        way: of `WAYS`.
        input_ids: `[B, n]`, no padding.
        new_tokens: of the output; all are written, whatever end tokens come.
        warm_up: call once before, and say what that took.
        repeats: calls to take the median time of, of either length; they write the same text.
        options: further arguments of `generate`, such as `do_sample`.
    """

    def call(tokens: int) -> Callable[[], Any]:
        return lambda: target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            eos_token_id=-1,
            return_dict_in_generate=True,
            **{"do_sample": False, **options},
            **_arguments(way, target, draft),
        )

    first = _seconds(call(new_tokens))[0] if warm_up else None
    torch.cuda.reset_peak_memory_stats()
    timed = [_seconds(call(new_tokens)) for _ in range(repeats)]
    seconds, output = statistics.median(taken for taken, _ in timed), timed[-1][1]
    peak = torch.cuda.max_memory_allocated()
    prefill = statistics.median(_seconds(call(1))[0] for _ in range(repeats))
    stats = getattr(output, "speculation_stats", None)
    written = output.sequences.shape[1] - input_ids.shape[1] - 1
    return Decoded(
        way,
        1e3 * prefill,
        1e3 * (seconds - prefill) / max(1, written),
        0.0 if first is None else first - seconds,
        stats.tau if stats is not None and stats.rounds else None,
        0 if stats is None else stats.plain_steps,
        output.sequences,
        peak,
    )


def _arguments(way: str, target: PreTrainedModel, draft: LongSpecDraftModel) -> dict[str, Any]:
    config = target.generation_config
    if way == COMPILED:
        return {"cache_implementation": "static"}
    if way == LOOKUP:
        return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    if way == CAPTURED_PLAIN:
        alone = with_tree_settings(config, tree_shape=(), ngram_branch_length=0, fallback_to_plain=False)
        return {"assistant_model": draft, "generation_config": alone}
    if way == UNCAPTURED:
        return {"assistant_model": draft, "generation_config": with_tree_settings(config, capture_rounds=False)}
    return {"assistant_model": draft} if way == LONGSPEC else {}


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call by CUDA events, and what it returns."""
    # What compiling has left behind takes most of a second to look through: no call shall have that happen within it.
    gc.collect()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.manual_seed(SEED)
    start.record()
    result = function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result
