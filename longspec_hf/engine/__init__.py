"""Rounds without Python between their kernels: fused forwards of target and draft, captured as CUDA graphs."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..cache import LongSpecCache
from ..candidate_generator import LongSpecCandidateGenerator
from .rounds import Engine
from .support import ENGINE_DEVICES, reason_against_engine

__all__ = ["ENGINE_DEVICES", "Engine", "make_engine", "reason_against_engine"]


def make_engine(
    target: PreTrainedModel, generator: LongSpecCandidateGenerator, cache: LongSpecCache, wants_hidden_states: bool
) -> tuple[Engine | None, str | None]:
    """The engine for a call whose prefill is done, or `None`, and on a GPU the reason in words."""
    draft, bound, settings = generator.draft, generator.bound, generator.settings
    reason = reason_against_engine(target, draft, bound, settings, cache, wants_hidden_states)
    if reason is None:
        return Engine(target, generator, cache), None
    return None, reason if draft.device.type in ENGINE_DEVICES else None
