"""Tree attention of the target's layers, in the terms of transformers' attention functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from longspec_hf_kernels import hybrid_tree_attention

from .tree import TokenTree

TREE_KWARG = "longspec_tree"
"""Keyword that carries each layer's [`TreeAttention`] through the target's forward to its attention layers."""


@dataclass(frozen=True)
class TreeAttention:
    """What the attention of one verification needs; built once a round, shared by all layers of a kind.

    Attributes:
        prefix_lens: `[B]` int32, rows of the committed tokens in the layers' buffers.
        ancestor_bits: `[B, T, words]` from [`TokenTree.ancestor_bits`].
        depths: `[B, T]`.
        starts: `[B]` int32 first row that is not padding, or `None`.
        window: of the layers' buffers, for layers whose window is in plain decoding's mask alone.
        soft_capped: whether a layer's soft-cap is applied; the attention that plain decoding uses may ignore it.
        shared: what the kernels work out of the others, kept for the round's other layers.
    """

    prefix_lens: torch.Tensor
    ancestor_bits: torch.Tensor
    depths: torch.Tensor
    starts: torch.Tensor | None
    window: int | None = None
    soft_capped: bool = True
    shared: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def per_layer(
        cls,
        tree: TokenTree,
        prefix_lens: torch.Tensor,
        starts: torch.Tensor | None,
        dropped: Sequence[tuple[int, ...] | None],
        devices: Sequence[torch.device],
        windows: Sequence[int | None],
        soft_capped: bool = True,
    ) -> list[TreeAttention]:
        """Metadata of trees whose rows follow `prefix_lens` (int32 `[B]`) committed ones, for every layer.

        Args:
            tree: the trees.
            prefix_lens, starts: of the texts.
            dropped: per layer, rows of each text that its buffers no longer hold; `None` where none ever are.
            devices: per layer, where its buffers are.
            windows: per layer, that of its buffers.
            soft_capped: as above.
        """
        bits = tree.ancestor_bits()
        layers = list(zip(dropped, devices, windows, strict=True))
        kinds: dict[tuple[tuple[int, ...] | None, torch.device, int | None], TreeAttention] = {}
        for offsets, device, window in layers:
            if (offsets, device, window) not in kinds:
                gone = torch.tensor(offsets or 0, dtype=torch.int32, device=prefix_lens.device)
                first = None if starts is None else (starts - gone).clamp(min=0).to(device)
                lengths, depths = (prefix_lens - gone).to(device), tree.depths.to(device)
                kinds[offsets, device, window] = cls(lengths, bits.to(device), depths, first, window, soft_capped)
        return [kinds[layer] for layer in layers]


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
    out = hybrid_tree_attention(
        query,
        key,
        value,
        tree.prefix_lens,
        tree.ancestor_bits,
        starts=tree.starts,
        depths=tree.depths,
        key_depths=tree.depths,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=tree.window if sliding_window is None else sliding_window,
        softcap=softcap if tree.soft_capped else None,
        sinks=s_aux,
        shared=tree.shared,
    )
    return out.transpose(1, 2).contiguous()
