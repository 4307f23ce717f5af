"""The user's cache and ours: taking one over for a call, and handing its rows back."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from .cache import LongSpecCache


def prepare_cache(target: PreTrainedModel, given: Cache, needed: int, at_once: int) -> LongSpecCache:
    """The call's cache: the given one if it is ours, else a new one with its rows."""
    if isinstance(given, StaticCache):
        given = DynamicCache(config=target.config)  # generate's own is still empty, and ours is as static
    cache = given if isinstance(given, LongSpecCache) else LongSpecCache.take_over(given)
    cache.remember()
    cache.reserve(min(needed, at_once), limit=needed)
    return cache


def adopt(cache: LongSpecCache, made: Cache) -> None:
    """Take the rows that a target has written to a cache of its own instead of the call's, which is still empty."""
    if made is not cache:
        for ours, theirs in zip(cache.layers, made.layers, strict=True):
            ours.load(theirs.keys, theirs.values, theirs.get_seq_length())


def hand_back(cache: LongSpecCache, given: Cache) -> None:
    """Let the caller's cache hold the rows, as views: plain decoding would have written them there."""
    for ours, theirs in zip(cache.layers, _layers_for(given, len(cache.layers)), strict=True):
        if not theirs.is_initialized:
            theirs.lazy_initialization(ours.keys, ours.values)
        rows = slice(None)
        if isinstance(theirs, DynamicSlidingWindowLayer):
            rows = slice(max(ours.keys.shape[2] - theirs.sliding_window + 1, 0), None)
            theirs.cumulative_length = ours.length
        theirs.keys, theirs.values = ours.keys[:, :, rows], ours.values[:, :, rows]


def _layers_for(cache: Cache, count: int) -> list[Any]:
    while len(cache.layers) < count:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers
