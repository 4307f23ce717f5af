"""Every family of targets against plain decoding: what `test_families.py` checks and `docs/models.md` lists."""

from __future__ import annotations

import functools
from unittest.mock import patch

import torch
from models import FAMILIES, ScriptedDraft, prompt, tiny_target

NAMES = {
    "llama": "Llama 2, TinyLlama, SmolLM2",
    "llama3": "Llama 3.x, with its rope scaling",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "mistral": "Mistral, window on all layers",
    "gemma2": "Gemma 2, every other layer a window, soft-caps",
    "gemma3": "Gemma 3, windows between full layers",
    "phi3": "Phi-3, window on all layers",
    "gpt_oss": "gpt-oss, windows, attention sinks, experts",
    "qwen2_5_vl": "Qwen2.5-VL, text prompts",
}
# Around one window and two; a chain is transformers' own loop, so fewer are enough there.
LENGTHS = {"chain": (7, 8, 17), "tree": (6, 7, 8, 9, 15, 16, 17)}
NEW_TOKENS = 12
TREE = [4, 16]  # 21 nodes
WAYS = ("chain", "tree")


@functools.cache
def attentions(family: str) -> tuple[str, ...]:
    """The implementations that its class offers."""
    return ("eager", "sdpa") if tiny_target(family)._supports_sdpa else ("eager",)


def cells() -> list[tuple[str, str]]:
    """`(family, attention)` of all that exist."""
    return [(family, attention) for family in FAMILIES for attention in attentions(family)]


@functools.cache
def plain_text(family: str, attention: str, length: int) -> torch.Tensor:
    """Ids `[n]` of plain decoding behind a prompt of `length` tokens."""
    model = tiny_target(family, attn_implementation=attention)
    return model.generate(prompt(length, seed=length), max_new_tokens=NEW_TOKENS, do_sample=False)[0]


def differing_lengths(family: str, attention: str, way: str) -> list[int]:
    """Prompt lengths whose text is not plain decoding's, the draft being right about half the time.

    A chain goes through transformers' own loop. Window layers drop rows every few tokens.

    Raises:
        RuntimeError: a tree was not speculated at all.
    """
    model = tiny_target(family, attn_implementation=attention)
    if way == "chain":
        model._supports_attention_backend = False
    differing = []
    for length in LENGTHS[way]:
        text = plain_text(family, attention, length)
        draft = ScriptedDraft(model, text, "noisy", tree_shape=TREE)
        with patch("longspec_hf.window_layer.SLACK_ROWS", 3):
            out = model.generate(
                prompt(length, seed=length),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                assistant_model=draft,
                return_dict_in_generate=True,
            )
        if way == "tree" and (out.speculation_stats.fallback_reason or out.speculation_stats.tau == 1):
            raise RuntimeError(f"{family} did not speculate: {out.speculation_stats}")
        if not torch.equal(out.sequences[0], text):
            differing.append(length)
    return differing
