"""Training of LongSpec drafts. Needs the extra `train` (accelerate, datasets, peft)."""

from .arguments import LongSpecTrainingArguments
from .collator import AnchorOffsetCollator
from .data import (
    FilledRows,
    ListedRows,
    PackedRows,
    load_token_rows,
    pack_texts,
    read_texts,
    rows_from_dataset,
    save_tokens,
)
from .losses import FrozenHead, chunked_loss, naive_loss
from .positions import anchor_offset_positions, draw_anchor_offset
from .processes import loaded_whole
from .self_generation import continue_batches, continue_prompts, make_prompts
from .target_states import TargetStates, read_target
from .tau import TauEvaluator, TauInput, replay
from .trainer import LongSpecTrainer
from .vocabulary import count_tokens, most_frequent_tokens, set_draft_vocabulary

__all__ = [
    "AnchorOffsetCollator",
    "FilledRows",
    "FrozenHead",
    "ListedRows",
    "LongSpecTrainer",
    "LongSpecTrainingArguments",
    "PackedRows",
    "TargetStates",
    "TauEvaluator",
    "TauInput",
    "anchor_offset_positions",
    "chunked_loss",
    "continue_batches",
    "continue_prompts",
    "count_tokens",
    "draw_anchor_offset",
    "load_token_rows",
    "loaded_whole",
    "make_prompts",
    "most_frequent_tokens",
    "naive_loss",
    "pack_texts",
    "read_target",
    "read_texts",
    "replay",
    "rows_from_dataset",
    "save_tokens",
    "set_draft_vocabulary",
]
