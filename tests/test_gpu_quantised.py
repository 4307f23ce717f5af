"""Quantised targets as people load them: torchao and bitsandbytes, about 250 million parameters. `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ScriptedDraft, prompt
from test_gpu_families import SMALL, SMALL_HEADS, gap_at_first_difference, like_a_trained_one, random_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# Whole blocks of 64 in a row: bitsandbytes packs no others on a CPU with bf16 instructions.
LITTLE = {
    **SMALL,
    **SMALL_HEADS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "initializer_range": 0.1,
}
MOST_APART = 1.5  # times as far from plain decoding's logits as another forward of transformers' own
INT8_ACTIVATIONS = "bitsandbytes int8 without outliers"


def weight_only(name: str, **fields: Any) -> TorchAoConfig:
    """Of torchao's configurations, the one for this kind of weights."""
    package = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(getattr(package, f"{name}WeightOnlyConfig")(**fields))


def bits_and_bytes(**fields: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**fields)


KINDS = {
    "torchao int8": lambda: weight_only("Int8"),
    # The layout of PyTorch's own kernel; the default one needs another package.
    "torchao int4": lambda: weight_only("Int4", group_size=128, int4_packing_format="tile_packed_to_4d"),
    "torchao fp8": lambda: weight_only("Float8"),
    "bitsandbytes nf4": lambda: bits_and_bytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bitsandbytes int8": lambda: bits_and_bytes(load_in_8bit=True),
    INT8_ACTIVATIONS: lambda: bits_and_bytes(load_in_8bit=True, llm_int8_threshold=0.0),
}
REASONS = {"bitsandbytes int8": "find outliers in the whole forward"}
"""Of the kinds whose numbers depend on the other rows of a forward: why they are decoded plainly."""


def quantised(kind: str, folder: Path, device: str, **sizes: Any) -> PreTrainedModel:
    """A random Llama in bf16, saved and loaded with its weights quantised."""
    quantization_config = KINDS[kind]()
    like_a_trained_one(random_model("llama", device, **sizes)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config, dtype=torch.bfloat16, device_map=device
    ).eval()


@torch.no_grad()
def distances(model: PreTrainedModel, plain: Any, out: Any, context: int) -> tuple[float, float]:
    """RMS distances from plain decoding's logits: of the rounds', and of one forward over the text or bf16's own."""
    same = int((plain.sequences == out.sequences)[0, context:].long().cumprod(0).sum())
    assert same > 8, "too few equal tokens to compare"
    steps, rounds = (torch.cat(text.logits[1 : same + 1]).float() for text in (plain, out))
    whole = model(plain.sequences[:, :-1], logits_to_keep=plain.sequences.shape[1] - context).logits[0].float()
    away, usual = (float((other - steps).square().mean().sqrt()) for other in (rounds, whole[1 : len(steps) + 1]))
    # On a CPU two forwards may agree to the bit; the logits' own rounding is there always.
    return away, max(usual, float(steps.square().mean().sqrt()) * torch.finfo(model.dtype).eps / 12**0.5)


def check(model: PreTrainedModel, kind: str, context: int, new_tokens: int) -> None:
    """Plain text, speculated where a row's numbers are its own; a first difference at a near-tie only."""
    ids = prompt(context, vocab=model.config.vocab_size).to(model.device)
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **kwargs)
    assert len(set(plain.sequences[0, context:].tolist())) >= 10, "the text says nothing: too few tokens"
    for mode in ("noisy", "wrong"):
        draft = ScriptedDraft(model, plain.sequences, mode).to(model.device)
        out = model.generate(ids, assistant_model=draft, **kwargs)
        stats = out.speculation_stats
        if kind in REASONS:
            assert REASONS[kind] in stats.fallback_reason
            assert torch.equal(plain.sequences, out.sequences)
            continue
        assert stats.fallback_reason is None
        if mode == "noisy":
            assert stats.tau > 1
        elif torch.equal(plain.sequences, out.sequences):  # behind a difference the script may be right by chance
            assert stats.tau == 1
        rounds, whole = distances(model, plain, out, context)
        print(f"{kind}, {mode}: tau {stats.tau:.2f}, rounds {rounds:.4f} from plain, usual {whole:.4f}")
        assert rounds <= MOST_APART * whole
        if kind != INT8_ACTIVATIONS:  # one unit in the last place may move an activation by 1/127 of its row's largest
            fault = gap_at_first_difference(model, plain.sequences, out.sequences)
            assert fault is None, f"{mode}, {fault}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_targets(kind, tmp_path):  # C11
    check(quantised(kind, tmp_path, "cuda", **LARGE), kind, 2048, 64)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao int4"])  # whose kernel is for GPUs
def test_quantised_targets_in_small(kind, tmp_path):  # C11
    check(quantised(kind, tmp_path, "cpu", **LITTLE), kind, 100, 30)
