"""The target's head as a draft uses it: over the tokens it may propose, whatever the head is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .few_rows_linear import linear

IDENTITY_ROWS = 256
"""Rows of the identity sent through a head at once, where its matrix is wanted."""


@dataclass(frozen=True)
class TargetHead:
    """A head over the proposable tokens.

    An ordinary linear layer is used by its rows, so a draft vocabulary costs a draft vocabulary's work. Any other
    module (quantised weights, an adapter, weights that lie elsewhere until they are used) knows best what it computes:
    it runs whole, and the proposable tokens are picked from its scores.

    Attributes:
        module: the target's head, `[..., hidden]` -> `[..., vocabulary or more]`.
        tokens: the proposable ones: `[proposable tokens]` ids, or the slice of the vocabulary.
        weight, bias: their rows of an ordinary linear layer; `None` for another module.
    """

    module: nn.Module
    tokens: torch.Tensor | slice
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(cls, module: Any, vocab_size: int, token_ids: torch.Tensor | None, device: torch.device) -> TargetHead:
        """The head `module` over `token_ids`, or the first `vocab_size` tokens: a padded one has rows behind them.

        Rows that are picked are put on `device`, the draft's; a whole head stays where it is.
        """
        tokens = slice(vocab_size) if token_ids is None else token_ids
        if not isinstance(module, nn.Linear) or not _is_ordinary(module):
            return cls(module, tokens, None, None)
        rows: list[Any] = [None if part is None else part[tokens] for part in (module.weight, module.bias)]
        if token_ids is not None:
            rows = [None if part is None else part.to(device) for part in rows]
        return cls(module, tokens, *rows)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., proposable tokens]` of `[..., hidden]`, on the head's device."""
        if self.weight is not None:
            return linear(hidden.to(self.weight.device), self.weight, self.bias)
        scores = self.module(beside(hidden, self.module))
        return scores[..., self.tokens if isinstance(self.tokens, slice) else self.tokens.to(scores.device)]

    @torch.no_grad()
    def matrix(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(weight, bias)`, `[proposable tokens, hidden]` and `[proposable tokens]` or `None`, for a loss's gradient.

        What a module of another kind multiplies by is read off its scores of the identity, which its quantisation of
        activations, if it has one, leaves as it is.
        """
        if self.weight is not None:
            return self.weight, self.bias
        bias = self.scores(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        identity = torch.eye(hidden_size, dtype=dtype, device=device).split(IDENTITY_ROWS)
        weight = torch.cat([(self.scores(rows) - bias).T for rows in identity], dim=1)
        return weight, bias[0] if bias.any() else None


def beside(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`x` on the device of the module's weight; where that is offloaded accelerate moves `x` itself."""
    weight = getattr(module, "weight", None)
    return x if not isinstance(weight, torch.Tensor) or weight.is_meta else x.to(weight.device)


def _is_ordinary(module: nn.Linear) -> bool:
    """Whether the module is `F.linear` with a weight that lies there as it is: no subclass, hook, packing or shard."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (torch.Tensor, nn.Parameter)
        and module.weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and module.weight.device.type != "meta"
        and module.weight.shape == (module.out_features, module.in_features)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
