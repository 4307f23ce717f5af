"""Options that commands and examples share: which models, how to decode, which tree."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..configuration_longspec import AUTO
from ..pairs import DTYPES, EMBEDDED, Pair, load_pair
from ..settings import TREE_SETTINGS

SAMPLING = ("top_p", "top_k", "min_p")
FLOATING = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """`--target`, `--draft`, `--dtype`, `--device`, `--plain`."""
    group = parser.add_argument_group("models")
    group.add_argument("--target", default=EMBEDDED, help="Hub id, folder or `embedded` (SmolLM2-135M-Instruct)")
    group.add_argument("--draft", help="Hub id or folder; the shipped draft for the embedded target")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of both models; auto: the checkpoint's")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default the first GPU, else the CPU")
    group.add_argument("--plain", action="store_true", help="leave the draft out, to compare")


def add_decoding_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Length, sampling, seed and tree."""
    group = parser.add_argument_group("decoding", "Greedy, unless a temperature is given.")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="default %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, help="sample at this temperature; 0: greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int, help="of the random stream; a fresh one by default")
    tree = parser.add_argument_group("tree", "By default as the draft's configuration says.")
    tree.add_argument(
        "--tree-shape",
        type=_shape_part,
        nargs="*",
        action=_TreeShape,
        metavar="NODES",
        help="nodes kept at each depth; auto: what promises the most tokens a second; nothing: no beam",
    )
    tree.add_argument("--max-tree-nodes", type=int, help="most nodes verified a round, the root included")
    tree.add_argument("--ngram-branch-length", type=int, help="tokens copied from the context; 0: none")
    tree.add_argument("--ngram-min-match", type=int, help="shortest match that is copied after")
    tree.add_argument(
        "--recheck-near-ties",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="decide nearly tied tokens as plain decoding would, for bf16 and fp16",
    )
    tree.add_argument(
        "--fallback-to-plain",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="go on without speculation where it does not pay",
    )
    tree.add_argument(
        "--capture-rounds",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run rounds on a GPU as captured CUDA graphs, where the target allows it",
    )


def positive(text: str) -> int:
    """An integer of at least 1, as the `type` of an option."""
    number = int(text) if text.strip().lstrip("+-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return number


def dtype_of(name: str) -> torch.dtype:
    """The floating-point dtype of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FLOATING:
        raise ValueError(f"`dtype` must be one of {', '.join(FLOATING)}, got {name!r}.")
    return FLOATING[name]


def _shape_part(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or numbers, got {text!r}") from None


class _TreeShape(argparse.Action):
    """`auto` alone, or numbers."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if AUTO in values and len(values) > 1:
            parser.error(f"argument {option_string}: expected auto or numbers, got both")
        setattr(namespace, self.dest, AUTO if AUTO in values else values)


def load_pair_of(args: argparse.Namespace) -> Pair:
    """The pair the options name, without its draft for `--plain`; the decoding options are checked first.

    Raises:
        ValueError: an option is out of range or names nothing that can be loaded.
    """
    validate_decoding_options(args)
    pair = load_pair(args.target, args.draft, args.dtype, args.device)
    return replace(pair, draft=None) if args.plain else pair


def validate_decoding_options(args: argparse.Namespace) -> None:
    """Check what `add_decoding_options` read.

    Raises:
        ValueError: an option is out of range, or shapes a sampling that greedy decoding has not.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {args.max_new_tokens}.")
    if args.temperature < 0:
        raise ValueError(f"`temperature` must not be negative, got {args.temperature}. Use 0 for greedy decoding.")
    for name, value in _given(args, SAMPLING).items():
        if not args.temperature:
            raise ValueError(f"`{name}` ({value}) needs sampling, got greedy decoding. Give a `temperature` above 0.")


def generation_config_of(args: argparse.Namespace, target: PreTrainedModel) -> GenerationConfig:
    """The target's generation configuration with the options over it, returning dictionaries."""
    fields = target.generation_config.to_diff_dict()
    if args.temperature:
        fields |= {"do_sample": True, "temperature": args.temperature, **_given(args, SAMPLING)}
    else:
        fields = {name: value for name, value in fields.items() if name not in (*SAMPLING, "temperature")}
        fields["do_sample"] = False
    fields.pop("max_length", None)
    fields.pop("_from_model_config", None)  # with it, transformers drops the tree's settings
    fields |= _given(args, ("repetition_penalty", *TREE_SETTINGS))
    config = GenerationConfig(**fields, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True)
    if config.pad_token_id is None:  # else transformers says so at every call
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return config


def set_seed(args: argparse.Namespace) -> None:
    """Start the random stream at `--seed`, where one was given."""
    if args.seed is not None:
        torch.manual_seed(args.seed)


def warn_of_context(pair: Pair, prompt_tokens: int, max_new_tokens: int) -> None:
    """Say on stderr if the text can outgrow what the target was made for."""
    if prompt_tokens + max_new_tokens > pair.context:
        print(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the {pair.context} the target was "
            "made for; expect worse text at the end.",
            file=sys.stderr,
        )


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
