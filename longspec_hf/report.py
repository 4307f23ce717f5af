"""Statistics of a call in words, for terminals and logs."""

from __future__ import annotations

from typing import Any

from .stats import SpeculationStats

PLAIN = "no draft was given"


def describe_output(output: Any, prompt_tokens: int, seconds: float) -> str:
    """`describe` of what `generate(return_dict_in_generate=True)` returned, with or without a draft.

    Args:
        output: with `sequences` `[B, T]`.
        prompt_tokens: length of the prompt, padding included.
        seconds: wall time of the whole call.
    """
    rows, length = output.sequences.shape
    plain = SpeculationStats(committed=rows * (length - prompt_tokens), fallback_reason=PLAIN)
    return describe(getattr(output, "speculation_stats", plain), prompt_tokens, seconds)


def describe(stats: SpeculationStats, prompt_tokens: int, seconds: float) -> str:
    """Lines that say what a call took and what speculation did in it.

    Args:
        stats: of the call.
        prompt_tokens: length of the prompt.
        seconds: wall time of the whole call, shown where the statistics have no times of their own.
    """
    tokens = f"{prompt_tokens} prompt tokens, {stats.committed} new"
    if stats.decode_seconds or stats.prefill_seconds:
        times = f"prefill {stats.prefill_seconds:.2f} s, decode {stats.decode_seconds:.2f} s"
        lines = [f"{tokens}; {times}, {stats.tokens_per_second:.1f} tokens/s"]
    else:
        lines = [f"{tokens}; {seconds:.2f} s in all, {stats.committed / max(seconds, 1e-9):.1f} tokens/s"]
    if stats.rounds:
        depths = " ".join(map(str, stats.accepted_per_depth)) or "none"
        lines.append(f"tau {stats.tau:.2f}; {stats.rounds} rounds, accepted per depth: {depths}")
    if len(stats.rounds_by_tree) > 1:
        trees = "; ".join(f"{name}: {rounds}" for name, rounds in stats.rounds_by_tree.items())
        lines.append(f"rounds by tree: {trees}")
    if stats.fallback_reason is not None:
        lines.append(f"without speculation: {stats.fallback_reason}")
    return "\n".join(lines)
