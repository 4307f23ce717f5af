"""Answer a file of prompts in batches, one JSON line each.

    python examples/batch_file.py prompts.txt --output answers.jsonl --batch-size 4

The file has a prompt per line, or, as .jsonl, objects with a `prompt`. Prompts of similar length share a batch; the
output keeps the file's order. What is done stands in `answers.jsonl.partial`, written after every batch, until all is.
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
    positive,
    set_seed,
)
from longspec_hf.pairs import Pair, encode_prompts
from longspec_hf.report import describe_output


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    prompts = read_prompts(args.prompts)
    if args.output.is_dir():
        raise ValueError(f"`output` must be a file, got the folder {args.output}. Name a .jsonl file in it.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pair = load_pair_of(args)
    config = generation_config_of(args, pair.target)
    set_seed(args)
    lines = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    partial = args.output.with_name(args.output.name + ".partial")
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar, partial.open("w", encoding="utf-8") as done:
        for start in range(0, len(order), args.batch_size):
            chosen = order[start : start + args.batch_size]
            for index, answer in zip(chosen, answer_batch(pair, [prompts[i] for i in chosen], config), strict=True):
                lines[index] = json.dumps({"prompt": prompts[index], "answer": answer}, ensure_ascii=False) + "\n"
                done.write(lines[index])
            done.flush()
            bar.update(len(chosen))
    ordered = args.output.with_name(args.output.name + ".ordered")
    ordered.write_text("".join(lines), encoding="utf-8")
    ordered.replace(args.output)
    partial.unlink()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text or .jsonl file; blank lines are no prompts.

    Raises:
        ValueError: the file is no UTF-8, there is no prompt, or a line of .jsonl holds none.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` ({path}) must be UTF-8 text, got other bytes ({error}). Convert it.") from error
    # Not `splitlines`, which also cuts at characters that may stand in a prompt, such as form feeds.
    numbered = enumerate(text.split("\n"), 1)
    lines = [(number, line.removesuffix("\r")) for number, line in numbered if line.strip()]
    if not lines:
        raise ValueError(f"`prompts` ({path}) is empty, expected at least one prompt.")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"line {number} of {path}") for number, line in lines]


def _prompt_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} must be a JSON object with a `prompt`, got {line[:40]!r} ({error}).") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} must be a JSON object with a `prompt` that is a text, got {line[:40]!r}.")
    return prompt


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
    parser.add_argument("--batch-size", type=positive, default=4, help="default %(default)s")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=128)
    return parser


if __name__ == "__main__":
    main()
