"""The best children of a level and their places in a beam: definitions and, in the interpreter, Triton kernels."""

import pytest
import torch
from attention_cases import needs_interpreter
from fused_cases import appended_by_hand, assert_best, child_scores, children_case, randoms
from longspec_hf_kernels import append_children, best_children_fused
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from longspec_hf_kernels.fused_beam import best_children_torch

from longspec_hf.beam import best_children

ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INFINITY = float("inf")
CHILDREN = [
    {},
    {"nodes": 1, "width": 3, "words": 1},
    {"names": False, "words": 3, "batch": 1},
    {"last": True, "width": 64, "nodes": 64},
    {"batch": 0},
]


BEAMS = [
    {"nodes": 1, "vocabulary": 7, "width": 1},
    {"nodes": 1, "vocabulary": 7, "width": 16},
    {"nodes": 3, "vocabulary": 600, "width": 4},
    {"nodes": 5, "vocabulary": 1024, "width": 16},
    {"nodes": 2, "vocabulary": 300, "width": 64},
]


def beam_problem(nodes, vocabulary, dtype, batch=2):
    scores = randoms(batch, nodes, seed=1, dtype=torch.float32)
    return scores, randoms(batch, nodes, vocabulary, seed=nodes, dtype=dtype) * 4


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sizes", BEAMS, ids=str)
def test_best_children_against_fp64(sizes, softcap):
    width = sizes["width"]
    for dtype in ALL_DTYPES:
        scores, logits = beam_problem(sizes["nodes"], sizes["vocabulary"], dtype)
        got = best_children_fused(scores, logits, width, softcap=softcap)
        assert_best(got, child_scores(scores, logits, softcap), width)
    scores, logits = beam_problem(sizes["nodes"], sizes["vocabulary"], torch.float32)
    for run, right in zip(
        best_children_fused(scores, logits, width), best_children(scores, logits, width), strict=True
    ):
        torch.testing.assert_close(run, right)


@needs_interpreter
@pytest.mark.parametrize("softcap, dtype", [(None, torch.float32), (3.0, torch.float16)])
@pytest.mark.parametrize("sizes", BEAMS, ids=str)
def test_beam_kernels(in_triton, sizes, softcap, dtype):
    scores, logits = beam_problem(sizes["nodes"], sizes["vocabulary"], dtype)
    got = best_children_fused(scores, logits, sizes["width"], softcap=softcap)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.int64, torch.int64]
    assert_best(got, child_scores(scores, logits, softcap), sizes["width"])


@needs_interpreter
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_beam_kernels_divide_by_the_temperature(in_triton, softcap):
    scores, logits = beam_problem(4, 300, torch.float32)
    got = best_children_fused(scores, logits, 8, softcap=softcap, temperature=0.7)
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    assert_best(got, child_scores(scores, capped / 0.7, None), 8)
    torch.testing.assert_close(got, best_children_torch(scores, capped, 8, temperature=0.7))


@needs_interpreter
def test_beam_kernels_read_any_strides(in_triton):
    scores, logits = beam_problem(4, 300, torch.float32)
    expected = best_children_torch(scores[:, ::2], logits[:, ::2, ::2], 5)
    for run, right in zip(best_children_fused(scores[:, ::2], logits[:, ::2, ::2], 5), expected, strict=True):
        torch.testing.assert_close(run, right)


def tie_problem():
    """Whole numbers: within a node and between nodes of one distribution, children tie again and again."""
    row = torch.randint(0, 4, (700,), generator=torch.Generator().manual_seed(5)).float()
    row[10] = -0.0  # as large as 0.0
    logits = torch.stack([row, row, row.flip(0)]).repeat(2, 1, 1)
    return torch.tensor([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]]), logits


