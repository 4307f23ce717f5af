"""One text, printed as it is generated: what `generate` and several examples do with their prompt."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from transformers import TextStreamer

from ..pairs import Pair
from ..report import describe_output
from .options import generation_config_of, set_seed


def print_continuation(
    args: argparse.Namespace, pair: Pair, inputs: dict[str, torch.Tensor], quiet: bool = False
) -> None:
    """Continue a prompt: the text to stdout as it comes, statistics to stderr.

    Args:
        args: the decoding options.
        pair: target and draft.
        inputs: the encoded prompt, one sequence.
        quiet: no statistics.
    """
    config = generation_config_of(args, pair.target)
    set_seed(args)
    began = time.perf_counter()
    output = pair.target.generate(
        **inputs,
        assistant_model=pair.draft,
        generation_config=config,
        streamer=TextStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - began
    if not quiet:
        print(describe_output(output, inputs["input_ids"].shape[1], seconds), file=sys.stderr)
