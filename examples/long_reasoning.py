"""A long chain of thought: few tokens in, up to 16k out.

    python examples/long_reasoning.py "How many primes are there below 60?" --temperature 0.6 --top-p 0.95
    python examples/long_reasoning.py --target Qwen/QwQ-32B-Preview --draft drafts/qwq --device cuda --dtype bfloat16

The limit is what the target's context leaves of `--max-new-tokens`. The draft's memory does not grow with the output.
"""

from __future__ import annotations

import argparse
import sys

from longspec_hf.cli.continuation import print_continuation
from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    load_pair_of,
)
from longspec_hf.pairs import encode_prompts

QUESTION = (
    "A farmer has 17 sheep. All but 9 run away, then half of the rest have one lamb each. How many are there now?"
)
REQUEST = "{question}\n\nThink step by step, check every step, and put the answer on a line of its own at the end."
LONGEST_OUTPUT = 16384


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    pair = load_pair_of(args)
    inputs = encode_prompts(pair, [REQUEST.format(question=args.question)])
    length = inputs["input_ids"].shape[1]
    if length + args.max_new_tokens > pair.context:
        args.max_new_tokens = pair.context - length
        print(f"The target's context of {pair.context} leaves {args.max_new_tokens} new tokens.", file=sys.stderr)
    print_continuation(args, pair, inputs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=LONGEST_OUTPUT)
    return parser


if __name__ == "__main__":
    main()
