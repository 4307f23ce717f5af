"""Evaluation in training: the loss at plain positions, and tau on held-out texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..modeling_longspec import LongSpecDraftModel
from .arguments import LongSpecTrainingArguments
from .collator import IGNORED, AnchorOffsetCollator
from .losses import LossSums
from .processes import whole_draft
from .tau import TauEvaluator, summarize


class DraftEvaluation(Trainer):
    """The part of [`LongSpecTrainer`] that evaluates.

    The loss is the sum over all labelled positions divided by their number, whatever batches they came in.
    """

    args: LongSpecTrainingArguments
    target_model: PreTrainedModel
    tau_evaluator: TauEvaluator | None
    control: Any
    data_collator: Any
    _evaluated: tuple[float, float] = (0.0, 0.0)  # loss sum and positions of this process
    _evaluating: bool = False
    loss_sums: Callable[..., LossSums]  # a method of the trainer

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss with a shift of 1, as at the first depth of a tree."""
        inputs = self._prepare_inputs(inputs)
        inputs["labels"] = self._without_copies(inputs["labels"])
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.loss_sums(model, inputs, shifts=[1])
        total, positions = float(sums.total), int((inputs["labels"][:, 1:] != IGNORED).sum())
        self._evaluated = self._evaluated[0] + total, self._evaluated[1] + positions
        return sums.total / max(positions, 1), None, None

    def _without_copies(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels `[B, T]` of one process, none of them in rows that only fill up the last batch of several."""
        loader = self.accelerator.gradient_state
        if self.args.world_size == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return labels
        own = max(loader.remainder - self.args.process_index * len(labels), 0)
        labels = labels.clone()
        labels[own:] = IGNORED
        return labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the loss of all positions divided by their number."""
        self._evaluated = 0.0, 0.0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics:
            total, positions = self._evaluated
            if self.args.world_size > 1:
                sums = torch.tensor(self._evaluated, dtype=torch.float64, device=self.args.device)
                total, positions = self.accelerator.reduce(sums, "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(positions, 1.0)
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation uses plain positions."""
        with self._plain_positions():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """`predict` uses plain positions."""
        with self._plain_positions():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _plain_positions(self) -> Iterator[None]:
        kept = self.data_collator
        if isinstance(kept, AnchorOffsetCollator):
            self.data_collator = AnchorOffsetCollator(kept.pad_token_id)
        try:
            yield
        finally:
            self.data_collator = kept

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluation loss, where there is an `eval_dataset`, and tau on held-out texts, once for all datasets."""
        metrics: dict[str, float] = {}
        has_rows = self.eval_dataset is not None or bool(args) or kwargs.get("eval_dataset") is not None
        within, self._evaluating = self._evaluating, True  # a dictionary's datasets come here one by one
        try:
            if has_rows:
                metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluating = within
        if self.tau_evaluator is not None and self._measures_tau(self.args) and not within:
            measured = self._measure_tau(self.tau_evaluator)
            measured = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
            self.log(measured)
            metrics.update(measured)
            if not has_rows:
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measures_tau(self, args: LongSpecTrainingArguments) -> bool:
        return self.tau_evaluator is not None and args.evaluate_tau

    def _measure_tau(self, evaluator: TauEvaluator) -> dict[str, float]:
        """Tau over all held-out texts, of which every process measures its share."""
        self.model.eval()
        draft = whole_draft(draft_of(self.accelerator.unwrap_model(self.model)))
        share = slice(self.args.process_index, None, self.args.world_size)
        return summarize(gather_object(evaluator.rows(draft, self.target_model, share)))


def draft_of(model: Any) -> LongSpecDraftModel:
    """The draft inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
