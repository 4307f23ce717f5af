"""Measure tau of a draft on held-out texts: looping and other outputs apart, with and without the n-gram branch.

1. Prompts from installed packages that training left out (tokens only, no model needed but the tokenizer)::

    python examples/evaluate_tau.py prompts --target embedded --packages networkx jinja2 pandas --count 72 \
        --output data/prompts.jsonl

2. The target's own outputs, once, by plain `generate`: of every prompt one greedy and one sampled at T = 0.8::

    python examples/evaluate_tau.py generate --target embedded --prompts data/prompts.jsonl --output data/texts.jsonl

3. Tau of a draft on them, as a table and as CSV::

    python examples/evaluate_tau.py measure --target embedded --texts data/texts.jsonl \
        --draft model_cards/longspec-smollm2-135m-instruct --csv docs/benchmarks/training_tau.csv

Outputs are the target's whatever the draft proposes, so step 3 replays them: it runs the draft along the text and
counts what `generate(assistant_model=draft)` would have counted. `measure --real` calls `generate` itself and
compares.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspec_hf import LongSpecDraftModel, with_tree_settings
from longspec_hf.cli.options import dtype_of, positive
from longspec_hf.embedded import embedded_target_folder
from longspec_hf.training import TauEvaluator
from longspec_hf.training.heldout import (
    generate_outputs,
    load_texts,
    make_context_prompts,
    make_prompts_from_packages,
    save_texts,
)
from longspec_hf.training.tau import DEFAULT_TREES, TauInput, summarize

DECODINGS = ("greedy", "sampled")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure tau of a LongSpec draft.")
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="cut prompts from installed packages")
    prompts.add_argument("--packages", nargs="+", required=True, help="import names")
    prompts.add_argument("--count", type=positive, default=72)
    prompts.add_argument(
        "--contexts", type=positive, nargs="*", help="instead: the same places after contexts of these sizes"
    )
    prompts.add_argument("--output", required=True)
    generate = commands.add_parser("generate", help="the target's outputs")
    generate.add_argument("--prompts", required=True)
    generate.add_argument("--new-tokens", type=positive, default=128)
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--decoding", nargs="+", choices=DECODINGS, default=list(DECODINGS))
    generate.add_argument("--batch-size", type=positive, default=1)
    generate.add_argument("--output", required=True)
    measure = commands.add_parser("measure", help="tau of a draft")
    measure.add_argument("--texts", required=True)
    measure.add_argument("--draft", required=True)
    measure.add_argument("--trees", nargs="*", choices=list(DEFAULT_TREES), help="by default all")
    measure.add_argument("--limit", type=positive, default=None, help="measure only the first texts")
    measure.add_argument("--real", action="store_true", help="also run generate on greedy texts and compare")
    measure.add_argument("--csv", default=None)
    for command in (prompts, generate, measure):
        command.add_argument("--target", default="embedded", help="model name, folder, or `embedded`")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--seed", type=int, default=1)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, float] | None:
    args = make_parser().parse_args(arguments)
    dtype = dtype_of(args.dtype)
    if args.command == "generate" and args.temperature <= 0 and "sampled" in args.decoding:
        raise ValueError(f"`temperature` must be above 0, got {args.temperature}. Ask for `--decoding greedy`.")
    name = str(embedded_target_folder()) if args.target == "embedded" else args.target
    if args.command == "prompts":
        tokenizer = AutoTokenizer.from_pretrained(name)
        if args.contexts:
            texts = make_context_prompts(args.packages, tokenizer, args.count, args.contexts, args.seed)
        else:
            texts = make_prompts_from_packages(args.packages, tokenizer, args.count, seed=args.seed)
        save_texts(args.output, texts)
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    if args.command == "generate":
        _generate(args, target)
        return None
    return _measure(args, target)


def _generate(args: argparse.Namespace, target) -> None:
    """Write each text as soon as it is there, the shortest prompts first, and at the end all in the prompts' order."""
    prompts = load_texts(args.prompts)
    if not prompts:
        raise ValueError(f"`prompts` ({args.prompts}) is empty, expected at least one prompt. Make it with `prompts`.")
    texts: dict[tuple[int, int], TauInput] = {}

    def outputs() -> Iterator[TauInput]:
        for number, decoding in enumerate(args.decoding):
            temperature = 0.0 if decoding == "greedy" else args.temperature
            for place, text in generate_outputs(
                target, prompts, args.new_tokens, temperature, args.seed, args.batch_size
            ):
                texts[number, place] = text
                yield text

    save_texts(args.output, outputs())
    ordered = Path(f"{args.output}.partial")
    save_texts(ordered, [texts[place] for place in sorted(texts)])
    ordered.replace(args.output)
    looping = sum(text.looping for text in texts.values())
    print(f"{len(texts)} outputs, {looping} of them looping")


