"""A chat whose cache grows from turn to turn: what was said before is never read again.

    python examples/chat.py
    python examples/chat.py --say "Name a river." "And a longer one?"

Every turn hands the last turn's cache back to `generate` together with the whole conversation; only the new tokens are
prefilled. An empty line or the end of input ends the chat.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from transformers import TextStreamer

from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    generation_config_of,
    load_pair_of,
    set_seed,
)
from longspec_hf.hook import CACHE_ARG  # `cache` in newer transformers, `past_key_values` before
from longspec_hf.pairs import Pair
from longspec_hf.report import describe_output


class Chat:
    """A conversation: its messages, their ids `[1, n]` and the target's cache of them."""

    def __init__(self, pair: Pair, generation_config) -> None:
        self.pair = pair
        self.generation_config = generation_config
        self.messages: list[dict[str, str]] = []
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self.cache = None

    def say(self, message: str) -> str:
        """The target's answer, streamed to stdout; the statistics go to stderr."""
        tokenizer = self.pair.tokenizer
        self.messages.append({"role": "user", "content": message})
        ids = self._extended_ids().to(self.pair.target.device)
        known = {} if self.cache is None else {CACHE_ARG: self.cache}
        began = time.perf_counter()
        output = self.pair.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=self.pair.draft,
            generation_config=self.generation_config,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **known,
        )
        seconds = time.perf_counter() - began
        print(describe_output(output, ids.shape[1], seconds), file=sys.stderr)
        self.ids, self.cache = output.sequences.cpu(), output[CACHE_ARG]
        answer = tokenizer.decode(self.ids[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _extended_ids(self) -> torch.Tensor:
        """Ids of the conversation: the ones so far, which the cache holds, and those of the new message.

        A template that changes what it showed before (some drop old thoughts) makes the cache worthless; then the
        conversation is read anew.
        """
        tokenizer = self.pair.tokenizer
        text = tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        before = tokenizer.decode(self.ids[0], clean_up_tokenization_spaces=False)
        if not text.startswith(before):
            self.ids, self.cache, before = self.ids[:, :0], None, ""
        new = tokenizer(text[len(before) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([self.ids, new], dim=1)


def read_messages() -> Iterator[str]:
    """Lines from the terminal, up to an empty one."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def main(arguments: list[str] | None = None) -> Chat:
    args = make_parser().parse_args(arguments)
    pair = load_pair_of(args)
    set_seed(args)
    chat = Chat(pair, generation_config_of(args, pair.target))
    for message in args.say or read_messages():
        chat.say(message)
    return chat


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--say", nargs="+", help="messages, instead of asking for them")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=200)
    return parser


if __name__ == "__main__":
    main()
