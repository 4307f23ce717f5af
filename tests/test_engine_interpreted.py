"""Whole rounds of the engine through its kernels, in Triton's interpreter: what a GPU runs, in order and together."""

import os

import pytest
import torch
from engine_calls import call
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from models import learned, prompt, tiny_target

pytestmark = [
    pytest.mark.usefixtures("engine_on_cpu"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sequences", [1, 2])
def test_rounds_of_kernels_write_plain_decodings_text(sequences, dtype, monkeypatch):
    """In half precision with the products of few rows, in fp32 with PyTorch's."""
    model = tiny_target(initializer_range=0.1, dtype=dtype, hidden_size=64, head_dim=16)
    ids = torch.cat([prompt(20, seed=seed) for seed in range(1, 1 + sequences)])
    plain = call(model, ids, max_new_tokens=12).sequences
    draft = learned(model, tree_shape=[2, 3], max_tree_nodes=6, ngram_branch_length=3)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    out = call(model, ids, draft, max_new_tokens=12)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.uncaptured_reason is None and out.speculation_stats.tau > 1.2
