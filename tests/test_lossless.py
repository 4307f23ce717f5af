"""Greedy decoding gives plain `generate`'s ids whatever the draft proposes.

`LONGSPEC_NIGHTLY=1` has every family write 128 tokens behind all eighty prompts, the usual run 32 behind sixteen.
"""

import os

import pytest
import torch
from models import VOCAB, ScriptedDraft, learned, prompt, scripted, tiny_target

NIGHTLY = os.environ.get("LONGSPEC_NIGHTLY") == "1"
MODES = ("oracle", "noisy", "wrong")
LOGIT_TOLERANCE = 1e-4  # fp32 logits of size 10, summed in another order


def assert_equals_plain(target, input_ids, new_tokens, **fields):
    """Drafts of these fields, which know the text always, sometimes or never, do not change it."""
    plain = target.generate(input_ids, max_new_tokens=new_tokens, do_sample=False)
    for mode in MODES:
        draft = ScriptedDraft(target, plain, mode, **fields)
        ours = target.generate(input_ids, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, ours), mode


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_prompts(target, length):  # C01
    assert_equals_plain(target, prompt(length, seed=length), 60)


def test_logits_of_a_long_prompt_equal_one_teacher_forced_forward(target):  # C02
    ids = prompt(700, seed=3)
    draft = scripted(target, ids, 64, "noisy")
    out = target.generate(
        ids,
        max_new_tokens=64,
        do_sample=False,
        assistant_model=draft,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = target(out.sequences).logits[0, 699:-1]
    assert (torch.cat(out.logits) - expected).abs().max() < LOGIT_TOLERANCE


def varied_prompts(count):
    """Prompts of mixed lengths: random, periodic and half-repeating."""
    for i in range(count):
        ids = prompt(3 + 7 * i % 90, seed=i)
        if i % 4 == 1:
            ids = ids[:, :5].repeat(1, 8)
        if i % 4 == 2:
            ids = torch.cat([ids, ids[:, : ids.shape[1] // 2]], dim=1)
        yield ids


def differing_prompts(model, numbers, new_tokens):
    """First differing index by number of the prompt; each kind of prompt meets each draft in sixteen of them.

    Four drafts take turns: one always right, one about half the time, one never, and a real one.
    """
    differing = {}
    for i, ids in enumerate(varied_prompts(80)):
        if i not in numbers:
            continue
        plain = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        # Few levels where little is accepted keep the test short; the shapes have a test of their own.
        draft = (
            ScriptedDraft(model, plain, "oracle", tree_shape=[1] * 7),
            ScriptedDraft(model, plain, "noisy", tree_shape=[2, 2]),
            ScriptedDraft(model, plain, "wrong", tree_shape=[2]),
            learned(model, tree_shape=[2], ngram_branch_length=4),
        )[i // 4 % 4]
        ours = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft)
        if not torch.equal(plain, ours):
            differing[i] = int((plain != ours).flatten().nonzero()[0])
    return differing


@pytest.mark.parametrize("part", range(4))
def test_eighty_varied_prompts(target, part):  # C04
    assert differing_prompts(target, range(part, 80, 4), 128) == {}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_varied_prompts_of_every_family(family):  # C13, with Llama above
    numbers, new_tokens = (range(80), 128) if NIGHTLY else (range(16), 32)
    assert differing_prompts(tiny_target(family), numbers, new_tokens) == {}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_varied_prompts_in_fp64(family):
    assert differing_prompts(tiny_target(family, torch.float64), range(16), 24) == {}


@pytest.mark.parametrize("cap", range(1, 13))
def test_length_cap_is_exact(target, cap):  # C05
    ids = prompt(9)
    draft = scripted(target, ids, 12, "oracle", tree_shape=[2] * 5)
    ours = target.generate(ids, max_new_tokens=cap, do_sample=False, assistant_model=draft)
    assert ours.shape[1] == 9 + cap
    assert torch.equal(target.generate(ids, max_new_tokens=cap, do_sample=False), ours)


@pytest.mark.parametrize("shape", [[1], [1, 1, 1], [4], [4, 16, 16], [2, 2, 2, 2], [16]], ids=str)
def test_tree_shape_does_not_change_the_text(target, shape):  # C07
    assert_equals_plain(target, prompt(20, seed=5), 48, tree_shape=shape)


def test_two_thousand_tokens_and_the_cache_at_the_end(target):  # C08
    ids = prompt(12, seed=8)
    plain = target.generate(ids, max_new_tokens=2000, do_sample=False)
    draft = ScriptedDraft(target, plain, "noisy", tree_shape=[2, 2])
    out = target.generate(
        ids, max_new_tokens=2000, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )
    assert torch.equal(plain, out.sequences)
    assert 0 < sum(out.speculation_stats.accepted_per_depth) < 2000
    rebuilt = target(out.sequences[:, :-1], use_cache=True, return_dict=True)
    for ours, theirs in zip(cache_of(out).layers, cache_of(rebuilt).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=LOGIT_TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=LOGIT_TOLERANCE, rtol=0)


def cache_of(output):
    return output["cache"] if "cache" in output else output["past_key_values"]


@pytest.mark.parametrize("period", [1, 2, 3])
def test_prompts_that_repeat(target, period):  # C09
    assert_equals_plain(target, prompt(period, seed=period).repeat(1, 48 // period), 32, ngram_branch_length=6)


def test_oracle_is_accepted_whole(target, monkeypatch):  # C12
    ids, depth, new_tokens = prompt(30, seed=2), 4, 101
    draft = scripted(target, ids, new_tokens + depth, "oracle", tree_shape=[2] * depth)
    forwards = []
    original = type(target).forward
    monkeypatch.setattr(type(target), "forward", lambda self, *a, **k: forwards.append(1) or original(self, *a, **k))
    stats = target.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    ).speculation_stats
    assert stats.tau == depth + 1
    assert stats.rounds == (new_tokens - 1) // (depth + 1)
    assert len(forwards) == stats.rounds + 1


def test_a_fresh_draft_with_a_draft_vocabulary(target):
    draft = learned(target, draft_vocab_size=20)
    draft.draft_token_ids.copy_(torch.randperm(VOCAB)[:20])
    ids = prompt(15)
    plain = target.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=draft))
