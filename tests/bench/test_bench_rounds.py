"""Times of rounds and of their parts: on a CPU what is timed, on a GPU (`pytest -m gpu`) that it can be."""

from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from longspec_hf.bench import rounds
from longspec_hf.bench.counting import guessing_draft, make_counting, rate_for
from longspec_hf.engine.capture import Captured
from longspec_hf.settings import resolve_tree_settings

PARTS = {"draft", "of it beam", "verify", "of it attention", "walk", "commit"}


def pair(nodes: int, device: str, dtype: torch.dtype, heads: int, head_dim: int):
    """A counting model of two layers with seven query heads to a K/V head, and a draft that is right now and then."""
    config = Qwen2Config(
        vocab_size=33_000,
        hidden_size=heads * head_dim,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 7,
        max_position_embeddings=8192,
    )
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    target = make_counting(AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)).eval()
    shape = [4, 16, 16, 16, 16] if nodes == 64 else [4] * 5
    draft = guessing_draft(target, tree_shape=shape, max_tree_nodes=nodes)
    draft.set_guesses(rate_for(3.5, 5), 1, 8192)
    return target, draft, resolve_tree_settings(draft, target.generation_config).of_tree(None)


def test_a_round_and_its_parts_on_a_cpu(monkeypatch):
    timed = []
    monkeypatch.setattr(torch.cuda, "Event", Mock(return_value=Mock(elapsed_time=Mock(return_value=2.0))))
    monkeypatch.setattr(rounds, "ROUNDS", 4)
    monkeypatch.setattr(rounds, "measure", lambda function: timed.append(function()) or 1.0)
    target, draft, settings = pair(16, "cpu", torch.float32, heads=7, head_dim=16)
    with_parts = rounds.time_rounds(target, draft, settings, 600, rate=1e9, with_parts=True)
    assert set(with_parts.parts) == PARTS and len(timed) == len(PARTS)
    assert with_parts.round_ms == 2.0 and with_parts.nodes == 16 and with_parts.levels == 5
    assert with_parts.tau >= 1 and with_parts.floor_ms > 0
    root = rounds.time_rounds(target, draft, settings.limited_to(0), 600, rate=1e9)
    assert root.tau == 1 and root.parts == {} and root.floor_ms < with_parts.floor_ms


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("context", [600, 4096])
def test_rounds_without_graphs_for_the_sanitizer(context, monkeypatch):
    """With `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer`, which a capture does not bear, every tensor is an
    allocation of its own: reads of a few bytes before or behind one are found, which within PyTorch's segments are
    not, until a tensor lies at the end of one."""
    monkeypatch.setattr(Captured, "prepare", lambda self: None)
    monkeypatch.setattr(rounds, "ROUNDS", 4)
    monkeypatch.setattr(rounds, "measure", lambda function: (function(), 1.0)[1])
    target, draft, settings = pair(64, "cuda", torch.bfloat16, heads=28, head_dim=128)
    assert rounds.time_rounds(target, draft, settings, context, rate=1e12, with_parts=True).tau > 1
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("context", [600, 4096])
@pytest.mark.parametrize("nodes", [16, 64])
def test_rounds_and_their_parts_are_timed(nodes, context):
    target, draft, settings = pair(nodes, "cuda", torch.bfloat16, heads=28, head_dim=128)
    times = rounds.time_rounds(target, draft, settings, context, rate=1e12, with_parts=True)
    assert times.tau > 1
    assert set(times.parts) == PARTS and min(times.parts.values()) > 0
