"""Embeddings and projections of the target's and the draft's layers.

An ordinary layer is read by its weight, in a kernel that also does what comes next. What a module of another
kind computes (quantised, with LoRA) is left to it: it is called, not unpacked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from longspec_hf_kernels import (
    add_rms_norm,
    embed_rms_norm,
    few_rows_fit,
    gated_linear,
    linear_add_rms_norm,
    project_rotate,
    project_rotate_and_store,
    projections_fit,
    rotate,
    rotate_and_store,
    silu_and_multiply,
)
from torch import nn
from torch.nn.modules import module as nn_module

from .capture import together


def embedded_normed(
    embed_tokens: nn.Module, token_ids: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of tokens `[b, T]`, normed for the first layer and as they are; both `[b, T, hidden]`."""
    if type(embed_tokens) is nn.Embedding and embed_tokens.max_norm is None and _is_as_made(embed_tokens):
        return embed_rms_norm(embed_tokens.weight, token_ids, norm_weight, eps)
    return add_rms_norm(embed_tokens(token_ids), None, norm_weight, eps)


def project_and_store(
    attention: Any,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    first_rows: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Rotated queries `[b, Hq, T, D]` of an attention module over `[b, T, hidden]`; its K/V rows are written.

    Arguments and `options` as of `rotate_and_store`.
    """
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    rest = (cos, sin, key_buffer, value_buffer, first_rows)
    if _are_ordinary(*projections) and projections_fit(hidden, *(each.weight for each in projections)):
        weights, biases = zip(*((each.weight, each.bias) for each in projections), strict=True)
        return project_rotate_and_store(hidden, weights, biases, *rest, **options)
    query, key, value = together(hidden.device, *(functools.partial(each, hidden) for each in projections))
    return rotate_and_store(query, key, value, *rest, **options)


def project_queries(
    attention: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Rotated queries `[b, Hq, T, D]` of an attention module over `[b, T, hidden]`; `options` as of `rotate`."""
    projection = attention.q_proj
    if _are_ordinary(projection) and projections_fit(hidden, projection.weight):
        return project_rotate(hidden, projection.weight, projection.bias, cos, sin, **options)
    return rotate(projection(hidden), cos, sin, **options)


def opened_gate(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` `[b, T, intermediate]` of a gated MLP over `[b, T, hidden]`."""
    if _are_read(hidden, mlp.gate_proj, mlp.up_proj):
        return gated_linear(hidden, mlp.gate_proj.weight, mlp.up_proj.weight)
    gate, up = together(hidden.device, lambda: mlp.gate_proj(hidden), lambda: mlp.up_proj(hidden))
    return silu_and_multiply(gate, up)


def project_add_norm(
    projection: Any, hidden: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with a layer's output added, normed for the next one and as it is; both `[b, T, hidden]`."""
    if _are_read(hidden, projection):
        return linear_add_rms_norm(hidden, projection.weight, residual, norm_weight, eps)
    return add_rms_norm(projection(hidden), residual, norm_weight, eps)


def _are_read(hidden: torch.Tensor, *projections: Any) -> bool:
    """Whether all are ordinary linear layers without a bias that the kernels are made for."""
    return _are_ordinary(*projections) and all(
        each.bias is None and few_rows_fit(hidden, each.weight) for each in projections
    )


def _are_ordinary(*projections: Any) -> bool:
    """Whether all are linear layers as PyTorch has them."""
    return all(type(each) is nn.Linear and _is_as_made(each) for each in projections)


def _is_as_made(module: nn.Module) -> bool:
    """Whether nobody has given the module a forward or hooks of their own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or hooks_of_all_modules()
    return not hooks and "forward" not in vars(module)


def hooks_of_all_modules() -> list[Any]:
    """What somebody has registered for every module there is, as by `register_module_forward_hook`."""
    return [*nn_module._global_forward_hooks.values(), *nn_module._global_forward_pre_hooks.values()]
