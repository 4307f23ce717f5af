"""Tree attention of the target's layers, in the terms of transformers' attention functions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from longspec_hf_kernels import hybrid_tree_attention, unpack_ancestor_bits
from torch.nn import functional as F

from .tree import TokenTree

TREE_KWARG = "longspec_tree"
"""Keyword that carries the tree's [`TreeAttention`] through the target's forward to its attention layers."""


@dataclass(frozen=True)
class TreeAttention:
    """What the attention of one verification needs; built once a round, shared by all layers.

    Attributes:
        prefix_length: cache rows of the committed tokens.
        prefix_lens: `[B]` int32, the same on the device.
        ancestor_bits: `[B, T, words]` from [`TokenTree.ancestor_bits`].
        depths: `[B, T]`.
        starts: `[B]` int32 first row that is not padding, or `None`.
    """

    prefix_length: int
    prefix_lens: torch.Tensor
    ancestor_bits: torch.Tensor
    depths: torch.Tensor
    starts: torch.Tensor | None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: TokenTree, prefix_length: int, starts: torch.Tensor | None) -> TreeAttention:
        """Metadata of a tree whose rows follow `prefix_length` committed ones."""
        prefix_lens = tree.depths.new_full((tree.depths.shape[0],), prefix_length, dtype=torch.int32)
        return cls(prefix_length, prefix_lens, tree.ancestor_bits(), tree.depths, starts)

    def mask(self, window: int | None) -> torch.Tensor:
        """Boolean `[B, 1, T, N + T]` of the rows each node sees; one per window, kept for the other layers."""
        if window not in self._masks:
            nodes = self.depths.shape[1]
            rows = torch.arange(self.prefix_length, device=self.depths.device).expand(*self.depths.shape, -1)
            prefix = torch.ones_like(rows, dtype=torch.bool)
            if self.starts is not None:
                prefix = rows >= self.starts.view(-1, 1, 1)
            tree = unpack_ancestor_bits(self.ancestor_bits, nodes)
            if window is not None:
                prefix = prefix & (self.prefix_length + self.depths.unsqueeze(-1) - rows < window)
                tree = tree & (self.depths.unsqueeze(-1) - self.depths.unsqueeze(-2) < window)
            self._masks[window] = torch.cat([prefix, tree], dim=-1).unsqueeze(1)
        return self._masks[window]


def tree_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: TreeAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one target layer over a tree.

    Args:
        query: `[B, Hq, T, D]` of the nodes.
        key, value: `[B, Hkv, N + T, D]`, the cache, the nodes' own rows last.
        tree: metadata of the round.
        scaling, sliding_window, softcap, s_aux: as transformers' models pass them (`s_aux`: attention sinks `[Hq]`).

    Returns:
        `[B, T, Hq, D]`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and softcap is None and s_aux is None:
        out = _masked_attention(query, key, value, tree.mask(sliding_window), scale)
    else:
        out = hybrid_tree_attention(
            query,
            key,
            value,
            tree.prefix_lens,
            tree.ancestor_bits,
            starts=tree.starts,
            depths=tree.depths,
            key_depths=tree.depths,
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
    return out.transpose(1, 2).contiguous()


def _masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """One call of PyTorch's fused CPU kernel, the one plain decoding uses, so that bf16 rounds alike.

    The query heads of a K/V head become its query rows, so that K and V are read in place and never repeated.
    """
    batch, heads, nodes, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    rows = query.reshape(batch, kv_heads, group * nodes, size)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat(1, 1, group, 1), scale=scale)
    return out.view(batch, heads, nodes, size)
