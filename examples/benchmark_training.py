"""Training speed in one process and in two, with a GPU each, and whether their loss curves agree.

Every run has the same rows, offsets and shifts per step, so the curves should be equal up to the order of sums::

    python examples/benchmark_training.py --csv docs/benchmarks/training_two_gpus.csv

The target is a random one of about 250M parameters, or any other with `--target`. One process runs with the whole
batch; two run with half of it each under every set-up of `--configs`, and once with a whole batch each ("doubled").
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from longspec_hf import LongSpecDraftModel
from longspec_hf.training import LongSpecTrainer, LongSpecTrainingArguments, PackedRows

HERE = Path(__file__).parent
UNTIMED_STEPS = 10
FIELDS = (
    *("run", "processes", "rows_per_process", "row_tokens", "steps", "tokens_per_second", "speed_up"),
    *("first_loss", "last_loss", "largest_loss_difference", "device", "torch", "transformers"),
)


class StepClock(TrainerCallback):
    """Seconds from the end of step `UNTIMED_STEPS` to the end of the last."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in (UNTIMED_STEPS, args.max_steps):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            if state.global_step == UNTIMED_STEPS:
                self.began = time.perf_counter()
            self.ended = time.perf_counter()


def random_target(dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A Llama of 16 layers of 1024."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def work(options: argparse.Namespace) -> None:
    """Train in this process, one of those that `accelerate launch` started; the first writes what it measured."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if options.target is None:
        target = random_target(dtype)
    else:
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype)
    torch.manual_seed(0)
    draft = LongSpecDraftModel.from_target(target, sliding_window=512)
    # Tokens in the proportions of a text, so that there is something to learn.
    count = options.steps * options.rows * int(os.environ.get("WORLD_SIZE", 1)) * options.row_tokens
    vocab = target.config.vocab_size
    tokens = (np.random.default_rng(0).zipf(1.2, count) % vocab).astype(np.uint32)
    args = LongSpecTrainingArguments(
        output_dir=str(options.folder),
        per_device_train_batch_size=options.rows,
        shift_groups=options.groups,
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    clock = StepClock()
    trainer = LongSpecTrainer(
        model=draft,
        target_model=target,
        args=args,
        train_dataset=PackedRows(tokens, options.row_tokens),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokens_done = (options.steps - UNTIMED_STEPS) * options.rows * options.row_tokens * args.world_size
        measured = {
            "processes": args.world_size,
            "steps": options.steps,
            "tokens_per_second": round(tokens_done / (clock.ended - clock.began)),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        }
        (options.folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(options: argparse.Namespace, config: str, processes: int, rows: int, groups: int) -> dict:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = [__file__, "--folder", folder, "--steps", options.steps, "--rows", rows, "--groups", groups]
        script += ["--row-tokens", options.row_tokens]
        script += [] if options.target is None else ["--target", options.target]
        command = [sys.executable]
        if processes > 1:
            file = HERE / "accelerate" / f"{config}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", processes]
            command += ["--main_process_port", 0]
            command += [] if torch.cuda.is_available() else ["--mixed_precision", "no"]
        subprocess.run([*map(str, [*command, *script])], check=True, env=os.environ)
        measured = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
        LongSpecDraftModel.from_pretrained(folder)  # what was written is a whole draft
        return {"run": config, "rows_per_process": rows, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="model name or folder; by default a random one")
    parser.add_argument("--rows", type=int, default=16, help="rows per step of one process")
    parser.add_argument("--row-tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--configs", nargs="*", default=["ddp", "fsdp2"], help="files of examples/accelerate")
    parser.add_argument("--csv", type=Path, help="file to write")
    parser.add_argument("--groups", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        return work(options)
    if options.rows % 2 or options.steps <= UNTIMED_STEPS:
        parser.error(f"`--rows` must be even and `--steps` more than {UNTIMED_STEPS}.")
    runs = [launch(options, "one process", 1, options.rows, 2)]
    runs += [launch(options, config, 2, options.rows // 2, 1) for config in options.configs]
    doubled = launch(options, options.configs[0], 2, options.rows, 1) if options.configs else None
    runs += [] if doubled is None else [{**doubled, "run": f"{doubled['run']} doubled"}]
    alone = runs[0]
    for run in runs:
        losses = run.pop("losses")
        alone.setdefault("curve", losses)
        run |= {"first_loss": losses[0], "last_loss": losses[-1], "row_tokens": options.row_tokens}
        run["speed_up"] = round(run["tokens_per_second"] / alone["tokens_per_second"], 3)
        if "doubled" not in run["run"]:
            differences = [abs(a - b) for a, b in zip(losses, alone["curve"], strict=True)]
            run["largest_loss_difference"] = round(max(differences), 6)
        run |= {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = [{name: run.get(name, "") for name in FIELDS} for run in runs]
    for line in lines:
        print("  ".join(f"{name}={value}" for name, value in line.items()))
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)
    return None


if __name__ == "__main__":
    main()
