"""Embeddings and projections of the target's and the draft's layers.

An ordinary layer is read by its weight, in a kernel that also does what comes next. What a module of another
kind computes (quantised, with LoRA, with a bias) is left to it: it is called, not unpacked.
"""

from __future__ import annotations

from typing import Any

import torch
from longspec_hf_kernels import (
    add_rms_norm,
    embed_rms_norm,
    few_rows_fit,
    gated_linear,
    linear_add_rms_norm,
    silu_and_multiply,
)
from torch import nn

from .capture import together


def embedded_normed(
    embed_tokens: nn.Module, token_ids: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of tokens `[b, T]`, normed for the first layer and as they are; both `[b, T, hidden]`."""
    if type(embed_tokens) is nn.Embedding and embed_tokens.max_norm is None and _is_as_made(embed_tokens):
        return embed_rms_norm(embed_tokens.weight, token_ids, norm_weight, eps)
    return add_rms_norm(embed_tokens(token_ids), None, norm_weight, eps)


def queries_keys_values(attention: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The three projections `[b, T, heads * D]` of an attention module."""
    return together(
        hidden.device,
        lambda: attention.q_proj(hidden),
        lambda: attention.k_proj(hidden),
        lambda: attention.v_proj(hidden),
    )


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
    """Whether all are ordinary linear layers that the kernels are made for."""
    return all(
        type(projection) is nn.Linear
        and projection.bias is None
        and _is_as_made(projection)
        and few_rows_fit(hidden, projection.weight)
        for projection in projections
    )


def _is_as_made(module: nn.Module) -> bool:
    """Whether nobody has given the module a forward or hooks of their own."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
