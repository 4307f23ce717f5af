"""The target's forward over tree nodes in few kernels: the layer of Llama, Mistral, Qwen2 and Qwen3, written out.

Rounding follows transformers' modules step by step, so in exact arithmetic the logits are those of the model's own
forward.
"""

from __future__ import annotations

from typing import Any

import torch
from longspec_hf_kernels import hybrid_tree_attention
from torch import nn
from transformers import PreTrainedModel

from ..cache import LongSpecCache
from .linears import embedded_normed, opened_gate, project_add_norm, project_and_store


class NodeAttention:
    """What all layers of one forward share: where the nodes' rows go and what they see.

    Attributes:
        lengths: int32 `[b]` committed rows.
        ancestor_bits: int64 `[b, T, words]`.
        depths: `[b, T]`.
        starts: int32 `[b]` or `None`.
        cos, sin: `[b, T, rotary_dim]` of the nodes' positions.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        ancestor_bits: torch.Tensor,
        depths: torch.Tensor,
        starts: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        self.lengths = lengths
        self.ancestor_bits = ancestor_bits
        self.depths = depths
        self.starts = starts
        self.cos, self.sin = cos, sin

    def __call__(
        self, attention: Any, hidden: torch.Tensor, key_buffer: torch.Tensor, value_buffer: torch.Tensor
    ) -> torch.Tensor:
        """What a transformers attention module over `[b, T, hidden]` gives to its last projection."""
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        query = project_and_store(
            attention,
            hidden,
            self.cos,
            self.sin,
            key_buffer,
            value_buffer,
            self.lengths,
            head_dim=attention.head_dim,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.variance_epsilon,
        )
        attended = hybrid_tree_attention(
            query,
            key_buffer,
            value_buffer,
            self.lengths,
            self.ancestor_bits,
            starts=self.starts,
            depths=self.depths,
            key_depths=self.depths,
            scale=attention.scaling,
        )
        return attended.transpose(1, 2).flatten(2)


def target_logits(
    target: PreTrainedModel, cache: LongSpecCache, token_ids: torch.Tensor, attend: NodeAttention
) -> torch.Tensor:
    """Logits `[b, T, V]` of nodes `[b, T]`; their K/V rows are written behind the committed ones.

    Args:
        target: of `ENGINE_TARGETS`.
        cache: holds the committed rows, with room for T more.
    """
    decoder: Any = target.model
    layers: list[Any] = list(decoder.layers[: decoder.config.num_hidden_layers])
    norms: list[Any] = [layer.input_layernorm for layer in layers[1:]] + [decoder.norm]
    normed, summed = embedded_normed(decoder.embed_tokens, token_ids, *_norm_of(layers[0].input_layernorm))
    for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
        buffers = cache.layers[index].buffers(token_ids.shape[0])
        attention, mlp = layer.self_attn, layer.mlp
        attended = attend(attention, normed, *buffers)
        norm = _norm_of(layer.post_attention_layernorm)
        normed, summed = project_add_norm(attention.o_proj, attended, summed, *norm)
        opened = opened_gate(mlp, normed)
        normed, summed = project_add_norm(mlp.down_proj, opened, summed, *_norm_of(next_norm))
    return target.lm_head(normed)


def _norm_of(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight and epsilon of an RMS norm of transformers."""
    return norm.weight, norm.variance_epsilon  # type: ignore[return-value]
