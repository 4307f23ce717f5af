"""Checks of arguments, those of `hybrid_tree_attention` above all: shapes and dtypes only, no device reads."""

import torch

from .masks import words_for

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT_DTYPES = (torch.int32, torch.int64)


def _validate_ints(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if not (tuple(tensor.shape) == shape and tensor.dtype in INT_DTYPES):
        raise ValueError(
            f"`{name}` must be int32 or int64 of shape {list(shape)}, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )


def validate_attention_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    starts: torch.Tensor | None,
    depths: torch.Tensor | None,
    key_depths: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise `ValueError` naming the first argument of `hybrid_tree_attention` that does not fit."""
    if query.dim() != 4:
        raise ValueError(f"`query` must be [B, Hq, T, D], got {query.dim()} dimensions.")
    batch, heads, nodes, size = query.shape
    if query.dtype not in FLOAT_DTYPES:
        raise ValueError(f"`query` must be fp16, bf16, fp32 or fp64, got {query.dtype}.")
    for name, tensor in (("key", key), ("value", value)):
        fits = tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[3] == size
        if not fits:
            raise ValueError(
                f"`{name}` must be [{batch}, Hkv, capacity, {size}] like `query`, got {list(tensor.shape)}."
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"`{name}` must have the dtype of `query`, {query.dtype}, got {tensor.dtype}: cast one of them."
            )
    if value.shape != key.shape:
        raise ValueError(f"`value` must have the shape of `key`, {list(key.shape)}, got {list(value.shape)}.")
    if not (key.shape[1] > 0 and heads % key.shape[1] == 0):
        raise ValueError(f"`query` heads must be a multiple of the {key.shape[1]} heads of `key`, got {heads}.")
    _validate_ints("prefix_lens", prefix_lens, (batch,))
    _validate_ints("starts", starts, (batch,))
    _validate_ints("depths", depths, (batch, nodes))
    if ancestor_bits is not None:
        fits = ancestor_bits.dim() == 3 and tuple(ancestor_bits.shape[:2]) == (batch, nodes)
        if not (fits and ancestor_bits.dtype == torch.int64):
            raise ValueError(
                f"`ancestor_bits` must be int64 of shape [{batch}, {nodes}, words], got {ancestor_bits.dtype} of "
                f"shape {list(ancestor_bits.shape)}."
            )
    if key_depths is not None:
        if ancestor_bits is None:
            raise ValueError(
                "`key_depths` must come with `ancestor_bits`, got `ancestor_bits=None`: pass both or neither."
            )
        _validate_ints("key_depths", key_depths, (batch, key_depths.shape[-1]))
        words, needed = ancestor_bits.shape[-1], words_for(key_depths.shape[-1])
        if words != needed:
            raise ValueError(
                f"`ancestor_bits` must have {needed} words for the {key_depths.shape[-1]} tree rows of `key_depths`, "
                f"got {words}."
            )
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}.")
    if window is not None:
        if window <= 0:
            raise ValueError(f"`window` must be positive, got {window}: pass None for no window.")
        if depths is None:
            raise ValueError("`depths` must be given with `window`, got None: pass each node's depth.")
        if not (ancestor_bits is None or key_depths is not None):
            raise ValueError(
                "`key_depths` must be given with `window` and `ancestor_bits`, got None: pass each tree row's depth."
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be positive, got {softcap}: pass None for no soft-cap.")
    if sinks is not None and not (tuple(sinks.shape) == (heads,) and sinks.is_floating_point()):
        raise ValueError(
            f"`sinks` must be a float tensor of shape [{heads}], got {sinks.dtype} of shape {list(sinks.shape)}."
        )
