"""When two greedy texts of one model may differ: where its own rounding decides which token is best."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

# Two logits, each off by what the model's own forward is off at most, rounded in another order.
MOST_ROUNDINGS = 3.0


@torch.no_grad()
def equal_but_for_rounding(model: PreTrainedModel, plain: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether `[1, n]` ids are equal, or first differ in two tokens that fp32 logits hold for about as good.

    About: by no more than `MOST_ROUNDINGS` times the largest error of the model's own logits there.
    """
    if torch.equal(plain, found):
        return True
    first = int((plain != found).flatten().nonzero()[0])
    before = plain[:, :first].to(model.device)
    exact = copy.deepcopy(model).float()(before).logits[0, -1]
    rounding = float((model(before).logits[0, -1].float() - exact).abs().max())
    chosen = exact[[int(plain[0, first]), int(found[0, first])]]
    return float(exact.max() - chosen.min()) <= MOST_ROUNDINGS * rounding
