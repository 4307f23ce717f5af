"""Kernels in the interpreter: how to have them, and that every access lies within the tensors of its launch."""

import os

import numpy
import pytest
import torch
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, uses_triton

# Finds its buffers by a table of addresses.
BY_ADDRESS = {"move_rows_kernel"}


@pytest.fixture
def in_triton(monkeypatch):
    """The public functions run the kernels, in the interpreter."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert uses_triton(torch.zeros(1))


def extent(tensor):
    """First byte and the one behind the last, of what the tensor's shape and strides reach."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


class Bounds:
    """Notes the extents of a launch's tensors, and checks accesses against them."""

    def __init__(self):
        self.extents = None

    def begin(self, name, arguments):
        given = [getattr(argument, "base", argument) for argument in arguments]  # a descriptor's base
        tensors = [argument for argument in given if isinstance(argument, torch.Tensor)]
        self.extents = None if name in BY_ADDRESS else [extent(tensor) for tensor in tensors]

    def check(self, pointers, mask, size):
        if self.extents is None:
            return
        used = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(numpy.int64)
        if used.size == 0:
            return
        low, high = int(used.min()), int(used.max()) + size
        if any(first <= low and high <= end for first, end in self.extents):
            return
        inside = numpy.zeros(used.shape, dtype=bool)
        for first, end in self.extents:
            inside |= (first <= used) & (used + size <= end)
        assert inside.all(), f"{(~inside).sum()} of {used.size} accesses lie outside the tensors of the launch"


@pytest.fixture(autouse=True)
def accesses_stay_inside(monkeypatch):
    """Masks of a compiled kernel hide a wrong address only where they are false: so they are looked at here."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="there are no kernels to interpret")
    bounds = Bounds()
    to_host = interpreter.GridExecutor._init_args_hst
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def begun(self, arguments, keywords):
        on_host = to_host(self, arguments, keywords)
        bounds.begin(self.fn.__name__, [*on_host[0], *on_host[1].values()])
        return on_host

    def size_of(pointers):
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def checked_load(self, pointers, mask, *rest, **named):
        bounds.check(pointers, mask, size_of(pointers))
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self, pointers, value, mask, *rest, **named):
        bounds.check(pointers, mask, size_of(pointers))
        return store(self, pointers, value, mask, *rest, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", begun)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
