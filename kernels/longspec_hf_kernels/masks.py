"""Visibility of tree rows and windows, shared by the definition and the CPU path."""

import torch

WORD_BITS = 64


def words_for(num_tree_keys: int) -> int:
    """Number of int64 words that hold one bit per tree key row."""
    return (num_tree_keys + WORD_BITS - 1) // WORD_BITS


def pack_ancestor_bits(visible: torch.Tensor) -> torch.Tensor:
    """Pack a boolean visibility matrix into the words `hybrid_tree_attention` reads.

    Args:
        visible: bool `[B, T, C]`; `visible[b, i, j]` says node `i` sees tree row `j` (itself included).

    Returns:
        int64 `[B, T, ceil(C / 64)]`; bit `j % 64` of word `j // 64` is `visible[..., j]`.
    """
    batch, nodes, keys = visible.shape
    words = words_for(keys)
    padded = torch.zeros(batch, nodes, words * WORD_BITS, dtype=torch.int64, device=visible.device)
    padded[..., :keys] = visible
    shifts = torch.arange(WORD_BITS, device=visible.device)
    # Bits are disjoint, so the sum is an or; bit 63 wraps to the sign, as int64 words want.
    return (padded.view(batch, nodes, words, WORD_BITS) << shifts).sum(-1)


def unpack_ancestor_bits(ancestor_bits: torch.Tensor, num_tree_keys: int | None = None) -> torch.Tensor:
    """Bool `[..., C]` from int64 words `[..., W]`; `C` defaults to `64 * W`."""
    shifts = torch.arange(WORD_BITS, device=ancestor_bits.device)
    bits = ((ancestor_bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)
    return bits if num_tree_keys is None else bits[..., :num_tree_keys]


def tree_visibility(
    ancestor_bits: torch.Tensor,
    depths: torch.Tensor | None,
    key_depths: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Which tree rows each node sees, window included.

    Args:
        ancestor_bits: int64 `[..., T, W]`.
        depths: int `[..., T]`, needed with a window.
        key_depths: int `[..., C]`, needed with a window.
        window: keys at a distance of `window` or more are hidden.

    Returns:
        bool `[..., T, C]` (`C = 64 * W` without `key_depths`).
    """
    if key_depths is None:
        return unpack_ancestor_bits(ancestor_bits)
    visible = unpack_ancestor_bits(ancestor_bits, key_depths.shape[-1])
    if window is not None and depths is not None:
        visible = visible & (depths.unsqueeze(-1) - key_depths.unsqueeze(-2) < window)
    return visible
