"""The fused steps: their definitions against other formulas, and the Triton kernels in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import needs_interpreter
from fused_cases import (
    CAPACITY,
    FIRST_ROWS,
    assert_near,
    fresh_buffers,
    moved_by_hand,
    randoms,
    rotary_case,
)
from longspec_hf_kernels import (
    RowMover,
    add_rms_norm,
    best_children_fused,
    embed_rms_norm,
    rotate,
    rotate_and_store,
    silu_and_multiply,
)
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, uses_triton
from longspec_hf_kernels.commit_rows import move_rows_torch
from longspec_hf_kernels.fused_gate import silu_and_multiply_torch
from longspec_hf_kernels.fused_norm import add_rms_norm_torch, embed_rms_norm_torch
from longspec_hf_kernels.fused_rotary import rotate_and_store_torch, rotate_torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

DTYPES = [torch.float32, torch.float16]
ALL_DTYPES = [*DTYPES, torch.bfloat16]


def test_who_uses_triton(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert not uses_triton(torch.zeros(1))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert not uses_triton(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert not uses_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_norm_is_transformers_bit_for_bit(dtype):
    x, residual = (randoms(2, 3, 50, seed=seed, dtype=dtype) for seed in (0, 1))
    layer = LlamaRMSNorm(50, eps=1e-5).to(dtype)
    layer.weight.data = randoms(50, seed=2, dtype=dtype)
    normed, summed = add_rms_norm(x, residual, layer.weight.data, 1e-5)
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, layer(residual + x))
    normed, summed = add_rms_norm(x, None, layer.weight.data, 1e-5)
    assert summed is x
    assert torch.equal(normed, layer(x))


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 64, 577, 9000])
@pytest.mark.parametrize("added", [True, False])
def test_norm_kernel(in_triton, added, hidden, dtype):
    x, residual = (randoms(2, 3, hidden, seed=seed, dtype=dtype) for seed in (0, 1))
    weight = randoms(hidden, seed=2, dtype=dtype)
    arguments = (x, residual if added else None, weight, 1e-2)
    got, expected = add_rms_norm(*arguments), add_rms_norm_torch(*arguments)
    assert_near(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [17, 64, 577])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 4)])
def test_embeddings_are_looked_up_and_normed(in_triton, shape, hidden, dtype):
    table, weight = randoms(50, hidden, seed=0, dtype=dtype), randoms(hidden, seed=1, dtype=dtype)
    token_ids = torch.randint(50, (*shape, 2), generator=torch.Generator().manual_seed(2))[..., 0]
    got = embed_rms_norm(table, token_ids, weight, 1e-2)
    expected = embed_rms_norm_torch(table, token_ids, weight, 1e-2)
    assert torch.equal(expected[1], table[token_ids])
    assert torch.equal(got[1], expected[1])
    assert got[0].shape == expected[0].shape == (*shape, hidden)
    if token_ids.numel():
        assert_near(got[0], expected[0])


def test_the_gate_in_fp64():
    gate, up = (randoms(2, 3, 50, seed=seed, dtype=torch.float32) for seed in (0, 1))
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    torch.testing.assert_close(silu_and_multiply(gate, up).double(), expected, rtol=1e-5, atol=1e-6)
    half = gate.half()
    assert torch.equal(silu_and_multiply(half, up.half()), F.silu(half) * up.half())


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 70, 1024, 2500])
def test_gate_kernel(in_triton, columns, dtype):
    """Halves of one projection, and gates far out on both sides."""
    both = randoms(2, 3, 2 * columns, seed=columns, dtype=dtype) * 20
    gate, up = both.split(columns, dim=-1)
    got = silu_and_multiply(gate, up)
    assert got.is_contiguous()
    assert_near(got, silu_and_multiply_torch(gate, up))


@pytest.mark.parametrize("rotary", [16, 8])
def test_rotation_is_a_product_of_complex_numbers(rotary):
    case = rotary_case(rotary=rotary)
    angle = randoms(3, 5, rotary // 2, seed=9, dtype=torch.float64)
    cos, sin = (torch.cat([table, table], -1).float() for table in (angle.cos(), angle.sin()))
    heads = case["query"].double().view(3, 5, 4, 16)
    low, high, rest = heads.split([rotary // 2, rotary // 2, 16 - rotary], dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle).unsqueeze(2)
    expected = torch.cat([turned.real, turned.imag, rest], dim=-1).transpose(1, 2)
    torch.testing.assert_close(rotate(case["query"], cos, sin, head_dim=16).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
def test_rotation_is_transformers_bit_for_bit_and_rows_lie_where_they_should(norms, dtype):
    case = rotary_case(dtype=dtype, norms=norms)
    got = rotate_and_store(**case)
    query, key, value = (
        case[name].unflatten(-1, (-1, 16)).transpose(1, 2).contiguous() for name in ("query", "key", "value")
    )
    if norms:
        layer = LlamaRMSNorm(16, eps=1e-6).to(dtype)
        layer.weight.data = case["query_norm"]
        query = layer(query)
        layer.weight.data = case["key_norm"]
        key = layer(key)
    query, key = apply_rotary_pos_emb(query, key, case["cos"], case["sin"])
    assert torch.equal(got, query)
    assert got.transpose(1, 2).is_contiguous()
    for buffer, rows in ((case["key_buffer"], key), (case["value_buffer"], value)):
        expected = torch.full_like(buffer, float("nan"))
        for b, first in enumerate(FIRST_ROWS):
            expected[b, :, first + 3 : first + 8] = rows[b]
        assert torch.equal(buffer.nan_to_num(99), expected.nan_to_num(99))


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 4, "kv_heads": 2, "head_dim": 16},
        {"heads": 7, "kv_heads": 1, "head_dim": 80, "rotary": 32, "batch": 2},
        {"heads": 3, "kv_heads": 3, "head_dim": 24, "rotary": 6, "nodes": 1},
    ],
    ids=str,
)
def test_rotary_kernel(in_triton, sizes, norms, dtype):
    """Random cosines: a channel that takes another's is noticed. Rows not written stay NaN."""
    case = rotary_case(dtype=dtype, norms=norms, **sizes)
    twin = fresh_buffers(case)
    got, expected = rotate_and_store(**case), rotate_and_store_torch(**twin)
    pairs = [(got, expected), *((case[name], twin[name]) for name in ("key_buffer", "value_buffer"))]
    for run, right in pairs:
        assert run.stride() == right.stride() or run.transpose(1, 2).is_contiguous()
        assert torch.equal(run.isnan(), right.isnan())
        if norms:
            assert_near(run, right)
        else:
            assert torch.equal(run.nan_to_num(99), right.nan_to_num(99))
    options = {name: case[name] for name in ("head_dim", "query_norm", "eps") if name in case}
    alone = rotate(case["query"], case["cos"], case["sin"], **options)
    assert torch.equal(alone, got)
    assert_near(alone, rotate_torch(case["query"], case["cos"], case["sin"], **options))


