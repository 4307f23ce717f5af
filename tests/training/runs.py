"""Small training runs for the tests."""

from __future__ import annotations

import numpy as np
import torch
from models import VOCAB, tiny_target

from longspec_hf import LongSpecDraftModel
from longspec_hf.training import AnchorOffsetCollator, LongSpecTrainer, LongSpecTrainingArguments, PackedRows


def random_rows(rows: int = 64, length: int = 24, seed: int = 0) -> PackedRows:
    """Rows of random tokens."""
    return PackedRows(np.random.default_rng(seed).integers(1, VOCAB, rows * length).astype(np.uint16), length)


def small_draft(target, seed: int = 0, **fields) -> LongSpecDraftModel:
    """A fresh draft with a short window, in the target's dtype."""
    torch.manual_seed(seed)
    return LongSpecDraftModel.from_target(target, **{"sliding_window": 8, **fields})


def small_trainer(
    folder, target=None, draft=None, rows=None, collator=None, heldout=None, **arguments
) -> LongSpecTrainer:
    """A trainer of a few steps on the CPU; `heldout` is a `TauEvaluator`, which an evaluation loss joins."""
    target = tiny_target() if target is None else target
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 5,
    }
    return LongSpecTrainer(
        model=small_draft(target) if draft is None else draft,
        target_model=target,
        args=LongSpecTrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=random_rows() if rows is None else rows,
        data_collator=AnchorOffsetCollator(0, 512, seed=5) if collator is None else collator,
        eval_dataset=None if heldout is None else random_rows(rows=6, seed=1),
        tau_evaluator=heldout,
    )


def losses(trainer) -> list[float]:
    """Logged losses in order of steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batch_of(rows: list[list[int]], labels: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    """A batch with plain positions."""
    labels = labels or [None] * len(rows)
    return AnchorOffsetCollator()([{"input_ids": r, "labels": y} for r, y in zip(rows, labels, strict=True)])
