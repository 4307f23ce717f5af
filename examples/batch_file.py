"""Answer a file of prompts in batches, one JSON line each.

    python examples/batch_file.py prompts.txt --output answers.jsonl --batch-size 4

The file has a prompt per line, or, as .jsonl, objects with a `prompt`. Prompts of similar length share a batch; the
output keeps the file's order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import GenerationConfig

from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    generation_config_of,
    load_pair_of,
    set_seed,
)
from longspec_hf.pairs import Pair, encode_prompts
from longspec_hf.report import describe_output


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {args.batch_size}.")
    prompts = read_prompts(args.prompts)
    pair = load_pair_of(args)
    config = generation_config_of(args, pair.target)
    set_seed(args)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for start in range(0, len(order), args.batch_size):
            chosen = order[start : start + args.batch_size]
            for index, answer in zip(chosen, answer_batch(pair, [prompts[i] for i in chosen], config), strict=True):
                answers[index] = answer
            bar.update(len(chosen))
    lines = (json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in zip(prompts, answers, strict=True))
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text or .jsonl file; empty lines are no prompts."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines


def answer_batch(pair: Pair, prompts: list[str], config: GenerationConfig) -> list[str]:
    """Answers to prompts that are decoded together; the statistics go to stderr."""
    inputs = encode_prompts(pair, prompts)
    began = time.perf_counter()
    output = pair.target.generate(**inputs, assistant_model=pair.draft, generation_config=config)
    length = inputs["input_ids"].shape[1]
    tqdm.write(describe_output(output, length, time.perf_counter() - began), file=sys.stderr)
    return pair.tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="file of prompts")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file of answers")
    parser.add_argument("--batch-size", type=int, default=4, help="default %(default)s")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=128)
    return parser


if __name__ == "__main__":
    main()
