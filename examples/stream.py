"""Use the text while it is made: `generate` in a thread, its pieces in a loop.

    python examples/stream.py "Tell me about rivers."

A server would send each piece on. LongSpec commits several tokens a round and hands them to the streamer one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    generation_config_of,
    load_pair_of,
    set_seed,
)
from longspec_hf.pairs import Pair, encode_prompts
from longspec_hf.report import describe_output


def stream(pair: Pair, inputs: dict[str, torch.Tensor], config: GenerationConfig) -> Iterator[str | Any]:
    """Pieces of text as they come, then the output of `generate`. What is raised in the thread is raised here."""
    streamer = TextIteratorStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate() -> Any:
        try:
            return pair.target.generate(
                **inputs, assistant_model=pair.draft, generation_config=config, streamer=streamer
            )
        except BaseException:
            streamer.end()  # else the loop below would wait for ever
            raise

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(generate)
        yield from streamer
        yield future.result()


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    pair = load_pair_of(args)
    inputs = encode_prompts(pair, [args.prompt])
    set_seed(args)
    began = time.perf_counter()
    for piece in stream(pair, inputs, generation_config_of(args, pair.target)):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        else:
            seconds = time.perf_counter() - began
            print()
            print(describe_output(piece, inputs["input_ids"].shape[1], seconds), file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="Tell me about the longest river on Earth.")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=120)
    return parser


if __name__ == "__main__":
    main()
