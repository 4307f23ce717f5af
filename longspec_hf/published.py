"""The published LongSpec pairs: which draft was trained for which target (github.com/sail-sg/LongSpec)."""

from __future__ import annotations

from typing import NamedTuple


class PublishedPair(NamedTuple):
    """A target and the draft its authors published; the draft must be converted, see `convert_checkpoint`.

    Attributes:
        target, draft: Hub repositories.
        context_length: of the target, in tokens.
        dtype: recommended for both.
    """

    target: str
    draft: str
    context_length: int
    dtype: str


PUBLISHED_PAIRS = (
    PublishedPair("lmsys/vicuna-7b-v1.5-16k", "sail/longspec-vicuna-7b-v1.5-16k", 16_384, "float16"),
    PublishedPair("lmsys/vicuna-13b-v1.5-16k", "sail/longspec-vicuna-13b-v1.5-16k", 16_384, "float16"),
    PublishedPair("lmsys/longchat-7b-v1.5-32k", "sail/longspec-longchat-7b-v1.5-32k", 32_768, "float16"),
    PublishedPair("lmsys/longchat-13b-16k", "sail/longspec-longchat-13b-16k", 16_384, "float16"),
    PublishedPair(
        "gradientai/Llama-3-8B-Instruct-262k", "sail/longspec-Llama-3-8B-Instruct-262k", 262_144, "bfloat16"
    ),
    PublishedPair("Qwen/QwQ-32B-Preview", "sail/longspec-QwQ-32B-Preview", 32_768, "bfloat16"),
)


def published_target(draft: str) -> str | None:
    """Hub repository of the target a published draft was trained for; `None` for any other draft."""
    return {pair.draft: pair.target for pair in PUBLISHED_PAIRS}.get(draft)
