"""What a model card says of a run, as the run recorded it."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
from transformers import TrainerState

from .arguments import LongSpecTrainingArguments


def training_facts(args: LongSpecTrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Steps, tokens, losses, settings, device and versions by name."""
    logged = [entry for entry in state.log_history if "ce" in entry]
    ended = [entry for entry in state.log_history if "train_runtime" in entry][-1:]
    facts: dict[str, Any] = {
        "steps": state.global_step,
        "tokens": int(sum(entry["positions"] for entry in logged)),
        "seconds": float(sum(entry["train_runtime"] + entry.get("earlier_runtime", 0.0) for entry in ended)),
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "optimizer": "muon, adamw for vectors" if args.muon else str(getattr(args.optim, "value", args.optim)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "cross_entropy_weight": args.ce_weight,
        "kl_weight": args.kl_weight,
        "loss_temperature": args.loss_temperature,
        "largest_cross_attention_shift": args.max_cross_attention_shift,
        "seed": args.seed,
    }
    if logged:
        facts |= {"final_cross_entropy": logged[-1]["ce"], "final_kl": logged[-1]["kl"]}
    on_gpu = torch.cuda.is_available() and args.device.type == "cuda"
    facts["device"] = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    facts["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return facts
