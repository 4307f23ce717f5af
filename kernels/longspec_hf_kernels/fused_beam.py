"""The best children of a beam's level, without a softmax or a sort over the vocabulary."""

import torch

from .backends import uses_triton
from .validation import FLOAT_DTYPES

# What the kernels keep of a part of the vocabulary, and nodes of a level.
MAX_WIDTH = 64
MAX_NODES = 64
# Parent and token share 32 bits of a key.
MAX_CHILDREN = 2**31


def _ordered(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort like fp32 `values`, and where those are equal, the lower `index` as the larger key."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) + (2**32 - 1 - index)


def best_children_torch(
    scores: torch.Tensor, logits: torch.Tensor, width: int, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of `best_children_fused`."""
    nodes, vocabulary = logits.shape[1:]
    unused = (scores == float("-inf")).unsqueeze(-1)
    wide = logits.float()
    if softcap is not None:
        wide = torch.tanh(wide / softcap) * softcap
    wide = torch.where(unused, 0.0, wide * (1.0 / temperature))
    tokens = torch.arange(vocabulary, device=logits.device)
    kept = _ordered(wide, tokens).topk(min(width, vocabulary), dim=-1).indices
    values = wide.gather(-1, kept)
    log_probs = torch.where(values == float("-inf"), values, values - wide.logsumexp(dim=-1, keepdim=True))
    summed = (scores.unsqueeze(-1) + log_probs).flatten(1)
    child = (torch.arange(nodes, device=logits.device).unsqueeze(-1) * vocabulary + kept).flatten(1)
    best = _ordered(summed, child).topk(min(width, summed.shape[1]), dim=1).indices
    child = child.gather(1, best)
    return summed.gather(1, best), child // vocabulary, child % vocabulary


def best_children_fused(
    scores: torch.Tensor, logits: torch.Tensor, width: int, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best `width` children, over all nodes of a level, by summed log-probability.

    Args:
        scores: fp32 `[B, k]` of the level's nodes, k at most 64; a node of score `-inf` is unused: its logits are not
            looked at and its children, in the order of their tokens, have the score `-inf` too.
        logits: `[B, k, V]` of their next token, in any float dtype; the maths is fp32.
        width: children to keep, at most 64; fewer are returned when there are only `k * V`.
        softcap: c of `tanh(logits / c) * c`, or None.
        temperature: that the logits are divided by, behind the soft-cap.

    Returns:
        scores (fp32), parent (int64, 0 .. k - 1) and token (int64) of the children, each `[B, min(width, k * V)]`,
        best first; of equal scores the lower parent, then the lower token is first.

    Raises:
        ValueError: a shape, dtype or `width` does not fit.
    """
    fits = scores.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == scores.shape
    if not (fits and logits.dtype in FLOAT_DTYPES):
        raise ValueError(
            f"`logits` must be floats of shape [{', '.join(map(str, scores.shape))}, V] for `scores` of that shape, "
            f"got {logits.dtype} of shape {list(logits.shape)}."
        )
    if scores.dtype != torch.float32:
        raise ValueError(f"`scores` must be torch.float32, got {scores.dtype}: cast them.")
    if not (1 <= width <= MAX_WIDTH):
        raise ValueError(f"`width` must be from 1 to {MAX_WIDTH}, got {width}.")
    if not (1 <= logits.shape[1] <= MAX_NODES and 1 <= logits.shape[1] * logits.shape[2] < MAX_CHILDREN):
        raise ValueError(
            f"`logits` must have from 1 to {MAX_NODES} nodes and fewer than {MAX_CHILDREN} children, got shape "
            f"{list(logits.shape)}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be positive, got {softcap}: pass None for no soft-cap.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}: pass 1.0 for logits as they are.")
    if uses_triton(logits):
        from .fused_beam_kernel import best_children_triton

        return best_children_triton(scores, logits, width, softcap=softcap, temperature=temperature)
    return best_children_torch(scores, logits, width, softcap=softcap, temperature=temperature)