@needs_interpreter
def test_rows_beyond_the_capacity_are_left_out(in_triton):
    case = rotary_case(batch=1)
    case["first_rows"] += CAPACITY - 3 - FIRST_ROWS[0] - 2
    rotate_and_store(**case)
    written = ~case["key_buffer"].isnan().all(-1)
    assert written[0, 0].nonzero().flatten().tolist() == [CAPACITY - 2, CAPACITY - 1]
    assert not written[1:].any()


VISITED = [[0, 1, 4, 5, 9, 0], [0, 2, 3, 4, 5, 6], [0, 7, 0, 0, 0, 0]]


def row_problem(dtype, size, index_dtype=torch.int32):
    """Six buffers of two layouts; a batch of three in buffers for four."""
    buffers = [randoms(4, 2, CAPACITY, size, seed=seed, dtype=dtype) for seed in range(4)]
    buffers += [randoms(4, CAPACITY, 3, size, seed=seed, dtype=dtype).transpose(1, 2) for seed in (4, 5)]
    lengths = torch.tensor([20, 0, 32], dtype=torch.int32)
    return buffers, (lengths, torch.tensor(VISITED), torch.tensor([5, 6, 2], dtype=index_dtype))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_are_moved_as_by_hand(index_dtype):
    buffers, arguments = row_problem(torch.bfloat16, 6, index_dtype)
    expected = [moved_by_hand(buffer, *arguments) for buffer in buffers]
    assert not torch.equal(expected[0], buffers[0])
    RowMover(buffers).move(*arguments)
    assert all(torch.equal(run, right) for run, right in zip(buffers, expected, strict=True))


@needs_interpreter
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 6, 64])
@pytest.mark.parametrize("counts", [[5, 6, 2], [1, 1, 1], [5, 1, 2]])
def test_row_kernel(in_triton, counts, size, dtype):
    """Bits are copied whole words at a time, so every dtype and size is one."""
    buffers, arguments = row_problem(dtype, size)
    arguments[2].copy_(torch.tensor(counts))
    expected = [buffer.clone() for buffer in buffers]
    for buffer in expected:
        move_rows_torch(buffer, *arguments)
    RowMover(buffers).move(*arguments)
    assert all(torch.equal(run, right) for run, right in zip(buffers, expected, strict=True))


