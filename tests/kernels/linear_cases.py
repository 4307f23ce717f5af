"""Random problems for the few-rows linear steps."""

from typing import Any

import torch
from fused_cases import CHANGED, assert_near, randoms
from longspec_hf_kernels.fused_gate import silu_and_multiply_torch
from longspec_hf_kernels.fused_linear_kernel import gated_linear_triton, linear_add_rms_norm_triton, linear_triton
from longspec_hf_kernels.fused_norm import add_rms_norm_torch
from longspec_hf_kernels.linear_configs import LinearConfig

EPS = 1e-5
# Matrix units cut off the last bits of an fp32 sum at each step, so the longer the sum, the more often an fp16 result
# is the next number: emulated, 2 % of the results of this depth and 8 % at 18944; of bf16 results, 0.3 and 1.2 %.
USUAL_DEPTH = 4096


def linear_case(rows: int, columns: int, depth: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Inputs `[1, rows, depth]`, weights that leave outputs near 1, a residual and a norm's weight."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "x": randoms(1, rows, depth, seed=0, **options),
        "weight": randoms(columns, depth, seed=1, **options) * depth**-0.5,
        "other": randoms(columns, depth, seed=2, **options) * depth**-0.5,
        "residual": randoms(1, rows, columns, seed=3, **options),
        "norm_weight": randoms(columns, seed=4, **options),
    }


def assert_products(case: dict[str, Any], plain: LinearConfig, gated: LinearConfig, split: LinearConfig) -> None:
    """The three steps by these configurations are what their definitions say, with products in fp32.

    PyTorch's own products are no measure: those of fp16 may add up split sums in fp16.
    """
    x, weight, other = case["x"], case["weight"], case["other"]
    share = CHANGED * (max(1.0, x.shape[-1] / USUAL_DEPTH) if x.dtype == torch.float16 else 1.0)
    product, second = (_product(x, matrix) for matrix in (weight, other))
    assert_near(linear_triton(x, weight, plain), product, changed_share=share)
    opened = silu_and_multiply_torch(product, second)
    assert_near(gated_linear_triton(x, weight, other, gated), opened, steps=3, changed_share=share)
    rest = (case["residual"], case["norm_weight"], EPS)
    got, expected = linear_add_rms_norm_triton(x, weight, *rest, split), add_rms_norm_torch(product, *rest)
    for one, wanted in zip(got, expected, strict=True):
        assert_near(one, wanted, steps=3, changed_share=share)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In fp32, rounded once."""
    return (x.float() @ weight.float().T).to(x.dtype)
