"""Dispatch of `longspec-hf`, and what becomes of errors: one line and an exit code, no traceback."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from ..version import __version__
from . import bench, card, convert, env, export, generate, train

COMMANDS = (generate, bench, convert, train, card, export, env)
USER_ERROR, ENVIRONMENT_ERROR, INTERRUPTED = 2, 1, 130


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="longspec-hf", description="LongSpec for Hugging Face transformers: speculative decoding, same tokens."
    )
    parser.add_argument("--version", action="version", version=f"longspec-hf {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, for bug reports")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for a user's mistake, 1 for a missing file or package."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if rest and args.command != "train":  # `train` has a parser of its own
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f"longspec-hf {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR if isinstance(error, ValueError) else ENVIRONMENT_ERROR
    return 0
