"""One process of a training run, started by `accelerate launch`; writes what it saw to `rank<n>.pt`.

Usage: `accelerate launch --config_file examples/accelerate/ddp.yaml ... tests/training/distributed_run.py FOLDER JSON`
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from models import tiny_target
from runs import losses, small_draft, small_trainer

from longspec_hf.training import LongSpecTrainer, TauEvaluator, TauInput
from longspec_hf.training.processes import export_draft, whole_draft

TEXTS = [TauInput(list(range(1, 20)), [5, 6, 7, 8] * 3, name=str(n)) for n in range(3)]


def train(folder: Path, **arguments) -> dict:
    """Train, save, measure tau; what this process saw."""
    heldout = TauEvaluator(TEXTS) if "eval_strategy" in arguments else None
    checkpoint = arguments.pop("resume", None)
    checkpoint = None if checkpoint is None else str(folder.parent / checkpoint)
    target = tiny_target()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    draft = small_draft(target, seed=0, draft_vocab_size=arguments.pop("draft_vocab_size", None))
    trainer = small_trainer(folder, target, draft, heldout=heldout, **arguments)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    export_draft(trainer.model, folder / "export", torch.bfloat16, writes=trainer.args.should_save)
    trainer.create_model_card()
    return {
        "losses": losses(trainer),
        "logged": [entry for entry in trainer.state.log_history if "ce" in entry],
        "steps": trainer.state.global_step,
        "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
        "tau": {k: v for entry in trainer.state.log_history for k, v in entry.items() if "tau" in k},
        "eval": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": whole_draft(trainer.accelerator.unwrap_model(trainer.model)).state_dict(),
        "sharded": [name for name, tensor in trainer.model.named_parameters() if type(tensor).__name__ == "DTensor"],
        "target_has_gradients": any(p.grad is not None or p.requires_grad for p in target.parameters()),
        "target_is_whole": all(torch.equal(target.state_dict()[name], tensor) for name, tensor in before.items()),
    }


def shard_on_cpu() -> None:
    """Let accelerate shard over gloo as PyTorch can: on a CPU it would pass over its FSDP settings and use DDP."""
    create = LongSpecTrainer.create_accelerator_and_postprocess

    def create_for_fsdp(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    LongSpecTrainer.create_accelerator_and_postprocess = create_for_fsdp


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    folder = Path(sys.argv[1])
    for name, arguments in json.loads(sys.argv[2]).items():
        seen = train(folder / name, **arguments)
        torch.save(seen, folder / f"{name}.rank{os.environ.get('RANK', 0)}.pt")
