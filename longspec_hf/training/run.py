"""A training run as a command line: from sources of text and a target to a draft with its card."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from ..embedded import embedded_target_folder
from ..modeling_longspec import LongSpecDraftModel
from .arguments import LongSpecTrainingArguments
from .collator import AnchorOffsetCollator
from .data import PackedRows, pack_texts, read_texts, rows_from_dataset
from .heldout import load_texts
from .processes import export_draft, loaded_whole
from .tau import TauEvaluator, TauInput
from .token_files import load_token_files
from .trainer import LongSpecTrainer
from .vocabulary import count_tokens, most_frequent_tokens, set_draft_vocabulary

DESCRIPTION = "Train a LongSpec draft for a target; docs/training.md has the stages and what the options do."
EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the embedded target is called on the Hub
DTYPES = ("bfloat16", "float16", "float32", "float64")
STAGES = {"short": (1536, True), "long": (6144, False), "outputs": (6144, False)}  # row length, anchor offset


@dataclass
class ScriptArguments:
    """What to train and on what."""

    stage: str = field(default="short", metadata={"help": "short, long or outputs", "choices": list(STAGES)})
    target: str = field(default="embedded", metadata={"help": "Model name, folder, or `embedded`."})
    target_name: str | None = field(default=None, metadata={"help": "The target's name in the draft's configuration."})
    target_dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the target."})
    tokens: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Token arrays (.npy); `path*4` takes it 4 times, `path@1024*4` learns nothing of a row's first "
            "1024 tokens, its prompt."
        },
    )
    texts: list[str] = field(default_factory=list, metadata={"help": "Text files, folders or .jsonl."})
    dataset: str | None = field(default=None, metadata={"help": "Hugging Face dataset (its train split)."})
    length: int | None = field(default=None, metadata={"help": "Tokens of a row; by default the stage's."})
    anchor_offset: bool | None = field(
        default=None, metadata={"help": "Anchor-offset positions; by default the stage's."}
    )
    draft: str | None = field(default=None, metadata={"help": "Draft to go on from; a fresh one without."})
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "Most frequent tokens a fresh draft proposes."}
    )
    intermediate_size: int | None = field(default=None, metadata={"help": "MLP size of a fresh draft."})
    target_layer_idx: int | None = field(
        default=None,
        metadata={
            "help": "Target layer that the draft's cross-attention reads; by default the draft's own, or the last."
        },
    )
    tau_texts: str | None = field(default=None, metadata={"help": "Held-out texts for tau."})
    export: str | None = field(
        default=None, metadata={"help": "Folder for a copy in the target's dtype, renewed at every save."}
    )
    compile_target: bool = field(default=False, metadata={"help": "Run the target through torch.compile."})


def check_arguments(args: ScriptArguments) -> None:
    """Refuse arguments that mean nothing, before anything is loaded.

    Raises:
        ValueError: the message names the argument.
    """
    if args.target_dtype not in DTYPES:
        raise ValueError(f"`target_dtype` must be one of {', '.join(DTYPES)}, got {args.target_dtype!r}.")
    if args.length is not None and args.length < 2:
        raise ValueError(f"`length` must be at least 2, a token and the next, got {args.length}.")
    for name in ("draft_vocab_size", "intermediate_size"):
        if args.draft and getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, expected none beside `draft` ({args.draft}), which has its own. "
                "Leave one of the two out."
            )


def load_tau_texts(path: str, vocab_size: int) -> list[TauInput]:
    """The held-out texts of a file, all with a prompt and an output.

    Raises:
        ValueError: the file holds no texts, one without a prompt or an output, or ids that are not the target's.
    """
    texts = load_texts(path)
    if not texts:
        raise ValueError(f"`tau_texts` ({path}) is empty, expected held-out texts. Make it with `evaluate_tau.py`.")
    for number, text in enumerate(texts, 1):
        if not text.prompt_ids or not text.output_ids:
            raise ValueError(
                f"`tau_texts` ({path}): text {number} must have tokens in `prompt_ids` and `output_ids`, got "
                f"{len(text.prompt_ids)} and {len(text.output_ids)}. Run `evaluate_tau.py generate` on the prompts "
                "first."
            )
        smallest, largest = (choose(text.prompt_ids + text.output_ids) for choose in (min, max))
        if smallest < 0 or largest >= vocab_size:
            raise ValueError(
                f"`tau_texts` ({path}): text {number} has ids from {smallest} to {largest}, expected 0 to "
                f"{vocab_size - 1}, the target's. Make the file with this target."
            )
    return texts


def load_rows(args: ScriptArguments, tokenizer, length: int, vocab_size: int | None = None) -> Dataset:
    """All training rows of the given sources; ids of `tokens` are checked against the target's `vocab_size`."""
    parts = load_token_files(args.tokens, length, vocab_size)
    if args.texts:
        parts.append(PackedRows(pack_texts(read_texts(args.texts, tokenizer), tokenizer), length))
    if args.dataset:
        from datasets import load_dataset

        dataset = load_dataset(args.dataset, split="train")
        if not len(dataset):
            raise ValueError(f"`dataset` ({args.dataset}) has no rows in its train split. Leave it out.")
        parts.append(rows_from_dataset(dataset, tokenizer, length))
    if not parts:
        raise ValueError(
            "`tokens`, `texts` and `dataset` are all empty, expected at least one source of training data."
        )
    return ConcatDataset(parts)


