"""The target's cache: rows in place, commits, crops, chat turns."""

import copy

import pytest
import torch
from models import ScriptedDraft, learned, prompt, scripted, tiny_target
from transformers import DynamicCache, StaticCache

from longspec_hf import LongSpecCache, LongSpecCandidateGenerator
from longspec_hf.hook import CACHE_ARG

TOLERANCE = 1e-4  # fp32 keys of size 5, computed for another number of rows


def filled(rows, heads=2, size=4, layers=2):
    cache = LongSpecCache()
    cache.reserve(64)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, layers, 1, heads, rows, size, generator=generator)
    for layer in range(layers):
        cache.update(states[0, layer], states[1, layer], layer)
    return cache, states


def test_update_writes_in_place_and_returns_views():
    cache, states = filled(5)
    layer = cache.layers[0]
    pointer = layer.keys.data_ptr()
    keys, values = cache.update(states[0, 0, :, :, :3], states[1, 0, :, :, :3], 0)
    assert keys.data_ptr() == pointer == cache.layers[0].keys.data_ptr()
    assert keys.shape[2] == values.shape[2] == 8
    assert torch.equal(keys, torch.cat([states[0, 0], states[0, 0, :, :, :3]], dim=2))


def test_growing_keeps_the_rows_and_stays_within_the_limit():
    cache = LongSpecCache()
    cache.reserve(4, limit=20)
    rows = torch.arange(12.0).view(1, 1, 12, 1)
    for i in range(0, 12, 3):
        cache.update(rows[:, :, i : i + 3], rows[:, :, i : i + 3], 0)
    assert cache.layers[0].keys.flatten().tolist() == list(range(12))
    assert cache.layers[0].capacity == 20


