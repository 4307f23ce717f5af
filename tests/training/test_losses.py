"""Chunked losses equal their definition: values and gradients, soft-cap, draft vocabulary, memory (C87, C98)."""

import subprocess
import sys

import pytest
import torch

from longspec_hf.training import FrozenHead, chunked_loss, naive_loss

EXACT = 1e-10  # fp64, the same sums in another order
FP32 = 1e-5  # relative; sums of a few hundred fp32 terms


def _case(dtype, softcap=None, bias=False, rows=37, hidden=16, vocab=29, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = FrozenHead(draw(vocab, hidden), draw(vocab) if bias else None, softcap, temperature)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::5] = -100
    mask = torch.rand(rows, generator=generator) > 0.3
    return draw(rows, hidden).requires_grad_(), head, labels, draw(rows, hidden), mask


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, FP32)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)], ids=["ce", "kl", "both"])
@pytest.mark.parametrize("chunk", [29, 29 * 8, 29 * 1000], ids=["one row", "8 rows", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_equals_the_definition(dtype, tolerance, softcap, bias, weights, chunk, temperature):
    hidden, *rest = _case(dtype, softcap, bias, temperature=temperature)
    expected = naive_loss(hidden, *rest, *weights)
    (expected_gradient,) = torch.autograd.grad(3.0 * expected.total, hidden)
    found = chunked_loss(hidden, *rest, *weights, chunk_elements=chunk)
    (gradient,) = torch.autograd.grad(3.0 * found.total, hidden)
    torch.testing.assert_close(found.total, expected.total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.ce, expected.ce, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_temperature_divides_the_logits_of_both():
    hidden, head, *rest = _case(torch.float64, temperature=0.5)
    sharper = FrozenHead(2 * head.weight)
    torch.testing.assert_close(
        chunked_loss(hidden, head, *rest, 0.3, 0.7), chunked_loss(hidden, sharper, *rest, 0.3, 0.7)
    )


def test_gradient_by_finite_differences():
    hidden, head, labels, teacher, mask = _case(torch.float64, 5.0, rows=5, hidden=4, vocab=7, temperature=0.7)
    torch.autograd.gradcheck(lambda h: chunked_loss(h, head, labels, teacher, mask, 0.4, 0.6, 14).total, (hidden,))


def test_ignored_positions_have_no_gradient():
    hidden, head, labels, teacher, mask = _case(torch.float64)
    chunked_loss(hidden, head, labels, teacher, mask, 1.0, 1.0).total.backward()
    silent = (labels == -100) & ~mask
    assert silent.any()
    assert torch.equal(hidden.grad.abs().sum(-1) == 0, silent)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_no_positions_have_no_loss(kl_weight):
    hidden, head, labels, teacher, mask = _case(torch.float64, rows=0)
    found = chunked_loss(hidden, head, labels, teacher, mask, 0.5, kl_weight)
    found.total.backward()
    assert [value.item() for value in found] == [0.0, 0.0, 0.0]
    assert hidden.grad.shape == (0, 16)


def test_bf16_states_give_bf16_gradients_close_to_fp32():
    hidden, head, labels, teacher, mask = _case(torch.float32)
    found = hidden.detach().bfloat16().requires_grad_()
    half = FrozenHead(head.weight.bfloat16())
    chunked_loss(found, half, labels, teacher.bfloat16(), mask, 0.5, 0.5).total.backward()
    naive_loss(hidden, head, labels, teacher, mask, 0.5, 0.5).total.backward()
    assert found.grad.dtype == torch.bfloat16
    error = (found.grad.float() - hidden.grad).norm() / hidden.grad.norm()
    assert error < 2e-2  # bf16 has 8 bits


MEMORY_SCRIPT = """
import re
import torch
from longspec_hf.training import FrozenHead, chunked_loss
torch.set_num_threads(1)
vocab, tokens, size = 128_000, 4096, 64
head = FrozenHead(torch.randn(vocab, size))
hidden = torch.randn(tokens, size, requires_grad=True)
labels = torch.randint(0, vocab, (tokens,))
mask = torch.ones(tokens, dtype=torch.bool)
def peak():  # of this program alone: getrusage would begin with the peak of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def run(count, kl_weight):
    part = hidden[:count]
    chunked_loss(part, head, labels[:count], hidden.detach()[:count], mask[:count], 1.0, kl_weight).total.backward()
run(2, 1.0)  # the allocator's and the matrix library's own
before = peak()
run(256, 1.0)  # takes as much as all tokens would, in a fraction of the time
run(tokens, 0.0)
print((peak() - before) / (tokens * vocab * 4))
"""


def test_memory_is_below_a_tenth_of_the_logits():
    """C87: 4096 tokens, 128k words; the naive logits are 2.1 GB."""
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert 0 < float(result.stdout) < 0.1
