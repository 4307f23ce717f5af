"""What a resumed run takes up beside transformers' state, so that it goes on as if never interrupted."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .collator import AnchorOffsetCollator

RECORD = "LongSpecTrainer"


def write_record(state: TrainerState, values: dict[str, float]) -> None:
    """Put numbers into `state`, with which checkpoints hold them (`trainer_state.json`)."""
    state.stateful_callbacks[RECORD] = {"args": {}, "attributes": values}


def read_record(state: TrainerState) -> dict[str, float]:
    """What `write_record` put there; empty for a new run and for checkpoints of older versions."""
    return dict((state.stateful_callbacks or {}).get(RECORD, {}).get("attributes", {}))


class BeginRun(TrainerCallback):
    """Calls `trainer.begin_run()` when training begins, with its state loaded."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.begin_run()


class ContinueOffsets(TrainerCallback):
    """Tells the collator which batches are this process's, and at every epoch how many came before."""

    def __init__(self, trainer: Any, collator: AnchorOffsetCollator) -> None:
        self.trainer, self.collator, self.first_epoch = trainer, collator, True

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.collator.process_index, self.collator.num_processes = args.process_index, args.world_size
        self.collator.batch_size = self.trainer._train_batch_size
        if args.dataloader_persistent_workers:
            self.collator.share_with_workers()
        self.first_epoch = True

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        count = batches_before(train_dataloader, state.global_step, args, self.first_epoch)
        self.collator.set_batches_drawn(count)
        self.first_epoch = False


def batches_before(loader: DataLoader, step: int, args: TrainingArguments, first_epoch: bool) -> int:
    """Batches of one process that came before those an epoch will collate.

    An epoch's last step may take fewer batches than the others. Data without a length is one long epoch.

    Args:
        loader: of one epoch.
        step: optimizer steps done.
        args: for the steps' batches.
        first_epoch: whether a resumed run may begin within this epoch.
    """
    accumulation = args.gradient_accumulation_steps
    earlier, in_epoch = 0, step
    if has_length(loader) and len(loader):
        epoch, in_epoch = divmod(step, -(-len(loader) // accumulation))
        earlier = epoch * len(loader)
    # Rows of an iterable that were seen already are collated once more, and passed over then.
    if first_epoch and (args.ignore_data_skip or isinstance(loader.dataset, IterableDataset)):
        in_epoch = 0
    return earlier + in_epoch * accumulation