@pytest.mark.parametrize("visited", [[0], [0, 1, 2], [0, 2], [0, 1, 4], [0, 3, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_commit_moves_only_visited_rows(visited):
    cache, states = filled(10)
    pointers = [layer.keys.data_ptr() for layer in cache.layers]
    cache.crop(-6)
    cache.begin_rounds(1)
    cache.commit([visited])
    expected = [0, 1, 2, 3, *(4 + node for node in visited)]
    for i, layer in enumerate(cache.layers):
        assert torch.equal(layer.keys, states[0, i][:, :, expected])
        assert torch.equal(layer.values, states[1, i][:, :, expected])
    assert [layer.keys.data_ptr() for layer in cache.layers] == pointers


@pytest.mark.parametrize("count", [0, 1, 10])
def test_crop(count):  # C62
    cache, states = filled(10)
    cache.crop(-count)
    assert cache.get_seq_length() == 10 - count
    assert torch.equal(cache.layers[1].values, states[1, 1][:, :, : 10 - count])


@pytest.mark.parametrize("count", [1, -11])
def test_crop_of_what_is_not_there_changes_nothing(count):  # C62
    cache, _ = filled(10)
    with pytest.raises(ValueError, match=r"`tokens_to_remove`.*10 tokens"):
        cache.crop(count)
    assert cache.get_seq_length() == 10


def test_everything_rejected_at_the_first_round(target):  # C62
    ids = prompt(1)
    draft = scripted(target, ids, 3, "wrong")
    out = target.generate(ids, max_new_tokens=3, do_sample=False, assistant_model=draft, return_dict_in_generate=True)
    reference = target(out.sequences[:, :-1], use_cache=True)
    for ours, theirs in zip(out[CACHE_ARG].layers, reference[CACHE_ARG].layers, strict=True):
        assert ours.get_seq_length() == 3
        torch.testing.assert_close(ours.keys, theirs.keys, atol=TOLERANCE, rtol=0)


def test_batch_operations_of_a_dynamic_cache():
    cache, states = filled(6)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert cache.layers[0].keys.shape == (2, 2, 7, 4)
    assert torch.equal(cache.layers[0].keys[1, :, :6], states[0, 0, 0])


def test_no_copy_of_the_cache_in_a_round(target):
    ids = prompt(40)
    draft = scripted(target, ids, 60, "noisy", ngram_branch_length=4)
    seen = set()
    original = LongSpecCache.commit

    def commit(self, visited):
        seen.update((i, layer.keys.data_ptr(), layer.values.data_ptr()) for i, layer in enumerate(self.layers))
        original(self, visited)
        seen.update((i, layer.keys.data_ptr(), layer.values.data_ptr()) for i, layer in enumerate(self.layers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongSpecCache, "commit", commit)
        stats = target.generate(
            ids, max_new_tokens=60, do_sample=False, assistant_model=draft, return_dict_in_generate=True
        ).speculation_stats
    assert stats.rounds > 10 and stats.tau > 1.2
    assert len(seen) == len(target.model.layers)


def turn(target, history, new, cache, draft=None, only_new=False):
    """One chat turn; returns ids and cache."""
    ids = torch.cat([history, new], dim=1)
    given = new if only_new else ids
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    out = target.generate(
        given, assistant_model=draft, return_dict_in_generate=True, **kwargs, **({CACHE_ARG: cache} if cache else {})
    )
    new_text = out.sequences[:, given.shape[1] :]
    return torch.cat([ids, new_text], dim=1), out[CACHE_ARG]


@pytest.mark.parametrize("only_new", [False, True])
def test_three_chat_turns_on_the_returned_cache(target, only_new):
    draft = learned(target)
    text, cache = torch.empty(1, 0, dtype=torch.long), None
    for i in range(3):
        question = prompt(9, seed=i)
        plain = target.generate(torch.cat([text, question], dim=1), max_new_tokens=12, do_sample=False)
        if only_new and cache is not None:
            # The last token of the answer has no row yet, so it opens the next turn.
            question, text = torch.cat([text[:, -1:], question], dim=1), text[:, :-1]
        text, cache = turn(target, text, question, cache, draft, only_new and cache is not None)
        assert torch.equal(text, plain)
        assert cache.get_seq_length() == text.shape[1] - 1


def test_a_users_dynamic_cache_is_read_and_written(target):
    ids = prompt(20)
    plain_cache, our_cache = DynamicCache(), DynamicCache()
    kwargs = {"max_new_tokens": 10, "do_sample": False}
    plain = target.generate(ids, **{CACHE_ARG: plain_cache}, **kwargs)
    ours = target.generate(ids, assistant_model=learned(target), **{CACHE_ARG: our_cache}, **kwargs)
    assert torch.equal(plain, ours)
    torch.testing.assert_close(our_cache.layers[1].keys, plain_cache.layers[1].keys, atol=TOLERANCE, rtol=0)
    longer = torch.cat([ours, prompt(3)], dim=1)
    copied = copy.deepcopy(our_cache)
    assert torch.equal(
        target.generate(longer, **{CACHE_ARG: plain_cache}, **kwargs),
        target.generate(longer, assistant_model=learned(target), **{CACHE_ARG: copied}, **kwargs),
    )


def test_an_error_leaves_the_cache_as_it_was(target):
    ids = prompt(20)
    _, cache = turn(target, ids[:, :0], ids, None, learned(target))
    before, rows = cache.get_seq_length(), cache.layers[0].keys.clone()
    longer = prompt(60)

    class Fails:
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("from the user")
            return scores

    with pytest.raises(RuntimeError, match="from the user"):
        target.generate(
            longer,
            max_new_tokens=20,
            do_sample=False,
            assistant_model=learned(target),
            logits_processor=[Fails()],
            **{CACHE_ARG: cache},
        )
    assert cache.get_seq_length() == before
    assert torch.equal(cache.layers[0].keys, rows)


def test_a_cache_whose_windows_have_dropped_rows_is_taken_over():
    model = tiny_target("mistral")
    ids = prompt(20)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE_ARG]
    longer = torch.cat([ids, prompt(4)], dim=1)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(longer, **kwargs, **{CACHE_ARG: (plain_cache := copy.deepcopy(cache))})
    out = model.generate(longer, assistant_model=learned(model), **kwargs, **{CACHE_ARG: cache})
    assert torch.equal(plain.sequences, out.sequences)
    assert out.speculation_stats.fallback_reason is None
    for ours, theirs in zip(cache.layers, plain_cache.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 31
        torch.testing.assert_close(ours.keys, theirs.keys, atol=TOLERANCE, rtol=0)


def test_take_over_refuses_what_it_cannot_keep(target):
    cache = StaticCache(config=target.config, max_cache_len=16)
    with pytest.raises(ValueError, match="`cache` must hold the keys and values"):
        LongSpecCache.take_over(cache)


def test_left_padding(target):  # C48
    ids = prompt(12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    plain = target.generate(ids, max_new_tokens=30, do_sample=False)
    for draft in (learned(target), ScriptedDraft(target, plain, "oracle")):
        out = target.generate(padded, attention_mask=mask, max_new_tokens=30, do_sample=False, assistant_model=draft)
        assert torch.equal(out[:, 4:], plain)


def test_the_draft_does_not_see_padding(target, monkeypatch):  # C48
    """Its trees are those of the prompt alone, whatever fills the front."""
    ids = prompt(12)
    seen = []
    original = LongSpecCandidateGenerator.propose

    def propose(self, *args, **kwargs):
        tree = original(self, *args, **kwargs)
        seen[-1].append((tree.token_ids.tolist(), tree.parents.tolist()))
        return tree

    monkeypatch.setattr(LongSpecCandidateGenerator, "propose", propose)
    draft = learned(target, ngram_branch_length=3)
    for filling in (None, 0, 7, 63):
        seen.append([])
        row, mask = ids, torch.ones_like(ids)
        if filling is not None:
            row = torch.nn.functional.pad(ids, (4, 0), value=filling)
            mask = torch.nn.functional.pad(mask, (4, 0))
        target.generate(row, attention_mask=mask, max_new_tokens=20, do_sample=False, assistant_model=draft)
    assert len(seen[0]) > 5
    assert all(trees == seen[0] for trees in seen)