def assert_ties_in_order(children, scores, logits):
    """By brute force: a stable sort of all children keeps the lower parent, then the lower token in front."""
    summed = (scores.unsqueeze(-1) + logits - logits[:, :1].logsumexp(-1, keepdim=True)).flatten(1)
    order = summed.sort(dim=1, descending=True, stable=True).indices[:, : children[0].shape[1]]
    assert torch.equal(children[1], order // logits.shape[-1])
    assert torch.equal(children[2], order % logits.shape[-1])


@pytest.mark.parametrize("width", [1, 4, 64])
def test_ties_of_the_definition(width):
    problem = tie_problem()
    assert_ties_in_order(best_children_fused(*problem, width), *problem)


@needs_interpreter
@pytest.mark.parametrize("width", [1, 4, 30])
def test_ties_of_the_kernels(in_triton, width):
    """The third node's sum is in another order: where it ties, it must only not lose a better child."""
    scores, logits = tie_problem()
    scores, logits = scores[:, :2], logits[:, :2]
    assert_ties_in_order(best_children_fused(scores, logits, width), scores, logits)


def unused_problem():
    """Rows without a use hold NaN; one row's vocabulary is masked but for three tokens, one whole level is unused."""
    scores = torch.tensor([[0.0, -INFINITY, -2.0], [-INFINITY] * 3])
    logits = randoms(2, 3, 300, seed=3, dtype=torch.float32)
    logits[scores == -INFINITY] = float("nan")
    logits[0, 0, 3:] = -INFINITY
    return scores, logits


def assert_unused_are_last(children):
    got, parent, token = children
    assert not got.isnan().any()
    assert bool(torch.isfinite(got[0]).all())
    assert set(parent[0].tolist()) == {0, 2}
    assert sorted(token[0][parent[0] == 0].tolist()) == [0, 1, 2]
    assert got[1].tolist() == [-INFINITY] * 8
    assert token[1].tolist() == list(range(8)) and parent[1].tolist() == [0] * 8


def test_unused_rows_of_the_definition():
    assert_unused_are_last(best_children_fused(*unused_problem(), 8))
    scores, logits = torch.zeros(1, 1), torch.full((1, 1, 5), -INFINITY)
    assert best_children_fused(scores, logits, 2)[0].tolist() == [[-INFINITY] * 2]


@needs_interpreter
def test_unused_rows_of_the_kernels(in_triton):
    assert_unused_are_last(best_children_fused(*unused_problem(), 8))
    scores, logits = torch.zeros(1, 1), torch.full((1, 1, 5), -INFINITY)
    assert best_children_fused(scores, logits, 2)[0].tolist() == [[-INFINITY] * 2]


def test_parts_of_the_vocabulary():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from longspec_hf_kernels.fused_beam_kernel import CHUNKS, choose_chunk

    for rows in (1, 3, 16, 64):
        for vocabulary in (100, 32768, 151936, 262144):
            chunk = choose_chunk(rows, vocabulary)
            programs = rows * -(-vocabulary // chunk)
            assert programs >= CHUNKS[chunk]
            larger = {other: enough for other, enough in CHUNKS.items() if other > chunk}
            assert all(rows * -(-vocabulary // other) < enough for other, enough in larger.items())


@needs_interpreter
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sizes", CHILDREN, ids=str)
def test_children_take_their_places(sizes, backend, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    case = children_case(**sizes)
    beam, seen = appended_by_hand(case)
    bits = append_children(**case)
    assert [part.tolist() for part in case["beam"]] == beam
    assert (None if bits is None else bits.tolist()) == seen


def changed(**new):
    case = children_case()
    return case | {name: change(case[name]) for name, change in new.items()}


@pytest.mark.parametrize(
    "name, case",
    [
        ("beam", lambda: changed(beam=lambda beam: (beam[0].int(), *beam[1:]))),
        ("beam", lambda: changed(beam=lambda beam: (beam[0], beam[1][:, 1:], beam[2]))),
        ("beam", lambda: changed(beam=lambda beam: tuple(part.T.contiguous().T for part in beam))),
        ("children", lambda: changed(children=lambda children: children[::-1])),
        ("children", lambda: changed(children=lambda children: tuple(part[:1] for part in children))),
        ("bits", lambda: changed(bits=lambda bits: bits.int())),
        ("bits", lambda: changed(bits=lambda bits: bits[0])),
        ("own_bits", lambda: changed(own_bits=lambda bits: bits[..., :1])),
        ("place", lambda: changed(place=lambda place: -1)),
        ("place", lambda: changed(place=lambda place: 9)),
    ],
)
def test_mistakes_are_named(name, case):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        append_children(**case())
