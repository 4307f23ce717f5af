"""The compiled fused steps on an NVIDIA GPU against their definitions: `pytest -m gpu -n 8 tests/kernels`."""

import pytest
import torch
from fused_cases import (
    CAPACITY,
    appended_by_hand,
    assert_best,
    assert_near,
    child_scores,
    children_case,
    fresh_buffers,
    moved_by_hand,
    randoms,
    rotary_case,
)
from longspec_hf_kernels import (
    RowMover,
    add_rms_norm,
    append_children,
    best_children_fused,
    embed_rms_norm,
    merge_tree,
    rotate,
    rotate_and_store,
    silu_and_multiply,
)
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, uses_triton
from longspec_hf_kernels.fused_beam import best_children_torch
from longspec_hf_kernels.fused_gate import silu_and_multiply_torch
from longspec_hf_kernels.fused_norm import add_rms_norm_torch, embed_rms_norm_torch
from longspec_hf_kernels.fused_rotary import rotate_and_store_torch
from tree_cases import SIZES, assert_same_tree, merged_by_hand, tree_problem

pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HIDDEN = [576, 3584, 4096]
HEADS = [(28, 4, 128), (32, 8, 128), (9, 3, 64)]
VOCABULARIES = [32768, 49152, 151936]


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert uses_triton(torch.zeros(1, device="cuda"))