@needs_interpreter
def test_a_mover_reads_its_table_anew(in_triton):
    """The second move begins behind the rows of the first, with buffers written in between."""
    buffers, (lengths, visited, counts) = row_problem(torch.float32, 8)
    mover = RowMover(buffers)
    mover.move(lengths, visited, counts)
    lengths += torch.tensor([5, 6, 0], dtype=torch.int32)
    for buffer in buffers:
        buffer[:, :, 30:] += 1
    expected = [moved_by_hand(buffer, lengths, visited, counts) for buffer in buffers]
    mover.move(lengths, visited, counts)
    assert all(torch.equal(run, right) for run, right in zip(buffers, expected, strict=True))


X = torch.zeros(2, 3, 8)
ROTARY = rotary_case(batch=2)
ROWS = (torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([1]))


@pytest.mark.parametrize(
    "name, call",
    [
        ("residual", lambda: add_rms_norm(X, X[:1], X[0, 0], 1e-5)),
        ("weight", lambda: add_rms_norm(X, None, X[0, 0].half(), 1e-5)),
        ("up", lambda: silu_and_multiply(X, X.half())),
        ("query", lambda: rotate_and_store(**ROTARY | {"query": ROTARY["query"][..., 1:]})),
        ("key", lambda: rotate_and_store(**ROTARY | {"key": ROTARY["key"].half()})),
        ("key", lambda: rotate_and_store(**ROTARY | {"key": ROTARY["key"][:1]})),
        ("value", lambda: rotate_and_store(**ROTARY | {"value": ROTARY["query"]})),
        ("cos", lambda: rotate_and_store(**ROTARY | {"cos": ROTARY["cos"][..., :5]})),
        ("cos", lambda: rotate_and_store(**ROTARY | {name: ROTARY[name][:, :-1] for name in ("cos", "sin")})),
        ("sin", lambda: rotate_and_store(**ROTARY | {"sin": ROTARY["sin"][..., :8]})),
        ("key_buffer", lambda: rotate_and_store(**ROTARY | {"key_buffer": ROTARY["key_buffer"][:1]})),
        ("value_buffer", lambda: rotate_and_store(**ROTARY | {"value_buffer": ROTARY["value_buffer"][:, :, 1:]})),
        ("first_rows", lambda: rotate_and_store(**ROTARY | {"first_rows": torch.zeros(2)})),
        ("offset", lambda: rotate_and_store(**ROTARY | {"offset": -1})),
        ("query_norm", lambda: rotate_and_store(**ROTARY | {"query_norm": X[0, 0]})),
        ("key_norm", lambda: rotate_and_store(**ROTARY | {"key_norm": X[0, 0]})),
        ("table", lambda: embed_rms_norm(X, ROWS[0], X[0, 0], 1e-5)),
        ("token_ids", lambda: embed_rms_norm(X[0], X[0, 0], X[0, 0], 1e-5)),
        ("weight", lambda: embed_rms_norm(X[0], ROWS[0], X[0, 0, 1:], 1e-5)),
        ("scores", lambda: best_children_fused(X[..., 0].half(), X, 4)),
        ("logits", lambda: best_children_fused(X[0], X, 4)),
        ("logits", lambda: best_children_fused(torch.zeros(1, 65), torch.zeros(1, 65, 4), 4)),
        ("width", lambda: best_children_fused(X[..., 0], X, 65)),
        ("softcap", lambda: best_children_fused(X[..., 0], X, 4, softcap=0.0)),
        ("softcap", lambda: best_children_fused(X[..., 0], X, 4, softcap=float("nan"))),
        ("temperature", lambda: best_children_fused(X[..., 0], X, 4, temperature=0.0)),
        ("temperature", lambda: best_children_fused(X[..., 0], X, 4, temperature=float("nan"))),
        ("buffers", lambda: RowMover([])),
        ("buffers", lambda: RowMover([X])),
        ("visited", lambda: RowMover([X[None]]).move(ROWS[0], ROWS[1].int(), ROWS[2])),
        ("lengths", lambda: RowMover([X[None]]).move(ROWS[0].float(), *ROWS[1:])),
        ("counts", lambda: RowMover([X[None]]).move(*ROWS[:2], torch.tensor([1, 1]))),
    ],
)
def test_mistakes_are_named(name, call):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        call()
