"""The compiled few-rows linear steps on an NVIDIA GPU: `pytest -m gpu -n 8 tests/kernels`."""

import pytest
import torch
from fused_cases import assert_near
from linear_cases import EPS, assert_products, linear_case
from longspec_hf_kernels import few_rows_fit, gated_linear, linear_add_rms_norm, linear_few_rows
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from longspec_hf_kernels.linear_configs import choose_linear
from longspec_hf_kernels.triton_configs import device_limits
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Output columns and depth: Qwen2.5-7B's and Llama-3-8B's MLPs there and back, SmolLM2-135M's, and an odd one.
SIZES = [(18944, 3584), (3584, 18944), (14336, 4096), (1536, 576), (576, 1536), (1000, 192)]


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 21, 64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, rows, dtype):
    case, limits = linear_case(rows, *size, dtype, "cuda"), device_limits(torch.device("cuda", 0))
    configs = [choose_linear(rows, *size, limits, **kind) for kind in ({}, {"gated": True}, {"split": True})]
    assert_products(case, *configs)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_rows_result_does_not_depend_on_the_others(size):
    """So a plain step and a round of the engine compute the same."""
    case = linear_case(64, *size, torch.bfloat16, "cuda")
    x, weight, other, residual = case["x"], case["weight"], case["other"], case["residual"]

    def results(rows):
        part = x[:, :rows]
        norm = (residual[:, :rows], case["norm_weight"], EPS)
        return [gated_linear(part, weight, other), *linear_add_rms_norm(part, weight, *norm)]

    some = [rows for rows in (1, 16, 40, 64) if few_rows_fit(x[:, :rows], weight)]
    assert len(some) >= 2
    for rows in some[:-1]:
        for few, many in zip(results(rows), results(some[-1]), strict=True):
            assert torch.equal(few, many[:, :rows])


def test_captured():
    case = linear_case(21, 3584, 3584, torch.bfloat16, "cuda")
    x, weight = case["x"], case["weight"]
    linear_few_rows(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_few_rows(x, weight)
    x.mul_(-2)
    graph.replay()
    assert_near(out, F.linear(x, weight), steps=2)