def _measure(args: argparse.Namespace, target) -> dict[str, float]:
    draft = LongSpecDraftModel.from_pretrained(args.draft, dtype=target.dtype).to(target.device).eval()
    texts = [text for text in load_texts(args.texts) if len(text.output_ids) > 1][: args.limit]
    evaluator = TauEvaluator(texts)
    if args.trees:
        evaluator.trees = {tree: evaluator.trees[tree] for tree in args.trees}
    rows = evaluator.rows(draft, target)
    if args.csv:
        device = torch.cuda.get_device_name() if target.device.type == "cuda" else platform.machine() + " CPU"
        versions = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *versions])
            writer.writeheader()
            writer.writerows({**row, **versions} for row in rows)
    metrics = summarize(rows)
    not_looping = sum(not text.looping for text in texts)
    print(f"{len(texts)} texts, {not_looping} of them not looping")
    print(f"{'tree':12s} {'all':>6s} {'looping':>8s} {'not looping':>12s}")
    for tree in evaluator.trees:
        values = [metrics.get(f"tau_{tree}{suffix}", float("nan")) for suffix in ("", "_looping", "_not_looping")]
        print(f"{tree:12s} {values[0]:6.2f} {values[1]:8.2f} {values[2]:12.2f}")
    for row in rows:
        row["sampling"] = "greedy" if row["decoding"] == "greedy" else "sampled"
    for group in ("kind", "sampling"):
        for value in dict.fromkeys(row[group] for row in rows):
            part = summarize([row for row in rows if row[group] == value])
            print(f"{value:14s} " + "  ".join(f"{tree} {part[f'tau_{tree}']:.2f}" for tree in evaluator.trees))
    if args.real:
        _compare(draft, target, evaluator, rows)
    return metrics


def _compare(draft, target, evaluator: TauEvaluator, rows: list[dict]) -> None:
    """Run `generate` on the greedy texts with the first tree; its rounds must be the replay's."""
    tree, settings = next(iter(evaluator.trees.items()))
    # Replay counts rounds only, and plain steps come by the clock.
    settings = replace(settings, fallback_to_plain=False).as_options()
    # Rows come text by text, one for each tree.
    for text, row in zip(evaluator.texts, rows[:: len(evaluator.trees)], strict=True):
        if text.decoding != "greedy":
            continue
        assert (row["name"], row["decoding"], row["tree"]) == (text.name, text.decoding, tree)
        ids = torch.tensor([text.prompt_ids], device=target.device)
        call = with_tree_settings(target.generation_config, **settings)
        call.update(do_sample=False, max_new_tokens=len(text.output_ids), return_dict_in_generate=True)
        output = target.generate(ids, generation_config=call, assistant_model=draft)
        same = output.sequences[0, ids.shape[1] :].tolist() == text.output_ids
        rounds = output.speculation_stats.rounds
        print(f"{text.name}: generate {rounds} rounds, replay {row['rounds']}, same text: {same}")


if __name__ == "__main__":
    main()
