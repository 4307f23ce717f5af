"""Linear layers over a few rows: the rule of tiles, and the kernel in the interpreter against the definitions."""

import pytest
import torch
from attention_cases import needs_interpreter
from fused_cases import assert_near, randoms
from longspec_hf_kernels import few_rows_fit, gated_linear, linear_add_rms_norm, linear_few_rows
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from longspec_hf_kernels.linear_configs import LinearConfig, choose_linear, is_for_few_rows
from longspec_hf_kernels.triton_configs import DeviceLimits
from torch.nn import functional as F

H100 = DeviceLimits(multiprocessors=132, shared_memory=228 * 1024, dependent_launch=True, tensor_maps=True)
HALF = torch.float16


def product(x, weight):
    """In fp32, rounded once."""
    return (x.float() @ weight.float().T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16], ids=str)
def test_definitions(dtype):
    x, gate, up = (
        randoms(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(2, 3, 64), (40, 64), (40, 64)])
    )
    residual, norm = randoms(2, 3, 40, seed=3, dtype=dtype), randoms(40, seed=4, dtype=dtype)
    assert_near(linear_few_rows(x, gate), product(x, gate), steps=2)
    opened = F.silu(product(x, gate).float()).to(dtype)
    assert_near(gated_linear(x, gate, up), opened * product(x, up), steps=4)
    normed, summed = linear_add_rms_norm(x, gate, residual, norm, 1e-5)
    assert_near(summed, residual + product(x, gate), steps=2)
    wide = summed.float()
    assert_near(normed, norm * (wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype), steps=2)


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "kind", "expected"),
    [  # measured to be the best, or within 1 % of it, on an H100
        (1, 18944, 3584, "gated", (128, 2, 1)),
        (16, 18944, 3584, "gated", (128, 2, 1)),
        (32, 18944, 3584, "gated", (64, 3, 1)),
        (64, 18944, 3584, "gated", (64, 3, 1)),
        (1, 14336, 4096, "gated", (128, 3, 1)),
        (64, 14336, 4096, "gated", (128, 2, 1)),
        (1, 3584, 18944, "split", (128, 3, 4)),
        (64, 3584, 18944, "split", (128, 3, 4)),
        (64, 4096, 14336, "split", (128, 3, 4)),
        (16, 32768, 3584, "plain", (128, 2, 1)),
    ],
)
def test_tiles_of_known_models(rows, columns, depth, kind, expected):
    config = choose_linear(rows, columns, depth, H100, gated=kind == "gated", split=kind == "split")
    assert (config.block_k, config.stages, config.splits) == expected
    assert config.mapped == (rows > 16)


def test_tiles_follow_the_device():
    small = DeviceLimits(multiprocessors=20, shared_memory=100 * 1024, dependent_launch=False)
    config = choose_linear(64, 18944, 3584, small, gated=True)
    assert (config.block_k, config.stages, config.mapped) == (64, 3, False)  # nothing is resident at once: smallest
    # 10 blocks of columns in 4 splits: two programs a multiprocessor, for which only the smallest tiles leave room.
    config = choose_linear(64, 640, 1280, small, split=True)
    assert (config.block_k, config.stages, config.splits) == (64, 3, 4)
    assert choose_linear(1, 576, 576, small, split=True).block_k == 64  # 576 is no multiple of 128
    assert choose_linear(1, 64 * 1000, 576, small, split=True).splits == 1


def test_who_is_for_few_rows():
    x, weight = torch.zeros(2, 4, 128, dtype=HALF), torch.zeros(8, 128, dtype=HALF)
    assert is_for_few_rows(x, weight)
    assert not is_for_few_rows(x.float(), weight.float())
    assert not is_for_few_rows(x, weight.bfloat16())
    assert not is_for_few_rows(x[..., :96], weight[:, :96].contiguous())
    assert not is_for_few_rows(x, torch.zeros(128, 8, dtype=HALF).T)
    assert not is_for_few_rows(x[:0], weight)
    assert is_for_few_rows(torch.zeros(32, 128, dtype=HALF), weight)
    assert not is_for_few_rows(torch.zeros(33, 128, dtype=HALF), weight)  # a small matrix
    large = torch.zeros(1, dtype=HALF).expand(2**17, 256)
    assert not is_for_few_rows(torch.zeros(64, 256, dtype=HALF), large)  # strides of 0
    large = torch.empty(2**17, 256, dtype=HALF)
    assert is_for_few_rows(torch.zeros(64, 256, dtype=HALF), large)
    assert not is_for_few_rows(torch.zeros(65, 256, dtype=HALF), large)


@needs_interpreter
def test_only_kernels_fit(monkeypatch):
    x, weight = torch.zeros(1, 64, dtype=HALF), torch.zeros(8, 64, dtype=HALF)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert not few_rows_fit(x, weight)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert few_rows_fit(x, weight)
    assert not few_rows_fit(x.float(), weight.float())


CONFIGS = {
    "deep": LinearConfig(block_m=16, block_n=64, block_k=128, stages=3),
    "flat": LinearConfig(block_m=32, block_n=64, block_k=64, stages=2),
    "mapped": LinearConfig(block_m=32, block_n=64, block_k=64, stages=3, mapped=True),
}


@needs_interpreter
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 64, 128), (13, 100, 640), (16, 130, 256)])
def test_kernel(rows, columns, depth, name):
    from linear_cases import assert_products, linear_case

    one = CONFIGS[name]
    case = linear_case(rows, columns, depth, HALF)
    for splits in (2, 3, 7):  # 7 of 2, 5 or 10 blocks: some would be empty
        split = LinearConfig(one.block_m, one.block_n, one.block_k, one.stages, splits, one.mapped)
        assert_products(case, one, one, split)


@needs_interpreter
def test_public_functions_run_the_kernel(monkeypatch):
    from linear_cases import EPS, linear_case

    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    case = linear_case(5, 100, 192, HALF)
    x, weight, other = case["x"], case["weight"], case["other"]
    rest = (case["residual"], case["norm_weight"], EPS)

    def results():
        return [linear_few_rows(x, weight), gated_linear(x, weight, other), *linear_add_rms_norm(x, weight, *rest)]

    by_kernel = results()
    launched = []
    monkeypatch.setattr(
        "longspec_hf_kernels.fused_linear_kernel.split_products", lambda *args: launched.append(args) or 1 / 0
    )
    for call in (lambda: linear_few_rows(x, weight), lambda: gated_linear(x, weight, other)):
        with pytest.raises(ZeroDivisionError):
            call()
    assert len(launched) == 2
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    for got, expected in zip(by_kernel, results(), strict=True):
        assert_near(got, expected, steps=4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, w, r, n: linear_few_rows(x, w[:, :8]), "weight"),
        (lambda x, w, r, n: linear_few_rows(x, w.half()), "weight"),
        (lambda x, w, r, n: gated_linear(x, w[:, :8], w), "gate"),
        (lambda x, w, r, n: gated_linear(x, w, w[:2]), "up"),
        (lambda x, w, r, n: linear_add_rms_norm(x, w[0], r, n, 1e-5), "weight"),
        (lambda x, w, r, n: linear_add_rms_norm(x, w, r[:1], n, 1e-5), "residual"),
        (lambda x, w, r, n: linear_add_rms_norm(x, w, r, n.half(), 1e-5), "norm_weight"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        call(torch.zeros(2, 16), torch.zeros(4, 16), torch.zeros(2, 4), torch.zeros(4))
