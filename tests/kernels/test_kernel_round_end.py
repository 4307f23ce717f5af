"""Walk, state and rotary rows: the definitions against the host's books, and the kernels in the interpreter."""

import pytest
import torch
from attention_cases import needs_interpreter
from longspec_hf_kernels import RowMover, advance, greedy_walk, rotary_rows
from walk_cases import advanced_by_hand, state_case, walk_case, walked_by_hand

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 40), (3, 7, 5), (2, 21, 6000), (1, 64, 9000)]


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_interpreter)])
def either(request):
    if request.param == "triton":
        request.getfixturevalue("in_triton")


def check_walk(case, most):
    visited, report = greedy_walk(*case, most)
    assert (visited.tolist(), report.tolist()) == walked_by_hand(case, most)
    return report[:, 1].max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_walk(either, size, dtype):
    deepest = max(check_walk(walk_case(*size, dtype, seed=seed), size[1]) for seed in range(4))
    assert deepest > 2 or size[1] == 1


def test_walk_in_fp64_compares_in_fp32(either):
    ids, parents, valid, _ = walk_case(1, 2, 4, torch.float32)
    logits = torch.zeros(1, 2, 4, dtype=torch.float64)
    logits[..., 2:] = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert greedy_walk(ids, parents, valid, logits, 1)[1][0, 2] == 2


NAN = float("nan")
ROWS = [[1.0, 3.0, 3.0], [-0.0, 0.0, -1.0], [1.0, NAN, torch.inf], [1.0, -NAN, torch.inf], [-5.0, -2.0]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_ties_and_nan_as_argmax_has_them(either, rows):
    """The lowest of equal tokens, zeros of either sign equal, NaN above infinity; parts of the vocabulary apart."""
    root = torch.zeros(1, 1, dtype=torch.long)
    for spread in (1, 3000):
        logits = torch.full((1, 1, 1 + spread * len(rows)), -torch.inf)
        for place, value in enumerate(rows):
            logits[0, 0, 1 + spread * place] = value
        report = greedy_walk(root, root, root == 0, logits, 3)[1]
        assert report.tolist() == [[0, 1, int(logits.argmax()), 0, 0]]


def test_logits_between_others(either):
    """Strides of a slice of a batch."""
    ids, parents, valid, logits = walk_case(4, 6, 30, torch.float32)
    wide = torch.full((4, 9, 50), torch.inf)
    wide[:, :6, :30] = logits
    assert torch.equal(
        greedy_walk(ids, parents, valid, wide[:, :6, :30], 6)[1], greedy_walk(ids, parents, valid, logits, 6)[1]
    )


def test_advance(either):
    case = state_case()
    expected = advanced_by_hand(case)
    advance(**case)
    assert [tensor.flatten().tolist() for tensor in list(case.values())[:5]] == expected


def test_counts_of_a_report_move_rows(either):
    """The walk's report is read where it is: its counts do not lie side by side."""
    buffer = torch.arange(2 * 20.0).view(2, 1, 20, 1).repeat(1, 1, 1, 4)
    before = buffer.clone()
    report = torch.tensor([[9, 3, 0, 0, 0], [9, 2, 0, 0, 0]])
    RowMover([buffer]).move(torch.tensor([5, 7]), torch.tensor([[0, 2, 4], [0, 3, 6]]), report[:, 1])
    for row, moves in ((0, {6: 7, 7: 9}), (1, {8: 10})):
        expected = before[row].clone()
        for into, source in moves.items():
            expected[:, into] = before[row][:, source]
        assert torch.equal(buffer[row], expected)


def test_rotary_rows(either):
    cos, sin = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    roots, limits = torch.tensor([[100], [107], [111]]), torch.tensor([[9], [2], [-1]])
    got_cos, got_sin, ids = rotary_rows(cos, sin, 100, roots, limits, 4)
    at = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 9], [11, 11, 11, 11]])
    assert torch.equal(got_cos, cos[at]) and torch.equal(got_sin, sin[at])
    assert ids.tolist() == [[100, 101, 102, 103], [107, 108, 109, 110], [111, 112, 113, 114]]


IDS, PARENTS, VALID, LOGITS = walk_case(2, 3, 10, torch.float32)
STATE = state_case()
TABLE = torch.zeros(8, 4)
ROOTS = torch.zeros(2, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("token_ids", lambda: greedy_walk(IDS.int(), PARENTS, VALID, LOGITS, 3)),
        ("parents", lambda: greedy_walk(IDS, PARENTS[:, :2], VALID, LOGITS, 3)),
        ("valid", lambda: greedy_walk(IDS, PARENTS, VALID.long(), LOGITS, 3)),
        ("logits", lambda: greedy_walk(IDS, PARENTS, VALID, LOGITS[:, :2], 3)),
        ("logits", lambda: greedy_walk(IDS, PARENTS, VALID, LOGITS.long(), 3)),
        ("most", lambda: greedy_walk(IDS, PARENTS, VALID, LOGITS, 0)),
        ("roots", lambda: advance(**STATE | {"roots": STATE["roots"].int()})),
        ("limits", lambda: advance(**STATE | {"limits": STATE["limits"][:1]})),
        ("lengths", lambda: advance(**STATE | {"lengths": STATE["lengths"].long()})),
        ("window_lengths", lambda: advance(**STATE | {"window_lengths": torch.zeros(6, dtype=torch.int32)[::2]})),
        ("counts", lambda: advance(**STATE | {"counts": STATE["counts"].float()})),
        ("tokens", lambda: advance(**STATE | {"tokens": STATE["tokens"][0]})),
        ("cos_table", lambda: rotary_rows(TABLE[:, ::2], TABLE, 0, ROOTS, ROOTS, 2)),
        ("sin_table", lambda: rotary_rows(TABLE, TABLE[:3], 0, ROOTS, ROOTS, 2)),
        ("root_positions", lambda: rotary_rows(TABLE, TABLE, 0, ROOTS[0], ROOTS, 2)),
        ("limits", lambda: rotary_rows(TABLE, TABLE, 0, ROOTS, ROOTS[:1], 2)),
        ("steps", lambda: rotary_rows(TABLE, TABLE, 0, ROOTS, ROOTS, 0)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(f"`{name}` must be ")
