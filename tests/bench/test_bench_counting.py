"""The models `longspec-hf bench` times: they count, and their drafts guess right where it was decided beforehand."""

import pytest
import torch
from models import tiny_target

from longspec_hf.bench import counting
from longspec_hf.bench.counting import counting_target, guessing_draft, make_counting, rate_for
from longspec_hf.bench.ways import WAYS, _arguments

SIZES = {"hidden_size": 64, "initializer_range": 0.02}
DEPTH = 6
ROUNDS_ONLY = {"tree_shape": [2] * DEPTH, "ngram_branch_length": 0, "fallback_to_plain": False}
NEW_TOKENS = 42


@pytest.fixture(scope="module")
def counter():
    return make_counting(tiny_target(**SIZES))


def speculated(target, ids, rate, draft_vocab_size=None):
    draft = guessing_draft(target, draft_vocab_size, **ROUNDS_ONLY)
    draft.set_guesses(rate, ids.shape[0], 200, seed=3)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    return draft, target.generate(ids, assistant_model=draft, **settings)


def counted(start, tokens, cycle=64):
    return [(start + number) % cycle for number in range(tokens)]


def test_a_counting_model_counts(counter):
    out = counter.generate(torch.tensor([[7, 8, 9], [60, 61, 62]]), max_new_tokens=10, do_sample=False)
    assert out.tolist() == [counted(7, 13), counted(60, 13)]


def test_tokens_beyond_the_cycle_are_not_counted_to(monkeypatch):
    monkeypatch.setattr(counting, "CYCLE", 40)
    target = make_counting(tiny_target(**SIZES))
    ids = torch.tensor([[36, 37]])
    assert target.generate(ids, max_new_tokens=6, do_sample=False).tolist() == [counted(36, 8, cycle=40)]
    _, output = speculated(target, ids, 1.0, draft_vocab_size=40)
    assert output.sequences.tolist() == [counted(36, 2 + NEW_TOKENS, cycle=40)]
    assert output.speculation_stats.tau > 5


def test_a_named_shape_counts_in_its_dtype(monkeypatch):
    monkeypatch.setitem(counting.SHAPES, "tiny", tiny_target(**SIZES, eos_token_id=3).config)
    target = counting_target("tiny", torch.device("cpu"))
    assert target.dtype == torch.bfloat16 and not target.training
    out = target.generate(torch.tensor([[1]]), max_new_tokens=10, do_sample=False)
    assert out.tolist() == [counted(1, 11)]  # past the end token


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"`shape` must be one of qwen2.5-7b, .*, got 'gpt'"):
        counting_target("gpt", torch.device("cpu"))


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 5.0, DEPTH + 1)])
def test_a_draft_that_never_or_always_guesses_right(counter, rate, low, high):
    _, output = speculated(counter, torch.tensor([[5, 6, 7], [20, 21, 22]]), rate)
    assert output.sequences.tolist() == [counted(5, 3 + NEW_TOKENS), counted(20, 3 + NEW_TOKENS)]
    assert low <= output.speculation_stats.tau <= high


def test_the_guesses_are_where_they_were_put(counter):
    ids = torch.tensor([[5, 6, 7]])
    draft, output = speculated(counter, ids, 0.7)
    right = (draft.bonus[0] > 0).tolist()
    position, last, expected = ids.shape[1], ids.shape[1] + NEW_TOKENS - 1, []
    while position < last:  # the root's position; the next ones are guessed at it and behind it
        accepted = 0
        while accepted < DEPTH and right[position + accepted] and position + accepted + 1 < last:
            accepted += 1
        expected.append(accepted + 1)
        position += accepted + 1
    stats = output.speculation_stats
    assert output.sequences.tolist() == [counted(5, 3 + NEW_TOKENS)]
    assert 1.5 < stats.tau < 5 and stats.rounds == len(expected)
    assert stats.accepted_per_depth == [
        sum(tokens > depth for tokens in expected) for depth in range(1, max(expected))
    ]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_the_same_text(counter, way):
    draft = guessing_draft(counter, None, fallback_to_plain=False)
    draft.set_guesses(0.7, 1, 100)
    out = counter.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, **_arguments(way, counter, draft)
    )
    assert out.tolist() == [counted(5, 15)]


@pytest.mark.parametrize(("tau", "depth"), [(1.0, 5), (2.5, 5), (3.5, 10), (4.0, 3)])
def test_the_rate_gives_tau(tau, depth):
    rate = rate_for(tau, depth)
    assert 0 <= rate <= 1
    assert sum(rate**power for power in range(depth + 1)) == pytest.approx(tau)


@pytest.mark.parametrize("tau", [0.9, 5.1])
def test_no_rate_gives_this_tau(tau):
    with pytest.raises(ValueError, match=rf"`tau` must lie between 1 and 5 .*, got {tau}"):
        rate_for(tau, 4)
