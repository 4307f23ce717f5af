"""Muon for matrices (K. Jordan, kellerjordan.github.io/posts/muon), AdamW for the rest, as one optimizer.

`torch.optim.Muon` takes matrices only, and a `Trainer` takes one optimizer; this joins torch's two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments


def muon_settings(args: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of [`MuonWithAdamW`] from those of a `Trainer`."""
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` on parameters of two dimensions, `torch.optim.AdamW` on all others.

    Updates of matrices are scaled to the size AdamW's have, so one learning rate serves both.

    Args:
        params: parameter groups, dicts with `params`; a group's own `lr` and `weight_decay` hold.
        lr: learning rate.
        momentum: of Muon.
        betas, eps: of AdamW.
        weight_decay: where a group names none.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__([dict(group) for group in params], {"lr": lr, "weight_decay": weight_decay})
        matrices, others = [], []
        for group in self.param_groups:
            settings = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            matrices.append({"params": [p for p in group["params"] if p.ndim == 2], **settings})
            others.append({"params": [p for p in group["params"] if p.ndim != 2], **settings})
        parts: list[Optimizer] = []
        if kept := [group for group in matrices if group["params"]]:
            parts.append(Muon(kept, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if kept := [group for group in others if group["params"]]:
            parts.append(AdamW(kept, lr=lr, betas=betas, eps=eps))
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state, which schedulers and checkpoints see."""
        first = 0
        for part in self.parts:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; states of the same parameters in the same groups."""
        super().load_state_dict(state_dict)
        self._share()
