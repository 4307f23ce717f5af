"""Arguments of [`LongSpecTrainer`]: transformers' own and the draft's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .processes import check_deepspeed


@dataclass
class LongSpecTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the draft's losses and schedule.

    Args:
        ce_weight: weight of the cross-entropy on the text, the paper's loss.
        kl_weight: weight of the KL divergence from the target's distribution.
        loss_temperature: that the draft's and the target's logits are divided by in both losses: where texts will be
            sampled at 0.8 or greedily, 0.8 leaves tokens aside that are never drawn there.
        max_cross_attention_shift: cross-attention of a step is shifted by a number drawn from 1 to this, since at
            inference the newest target rows do not exist yet. The depth of the tree is a good value.
        shift_groups: parts a batch is split into by rows, each with a shift of its own.
        loss_chunk_elements: logits held at once in the loss; by default 4M on a CPU, 64M on a GPU.
        compile_loss: fuse the loss's elementwise passes with torch.compile.
        max_train_seconds: stop after this time and run the learning-rate schedule over it. `None` leaves both to
            transformers.
        muon: update matrices with Muon, the rest with AdamW; `learning_rate` and `weight_decay` serve both, `optim` is
            not used.
        evaluate_tau: measure tau at every evaluation, where the trainer was given tau inputs.

    Raises:
        ValueError: a field is out of its range (the message names it), or `deepspeed` is asked for and not installed.
    """

    ce_weight: float = field(default=0.1, metadata={"help": "Weight of the cross-entropy on the text."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL to the target's distribution."})
    loss_temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions in the losses."})
    max_cross_attention_shift: int = field(default=4, metadata={"help": "Largest shift of the cross-attention."})
    shift_groups: int = field(default=1, metadata={"help": "Parts of a batch with a shift of their own."})
    loss_chunk_elements: int | None = field(default=None, metadata={"help": "Logits held at once in the loss."})
    compile_loss: bool = field(default=False, metadata={"help": "Fuse the loss with torch.compile."})
    max_train_seconds: float | None = field(default=None, metadata={"help": "Stop after this many seconds."})
    muon: bool = field(default=False, metadata={"help": "Muon for matrices instead of the optimizer of `optim`."})
    evaluate_tau: bool = field(default=True, metadata={"help": "Measure tau at every evaluation."})

    def __post_init__(self) -> None:
        check_deepspeed(self)
        super().__post_init__()
        for name in ("ce_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.ce_weight == self.kl_weight == 0:
            raise ValueError("`ce_weight` and `kl_weight` are both 0, expected a loss. Set at least one of them.")
        if self.loss_temperature <= 0:
            raise ValueError(
                f"`loss_temperature` must be positive, got {self.loss_temperature}. 1.0 leaves the logits."
            )
        for name in ("max_cross_attention_shift", "shift_groups", "loss_chunk_elements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.muon and not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"`muon` needs `torch.optim.Muon` of torch 2.9 or newer, got torch {torch.__version__}. Upgrade torch "
                "or leave `muon` off."
            )
        if self.max_train_seconds is not None and self.max_train_seconds <= 0:
            raise ValueError(
                f"`max_train_seconds` must be positive, got {self.max_train_seconds}. Use `None` for no limit."
            )
