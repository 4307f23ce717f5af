"""Random problems for hybrid tree attention, with NaN in every row that nobody may use."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from longspec_hf_kernels import hybrid_tree_attention_reference, pack_ancestor_bits

# Relative errors ||out - ref|| / ||ref|| against fp64. fp64: rounding over a few thousand terms. fp32: as
# C85 asks, out of reach for TF32 products (about 3e-4). fp16 and bf16: half a unit in the last place of
# the result (2.4e-4, 2e-3) plus the rounding of the softmax weights before the second product.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# What a wrong mask costs at least: a missing ancestor mask shows as about 1.6.
WRONG_MASK_ERROR = 0.1

# PyTorch imports Triton early, so the variable has to be set before PyTorch is (tests/conftest.py).
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start; on a GPU test_kernel_gpu.py runs the compiled kernels instead",
)


@dataclass
class AttentionCase:
    """Arguments of one call; `visible` is the tree's mask before it was packed."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    visible: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Any, **overrides: Any) -> torch.Tensor:
        return function(*self.arguments, **self.options, **overrides)

    def expected(self) -> torch.Tensor:
        """The definition in fp64 on the CPU."""

        def wide(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.cpu().double() if value.is_floating_point() else value.cpu()

        arguments = [wide(value) for value in self.arguments]
        return hybrid_tree_attention_reference(*arguments, **{k: wide(v) for k, v in self.options.items()})

    def error(self, function: Any, **overrides: Any) -> float:
        """Relative error of `function` against the definition; NaN stays NaN and fails every bound."""
        return relative_error(self.run(function, **overrides), self.expected())


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||; the plain norm where nothing is expected."""
    out, expected = out.detach().cpu().double(), expected.detach().cpu().double()
    norm = float(expected.norm())
    return float((out - expected).norm()) / (norm if norm > 0 else 1.0)


def random_parents(count: int, generator: torch.Generator) -> list[int]:
    """A random tree over `count` rows in shuffled order; the root's parent is -1."""
    order = torch.randperm(count, generator=generator).tolist()
    parents = [-1] * count
    for rank in range(1, count):
        parents[order[rank]] = order[int(torch.randint(rank, (1,), generator=generator))]
    return parents


def tree_from_parents(parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(visible [C, C], depths [C])`: every row sees itself and its ancestors."""
    count = len(parents)
    visible = torch.zeros(count, count, dtype=torch.bool)
    depths = torch.zeros(count, dtype=torch.int64)
    for row in range(count):
        node, depth = row, -1
        while node != -1:
            visible[row, node] = True
            node, depth = parents[node], depth + 1
        depths[row] = depth
    return visible, depths


def make_case(
    *,
    prefixes: list[int],
    nodes: int = 5,
    tree_keys: int | None = None,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    starts: list[int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    tree: bool = True,
    strided: bool = False,
    spare: int = 7,
    key_depths: bool = True,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> AttentionCase:
    """A random problem: the query's nodes are a random subset of the rows of a random tree.

    Every K/V row before `starts`, behind the tree and of the tree that no node sees is NaN. With
    `strided`, K and V are views with different strides into larger buffers.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(prefixes), kv_heads * group
    keys = 0 if not tree else (tree_keys or nodes)
    capacity = max(prefixes) + keys + spare
    visible = torch.zeros(batch, nodes, keys, dtype=torch.bool)
    depths = torch.zeros(batch, nodes, dtype=index_dtype)
    tree_depths = torch.zeros(batch, keys, dtype=index_dtype)
    for b in range(batch if tree else 0):
        all_visible, all_depths = tree_from_parents(random_parents(keys, generator))
        chosen = torch.randperm(keys, generator=generator)[:nodes]
        visible[b], depths[b], tree_depths[b] = all_visible[chosen], all_depths[chosen], all_depths
    if strided:
        key = torch.full((batch, capacity, kv_heads + 1, head_dim), float("nan"), dtype=dtype)[:, :, 1:].transpose(
            1, 2
        )
        value = torch.full((batch, kv_heads, head_dim, capacity), float("nan"), dtype=dtype).transpose(2, 3)
        query = torch.randn(batch, nodes, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    else:
        key = torch.full((batch, kv_heads, capacity, head_dim), float("nan"), dtype=dtype)
        value = key.clone()
        query = torch.randn(batch, heads, nodes, head_dim, generator=generator).to(dtype)
    for b, prefix in enumerate(prefixes):
        rows = list(range(0 if starts is None else starts[b], prefix))
        rows += [prefix + int(j) for j in visible[b].any(0).nonzero()]
        for buffer in (key, value):
            buffer[b, :, rows] = torch.randn(kv_heads, len(rows), head_dim, generator=generator).to(dtype)
    options: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "starts": None if starts is None else torch.tensor(starts, dtype=index_dtype, device=device),
        "window": window,
        "softcap": softcap,
        "sinks": torch.randn(heads, generator=generator).to(device=device, dtype=dtype) if sinks else None,
        "depths": depths.to(device) if window else None,
        "key_depths": tree_depths.to(device) if tree and (window or key_depths) else None,
    }
    arguments = (
        query.to(device),
        key.to(device),
        value.to(device),
        torch.tensor(prefixes, dtype=index_dtype, device=device),
        pack_ancestor_bits(visible).to(device) if tree else None,
    )
    return AttentionCase(arguments, options, visible if tree else None, {"depths": depths})
