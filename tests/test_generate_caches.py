"""Caches given to `generate`: static, offloaded and quantised ones, prefixes, copies, chat turns, errors."""

import copy

import pytest
import torch
from models import learned, prompt, scripted, tiny_target
from test_generate_options import NEW, compare
from transformers import DynamicCache, StaticCache

from longspec_hf.hook import CACHE_ARG


@pytest.mark.parametrize("how", ["setting", "object", "exact"])
def test_static_caches(target, how):  # C67
    ids = prompt(12)
    if how == "setting":
        compare(target, input_ids=ids, cache_implementation="static")
        return
    length = 12 + NEW + (0 if how == "exact" else 20)
    plain = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    cache = StaticCache(config=target.config, max_cache_len=length)
    out = target.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=False,
        assistant_model=learned(target),
        return_dict_in_generate=True,
        **{CACHE_ARG: cache},
    )
    assert torch.equal(plain, out.sequences) and out[CACHE_ARG] is cache
    assert "StaticCache" in out.speculation_stats.fallback_reason


@pytest.mark.parametrize("settings", [{"cache_implementation": "offloaded"}, {"cache_implementation": "quantized"}])
def test_caches_that_are_someone_elses(target, settings):  # C68
    if settings["cache_implementation"] == "offloaded" and not torch.cuda.is_available():
        kwargs = {"input_ids": prompt(8), "max_new_tokens": 4, "do_sample": False, **settings}
        errors = []
        for draft in ({}, {"assistant_model": learned(target)}):
            try:
                errors.append(target.generate(**kwargs, **draft))
            except Exception as error:  # what plain generate raises here is not ours to say
                errors.append(type(error))
        assert errors[0] == errors[1] if isinstance(errors[0], type) else torch.equal(*errors)
        return
    config = {"nbits": 4}
    kwargs = {"input_ids": prompt(8), "max_new_tokens": 4, "do_sample": False, "cache_config": config, **settings}
    outcomes = []
    for draft in ({}, {"assistant_model": learned(target)}, {"assistant_model": learned(target)}):
        try:
            outcomes.append(target.generate(**kwargs, **draft).tolist())
        except (ImportError, ValueError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert config == {"nbits": 4}


def caches_of_a_prefix(target, ids):
    """A cache prefilled outside, by a forward of the first ids."""
    with torch.no_grad():
        return target(ids, use_cache=True, **{CACHE_ARG: DynamicCache(config=target.config)})[CACHE_ARG]


def test_a_prefix_prefilled_outside_and_copied(target):  # C58
    ids = prompt(40)
    prefix = caches_of_a_prefix(target, ids[:, :25])
    plain = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    for _ in range(2):  # a copy each, so that the prefix can be used again
        cache = copy.deepcopy(prefix)
        out = target.generate(
            ids,
            max_new_tokens=NEW,
            do_sample=False,
            assistant_model=learned(target),
            **{CACHE_ARG: cache},
        )
        assert torch.equal(plain, out)
        assert cache.get_seq_length() == 40 + NEW - 1  # the user's own cache holds the text, as after plain
    assert prefix.get_seq_length() == 25


def test_our_cache_can_be_copied(target):
    ids = prompt(20)
    first = target.generate(
        ids, max_new_tokens=10, do_sample=False, assistant_model=learned(target), return_dict_in_generate=True
    )
    kept = copy.deepcopy(first[CACHE_ARG])
    more = torch.cat([first.sequences, prompt(5, seed=9)], dim=1)
    plain = target.generate(more, max_new_tokens=10, do_sample=False)
    for cache in (kept, first[CACHE_ARG]):
        assert torch.equal(
            plain,
            target.generate(
                more, max_new_tokens=10, do_sample=False, assistant_model=learned(target), **{CACHE_ARG: cache}
            ),
        )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("second", ["plain", "draft", "forward"])
def test_a_cache_made_in_inference_mode_is_written_outside(family, second):
    model = tiny_target(family)
    kwargs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        first = model.generate(prompt(20), assistant_model=learned(model), **kwargs)
    text = torch.cat([first.sequences.clone(), prompt(4, seed=9)], dim=1)
    expected = model.generate(text, **kwargs).sequences
    cache = {CACHE_ARG: first[CACHE_ARG]}
    if second == "forward":
        with torch.no_grad():
            logits = model(text[:, 29:], **cache).logits
        assert int(logits[0, -1].argmax()) == int(expected[0, 34])
        return
    draft = {"assistant_model": learned(model)} if second == "draft" else {}
    out = model.generate(text, **kwargs, **cache, **draft)
    assert torch.equal(out.sequences, expected)
    assert not any(layer.keys.is_inference() for layer in out[CACHE_ARG].layers)


def test_a_compiled_target_writes_a_cache_of_inference_mode():
    torch._dynamo.reset()
    model = tiny_target("gemma3")
    kwargs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        first = model.generate(prompt(20), assistant_model=learned(model), **kwargs)
    text = torch.cat([first.sequences.clone(), prompt(4, seed=9)], dim=1)
    expected = model.generate(text, **kwargs).sequences
    model.forward = torch.compile(model.forward, backend="eager")
    out = model.generate(text, assistant_model=learned(model), **kwargs, **{CACHE_ARG: first[CACHE_ARG]})
    assert torch.equal(out.sequences, expected)


def test_a_cropped_cache_of_inference_mode_is_written_outside(target):
    """Nothing grows, so nothing is copied but for that."""
    kwargs = {"do_sample": False, "assistant_model": learned(target)}
    with torch.inference_mode():
        first = target.generate(prompt(9), max_new_tokens=40, return_dict_in_generate=True, **kwargs)
    first[CACHE_ARG].crop(-30)
    text = first.sequences[:, :20].clone()
    expected = target.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(target.generate(text, max_new_tokens=5, **kwargs, **{CACHE_ARG: first[CACHE_ARG]}), expected)


@pytest.mark.parametrize("turns", ["full", "new"])
def test_three_chat_turns(target, turns):  # C58, C60
    draft = learned(target)
    cache, text, other = None, prompt(10), prompt(10)
    for turn in range(3):
        arguments = {} if cache is None else {CACHE_ARG: cache}
        given = text
        if turns == "new" and cache is not None:
            given = text[:, cache.get_seq_length() :]
        out = target.generate(
            given,
            attention_mask=torch.ones_like(text),
            max_new_tokens=12,
            do_sample=False,
            assistant_model=draft,
            return_dict_in_generate=True,
            **arguments,
        )
        cache = out[CACHE_ARG]
        new = out.sequences[:, given.shape[1] :]
        other = target.generate(other, max_new_tokens=12, do_sample=False)
        text = torch.cat([text, new], dim=1)
        assert torch.equal(text, other)
        addition = prompt(6, seed=40 + turn)
        text, other = torch.cat([text, addition], dim=1), torch.cat([other, addition], dim=1)


def test_the_draft_reads_the_whole_text_in_a_later_turn(target):  # C60
    """Its window after a turn on the first turn's cache is that of a run without a cache."""
    draft = learned(target)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "assistant_model": draft, "return_dict_in_generate": True}
    first = target.generate(prompt(30), **kwargs)
    text = torch.cat([first.sequences, prompt(3, seed=5)], dim=1)
    cold = target.generate(text, **kwargs)
    warm = target.generate(text, **{CACHE_ARG: first[CACHE_ARG]}, **kwargs)
    ours, theirs = warm[CACHE_ARG].draft_window, cold[CACHE_ARG].draft_window
    assert torch.equal(ours.lengths, theirs.lengths)
    rows = int(ours.lengths[0])
    assert rows > 16  # longer than the turn's own addition
    torch.testing.assert_close(ours.keys[:, :, :rows], theirs.keys[:, :, :rows])
    assert warm.speculation_stats.accepted_per_depth == cold.speculation_stats.accepted_per_depth


def test_an_exception_in_a_processor_leaves_everything_as_it_was(target):
    ids = prompt(20)
    attention = target.config._attn_implementation
    state = {name: value.clone() for name, value in target.state_dict().items()}
    calls = []

    def broken(input_ids, scores):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("on purpose")
        return scores

    draft = scripted(target, ids, NEW, "oracle")
    cache = caches_of_a_prefix(target, ids[:, :10])
    with pytest.raises(RuntimeError, match="on purpose"):
        target.generate(
            ids,
            max_new_tokens=NEW,
            do_sample=False,
            assistant_model=draft,
            logits_processor=[broken],
            **{CACHE_ARG: cache},
        )
    assert target.config._attn_implementation == attention and cache.get_seq_length() == 10
    assert all(torch.equal(state[name], value) for name, value in target.state_dict().items())
    compare(target, draft, input_ids=ids)
