"""Calls that the engine decodes, and its parts as they stand after a prefill."""

import torch

from longspec_hf.cache import LongSpecCache
from longspec_hf.candidate_generator import LongSpecCandidateGenerator
from longspec_hf.hook import CACHE_ARG
from longspec_hf.target import bind


def call(model, ids, draft=None, **kwargs):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 28, "do_sample": False, **kwargs}
    return model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **options)


@torch.no_grad()
def after_prefill(model, draft, ids, settings):
    """A generator and a cache that have read the prompt `[1, n]`; the cache has room for more."""
    cache = LongSpecCache()
    cache.reserve(200)
    model(ids, **{CACHE_ARG: cache})
    cache.begin_rounds(1)
    generator = LongSpecCandidateGenerator(draft, bind(draft, model), settings)
    generator.start(ids.tolist(), torch.arange(ids.shape[1]).unsqueeze(0))
    return generator, cache
