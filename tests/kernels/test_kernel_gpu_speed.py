"""What a tree costs on a GPU beside a one-token step: `pytest -m gpu tests/kernels`, nothing else running."""

import pytest
import torch
from attention_cases import random_parents, tree_from_parents
from longspec_hf_kernels import hybrid_tree_attention, pack_ancestor_bits

triton_testing = pytest.importorskip("triton.testing", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PREFIX = 32768
SHAPES = {"qwen2.5-7b": (28, 4), "llama-3-8b": (32, 8), "vicuna-7b": (32, 32)}


def median_milliseconds(heads: int, kv_heads: int, nodes: int) -> float:
    query = torch.randn(1, heads, nodes, 128, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 1, kv_heads, PREFIX + nodes, 128, dtype=torch.bfloat16, device="cuda")
    visible, _ = tree_from_parents(random_parents(nodes, torch.Generator().manual_seed(0)))
    bits = pack_ancestor_bits(visible.unsqueeze(0)).cuda()
    prefix_lens = torch.tensor([PREFIX], dtype=torch.int32, device="cuda")
    return triton_testing.do_bench_cudagraph(
        lambda: hybrid_tree_attention(query, key, value, prefix_lens, bits, scale=128**-0.5),
        rep=50,
        return_mode="median",
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_of_16_nodes_costs_little_more_than_one_node(shape):
    assert median_milliseconds(*SHAPES[shape], 16) <= 1.2 * median_milliseconds(*SHAPES[shape], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_of_21_nodes_costs_at_most_half_more_than_one_node(shape):
    """C86."""
    assert median_milliseconds(*SHAPES[shape], 21) <= 1.5 * median_milliseconds(*SHAPES[shape], 1)
