"""The public entry: checks its arguments and hands them to the backend of the device."""

import torch

from . import operator as _operator  # noqa: F401  (registers the operator)
from .validation import validate_attention_arguments


def hybrid_tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    *,
    starts: torch.Tensor | None = None,
    depths: torch.Tensor | None = None,
    key_depths: torch.Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tree nodes over `[start, prefix_len)` and over the tree rows their bits name.

    See `hybrid_tree_attention_reference` for the maths, shapes, dtypes and source; every backend
    computes that function. The result's memory is laid out as `[B, T, Hq, D]`, so that transposing it
    back for an output projection costs nothing. Inference only: there is no backward.

    Raises:
        ValueError: an argument's shape or dtype does not fit; names the argument.
    """
    validate_attention_arguments(
        query, key, value, prefix_lens, ancestor_bits, starts, depths, key_depths, scale, window, softcap, sinks
    )
    return torch.ops.longspec_hf.hybrid_tree_attention(
        query,
        key,
        value,
        prefix_lens,
        ancestor_bits,
        starts,
        depths,
        key_depths,
        sinks,
        scale,
        window,
        softcap,
    )
