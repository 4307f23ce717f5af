"""The public entry: checks its arguments and hands them to the backend of the device."""

from typing import Any

import torch

from . import operator as _operator  # noqa: F401  (registers the operator)
from .backends import select_backend
from .torch_attention import hybrid_tree_attention_torch
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
    shared: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """Attention of tree nodes over `[start, prefix_len)` and over the tree rows their bits name.

    See `hybrid_tree_attention_reference` for the maths, shapes, dtypes and source; every backend
    computes that function. The result's memory is laid out as `[B, T, Hq, D]`, so that transposing it
    back for an output projection costs nothing. Inference only: there is no backward.

    Args:
        shared: a dict, empty at first, that all calls with the same `prefix_lens`, `starts`,
            `ancestor_bits`, `depths` and `key_depths` pass (the layers of one round): the CPU path keeps
            there what it works out of them. Other backends ignore it.

    Others, and the result, as in `hybrid_tree_attention_reference`.

    Raises:
        ValueError: an argument's shape or dtype does not fit, or `LONGSPEC_ATTENTION` names no backend that can run
            here; the message names it.
    """
    validate_attention_arguments(
        query, key, value, prefix_lens, ancestor_bits, starts, depths, key_depths, scale, window, softcap, sinks
    )
    if query.device.type == "cpu" and not torch.compiler.is_compiling() and select_backend(query) == "torch":
        return hybrid_tree_attention_torch(
            query,
            key,
            value,
            prefix_lens,
            ancestor_bits,
            starts=starts,
            depths=depths,
            key_depths=key_depths,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            shared=shared,
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
