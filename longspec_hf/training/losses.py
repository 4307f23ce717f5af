"""Losses of the draft through a frozen head, in chunks: `[tokens, vocab]` logits never exist at once.

For one position with draft logits z (soft-capped where the target's are), q = softmax(z), label y and the target's
distribution p over the same tokens::

    cross-entropy   -log q_y                      gradient wrt z: q - onehot(y)
    KL              sum_v p_v (log p_v - log q_v)  gradient wrt z: q - p

Both distributions may be those of logits over a temperature; z then stands for the divided logits.

The head is frozen, so the gradient of the hidden state is that row times the head's matrix. It is computed together
with the loss, chunk by chunk, and kept (`[tokens, hidden]`) for the backward pass. `naive_loss` is the definition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .collator import IGNORED

# Logits of one chunk: 16 MB in fp32 on a CPU; on a GPU larger matrices pay.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


class FrozenHead(NamedTuple):
    """The target's head over the tokens the draft may propose.

    Attributes:
        weight: `[V, hidden]`.
        bias: `[V]` or `None`.
        softcap: final logits become `softcap * tanh(logits / softcap)`; `None` leaves them.
        temperature: that the logits are divided by, behind the soft-cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., V]` of `[..., hidden]`, in fp32 (fp64 stays fp64)."""
        raw = F.linear(hidden, self.weight, self.bias)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        capped = raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)
        return capped if self.temperature == 1.0 else capped / self.temperature


class LossSums(NamedTuple):
    """Sums over positions: `total = ce_weight * ce + kl_weight * kl`. Only `total` carries gradients."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def naive_loss(
    hidden: torch.Tensor,
    head: FrozenHead,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    mask: torch.Tensor,
    ce_weight: float,
    kl_weight: float,
) -> LossSums:
    """The definition of `chunked_loss`, with all logits at once."""
    log_q = head.logits(hidden).log_softmax(-1)
    ce = F.nll_loss(log_q, labels, ignore_index=IGNORED, reduction="sum")
    log_p = head.logits(teacher_hidden).log_softmax(-1)
    kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum()
    return LossSums(ce_weight * ce + kl_weight * kl, ce.detach(), kl.detach())


def chunked_loss(
    hidden: torch.Tensor,
    head: FrozenHead,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    mask: torch.Tensor,
    ce_weight: float,
    kl_weight: float,
    chunk_elements: int | None = None,
    compiled: bool = False,
) -> LossSums:
    """Cross-entropy on the text and KL to the target, summed over positions; zero where there are none.

    Args:
        hidden: `[N, hidden]` input of the head (after the final norm).
        head: the frozen head. With a draft vocabulary both distributions are over its tokens alone: the target's is
            renormalised, and cross-entropy ignores positions whose next token is outside.
        labels: `[N]` rows of the head, -100 where cross-entropy has nothing to learn.
        teacher_hidden: `[N, hidden]` the target's own input of the head.
        mask: `[N]` bool, positions that count for KL.
        ce_weight, kl_weight: a weight of zero leaves that loss out of the gradient; zero `kl_weight` also leaves it
            uncomputed.
        chunk_elements: logits held at once; by default 4M on a CPU, 64M on a GPU.
        compiled: fuse a chunk's elementwise passes with torch.compile.
    """
    limit = chunk_elements or CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    rows = max(1, min(limit // head.weight.shape[0], hidden.shape[0]))
    weights = (float(ce_weight), float(kl_weight))
    return LossSums(*_ChunkedLoss.apply(hidden, head, labels, teacher_hidden, mask, weights, rows, compiled))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, head, labels, teacher_hidden, mask, weights, rows, compiled):
        step = _compiled_chunk() if compiled else _chunk
        gradient = torch.empty_like(hidden)
        sums = None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk_sums, chunk_gradient = step(
                hidden[part], teacher_hidden[part], labels[part], mask[part], *head, *weights
            )
            gradient[part] = chunk_gradient
            sums = chunk_sums if sums is None else sums + chunk_sums
        ctx.save_for_backward(gradient)
        if sums is None:  # no positions
            sums = head.weight.new_zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32))
        ce, kl = sums.unbind()
        return weights[0] * ce + weights[1] * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_total, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), *(None,) * 7


def _chunk(
    hidden, teacher_hidden, labels, mask, weight, bias, softcap, temperature, ce_weight: float, kl_weight: float
):
    """Sums `[2]` (cross-entropy, KL) of one chunk and the gradient `[rows, hidden]` of their weighted sum."""
    head = FrozenHead(weight, bias, softcap, temperature)
    logits = head.logits(hidden)
    log_q = logits.log_softmax(-1)
    counts = labels != IGNORED
    index = labels.clamp(min=0).unsqueeze(-1)
    ce = -(log_q.gather(-1, index).squeeze(-1) * counts).sum()
    ce_scale = ce_weight * counts.to(log_q.dtype).unsqueeze(-1)
    if kl_weight:
        kl_scale = kl_weight * mask.to(log_q.dtype).unsqueeze(-1)
        log_p = head.logits(teacher_hidden).log_softmax(-1)
        p = log_p.exp()
        kl = ((p * (log_p - log_q)).sum(-1) * mask).sum()
        gradient = log_q.exp_().mul_(ce_scale + kl_scale).sub_(p.mul_(kl_scale))
    else:
        kl = torch.zeros_like(ce)
        gradient = log_q.exp_().mul_(ce_scale)
    gradient = gradient.scatter_add_(-1, index, -ce_scale)
    if softcap is not None:
        gradient = gradient.mul_(1 - (logits * temperature / softcap) ** 2)
    if temperature != 1.0:
        gradient = gradient.div_(temperature)
    return torch.stack([ce, kl]), gradient.to(weight.dtype) @ weight


_COMPILED: list[Any] = []


def _compiled_chunk() -> Any:
    if not _COMPILED:
        _COMPILED.append(torch.compile(_chunk, dynamic=False))
    return _COMPILED[0]