def make_draft(args: ScriptArguments, target: PreTrainedModel, rows: Dataset) -> LongSpecDraftModel:
    """The draft to train, in fp32."""
    layer = {} if args.target_layer_idx is None else {"target_layer_idx": args.target_layer_idx}
    if args.draft:
        return LongSpecDraftModel.from_pretrained(args.draft, dtype=torch.float32, **layer)
    sizes = {"draft_vocab_size": args.draft_vocab_size, "intermediate_size": args.intermediate_size}
    given = {name: value for name, value in sizes.items() if value is not None} | layer
    draft = LongSpecDraftModel.from_target(target, **given).float()
    if args.draft_vocab_size is not None:
        sample = np.random.default_rng(0).permutation(len(rows))[:20_000]  # type: ignore[arg-type]
        counts = count_tokens((rows[int(index)]["input_ids"] for index in sample), draft.config.vocab_size)
        ends = target.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        chosen = most_frequent_tokens(counts, args.draft_vocab_size, always=ends)
        set_draft_vocabulary(draft, chosen)
        print(f"draft vocabulary covers {counts[chosen].sum() / counts.sum():.4f} of the training tokens")
    return draft


class ExportAtSave(TrainerCallback):
    """Keeps a copy of the draft in the dtype it will run in: what a Hub repository holds."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        export_draft(model, self.folder, self.dtype, writes=args.should_save)


def main(arguments: list[str] | None = None, prog: str | None = None) -> LongSpecTrainer:
    """Train as the command line says, save draft, state and card, and return the trainer.

    Args:
        arguments: the command line; by default the process's.
        prog: name of the command in its help.

    Raises:
        ValueError: an argument is out of range, or there is nothing to train on.
    """
    parser = HfArgumentParser((ScriptArguments, LongSpecTrainingArguments), prog=prog, description=DESCRIPTION)
    args, training_args = parser.parse_args_into_dataclasses(arguments)
    check_arguments(args)
    set_seed(training_args.seed)  # a fresh draft is the same in every process
    with training_args.main_process_first():
        name = str(embedded_target_folder()) if args.target == "embedded" else args.target
    tokenizer = AutoTokenizer.from_pretrained(name)
    length, anchor_offset = STAGES[args.stage]
    length = length if args.length is None else args.length
    anchor_offset = anchor_offset if args.anchor_offset is None else args.anchor_offset
    vocab_size = AutoConfig.from_pretrained(name).get_text_config(decoder=True).vocab_size
    rows = load_rows(args, tokenizer, length, vocab_size)
    tau_texts = load_tau_texts(args.tau_texts, vocab_size) if args.tau_texts else None
    with loaded_whole(training_args):
        target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.target_dtype))
        draft = make_draft(args, target, rows)
    draft.config.target_name_or_path = args.target_name or (
        EMBEDDED_NAME if args.target == "embedded" else args.target
    )
    if args.compile_target:
        target.model.compile(dynamic=False)
    context = target.config.get_text_config(decoder=True).max_position_embeddings
    trainer = LongSpecTrainer(
        model=draft,
        target_model=target,
        args=training_args,
        train_dataset=rows,
        data_collator=AnchorOffsetCollator(
            tokenizer.pad_token_id or 0, context if anchor_offset else None, seed=training_args.seed
        ),
        tau_evaluator=None if tau_texts is None else TauEvaluator(tau_texts),
    )
    if args.export:
        trainer.add_callback(ExportAtSave(args.export, target.dtype))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.export:
        export_draft(trainer.model, args.export, target.dtype, writes=training_args.should_save)
    if trainer.tau_evaluator is not None:
        trainer.evaluate()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer
