"""Random problems for the projections with what follows them."""

from typing import Any

import torch
from fused_cases import assert_near, randoms, rotary_case
from longspec_hf_kernels.fused_rotary import rotate_and_store_torch, rotate_torch

# Splits of a sum added up in another order round to the next number now and then, and so do the rotation's own steps.
STEPS = 3


def projection_case(*, depth: int = 128, biases: bool = False, **sizes: Any) -> dict[str, Any]:
    """Arguments of `project_rotate_and_store` that leave projections near 1; `sizes` as of `rotary_case`."""
    rotary = rotary_case(**sizes)
    columns = [rotary.pop(name).shape[-1] for name in ("query", "key", "value")]
    like, seed = rotary["cos"], sizes.get("seed", 0)
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    given = {
        "x": randoms(*like.shape[:2], depth, seed=seed + 5, **options),
        "weights": [
            randoms(width, depth, seed=seed + 6 + place, **options) * depth**-0.5
            for place, width in enumerate(columns)
        ],
        "biases": [randoms(width, seed=seed + 9 + place, **options) for place, width in enumerate(columns)],
    }
    if not biases:
        given["biases"] = [None] * 3
    return given | rotary


def stored_by_hand(case: dict[str, Any]) -> torch.Tensor:
    """The definition with products in fp32, rounded once: PyTorch's own of fp16 may add up split sums in fp16."""
    rest = {name: value for name, value in case.items() if name not in ("x", "weights", "biases")}
    pairs = zip(case["weights"], case["biases"], strict=True)
    return rotate_and_store_torch(*(_projected(case["x"], weight, bias) for weight, bias in pairs), **rest)


def rotated_by_hand(case: dict[str, Any]) -> torch.Tensor:
    """The same of the queries alone."""
    projected = _projected(case["x"], case["weights"][0], case["biases"][0])
    options = {name: case[name] for name in ("head_dim", "query_norm", "eps") if name in case}
    return rotate_torch(projected, case["cos"], case["sin"], **options)


def assert_same_rows(run: dict[str, Any], twin: dict[str, Any]) -> None:
    """The same rows of the buffers are written, with the same numbers but for rounding."""
    for name in ("key_buffer", "value_buffer"):
        assert torch.equal(run[name].isnan(), twin[name].isnan())
        assert_near(run[name], twin[name], steps=STEPS)


def _projected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    exact = x.float() @ weight.float().T
    return (exact if bias is None else exact + bias.float()).to(x.dtype)
