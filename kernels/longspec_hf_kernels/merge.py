"""Partial attention results and their merge by log-sum-exp."""

import torch


def explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One part of a softmax, with its log-sum-exp.

    Args:
        query: `[H, M, D]`.
        key, value: `[H, N, D]`.
        visible: bool, broadcastable to `[H, M, N]`, or None when every row is seen.
        scale, softcap: as in `hybrid_tree_attention_reference`.

    Returns:
        `(out [H, M, D], lse [H, M])` in fp32 (fp64 for fp64 inputs); zeros and `-inf` where
        nothing is seen.
    """
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(accumulate) * scale) @ key.to(accumulate).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # An empty row's lse is -inf; subtracting 0 there leaves exp(-inf) = 0 instead of NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    return torch.exp(scores - shift) @ value.to(accumulate), lse


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two parts of one softmax: `out = sum exp(lse_i - lse) out_i`, `lse = log sum exp lse_i`.

    Args:
        out_a, out_b: `[..., D]`, any float dtype.
        lse_a, lse_b: `[...]`, fp32 or fp64; `-inf` marks a part that saw nothing.

    Returns:
        `(out, lse)` in the dtype of the log-sum-exps.

    Source: Flash-Decoding's reduction over splits; LongSpec (arXiv 2502.17421) merges its prefix and
    tree parts the same way.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a = torch.exp(lse_a - shift).unsqueeze(-1)
    weight_b = torch.exp(lse_b - shift).unsqueeze(-1)
    return out_a * weight_a + out_b * weight_b, lse


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Let `sinks` (broadcastable to `lse`) join the denominator: `out * sigmoid(lse - sink)`."""
    return out * torch.sigmoid(lse - sinks).unsqueeze(-1)
