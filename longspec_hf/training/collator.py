"""Batches for training: right padding, labels, and anchor-offset or plain position ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import get_worker_info

from .positions import anchor_offset_positions, draw_anchor_offset

IGNORED = -100


@dataclass
class AnchorOffsetCollator:
    """Collates rows `{"input_ids": [n], "labels": [n] (optional)}` into a batch.

    The batch holds `input_ids`, `position_ids` and `labels`, each `[B, T]`. Rows are padded on the right, where causal
    attention keeps padding out of sight without a mask; padding has label -100. Labels name the token at their own
    place, as everywhere in transformers: the shift happens in the loss.

    The k-th batch after `batches_drawn` is set draws the same offsets whatever came before, so a resumed run repeats
    an uninterrupted one, and with `dataloader_num_workers` as without. Every row draws by itself: batches that several
    processes take in turn have the offsets that one process would draw for them joined together.

    Args:
        pad_token_id: filler of `input_ids`.
        max_position: positions the target knows; offsets reach up to it. `None` gives plain positions 0 .. T - 1.
        seed: seed of the offsets.
        batches_drawn: number of batches this process has drawn already.
        process_index, num_processes: which of how many processes takes these batches.
        batch_size: rows of a full batch, so that the rows of a shorter one at an epoch's end draw anew; by default
            the largest batch so far. The trainer sets it.

    Raises:
        ValueError: `pad_token_id` is negative; or, of a batch, a row is empty, has labels of another length, or is
            longer than `max_position`.
    """

    pad_token_id: int = 0
    max_position: int | None = None
    seed: int = 0
    batches_drawn: int = 0
    process_index: int = 0
    num_processes: int = 1
    batch_size: int | None = None
    _calls: int = field(default=0, init=False, repr=False)
    _largest: int = field(default=0, init=False, repr=False)
    # Batches drawn and how often they were set.
    _shared: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _times_set: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.pad_token_id < 0:
            raise ValueError(
                f"`pad_token_id` must be a token's id, got {self.pad_token_id}. Padding is never seen, so any will "
                "do, such as 0."
            )

    def share_with_workers(self) -> None:
        """Let `set_batches_drawn` reach the copies in data loader workers that outlive an epoch."""
        if self._shared is None:
            self._shared = torch.zeros(2, dtype=torch.long).share_memory_()

    def set_batches_drawn(self, count: int) -> None:
        """Continue as if `count` batches had been drawn; data loader workers that start afterwards do, too."""
        self.batches_drawn, self._calls = count, 0
        self._times_set += 1
        if self._shared is not None:
            self._shared.copy_(torch.tensor([count, self._times_set]))

    def _take_shared(self) -> None:
        if self._shared is not None and int(self._shared[1]) != self._times_set:
            self.batches_drawn, self._times_set = self._shared.tolist()
            self._calls = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [
            torch.as_tensor(row["labels"], dtype=torch.long) if row.get("labels") is not None else row_ids
            for row, row_ids in zip(rows, ids, strict=True)
        ]
        length = max(len(row_ids) for row_ids in ids)
        self._check(ids, labels, length)
        self._largest = max(self._largest, len(ids))
        first = self._batch_number() * max(self.batch_size or self._largest, len(ids))
        positions = []
        for row in range(first, first + len(ids)):
            anchors, offset = (0, 0)
            if self.max_position is not None:
                generator = torch.Generator().manual_seed((self.seed * 1_000_000_007 + row) % 2**63)
                anchors, offset = draw_anchor_offset(length, self.max_position, generator)
            positions.append(anchor_offset_positions(length, anchors, offset))
        return {
            "input_ids": _pad(ids, length, self.pad_token_id),
            "position_ids": torch.stack(positions),
            "labels": _pad(labels, length, IGNORED),
        }

    def _batch_number(self) -> int:
        self._take_shared()
        worker = get_worker_info()
        # Workers take batches in turn, each with its own copy of this object.
        index = self._calls if worker is None else self._calls * worker.num_workers + worker.id
        self._calls += 1
        return (self.batches_drawn + index) * self.num_processes + self.process_index

    def _check(self, ids: list[torch.Tensor], labels: list[torch.Tensor], length: int) -> None:
        for number, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
            if not len(row_ids):
                raise ValueError(f"`input_ids` of row {number} is empty. Leave empty texts out of the data.")
            if len(row_ids) != len(row_labels):
                raise ValueError(
                    f"`labels` of row {number} has {len(row_labels)} entries, expected {len(row_ids)}, one for each "
                    "of `input_ids`. Use -100 where a token is not to be learned."
                )
        if self.max_position is not None and length > self.max_position:
            raise ValueError(
                f"`input_ids` has {length} tokens, more than the {self.max_position} positions of the target. Use "
                "shorter rows."
            )


def _pad(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    batch = torch.full((len(rows), length), value, dtype=torch.long)
    for row, values in zip(batch, rows, strict=True):
        row[: len(values)] = values
    return batch
