"""The compiled projections, and layers of kernels that come in early, on an NVIDIA GPU: `pytest -m gpu -n 8`."""

from dataclasses import replace

import pytest
import torch
from fused_cases import assert_near, fresh_buffers, randoms
from longspec_hf_kernels import (
    gated_linear,
    hybrid_tree_attention,
    linear_add_rms_norm,
    project_rotate,
    project_rotate_and_store,
    projections_fit,
    triton_configs,
)
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from projection_cases import STEPS, assert_same_rows, projection_case, rotated_by_hand, stored_by_hand

pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HALVES = [torch.bfloat16, torch.float16]
# Qwen2.5-7B's attention, with its biases, Llama-3-8B's, SmolLM2-135M's, and one whose heads end within tiles.
SIZES = [
    {"heads": 28, "kv_heads": 4, "head_dim": 128, "depth": 3584, "biases": True},
    {"heads": 32, "kv_heads": 8, "head_dim": 128, "depth": 4096},
    {"heads": 9, "kv_heads": 3, "head_dim": 64, "depth": 576},
    {"heads": 5, "kv_heads": 1, "head_dim": 80, "rotary": 32, "depth": 192, "norms": True},
]


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (2, 21), (1, 64)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_projections(sizes, rows, dtype):
    batch, nodes = rows
    case = projection_case(batch=batch, nodes=nodes, dtype=dtype, device="cuda", **sizes)
    for name in ("key_buffer", "value_buffer"):
        heads, head_dim = case[name].shape[1::2]
        case[name] = case[name].new_full((3, 80, heads, head_dim), float("nan")).transpose(1, 2)
    assert projections_fit(case["x"], *case["weights"])
    twin = fresh_buffers(case)
    assert_near(project_rotate_and_store(**case), stored_by_hand(twin), steps=STEPS)
    assert_same_rows(case, twin)
    options = {name: case[name] for name in ("head_dim", "query_norm", "eps") if name in case}
    queries = project_rotate(case["x"], case["weights"][0], case["biases"][0], case["cos"], case["sin"], **options)
    assert_near(queries, rotated_by_hand(case), steps=STEPS)


class Layers:
    """Decoder layers of kernels, each reading what the one before has written, over K/V rows it has written itself."""

    def __init__(self, nodes: int, layers: int = 6) -> None:
        sizes = {"heads": 28, "kv_heads": 4, "head_dim": 128, "depth": 3584, "biases": True}
        self.cases = [
            projection_case(batch=1, nodes=nodes, dtype=torch.bfloat16, device="cuda", seed=20 * layer, **sizes)
            for layer in range(layers)
        ]
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        self.buffers = [randoms(2, 1, 4, 4096, 128, seed=layer, **options) for layer in range(layers)]
        self.out, self.down = (randoms(3584, width, seed=1, **options) * width**-0.5 for width in (3584, 8192))
        self.gate, self.up = (randoms(8192, 3584, seed=seed, **options) * 3584**-0.5 for seed in (2, 3))
        self.norm = torch.ones(3584, **options)
        self.lengths = torch.tensor([4000], dtype=torch.int32, device="cuda")
        self.bits = torch.ones(1, nodes, 1, dtype=torch.long, device="cuda").cumsum(1)
        self.depths = torch.arange(nodes, device="cuda").unsqueeze(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        summed = x
        for case, (keys, values) in zip(self.cases, self.buffers, strict=True):
            given = case | {
                "x": x,
                "key_buffer": keys,
                "value_buffer": values,
                "first_rows": self.lengths,
                "offset": 0,
            }
            query = project_rotate_and_store(**given)
            attended = hybrid_tree_attention(
                query, keys, values, self.lengths, self.bits, depths=self.depths, key_depths=self.depths, scale=0.5
            )
            x, summed = linear_add_rms_norm(attended.transpose(1, 2).flatten(2), self.out, summed, self.norm, 1e-6)
            opened = gated_linear(x, self.gate, self.up)
            x, summed = linear_add_rms_norm(opened, self.down, summed, self.norm, 1e-6)
        return summed


@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_kernels_that_come_in_early_wait(nodes, monkeypatch):
    """A read before a predecessor's end would change the bits, launched or captured."""
    layers = Layers(nodes)
    x = randoms(1, nodes, 3584, seed=9, dtype=torch.bfloat16, device="cuda")
    limits = triton_configs.device_limits(x.device)
    if not limits.dependent_launch:
        pytest.skip("this device brings no kernel in early")
    early = layers(x)
    assert early.isfinite().all()
    straight = replace(limits, dependent_launch=False)
    with monkeypatch.context() as patch:
        for name in ("triton_attention", "fused_linear_kernel", "fused_norm_kernel", "fused_rotary_kernel",
                     "fused_projection_kernel"):  # fmt: skip
            patch.setattr(f"longspec_hf_kernels.{name}.device_limits", lambda device: straight)
        assert torch.equal(layers(x), early)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layers(x)
    for _ in range(20):
        replayed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, early)
