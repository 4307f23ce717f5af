"""Random-weight models of real sizes that count, and drafts that guess right at a chosen rate: for timing alone.

The models do all the work of their size, and the text they write is known beforehand, whatever is rounded how:
embeddings outweigh everything the layers add, and the head answers token t with t + 1. So a draft can be scripted on
the device, which a captured round needs, and every way of decoding must write the same text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from ..configuration_longspec import LongSpecDraftConfig
from ..modeling_longspec import LongSpecDraftModel

CYCLE = 32000
"""Tokens counted through; far more than any output has, so that nothing is ever repeated."""
EMBEDDING_SCALE = 30.0
"""Standard deviation of an embedding's channels. What tens of layers of random weights add stays well below it."""
CERTAIN = 1e4

SHAPES = {
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072 + 8192,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072 + 8192,
    ),
    "qwen2.5-14b": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=131072 + 8192,
    ),
}
"""Sizes of published models, from their configurations; contexts raised to 128k with room for an output."""


def counting_target(shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random-weight model of a named shape that continues token t with t + 1, modulo `CYCLE`.

    Args:
        shape: a key of `SHAPES`.
        device, dtype: of the model, which is made there.

    Raises:
        ValueError: there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")
    config = copy.deepcopy(SHAPES[shape])
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device=device, dtype=dtype)
    return make_counting(model).eval()


@torch.no_grad()
def make_counting(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model with an untied head the embeddings and the head of a counting one, in place."""
    embeddings: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    weight, head = embeddings.weight, output.weight
    cycle = min(CYCLE, weight.shape[0])
    generator = torch.Generator(weight.device).manual_seed(0)
    for start in range(0, weight.shape[0], cycle):
        rows = slice(start, min(start + cycle, weight.shape[0]))
        block = torch.randn(weight[rows].shape, generator=generator, device=weight.device)
        head[rows] = block.to(head.dtype)
        weight[rows] = (EMBEDDING_SCALE * block).to(weight.dtype)
    head[:cycle] = head[:cycle].roll(1, dims=0)  # row t + 1 recognises token t
    return model


class GuessingDraft(LongSpecDraftModel):
    """A random-weight draft that does all the work of a real one and then guesses right at a chosen rate.

    Whether the token after a position is among the draft's proposals is decided beforehand, by chance, for every
    sequence of a batch and every position.
    """

    def set_guesses(self, rate: float, sequences: int, positions: int, seed: int = 0) -> None:
        """Choose where the draft is right.

        Args:
            rate: share of the positions.
            sequences, positions: of the call.
            seed: of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        right = torch.rand(sequences, positions, generator=generator) < rate
        self.bonus = torch.where(right, CERTAIN, -CERTAIN).to(device=self.device, dtype=self.dtype)
        vocab_size = self.config.vocab_size
        self.following = (torch.arange(vocab_size, device=self.device) + 1) % min(CYCLE, vocab_size)

    def next_token_logits(
        self,
        hidden: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The draft's scores, the true next token far above or far below all others."""
        logits = head(hidden)
        bonus = self.bonus[: token_ids.shape[0]].gather(1, position_ids)
        return logits.scatter_add_(-1, self.following[token_ids].unsqueeze(-1), bonus.unsqueeze(-1).to(logits.dtype))


def guessing_draft(target: PreTrainedModel, draft_vocab_size: int | None = 32768, **settings: Any) -> GuessingDraft:
    """A guessing draft of the target's sizes. The draft's vocabulary holds the tokens counted through."""
    config = LongSpecDraftConfig.from_target(target.config, draft_vocab_size=draft_vocab_size, **settings)
    with torch.device(target.device):
        draft = GuessingDraft(config)
    return draft.to(device=target.device, dtype=target.dtype).eval()


def rate_for(tau: float, depth: int) -> float:
    """The rate at which `1 + p + ... + p ** depth`, the mean tokens of a round, is `tau`.

    Raises:
        ValueError: no rate from 0 to 1 gives it.
    """
    if not 1 <= tau <= depth + 1:
        raise ValueError(f"`tau` must lie between 1 and {depth + 1} (the tree's depth and one), got {tau}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(depth + 1)) < tau else (low, middle)
    return low
