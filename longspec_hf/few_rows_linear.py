"""Linear layers over a few rows on a CPU, at about the cost of one row.

Verifying a tree multiplies every weight matrix by 2 to 32 rows. `F.linear` hands that to MKL as `x @ W.T`, which
repacks the weights in every forward: two rows cost twice as much as one. The same product with the weights on the
left, `W @ x.T`, reads them once, in the order they lie in memory. Nothing is packed beforehand, so nothing is kept, no
memory is added and weights may change at any time.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

MOST_ROWS = 32
"""Rows up to which `W @ x.T` was measured to be faster than `x @ W.T`."""

Module = TypeVar("Module", bound=nn.Module)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, by `few_rows_linear` where that is faster; the two differ by the order of summation.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]` or `None`.
    """
    return few_rows_linear(x, weight, bias) if _is_faster(x, weight) else F.linear(x, weight, bias)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight, bias)` as `weight @ x.T`: contiguous `[..., N]` of `[..., K]` and `[N, K]`."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    # MKL's kernels are made for whole vectors: between two powers of two the larger one costs less.
    padded = 1 << (count - 1).bit_length()
    if padded != count or not rows.is_contiguous():
        given, rows = rows, rows.new_zeros(padded, rows.shape[1])
        rows[:count] = given
    product = torch.mm(weight, rows.t())[:, :count].t()
    product = product.contiguous() if bias is None else (product + bias).contiguous()
    return product.view(*x.shape[:-1], weight.shape[0])


def _is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `x` is a few rows of fp32 on a CPU with MKL, outside of training, and both tensors are ordinary ones."""
    return (
        1 < x.numel() // max(1, x.shape[-1]) <= MOST_ROWS
        and x.dtype is weight.dtype is torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
    )


class _FewRowsLinear(nn.Linear):
    """The `nn.Linear` of a view."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def few_rows_view(model: Module) -> Module:
    """`model` with its linear layers computed by `linear`; the model itself is left as it is.

    The view shares parameters, buffers and configurations. Its modules that hold parameters, and those on the way to
    them, are shallow copies with tables of hooks of their own; all others, as rotary tables, are shared. Layers of
    other classes, and modules whose `forward` was replaced on the instance (offloading, compilation), run as they do
    in the model. A model without fp32 parameters on the CPU is returned itself.
    """
    if not any(p.device.type == "cpu" and p.dtype is torch.float32 for p in model.parameters()):
        return model
    return _view(model, {})  # type: ignore[return-value]


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    children = {name: None if child is None else _view(child, seen) for name, child in module._modules.items()}
    is_linear = type(module) is nn.Linear
    changed = any(child is not module._modules[name] for name, child in children.items())
    view = module
    # A scripted module cannot be copied so.
    if is_linear or changed or (module._parameters and not isinstance(module, torch.jit.ScriptModule)):
        cls = _FewRowsLinear if is_linear else type(module)
        view = cls.__new__(cls)
        # Tables of hooks are copied: transformers installs some, at routers too, at the first forward that wants them.
        own = {
            name: dict_.copy() for name, dict_ in vars(module).items() if "_hooks" in name and isinstance(dict_, dict)
        }
        view.__dict__.update(module.__dict__, _modules=children, **own)
    seen[id(module)] = view
    return view
