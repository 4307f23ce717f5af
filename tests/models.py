"""Tiny random targets and scripted drafts, made here and nowhere else."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,  # gives varied text; the usual 0.02 repeats one token
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
WINDOW = 8  # test prompts pass it several times over
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MULTI_AXIS_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def vision_language_config(**fields) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL around a language model of these sizes."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = Qwen2_5_VLConfig(text_config=fields, vision_config=vision, **tokens)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, {**ALTERNATING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "gemma3": (Gemma3TextConfig, ALTERNATING),
    "phi3": (Phi3Config, {"sliding_window": WINDOW}),
    "gpt_oss": (GptOssConfig, {**EXPERTS, **ALTERNATING, "num_local_experts": 4}),
    "qwen2_5_vl": (vision_language_config, {"rope_parameters": MULTI_AXIS_ROPE}),
}


def tiny_target(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random target of about 20 000 parameters; overrides go to its configuration."""
    make_config, extra = FAMILIES[family]
    attention = overrides.pop("attn_implementation", None)
    config = make_config(**{**SIZES, **extra, **overrides})
    torch.manual_seed(seed)
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random ids `[1, length]`."""
    return torch.randint(1, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


class ScriptedDraft(LongSpecDraftModel):
    """A draft that knows the target's text and proposes it always, about half the time, or never.

    Everything but the next-token scores is the real draft's: beam, window, cross-attention, tree.

    Args:
        target: the model it drafts for.
        script: `[n]` ids of the whole text, prompt included.
        mode: "oracle", "noisy" or "wrong".
        fields: of the draft's configuration.
    """

    def __init__(self, target: PreTrainedModel, script: torch.Tensor, mode: str, **fields) -> None:
        defaults = {
            "sliding_window": 16,
            "ngram_branch_length": 0,
            "tree_shape": [2, 4, 4],
            "fallback_to_plain": False,  # goes by the clock, so counts of rounds would not be the same each time
        }
        super().__init__(LongSpecDraftConfig.from_target(target.config, **{**defaults, **fields}))
        self.to(target.dtype).eval()
        self.script = script.flatten()
        self.mode = mode

    def next_token_logits(self, hidden, head, token_ids, position_ids):
        vocab = self.config.vocab_size
        position = position_ids + 1
        known = position < len(self.script)
        token = self.script[position.clamp(max=len(self.script) - 1)]
        right = {"oracle": known, "noisy": known & (position * 7919 % 13 < 7), "wrong": known & False}[self.mode]
        # Other tokens get varied scores, so that beams are not degenerate.
        ids = torch.arange(vocab, device=position.device)
        logits = ((ids * 31 + position.unsqueeze(-1) * 17) % 23).float()
        bonus = torch.where(right, 40.0, float("-inf")).masked_fill(~known, 0.0)
        return logits.scatter_add(-1, token.unsqueeze(-1), bonus.unsqueeze(-1))


def scripted(target: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int, mode: str, **fields) -> ScriptedDraft:
    """A scripted draft for the greedy continuation of `input_ids`."""
    script = target.generate(input_ids, max_new_tokens=new_tokens, do_sample=False)
    return ScriptedDraft(target, script, mode, **fields)


def learned(target: PreTrainedModel, seed: int = 1, **fields) -> LongSpecDraftModel:
    """A real draft with random weights, all of its parts in use."""
    torch.manual_seed(seed)
    defaults = {"sliding_window": 16, "tree_shape": [3, 4], "fallback_to_plain": False}
    return LongSpecDraftModel.from_target(target, **{**defaults, **fields})
