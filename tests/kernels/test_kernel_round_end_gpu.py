"""The compiled walk, state and rotary rows on an NVIDIA GPU: `pytest -m gpu -n 8 tests/kernels`."""

import pytest
import torch
from longspec_hf_kernels import advance, greedy_walk, rotary_rows
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from longspec_hf_kernels.fused_state import rotary_rows_torch
from walk_cases import advanced_by_hand, state_case, walk_case, walked_by_hand

pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 152064), (1, 64, 152064), (3, 21, 49152), (8, 8, 32000), (2, 133, 1000)])
def test_walk(size, dtype):
    """Also with the ties that half precision has among so many tokens."""
    for seed in range(3):
        case = walk_case(*size, dtype, seed=seed, device="cuda")
        visited, report = greedy_walk(*case, size[1])
        assert (visited.tolist(), report.tolist()) == walked_by_hand(case, size[1])


def test_a_captured_walk_follows_its_logits():
    case = walk_case(2, 16, 5000, torch.bfloat16, device="cuda")
    greedy_walk(*case, 6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        visited, report = greedy_walk(*case, 16)
    for seed in (1, 2, 3):
        for part, fresh in zip(case, walk_case(2, 16, 5000, torch.bfloat16, seed=seed, device="cuda"), strict=True):
            part.copy_(fresh)
        graph.replay()
        assert (visited.tolist(), report.tolist()) == walked_by_hand(case, 16)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_advance(batch):
    case = state_case(batch, most=33, device="cuda")
    expected = advanced_by_hand(case)
    advance(**case)
    assert [tensor.flatten().tolist() for tensor in list(case.values())[:5]] == expected


@pytest.mark.parametrize("rotary", [128, 80, 6])
def test_rotary_rows(rotary):
    cos, sin = torch.randn(2, 500, rotary).to("cuda", torch.bfloat16)
    roots = torch.tensor([[32768], [33000], [33267]], device="cuda")
    limits = torch.tensor([[499], [3], [-1]], device="cuda")
    got, expected = (run(cos, sin, 32768, roots, limits, 33) for run in (rotary_rows, rotary_rows_torch))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
