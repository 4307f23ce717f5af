"""The compiled kernels on an NVIDIA GPU against the definition in fp64: `pytest -m gpu -n 8 tests/kernels`.

Nearly all the time goes into compiling, so the tests are cut small enough for several workers.
"""

import random

import pytest
import torch
from attention_cases import TOLERANCE, WRONG_MASK_ERROR, make_case, relative_error
from longspec_hf_kernels import hybrid_tree_attention, pack_ancestor_bits
from longspec_hf_kernels.backends import FLASH_HEAD_DIMS, has_flash_attn
from longspec_hf_kernels.torch_attention import hybrid_tree_attention_torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from longspec_hf_kernels.flash_attention import hybrid_tree_attention_flash
from longspec_hf_kernels.hopper_attention import GLUON_TRITON, HOPPER_HEAD_DIMS, hopper_fits
from longspec_hf_kernels.triton_attention import hybrid_tree_attention_triton
from longspec_hf_kernels.triton_configs import LaunchOptions, triton_version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9 or triton_version() != GLUON_TRITON,
    reason="the kernel is for Hopper GPUs and one version of Gluon",
)

FLASH_ATTN = pytest.param(True, marks=pytest.mark.skipif(not has_flash_attn(), reason="flash-attn is not installed"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 80, 96, 128, 256]
LENGTHS = [0, 1, 2, 31, 63, 64, 65, 127, 500, 1000, 3001]
# C76: another order of the same sums, rounded to bf16 at the end; the largest difference of any element.
SPLIT_TOLERANCE = 1e-3


def random_case(seed: int, **fixed):
    """One of everything the signature allows."""
    draw = random.Random(seed)
    batch, nodes = draw.randint(1, 3), draw.choice([1, 3, 16, 21, 65, 80])
    prefixes = [draw.choice(LENGTHS) for _ in range(batch)]
    options = {
        "prefixes": prefixes,
        "nodes": nodes,
        "tree_keys": nodes + draw.choice([0, 5, 70]),
        "kv_heads": draw.choice([1, 2, 4]),
        "group": draw.choice([1, 4, 7]),
        "starts": [draw.randint(0, prefix) for prefix in prefixes] if draw.random() < 0.4 else None,
        "window": draw.choice([None, None, 4, 512]),
        "softcap": draw.choice([None, None, 3.0]),
        "sinks": draw.random() < 0.3,
        "tree": draw.random() < 0.9,
        "strided": draw.random() < 0.5,
        "spare": draw.choice([0, 7]),
        "index_dtype": draw.choice([torch.int32, torch.int64]),
        "seed": seed,
    }
    return make_case(device="cuda", **(options | fixed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seeds", [range(5), range(5, 10)], ids=["first", "second"])
def test_random_problems(seeds, head_dim, dtype):
    """C85 among them: fp32 within 1e-5, which TF32 products miss by far."""
    errors = {}
    for seed in seeds:
        case = random_case(1000 * head_dim + seed, head_dim=head_dim, dtype=dtype)
        errors[seed] = case.error(hybrid_tree_attention)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_tile_and_word_edges(dtype):
    errors = {}
    for prefix in [0, 1, 63, 64, 65, 1000, 20000]:
        for nodes, tree_keys in [(1, 1), (5, 63), (16, 64), (64, 64), (65, 65), (80, 130)]:
            case = make_case(
                prefixes=[prefix], nodes=nodes, tree_keys=tree_keys, group=4, head_dim=128, dtype=dtype,
                device="cuda", spare=0, key_depths=False, seed=prefix + nodes,
            )  # fmt: skip
            errors[prefix, tree_keys] = case.error(hybrid_tree_attention)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_equal_to_rows_are_not_mixed_up(dtype):
    """C74."""
    case = make_case(prefixes=[40], nodes=16, kv_heads=16, group=1, dtype=dtype, device="cuda")
    assert case.error(hybrid_tree_attention) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [4, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_agree_between_the_paths(dtype, window):
    """C77, C78: prefixes on both sides of the window's edge, by both paths."""
    for prefix in [3, window, window + 1, 10 * window]:
        case = make_case(
            prefixes=[prefix, 100], starts=[1, 0], nodes=6, tree_keys=66, window=window, dtype=dtype, device="cuda"
        )
        assert case.error(hybrid_tree_attention_triton) < TOLERANCE[dtype]
        assert case.error(hybrid_tree_attention_torch) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", FLASH_HEAD_DIMS)
@pytest.mark.parametrize("nodes", [1, 21, 69])
@pytest.mark.parametrize("package", [False, FLASH_ATTN], ids=["torch flash", "flash-attn"])
def test_the_scheme_of_the_paper_and_the_torch_path(package, nodes, head_dim, dtype):
    """C73: prefix and tree parts merged, against one softmax; GQA 8:2."""
    case = make_case(prefixes=[700, 0, 65], starts=[3, 0, 65], nodes=nodes, tree_keys=nodes + 9, group=4,
                     head_dim=head_dim, dtype=dtype, device="cuda", sinks=nodes == 21)  # fmt: skip
    case.options = {k: v for k, v in case.options.items() if k not in ("window", "depths")}
    expected = case.expected()
    assert relative_error(case.run(hybrid_tree_attention_torch), expected) < TOLERANCE[dtype]
    case.options.pop("key_depths")
    for packed in (False, True):
        out = case.run(hybrid_tree_attention_flash, packed=packed, package=package)
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("package", [FLASH_ATTN], ids=["flash-attn"])
def test_flash_attn_has_a_soft_cap(package):
    case = make_case(prefixes=[700, 0], nodes=21, tree_keys=21, group=4, head_dim=128, dtype=torch.bfloat16,
                     device="cuda", softcap=3.0)  # fmt: skip
    case.options = {k: v for k, v in case.options.items() if k not in ("window", "depths", "key_depths")}
    out = case.run(hybrid_tree_attention_flash, package=package)
    assert relative_error(out, case.expected()) < TOLERANCE[torch.bfloat16]


def beyond_one_step(run: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where the two differ by the tolerance or more, and by more than one step of their dtype.

    From 0.25 on, which results over few rows reach, bf16 has steps of 0.002 and more: two sums that differ
    by next to nothing may be rounded to either side of one.
    """
    step = torch.finfo(run.dtype).eps * 2.0 ** torch.maximum(run.abs(), other.abs()).float().log2().floor()
    difference = (run.float() - other.float()).abs()
    return (difference >= SPLIT_TOLERANCE) & (difference > step)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_splits_hardly_change_the_result_and_runs_repeat_bit_for_bit(dtype):
    """C76."""
    case = make_case(prefixes=[4096, 300], nodes=16, group=4, head_dim=128, dtype=dtype, device="cuda")
    runs = [case.run(hybrid_tree_attention_triton, splits=n) for n in (1, 2, 4, 8, 16)]
    for run in runs:
        assert float((run[0] - runs[0][0]).abs().max()) < SPLIT_TOLERANCE  # over 4096 rows: below 0.125
        assert not beyond_one_step(run, runs[0]).any()
        assert relative_error(run, case.expected()) < TOLERANCE[dtype]
    assert torch.equal(case.run(hybrid_tree_attention), case.run(hybrid_tree_attention))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_call_follows_lengths_starts_and_bits(dtype):
    """Every length is read on the device, so a replay computes the problem its tensors hold then."""
    problems = [
        make_case(prefixes=prefixes, starts=starts, nodes=9, tree_keys=70, group=4, spare=3000 - max(prefixes),
                  dtype=dtype, device="cuda", seed=seed)
        for seed, (prefixes, starts) in enumerate([([64, 1], [0, 0]), ([2900, 0], [17, 0]), ([0, 2999], [0, 2999])])
    ]  # fmt: skip
    static = problems[0]
    static.run(hybrid_tree_attention)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static.run(hybrid_tree_attention)
    for problem in [*problems, problems[0]]:
        for target, source in zip(static.arguments, [t.clone() for t in problem.arguments], strict=True):
            target.copy_(source)
        for name in ("starts", "key_depths"):
            static.options[name].copy_(problem.options[name].clone())
        out.fill_(float("nan"))  # every element must be written
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, static.expected()) < TOLERANCE[dtype]


@needs_hopper
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_the_hopper_kernel_on_random_problems(group, head_dim, dtype):
    """Forced, so that it runs for few rows too, where the table would choose the other kernel."""
    errors = {}
    for seed in range(6 * group, 6 * group + 6):
        case = random_case(
            seed, head_dim=head_dim, dtype=dtype, group=group, window=None, softcap=None, strided=False,
            nodes=[1, 5, 16, 33, 64, 80][seed % 6], tree_keys=[80, 128, 200][seed % 3],
        )  # fmt: skip
        errors[seed] = case.error(hybrid_tree_attention_triton, hopper=True)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@needs_hopper
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_the_hopper_kernel_around_tile_and_word_edges(dtype):
    errors = {}
    for prefix in [0, 1, 63, 64, 65, 127, 128, 129, 1000, 20000]:
        for nodes, tree_keys in [(1, 1), (64, 64), (65, 65), (80, 130), (9, 300)]:
            case = make_case(
                prefixes=[prefix, prefix // 2], nodes=nodes, tree_keys=tree_keys, group=4, head_dim=128, dtype=dtype,
                device="cuda", spare=0, sinks=nodes == 65, seed=prefix + nodes,
            )  # fmt: skip
            errors[prefix, tree_keys] = case.error(hybrid_tree_attention_triton, hopper=True)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@needs_hopper
def test_the_hopper_kernel_is_what_many_rows_get_and_repeats_bit_for_bit():
    case = make_case(prefixes=[4096, 300], nodes=64, group=7, kv_heads=4, head_dim=128, dtype=torch.bfloat16,
                     device="cuda")  # fmt: skip
    chosen = case.run(hybrid_tree_attention)
    assert torch.equal(chosen, case.run(hybrid_tree_attention_triton, hopper=True))
    assert not torch.equal(chosen, case.run(hybrid_tree_attention_triton, hopper=False))


@needs_hopper
def test_rows_the_copy_engine_cannot_take_go_to_the_other_kernel():
    case = make_case(
        prefixes=[500], nodes=64, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda", strided=True
    )
    query, key, value = case.arguments[:3]
    assert not hopper_fits(query, key, value, None, None)
    assert case.error(hybrid_tree_attention) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("hopper", [False, pytest.param(True, marks=needs_hopper)], ids=["portable", "hopper"])
@pytest.mark.parametrize("nodes", [1, 16, 64])
def test_overlapped_launches_wait_for_each_other(nodes, hopper):
    """Each call's query is the call before's result: a read before its end would change the bits."""
    case = make_case(prefixes=[3000], nodes=nodes, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    query, *others = case.arguments
    case.options["scale"] *= 100  # or the results would soon all be the mean of the values

    def chain(options):
        result = query
        for _ in range(20):
            result = hybrid_tree_attention_triton(result, *others, **case.options, hopper=hopper, options=options)
        return result

    early = LaunchOptions(early_splits=True, early_hopper=True)
    straight = chain(LaunchOptions())
    assert straight.isfinite().all()
    assert torch.equal(chain(early), straight)
    chain(early)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(early)
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, straight)


def test_a_broken_mask_is_noticed():
    """Causal bits instead of the ancestors' give another result: the comparisons above can fail."""
    case = make_case(prefixes=[20], nodes=24, head_dim=128, dtype=torch.bfloat16, device="cuda")
    query, key, value, prefix_lens, bits = case.arguments
    key, value = key.nan_to_num(0.3), value.nan_to_num(0.3)
    causal = pack_ancestor_bits(torch.ones(1, 24, 24, dtype=torch.bool).tril()).cuda()
    broken = hybrid_tree_attention(query, key, value, prefix_lens, causal, **case.options)
    assert relative_error(broken, case.expected()) > WRONG_MASK_ERROR
    right = hybrid_tree_attention(query, key, value, prefix_lens, bits, **case.options)
    assert relative_error(right, case.expected()) < TOLERANCE[torch.bfloat16]


def test_compiles_with_inductor():
    case = make_case(prefixes=[20, 3], sinks=True, starts=[1, 0], dtype=torch.float16, device="cuda")

    def function(*arguments):
        return hybrid_tree_attention(*arguments, **case.options).transpose(1, 2).reshape(2, 5, -1) * 2

    assert torch.equal(torch.compile(function, fullgraph=True)(*case.arguments), function(*case.arguments))


def test_tiny_shapes_for_the_sanitizer():
    """`compute-sanitizer python -m pytest -m gpu tests/kernels -k sanitizer` looks for stray accesses."""
    for seed, (prefix, nodes, group, options) in enumerate([
        (0, 1, 1, {}),
        (130, 5, 7, {"spare": 0}),
        (65, 65, 4, {"spare": 0, "strided": True, "starts": [3]}),
        (70, 3, 4, {"spare": 0, "window": 9, "sinks": True, "head_dim": 80}),
        (300, 65, 4, {"spare": 0, "head_dim": 128}),
    ]):  # fmt: skip
        case = make_case(prefixes=[prefix], nodes=nodes, kv_heads=2, group=group, dtype=torch.bfloat16,
                         device="cuda", seed=seed, **options)  # fmt: skip
        assert case.error(hybrid_tree_attention_triton, splits=3) < TOLERANCE[torch.bfloat16]
