"""Layers with a sliding window: what they show, what they keep, and how far back they can go."""

import pytest
import torch
from models import learned, prompt, scripted, tiny_target
from test_batch import padded, scripted_rows
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from longspec_hf import LongSpecCache
from longspec_hf.hook import CACHE_ARG
from longspec_hf.window_layer import WindowLayer

WINDOW = 8
SLACK = 3
TOLERANCE = 1e-4  # fp32 keys of size 5, computed for another number of rows


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch):
    monkeypatch.setattr("longspec_hf.window_layer.SLACK_ROWS", SLACK)


def rows(count, first=0, batch=1):
    """Keys `[batch, 1, count, 1]` that hold their own numbers."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, 1, count, 1).expand(batch, -1, -1, -1)


def filled(length, chunk=5, batch=1):
    layer = WindowLayer(WINDOW)
    for first in range(0, length, chunk):
        new = rows(min(chunk, length - first), first, batch)
        layer.update(new, -new)
    return layer


@pytest.mark.parametrize(
    "chunks", [[6, 1, 1, 1, 1], [7, 1, 1], [8, 1], [20, 1, 1], [1] * 30, [5, 5, 30, 2, 1, 9]], ids=str
)
def test_shows_what_transformers_layer_shows(chunks):
    ours, theirs = WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)
    first = 0
    for count in chunks:
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        keys, values = ours.update(rows(count, first), -rows(count, first))
        expected = theirs.update(rows(count, first), -rows(count, first))
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
        first += count


def test_growth_ends_at_the_window():
    layer = filled(1000, chunk=1)
    assert layer.capacity <= WINDOW - 1 + 1 + SLACK
    layer.make_room([1000], 21)
    assert layer.capacity <= WINDOW - 1 + 21 + SLACK
    assert torch.equal(layer.keys.flatten()[1 - WINDOW :], rows(WINDOW - 1, 1000 - WINDOW + 1).flatten())


def test_crop_goes_back_as_far_as_the_window_is_held():
    layer = filled(30, chunk=1)
    held = 30 - layer.offsets[0]
    possible = held - (WINDOW - 1)
    before = layer.keys.clone()
    with pytest.raises(ValueError, match=rf"`tokens_to_remove` must be at least {-possible}.*window of {WINDOW}"):
        layer.crop(-possible - 1)
    assert torch.equal(layer.keys, before) and layer.length == 30
    layer.crop(-possible)
    keys, _ = layer.update(rows(1, 99), rows(1, 99))
    assert keys.flatten().tolist() == [*range(30 - possible - WINDOW + 1, 30 - possible), 99]


def test_transformers_own_assisted_generation_may_crop():
    ours, theirs, length = WindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW), 0
    for layer in (ours, theirs):
        layer.update(rows(20), rows(20))
        layer.activate_past_recording()
    length = 20
    for count, rejected in [(6, 5), (6, 0), (9, 8), (40, 39), (2, 1)]:
        shown = WINDOW - 1 + count  # transformers 5.17 returns more than that
        keys, expected = (layer.update(rows(count, length), rows(count, length))[0] for layer in (ours, theirs))
        assert torch.equal(keys, expected[:, :, -shown:])
        for layer in (ours, theirs):
            layer.crop(-rejected)
        length += count - rejected
        assert ours.get_seq_length() == theirs.get_seq_length() == length


def test_the_whole_cache_is_left_alone_when_a_window_cannot_be_cropped():
    cache = LongSpecCache.take_over(DynamicCache(config=tiny_target("gemma3").config))
    for i in range(30):
        cache.update(rows(1, i), rows(1, i), 0)
        cache.update(rows(1, i), rows(1, i), 1)
    with pytest.raises(ValueError, match="`tokens_to_remove`"):
        cache.crop(-20)
    assert [layer.length for layer in cache.layers] == [30, 30]


def test_sequences_drop_rows_on_their_own_and_are_aligned_at_the_end():
    layer = filled(12, batch=2)
    lengths = [12, 12]
    for step in range(20):
        layer.make_room(lengths, 3)
        where = torch.tensor(lengths)[:, None] + torch.arange(3)
        new = where.float()[:, None, :, None]
        layer.write_tree(new, new, layer.buffer_rows(where))
        lengths = [lengths[0] + 1, lengths[1] + (step % 2) * 3]
    assert layer.capacity <= WINDOW - 1 + 2 * SLACK + 3 and layer.offsets[0] != layer.offsets[1]
    layer.length = max(lengths)
    layer.swap(0, 1)
    layer.align(lengths[::-1])
    assert lengths == [32, 42]
    assert layer.keys[0].flatten().tolist() == list(range(35, 42))
    assert layer.keys[1].flatten().tolist() == [0] * 7  # it has none of the last rows
    assert layer.offsets == [35, 35]


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_bytes_do_not_depend_on_the_length(family):
    model = tiny_target(family)
    nbytes = set()
    for length in (40, 400):
        out = model.generate(
            prompt(length),
            max_new_tokens=60,
            do_sample=False,
            assistant_model=learned(model, tree_shape=[4, 16]),
            return_dict_in_generate=True,
        )
        layers = [layer for layer in out[CACHE_ARG].layers if isinstance(layer, WindowLayer)]
        assert layers
        nbytes |= {layer._key_buffer.nbytes for layer in layers}
        # The window, a tree of 21 nodes with the 8 of its copied branch, and the slack.
        assert all(layer.capacity <= WINDOW - 1 + 29 + SLACK for layer in layers)
    assert len(nbytes) == 1


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_chat_turns_on_the_returned_cache(family):  # C66
    model = tiny_target(family)
    text, kwargs = torch.empty(1, 0, dtype=torch.long), {}
    for turn in range(3):
        text = torch.cat([text, prompt(9, seed=turn)], dim=1)
        plain = model.generate(text, max_new_tokens=12, do_sample=False)
        out = model.generate(
            text,
            max_new_tokens=12,
            do_sample=False,
            assistant_model=learned(model),
            return_dict_in_generate=True,
            **kwargs,
        )
        assert torch.equal(plain, out.sequences)
        assert out.speculation_stats.fallback_reason is None
        text, kwargs = out.sequences, {CACHE_ARG: out[CACHE_ARG]}
    text = torch.cat([text, prompt(9, seed=9)], dim=1)
    plain = model.generate(text, max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, model.generate(text, max_new_tokens=12, do_sample=False, **kwargs))


def test_a_prompt_read_in_chunks():
    model = tiny_target("gemma3")
    ids = prompt(50)
    kwargs = {"max_new_tokens": 30, "do_sample": False, "prefill_chunk_size": 7}
    plain = model.generate(ids, **kwargs)
    assert torch.equal(plain, model.generate(ids, **kwargs, assistant_model=learned(model)))


def test_a_window_and_twelve_ids():  # C63
    for attention in ("eager", "sdpa"):
        model = tiny_target("mistral", attn_implementation=attention)
        draft = scripted(model, prompt(12), 50, "noisy")
        out = model.generate(prompt(12), max_new_tokens=50, do_sample=False, assistant_model=draft)
        assert torch.equal(out[0], draft.script)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_rows_of_a_batch(family):
    model = tiny_target(family)
    inputs, alone = padded()
    draft = scripted_rows(model, alone, 40)
    kwargs = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **kwargs)
    out = model.generate(**inputs, **kwargs, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(plain, out.sequences)
    more = torch.cat([out.sequences, torch.cat([prompt(4, seed=s) for s in (7, 8, 9)])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 44, dtype=torch.long)], dim=1)
    again = {"attention_mask": mask, **kwargs}
    expected = model.generate(more, **again)
    assert torch.equal(expected, model.generate(more, **again, assistant_model=draft, **{CACHE_ARG: out[CACHE_ARG]}))


def test_near_ties_step_back():
    """`recheck_near_ties` goes back as far as to the prompt: its rows stay."""
    model = tiny_target("gemma2", torch.bfloat16)
    ids = prompt(40)
    plain = model.generate(ids, max_new_tokens=80, do_sample=False)
    draft = learned(model, recheck_near_ties=True, ngram_branch_length=4)
    out = model.generate(ids, max_new_tokens=80, do_sample=False, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(plain, out.sequences)
    assert out.speculation_stats.rechecks > 20  # whole stretches of text were read again


@pytest.mark.parametrize("only_new", [False, True])
def test_an_error_leaves_the_windows_as_they_were(only_new):
    model = tiny_target("gemma3")
    first = model.generate(
        prompt(20), max_new_tokens=10, do_sample=False, assistant_model=learned(model), return_dict_in_generate=True
    )
    cache, calls = first[CACHE_ARG], []
    before = [layer.keys[:, :, 1 - WINDOW :].clone() for layer in cache.layers]

    def fails(input_ids, scores):
        calls.append(1)
        if len(calls) == 25:
            raise RuntimeError("from the user")
        return scores

    longer = torch.cat([first.sequences, prompt(3 if only_new else 60)], dim=1)
    with pytest.raises(RuntimeError, match="from the user"):
        model.generate(
            longer,
            max_new_tokens=40,
            do_sample=False,
            assistant_model=learned(model),
            logits_processor=[fails],
            **{CACHE_ARG: cache},
        )
    assert [layer.length for layer in cache.layers] == [29, 29]
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, 1 - WINDOW :], keys)
