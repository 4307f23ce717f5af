"""Summarise a long document.

    python examples/summarize_document.py report.txt --max-new-tokens 300
    python examples/summarize_document.py report.txt --target Qwen/Qwen2.5-7B-Instruct --draft runs/final --device cuda

By default the embedded target summarises this project's page on training. A document longer than the target's context
is cut, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longspec_hf.cli.continuation import print_continuation
from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    load_pair_of,
)
from longspec_hf.pairs import encode_prompts

DEFAULT_DOCUMENT = Path(__file__).parent.parent / "docs" / "training.md"
REQUEST = (
    "Summarise this document in a few sentences.\n\n{document}\n\nSummarise the document above in a few sentences."
)
ROOM_FOR_REQUEST = 128  # tokens of the request and the chat template


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    document = args.document.read_text(encoding="utf-8")
    pair = load_pair_of(args)
    room = pair.context - args.max_new_tokens - ROOM_FOR_REQUEST
    limit = room if args.document_tokens is None else min(room, args.document_tokens)
    prompt = REQUEST.format(document=cut(pair.tokenizer, document, limit))
    inputs = encode_prompts(pair, [prompt])
    print_continuation(args, pair, inputs)


def cut(tokenizer: PreTrainedTokenizerBase, document: str, limit: int) -> str:
    """The head of the document, at most `limit` tokens."""
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    if len(ids) <= limit:
        return document
    if limit < 1:
        raise ValueError("`max_new_tokens` leaves no room for a document in the target's context. Lower it.")
    print(f"The document has {len(ids)} tokens; the first {limit} are summarised.", file=sys.stderr)
    return tokenizer.decode(ids[:limit])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", nargs="?", type=Path, default=DEFAULT_DOCUMENT, help="text file")
    parser.add_argument("--document-tokens", type=int, help="at most so many tokens of it")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=200)
    return parser


if __name__ == "__main__":
    main()
