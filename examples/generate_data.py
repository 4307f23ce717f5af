"""Make training data for a draft: tokens of text files, and continuations written by the target itself.

Tokenize sources and documents (here: an installed Python environment without the packages kept for evaluation)::

    python examples/generate_data.py tokenize --target embedded --output data/corpus.npy \
        --paths "$(python -c 'import site; print(site.getsitepackages()[0])')" --exclude networkx jinja2 pandas

Let the target continue prompts cut from those texts, half of them with an instruction around::

    python examples/generate_data.py continue --target embedded --tokens data/corpus.npy --output data/own.npy \
        --count 768 --prompt-length 1024 --new-tokens 512 --temperatures 0.8

What is done is written after every batch. `--from-start 0.5` lets half of the prompts begin where a text begins.

Give both to `examples/train_draft.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from longspec_hf.cli.options import dtype_of, positive
from longspec_hf.embedded import embedded_target_folder
from longspec_hf.training import continue_batches, make_prompts, pack_texts, read_texts, save_tokens
from longspec_hf.training.data import read_found_file

SUFFIXES = (".py", ".md", ".rst", ".txt")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make training data for a LongSpec draft.")
    commands = parser.add_subparsers(dest="command", required=True)
    tokenize = commands.add_parser("tokenize", help="text files and folders to tokens")
    tokenize.add_argument(
        "--paths", nargs="+", required=True, help="files, folders or .jsonl with `text` or `messages`"
    )
    tokenize.add_argument(
        "--exclude", nargs="*", default=[], help="of the folders, leave out what lies below these names"
    )
    tokenize.add_argument("--max-tokens", type=positive, default=None)
    own = commands.add_parser("continue", help="prompts continued by the target")
    own.add_argument("--tokens", required=True, help="output of `tokenize`")
    own.add_argument("--count", type=positive, default=768)
    own.add_argument("--prompt-length", type=positive, default=1024)
    own.add_argument("--new-tokens", type=positive, default=512)
    own.add_argument("--batch-size", type=positive, default=256)
    own.add_argument("--temperatures", type=float, nargs="+", default=[0.8], help="in turn, one a batch; 0 is greedy")
    own.add_argument("--instructed", type=float, default=0.5, help="share of prompts with an instruction")
    own.add_argument("--from-start", type=float, default=0.0, help="share of prompts that begin where a text begins")
    own.add_argument("--dtype", default="bfloat16")
    own.add_argument("--seed", type=int, default=0)
    for command in (tokenize, own):
        command.add_argument("--target", default="embedded", help="model name, folder, or `embedded`")
        command.add_argument("--output", required=True, help=".npy file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    dtype = dtype_of(args.dtype) if args.command == "continue" else None
    if args.command == "continue" and min(args.temperatures) < 0:
        raise ValueError(f"`temperatures` must not be negative, got {min(args.temperatures)}. Use 0 for greedy text.")
    name = str(embedded_target_folder()) if args.target == "embedded" else args.target
    tokenizer = AutoTokenizer.from_pretrained(name)
    if args.command == "tokenize":
        texts = _texts(args.paths, set(args.exclude), tokenizer)
        tokens = pack_texts(texts, tokenizer, max_tokens=args.max_tokens)
        if not len(tokens):
            raise ValueError(
                f"`paths` ({', '.join(args.paths)}) gave 0 tokens, expected some text. In folders only "
                f"{', '.join(SUFFIXES)} count; name .jsonl files themselves, and check `exclude`."
            )
        _save(args.output, tokens)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    source = np.load(args.tokens, mmap_mode="r").reshape(-1)
    prompts = make_prompts(
        source, tokenizer, args.count, args.prompt_length, args.instructed, args.seed, args.from_start
    )
    done = np.empty((0, args.prompt_length + args.new_tokens), dtype=source.dtype)
    for rows in continue_batches(target, prompts, args.new_tokens, args.batch_size, args.temperatures, args.seed):
        done = np.concatenate([done, rows.astype(source.dtype)])
        _save(args.output, done)


def _save(path: str, tokens: np.ndarray) -> None:
    save_tokens(path, tokens)
    print(f"{path}: {tokens.size:,} tokens, shape {tokens.shape}", flush=True)


def _texts(paths: list[str], excluded: set[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield from read_texts([path], tokenizer)
            continue
        # In random order, so that any part of the tokens is a sample of all.
        files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
        files = [
            file for file in files if not excluded & {part.split("-")[0] for part in file.relative_to(path).parts}
        ]
        for index in np.random.default_rng(0).permutation(len(files)):
            if text := read_found_file(files[index]):
                yield text


if __name__ == "__main__":
    main()
