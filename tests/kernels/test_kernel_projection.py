"""Projections with rotation and store: in the interpreter against the definitions, and which calls run as kernels."""

import pytest
import torch
from attention_cases import needs_interpreter
from fused_cases import assert_near, fresh_buffers
from longspec_hf_kernels import few_rows_fit, project_rotate, project_rotate_and_store, projections_fit
from longspec_hf_kernels.linear_configs import MOST_ROWS, LinearConfig
from projection_cases import STEPS, assert_same_rows, projection_case, rotated_by_hand, stored_by_hand

HALF = torch.float16
SIZES = {
    "whole tiles": {"heads": 4, "kv_heads": 4, "head_dim": 16},
    "tiles with a rest": {"heads": 5, "kv_heads": 1, "head_dim": 80, "rotary": 32, "batch": 2, "nodes": 7},
    "one row": {"heads": 3, "kv_heads": 2, "head_dim": 24, "rotary": 6, "nodes": 1, "batch": 1, "depth": 192},
}


def queries_of(case):
    options = {name: case[name] for name in ("head_dim", "query_norm", "eps") if name in case}
    return project_rotate(case["x"], case["weights"][0], case["biases"][0], case["cos"], case["sin"], **options)


def assert_right(case):
    twin = fresh_buffers(case)
    assert_near(project_rotate_and_store(**case), stored_by_hand(twin), steps=STEPS)
    assert_same_rows(case, twin)
    assert_near(queries_of(case), rotated_by_hand(case), steps=STEPS)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_definitions(norms, biases, dtype):
    assert_right(projection_case(norms=norms, biases=biases, dtype=dtype))


@needs_interpreter
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernel(in_triton, sizes, norms, biases):
    case = projection_case(norms=norms, biases=biases, dtype=HALF, **sizes)
    assert projections_fit(case["x"], *case["weights"])
    assert_right(case)


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_are_added_up_and_none_is_empty(in_triton, monkeypatch, splits):
    """Also where 7 are asked for and the depth has 2 blocks."""
    config = LinearConfig(block_m=16, block_n=64, block_k=64, stages=2, splits=splits)
    monkeypatch.setattr("longspec_hf_kernels.fused_projection.choose_linear", lambda *args, **kwargs: config)
    assert_right(projection_case(dtype=HALF, biases=True))


@needs_interpreter
def test_what_runs_as_kernels(in_triton, monkeypatch):
    """Few rows of half precision, small weights too; the rest is computed by PyTorch's own products."""
    weight = torch.zeros(64, 128, dtype=HALF)
    some, many = (torch.zeros(1, rows, 128, dtype=HALF) for rows in (MOST_ROWS, MOST_ROWS + 1))
    assert projections_fit(some, weight) and not few_rows_fit(some, weight)
    assert not projections_fit(many, weight) and not projections_fit(some.float(), weight.float())
    assert not projections_fit(some, weight, torch.zeros(128, 64, dtype=HALF).T)
    monkeypatch.setattr("longspec_hf_kernels.fused_linear_kernel.split_products", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr("longspec_hf_kernels.fused_projection_kernel.joined_triton", lambda *args: 1 / 0)
    few = projection_case(dtype=HALF)
    for call in (lambda: project_rotate_and_store(**few), lambda: queries_of(few)):
        with pytest.raises(ZeroDivisionError):
            call()
    assert_right(projection_case(dtype=torch.float32))
    # No parts lie around where the kernel was not asked for its own sums.
    assert_right(projection_case(dtype=HALF, batch=3, nodes=22, heads=2, kv_heads=1))


CASE = projection_case()
CHANGES = {
    "x": {"x": CASE["x"][0]},
    "weights[0]": {"weights": [CASE["weights"][0][:, :8], *CASE["weights"][1:]]},
    "weights[1]": {"weights": [CASE["weights"][0], CASE["weights"][1][:5], CASE["weights"][2]]},
    "weights[2]": {"weights": [*CASE["weights"][:2], CASE["weights"][0]]},
    "weights": {"weights": CASE["weights"][:2]},
    "biases": {"biases": [None]},
    "biases[1]": {"biases": [None, torch.zeros(3), None]},
    "cos": {"cos": CASE["cos"][..., :5]},
    "key_buffer": {"key_buffer": CASE["key_buffer"][:1]},
    "offset": {"offset": -1},
    "query_norm": {"query_norm": torch.zeros(3)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError) as error:
        project_rotate_and_store(**CASE | CHANGES[name])
    assert str(error.value).startswith(f"`{name}` must ")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("x", {"x": CASE["x"][0]}),
        ("weight", {"weight": CASE["weights"][0].half()}),
        ("bias", {"bias": torch.zeros(3)}),
        ("sin", {"sin": CASE["sin"][:1]}),
        ("cos", {name: CASE[name][:, :-1] for name in ("cos", "sin")}),
        ("query_norm", {"query_norm": torch.zeros(3)}),
    ],
)
def test_bad_arguments_of_queries_are_named(name, given):
    case = {"x": CASE["x"], "weight": CASE["weights"][0], "bias": None, "cos": CASE["cos"], "sin": CASE["sin"]}
    with pytest.raises(ValueError) as error:
        project_rotate(**case | given, head_dim=16)
    assert str(error.value).startswith(f"`{name}` must ")
