"""Fine-tune a draft for one domain with LoRA: small adapters on a trained draft, merged into it at the end.

For a draft that meets texts it was not trained on, a few minutes on such texts raise tau. A command to try::

    python examples/finetune_lora.py --target embedded --draft model_cards/longspec-smollm2-135m-instruct \
        --texts docs README.md --output runs/longspec-docs --steps 20 --length 512 --batch-size 2

The output is an ordinary draft folder; generation does not need peft.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspec_hf import LongSpecDraftModel
from longspec_hf.cli.options import dtype_of, positive
from longspec_hf.embedded import embedded_target_folder
from longspec_hf.training import (
    AnchorOffsetCollator,
    LongSpecTrainer,
    LongSpecTrainingArguments,
    PackedRows,
    pack_texts,
    read_texts,
)

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune a LongSpec draft with LoRA.")
    parser.add_argument("--target", default="embedded", help="model name, folder, or `embedded`")
    parser.add_argument("--draft", required=True, help="trained draft, folder or Hub name")
    parser.add_argument("--texts", nargs="+", required=True, help="files, folders or .jsonl of the domain")
    parser.add_argument("--output", required=True, help="folder of the fine-tuned draft")
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--length", type=positive, default=1536)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default="float32", help="of the target and of the saved draft")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> LongSpecDraftModel:
    args = make_parser().parse_args(arguments)
    dtype = dtype_of(args.dtype)
    name = str(embedded_target_folder()) if args.target == "embedded" else args.target
    tokenizer = AutoTokenizer.from_pretrained(name)
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    draft = LongSpecDraftModel.from_pretrained(args.draft, dtype=torch.float32)
    torch.manual_seed(args.seed)
    adapted = get_peft_model(draft, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=ADAPTED))
    adapted.print_trainable_parameters()
    trainer = LongSpecTrainer(
        model=adapted,
        target_model=target,
        args=LongSpecTrainingArguments(
            output_dir=str(Path(args.output) / "adapter"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=PackedRows(pack_texts(read_texts(args.texts, tokenizer), tokenizer), args.length),
        data_collator=AnchorOffsetCollator(
            tokenizer.pad_token_id or 0, target.config.get_text_config(decoder=True).max_position_embeddings, args.seed
        ),
    )
    trainer.train()
    merged = adapted.merge_and_unload().to(dtype)
    merged.save_pretrained(args.output)
    return merged


if __name__ == "__main__":
    main()