def captured(call):
    """A CUDA graph of `call` and what its run returns; the first call, outside, compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, 9000])
def test_norm(hidden, dtype):
    options = {"dtype": dtype, "device": "cuda"}
    x, residual = (randoms(1, 21, hidden, seed=seed, **options) for seed in (0, 1))
    weight = randoms(hidden, seed=2, **options)
    for added in (residual, None):
        got, expected = (run(x, added, weight, 1e-6) for run in (add_rms_norm, add_rms_norm_torch))
        assert_near(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_embeddings(hidden, dtype):
    table, weight = (randoms(*shape, seed=0, dtype=dtype, device="cuda") for shape in ((3000, hidden), (hidden,)))
    for rows in (1, 16, 64):
        token_ids = torch.randint(3000, (1, rows), generator=torch.Generator().manual_seed(rows)).cuda()
        got, expected = (run(table, token_ids, weight, 1e-6) for run in (embed_rms_norm, embed_rms_norm_torch))
        assert_near(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "sizes", [{}, {"nodes": 1, "words": 1}, {"last": True, "width": 64}, {"names": False}], ids=str
)
def test_children(sizes):
    case = children_case(**sizes, device="cuda")
    beam, seen = appended_by_hand(case)
    bits = append_children(**case)
    assert [part.tolist() for part in case["beam"]] == beam
    assert (None if bits is None else bits.tolist()) == seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1536, 14336, 18944])
def test_gate(columns, dtype):
    both = randoms(1, 21, 2 * columns, seed=0, dtype=dtype, device="cuda") * 5
    gate, up = both.split(columns, dim=-1)
    assert_near(silu_and_multiply(gate, up), silu_and_multiply_torch(gate, up))


def assert_same_rotation(case, exact):
    twin = fresh_buffers(case)
    run = fresh_buffers(case)
    got, expected = rotate_and_store(**run), rotate_and_store_torch(**twin)
    for name in ("key_buffer", "value_buffer"):
        assert torch.equal(run[name].isnan(), twin[name].isnan())
    assert torch.equal(run["value_buffer"].nan_to_num(99), twin["value_buffer"].nan_to_num(99))
    for one, other in ((got, expected), (run["key_buffer"], twin["key_buffer"])):
        if exact:
            assert torch.equal(one.nan_to_num(99), other.nan_to_num(99))
        else:
            assert_near(one, other)
    options = {name: case[name] for name in ("head_dim", "query_norm", "eps") if name in case}
    assert torch.equal(rotate(case["query"], case["cos"], case["sin"], **options), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_rotation(heads, kv_heads, head_dim, norms, dtype):
    """Without norms bit for bit: both products and the sum round where PyTorch's do."""
    for batch, nodes, rotary in ((1, 1, head_dim), (1, 21, head_dim), (3, 5, head_dim // 2)):
        case = rotary_case(
            batch=batch, nodes=nodes, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=rotary, norms=norms,
            dtype=dtype, device="cuda",
        )  # fmt: skip
        assert_same_rotation(case, exact=not norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_rotation_follows_its_rows(dtype):
    case = rotary_case(heads=28, kv_heads=4, head_dim=128, dtype=dtype, device="cuda")
    graph, got = captured(lambda: rotate_and_store(**case))
    for rows in ([1, 2, 3], [30, 0, 16]):
        case["first_rows"].copy_(torch.tensor(rows))
        case["query"].copy_(randoms(*case["query"].shape, seed=rows[0], dtype=dtype, device="cuda"))
        case["key_buffer"].fill_(float("nan"))
        twin = fresh_buffers(case)
        graph.replay()
        expected = rotate_and_store_torch(**twin)
        assert torch.equal(got, expected)
        assert torch.equal(case["key_buffer"].nan_to_num(99), twin["key_buffer"].nan_to_num(99))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("nodes, width", [(1, 1), (1, 16), (4, 16), (16, 4), (64, 64)])
def test_best_children(nodes, width, vocabulary, dtype):
    for batch, softcap in ((1, None), (2, 30.0)):
        scores = randoms(batch, nodes, seed=0, dtype=torch.float32, device="cuda")
        logits = randoms(batch, nodes, vocabulary, seed=1, dtype=dtype, device="cuda") * 4
        got = best_children_fused(scores, logits, width, softcap=softcap)
        assert_best(got, child_scores(scores, logits, softcap), width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_of_one_node_go_to_the_lower_token(dtype):
    """Whole logits tie within and across the parts of the vocabulary; the sums are equal then, to the bit."""
    logits = randoms(1, 1, 151936, seed=1, dtype=torch.float32, device="cuda").round().to(dtype)
    scores = torch.zeros(1, 1, device="cuda")
    got, expected = (run(scores, logits, 64) for run in (best_children_fused, best_children_torch))
    assert torch.equal(got[2], expected[2])
    right = logits[0, 0].float().sort(descending=True, stable=True).indices[:64]
    assert torch.equal(got[2][0], right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_beam_follows_scores_and_unused_rows(dtype):
    scores = torch.zeros(2, 4, device="cuda")
    logits = randoms(2, 4, 49152, seed=0, dtype=dtype, device="cuda") * 4
    graph, got = captured(lambda: best_children_fused(scores, logits, 16))
    for seed in (1, 2):
        scores.copy_(randoms(2, 4, seed=seed, dtype=torch.float32))
        logits.copy_(randoms(2, 4, 49152, seed=seed + 10, dtype=dtype) * 4)
        scores[0, seed:] = float("-inf")
        expected = child_scores(scores, logits)
        logits[0, seed:] = float("nan")
        graph.replay()
        assert_best(got, expected, 16)
        assert bool((got[1][0] < seed).all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [*SIZES, ((16,) * 15, 15, 128)], ids=str)
def test_trees(sizes, batch):
    for seed in range(6):
        problem = tree_problem(*sizes, batch=batch, seed=seed, device="cuda")
        assert_same_tree(merge_tree(**problem), merged_by_hand(problem))


@pytest.mark.parametrize("sizes", [SIZES[0], ((16,) * 15, 15, 128)], ids=str)
def test_a_captured_merge_follows_the_beam_and_the_branch(sizes):
    problem = tree_problem(*sizes, seed=1, device="cuda")
    graph, got = captured(lambda: merge_tree(**problem))
    for seed in (3, 5):
        other = tree_problem(*sizes, seed=seed)
        for name in ("root", "tokens", "parents", "scores", "branch", "limits"):
            problem[name].copy_(other[name])
        graph.replay()
        assert_same_tree(got, merged_by_hand(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads, head_dim", [(4, 128), (8, 128), (3, 64), (2, 5)])
def test_a_captured_commit_follows_lengths_and_paths(kv_heads, head_dim, dtype):
    """All layers at once, in two layouts; head size 5 moves words of 2 or 4 bytes."""
    options = {"dtype": dtype, "device": "cuda"}
    buffers = [randoms(4, kv_heads, CAPACITY, head_dim, seed=seed, **options) for seed in range(56)]
    buffers += [randoms(4, CAPACITY, kv_heads, head_dim, seed=9, **options).transpose(1, 2)]
    lengths = torch.zeros(3, dtype=torch.int32, device="cuda")
    visited = torch.zeros(3, 6, dtype=torch.int64, device="cuda")
    counts = torch.ones(3, dtype=torch.int32, device="cuda")
    mover = RowMover(buffers)
    graph, _ = captured(lambda: mover.move(lengths, visited, counts))
    for first, path, used in (
        ([20, 0, 32], [[0, 1, 4, 5, 9, 0], [0, 2, 3, 4, 5, 6], [0, 7, 0, 0, 0, 0]], [5, 6, 2]),
        ([3, 25, 0], [[0, 5, 0, 0, 0, 0], [0, 1, 2, 3, 4, 14], [0, 31, 32, 33, 34, 39]], [1, 6, 6]),
    ):
        lengths.copy_(torch.tensor(first))
        visited.copy_(torch.tensor(path))
        counts.copy_(torch.tensor(used))
        expected = [moved_by_hand(buffer, lengths, visited, counts) for buffer in buffers]
        graph.replay()
        assert all(torch.equal(run, right) for run, right in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_layer_step_reads_its_inputs_anew(dtype):
    """Norm and gate in one graph, fed with other numbers before each replay."""
    x, residual = (torch.zeros(1, 5, 576, dtype=dtype, device="cuda") for _ in range(2))
    weight = randoms(576, seed=2, dtype=dtype, device="cuda")

    def step(norm, gate):
        normed, summed = norm(x, residual, weight, 1e-5)
        return gate(normed, summed)

    graph, got = captured(lambda: step(add_rms_norm, silu_and_multiply))
    for seed in (1, 2):
        x.copy_(randoms(1, 5, 576, seed=seed, dtype=dtype))
        residual.copy_(randoms(1, 5, 576, seed=seed + 10, dtype=dtype))
        graph.replay()
        # One step's rounding passes through the next: twice the tolerance of either.
        assert_near(got, step(add_rms_norm_torch, silu_and_multiply_torch), steps=2)
