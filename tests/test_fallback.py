"""Targets that take no tree: a chain in transformers' own loop, or plain decoding where that would change the text."""

import pytest
import torch
from heads import target_with_head
from models import ScriptedDraft, prompt, scripted, tiny_target
from transformers import DynamicCache, EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from longspec_hf.hook import CACHE_ARG


def half_read(model):
    """A cache with the first rows of the prompt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(10)[:, :6], use_cache=True, **{CACHE_ARG: cache})
    return cache


def at_length(length):
    return lambda ids, scores, **_: torch.full((ids.shape[0],), ids.shape[1] >= length)


def ends_at(model, place):
    """Ends a text at the token that stands at this place of the greedy one."""
    return EosTokenCriteria(int(model.generate(prompt(10), max_new_tokens=20, do_sample=False)[0, place]))


class Collecting(BaseStreamer):
    """Takes one token a call, as its base class says."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("`use_cache` is off", lambda model: {"use_cache": False}),
        ("`output_attentions`", lambda model: {"output_attentions": True}),
        ("`attention_mask`", lambda model: {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]])}),
        ("one sequence at a time", lambda model: {"input_ids": prompt(10).repeat(2, 1)}),
        ("empty cache", lambda model: {CACHE_ARG: half_read(model)}),
        ("cache that can grow", lambda model: {"cache_implementation": "static"}),
        ("`recheck_near_ties`", lambda model: {"generation_config": GenerationConfig(recheck_near_ties=True)}),
        ("`inputs_embeds`", lambda model: {"inputs_embeds": model.model.embed_tokens(prompt(10)).detach()}),
        ("ClassifierFree", lambda model: {"guidance_scale": 1.5}),
        ("asked behind every chain", lambda model: {"stopping_criteria": StoppingCriteriaList([at_length(24)])}),
        ("MaxLength", lambda model: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(24)])}),
        (
            "EosToken",
            lambda model: {"stopping_criteria": StoppingCriteriaList([ends_at(model, 23)]), "pad_token_id": 0},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_chain_would_change_is_decoded_plainly(reason, arguments, monkeypatch):
    model = tiny_target()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    draft = scripted(model, prompt(10), 30, "oracle", tree_shape=[1] * 5)

    def call(assistant=None):
        given = {"input_ids": prompt(10), **arguments(model)}
        if "inputs_embeds" in given:
            del given["input_ids"]
        options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
        return model.generate(**given, **options, assistant_model=assistant)

    out = call(draft)
    assert torch.equal(call().sequences, out.sequences)
    assert reason in out.speculation_stats.fallback_reason


def test_a_streamer_of_a_chain_target_gets_one_token_a_call(monkeypatch):
    model = tiny_target()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    draft = scripted(model, prompt(10), 20, "oracle")
    plain, speculative = Collecting(), Collecting()
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    model.generate(prompt(10), streamer=plain, **kwargs)
    out = model.generate(
        prompt(10), streamer=speculative, assistant_model=draft, return_dict_in_generate=True, **kwargs
    )
    assert speculative.calls == plain.calls and "speculation_stats" not in out


def test_a_chain_target_that_rounds_by_the_whole_forward_is_decoded_plainly(monkeypatch):  # C11
    model = target_with_head("dynamic int8")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    ids = prompt(9)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    draft = ScriptedDraft(model, plain, "noisy")
    out = model.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(plain, out.sequences)
    assert "dynamically quantised" in out.speculation_stats.fallback_reason


@pytest.mark.parametrize("place", range(11, 24))
def test_a_chain_ends_at_an_end_token(place, monkeypatch):
    model = tiny_target()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    ids = prompt(10)
    draft = scripted(model, ids, 30, "oracle", tree_shape=[1] * 5)
    kwargs = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": int(draft.script[place]), "pad_token_id": 0}
    plain = model.generate(ids, **kwargs)
    out = model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
    assert torch.equal(plain, out.sequences) and "speculation_stats" not in out
