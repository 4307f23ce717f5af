"""The least time a step can take: the bytes it must read, over the rate at which memory is copied."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..cache import LongSpecCache
from ..modeling_longspec import LongSpecDraftModel
from ..target import BoundTarget


def target_bytes(target: PreTrainedModel) -> int:
    """Weights one forward reads: all but the embedding table, of which it reads a few rows."""
    embeddings: Any = target.get_input_embeddings()
    head: Any = target.get_output_embeddings()
    table = embeddings.weight
    tied = head.weight.data_ptr() == table.data_ptr()
    return sum(p.nbytes for p in target.parameters()) - (0 if tied else table.nbytes)


def cache_bytes(cache: LongSpecCache, sequences: int) -> int:
    """K/V of the committed rows, which every forward reads once."""
    rows = sum(cache.row_lengths[:sequences])
    layers: Any = cache.layers
    return sum(2 * rows * layer.keys.shape[1] * layer.keys.shape[-1] * layer.keys.itemsize for layer in layers)


def draft_bytes(draft: LongSpecDraftModel, bound: BoundTarget, cache: LongSpecCache, sequences: int) -> int:
    """What expanding one level of the tree reads: the layer, the head's rows and one layer's K/V."""
    layer = sum(p.nbytes for p in draft.parameters())
    head = bound.head.weight
    rows = 0 if head is None else head.nbytes
    return layer + rows + cache_bytes(cache, sequences) // len(cache.layers)
