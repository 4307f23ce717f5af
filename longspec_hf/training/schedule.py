"""A learning-rate schedule over wall-clock time, for training that must end at a given moment."""

from __future__ import annotations

import math
import time

import torch
from accelerate.utils import broadcast
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback


class TimeBudget(TrainerCallback):
    """Stops training when `seconds` have passed since its first step, and tells how much has.

    The first process's clock counts for all: learning rates and ends that differ would pull them apart. What a run
    has spent goes into its checkpoints, and `resume` takes it up again.

    Args:
        seconds: the budget.

    Attributes:
        spent: part of the budget that has passed, 0 to 1, as of the last step.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.resume(0.0)

    def resume(self, passed: float) -> None:
        """Begin with the next step, `passed` seconds of the budget being gone; 0 is a new run."""
        self._before = passed
        self._began: float | None = None
        self.spent = min(passed / self.seconds, 1.0)

    @property
    def passed(self) -> float:
        """Seconds of the budget that have passed by now."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._began is None:
            self._began = time.monotonic()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        passed = self.passed / self.seconds
        if args.world_size > 1:
            passed = float(broadcast(torch.tensor(passed, device=args.device)))
        self.spent = min(passed, 1.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.spent >= 1.0:
            control.should_training_stop = True


def budget_schedule(optimizer: Optimizer, budget: TimeBudget, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up, then a half cosine to zero over the steps or the budget, whichever ends first."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = max((step - warmup_steps) / max(total_steps - warmup_steps, 1), budget.spent)
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)
