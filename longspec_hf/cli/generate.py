"""`longspec-hf generate`: a prompt in, its continuation on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jinja2 import TemplateError

from ..pairs import encode_prompts
from .continuation import print_continuation
from .options import (
    add_decoding_options,
    add_pair_options,
    load_pair_of,
    warn_of_context,
)

DESCRIPTION = """Continue a prompt with a LongSpec pair. The text goes to stdout as it comes, statistics to stderr.

    longspec-hf generate report.txt --max-new-tokens 200
    git diff | longspec-hf generate - --system "Describe this change in one sentence."
    longspec-hf generate --prompt "Name three rivers." --temperature 0.8 --seed 1
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="file with the prompt; `-` or a pipe: stdin")
    parser.add_argument("--prompt", help="the prompt itself")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the tokenizer's chat template; by default where it has one",
    )
    parser.add_argument("--system", help="system message, with a chat template")
    parser.add_argument("--quiet", action="store_true", help="no statistics")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=256)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    prompt = read_prompt(args.file, args.prompt)
    pair = load_pair_of(args)
    try:
        inputs = encode_prompts(pair, [prompt], args.chat, args.system)
    except TemplateError as error:
        refused = "`system` must be a message" if args.system is not None else "the prompt must be one"
        raise ValueError(
            f"{refused} that the target's chat template takes, which says: {error}. Leave it out or use `--no-chat`."
        ) from error
    length = inputs["input_ids"].shape[1]
    warn_of_context(pair, length, args.max_new_tokens)
    print_continuation(args, pair, inputs, args.quiet)


def read_prompt(file: str | None, prompt: str | None) -> str:
    """The prompt from the one place that was given.

    Raises:
        ValueError: no place was given, or two, or the prompt is empty.
    """
    if file is not None and prompt is not None:
        raise ValueError(f"`file` ({file}) and `prompt` were both given, expected one of them.")
    if file is None and prompt is None and sys.stdin.isatty():
        raise ValueError("no prompt was given, expected a `file`, `--prompt` or a text on stdin.")
    if prompt is None:
        prompt = sys.stdin.read() if file is None or file == "-" else Path(file).read_text(encoding="utf-8")
    if not prompt.strip():
        raise ValueError("the prompt is empty, expected a text. Check the file or the command before the pipe.")
    return prompt
