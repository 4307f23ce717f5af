"""Times of the engine's rounds: as a whole, part by part, and beside the floor."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from longspec_hf_kernels import hybrid_tree_attention
from transformers import PreTrainedModel

from ..cache import LongSpecCache
from ..candidate_generator import LongSpecCandidateGenerator
from ..engine import Engine
from ..engine.capture import Captured
from ..modeling_longspec import LongSpecDraftModel
from ..settings import TreeSettings
from ..target import bind
from .device import measure
from .floor import cache_bytes, draft_bytes, target_bytes

ROUNDS = 20
SPARE_ROWS = 2048


@dataclass(frozen=True)
class RoundTimes:
    """Milliseconds of rounds at one context.

    Attributes:
        round_ms: median of whole rounds in a row, from one's end to the next's: what the host does meanwhile counts
            where the device waits for it.
        floor_ms: the bytes of such a round over the copy rate.
        tau: tokens a round.
        parts: milliseconds of the replays of each part by itself.
    """

    context: int
    nodes: int
    levels: int
    round_ms: float
    floor_ms: float
    tau: float
    parts: dict[str, float]


def engine_at(
    target: PreTrainedModel, draft: LongSpecDraftModel, settings: TreeSettings, context: int, sequences: int = 1
) -> Engine:
    """An engine whose cache holds `context` random rows, as after a prefill of that length, and room for more.

    Random rows cost what real ones cost, and a prefill of 128k tokens is saved.
    """
    device, config = target.device, target.config
    cache = LongSpecCache()
    cache.reserve(context + SPARE_ROWS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        rows = torch.randn(
            2, sequences, config.num_key_value_heads, context, head_dim, device=device, dtype=target.dtype
        )
        cache.update(rows[0], rows[1], index)
        del rows
    cache.begin_rounds(sequences)
    generator = LongSpecCandidateGenerator(draft, bind(draft, target), settings, sequences)
    window = draft.config.sliding_window
    ids = torch.randint(0, config.vocab_size, (sequences, window)).tolist()
    generator.start(ids, torch.arange(context - window, context, device=device).expand(sequences, -1))
    generator.append([[row] for row in range(sequences)])
    engine = Engine(target, generator, cache)
    engine.load([SPARE_ROWS] * sequences, None)
    return engine


def step(engine: Engine, settings: TreeSettings) -> tuple[torch.cuda.Event, int]:
    """One greedy round and its bookkeeping; an event behind all that it gave the device, and tokens drawn."""
    engine.prepare(settings, greedy=True)
    _, tokens = engine.greedy_round(settings)
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    lengths = engine.cache.row_lengths
    engine.cache.set_lengths([old + len(new) for old, new in zip(lengths, tokens, strict=True)])
    engine.generator.append(tokens, projected=True)
    return end, sum(map(len, tokens))


@torch.no_grad()
def time_rounds(
    target: PreTrainedModel,
    draft: LongSpecDraftModel,
    settings: TreeSettings,
    context: int,
    rate: float,
    sequences: int = 1,
    with_parts: bool = False,
) -> RoundTimes:
    """Measure rounds of `settings` at a context, without gradients, as `generate` runs them.

    Args:
        rate: bytes a second of a copy (`copy_rate`).
        with_parts: time the parts too.
    """
    engine = engine_at(target, draft, settings, context, sequences)
    try:
        step(engine, settings)
        ends, counts = zip(*[step(engine, settings) for _ in range(2 + ROUNDS)], strict=True)
        ends[-1].synchronize()
        times = [before.elapsed_time(after) for before, after in pairwise(ends[1:])]
        levels = len(settings.tree_shape)
        read = target_bytes(target) + cache_bytes(engine.cache, sequences)
        read += levels * draft_bytes(draft, engine.generator.bound, engine.cache, sequences)
        parts = time_parts(engine, settings) if with_parts else {}
    finally:
        engine.close()
    return RoundTimes(
        context=context,
        nodes=settings.max_nodes,
        levels=levels,
        round_ms=statistics.median(times),
        floor_ms=read / rate * 1e3,
        tau=statistics.mean(counts[2:]) / sequences,
        parts=parts,
    )


def time_parts(engine: Engine, settings: TreeSettings) -> dict[str, float]:
    """Milliseconds of each part of a round, captured by itself. The engine's state is used up."""
    drafted = engine.draft(settings)
    logits = engine.verify(drafted)
    visited, report = engine.walk(drafted, logits, settings)
    attend = engine.attention_of(drafted)
    sequences, nodes = drafted.tree.token_ids.shape
    config = engine.target.config
    head_dim = engine.generator.draft.config.head_dim
    query = torch.randn(
        sequences, config.num_attention_heads, nodes, head_dim, device=engine.device, dtype=engine.target.dtype
    )
    state = engine.state

    def attention() -> None:
        layers: Any = engine.cache.layers
        for layer in layers:
            keys, values = layer.buffers(sequences)
            hybrid_tree_attention(
                query,
                keys,
                values,
                state.lengths,
                attend.ancestor_bits,
                starts=state.starts,
                depths=attend.depths,
                key_depths=attend.depths,
                scale=head_dim**-0.5,
            )

    def beam() -> None:
        engine.forward.beam(state, settings, drafted.positions)

    parts = {
        "draft": lambda: engine.draft(settings),
        "of it beam": beam,
        "verify": lambda: engine.verify(drafted),
        "of it attention": attention,
        "walk": lambda: engine.walk(drafted, logits, settings),
        "commit": lambda: engine.commit_paths(drafted, visited, report[:, 1], report[:, 2:]),
    }
    # All graphs live until the last is timed: newer PyTorch frees the workspace that cuBLAS has for a stream when a
    # graph captured on it is destroyed, though others may use it (pytorch/pytorch issue 193402).
    graphs = {name: Captured(function, engine.device, engine.pool) for name, function in parts.items()}
    times = {}
    for name, captured in graphs.items():
        captured()
        captured()
        times[name] = measure(captured)
        engine.load([SPARE_ROWS] * sequences, state.starts)
    return times
