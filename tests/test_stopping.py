"""Stops fall exactly where plain `generate` stops, at any offset in a block."""

import string

import pytest
import torch
from models import ScriptedDraft, prompt, scripted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from longspec_hf.hook import CACHE_ARG

DEPTH = 5
BLOCK = {"tree_shape": [2] * DEPTH}


@pytest.mark.parametrize("k", range(1, DEPTH + 3))
def test_eos_inside_a_block(target, k):  # C25
    ids = prompt(10, seed=4)
    free = target.generate(ids, max_new_tokens=20, do_sample=False)
    draft = ScriptedDraft(target, free, "oracle", **BLOCK)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": int(free[0, 9 + k]), "pad_token_id": 0}
    plain = target.generate(ids, **kwargs)
    ours = target.generate(ids, assistant_model=draft, **kwargs)
    assert torch.equal(plain, ours)
    assert ours[0, -1] == kwargs["eos_token_id"]


def test_eos_lists_in_either_order_and_a_draft_with_its_own(target):  # C26
    ids = prompt(10, seed=4)
    free = target.generate(ids, max_new_tokens=20, do_sample=False)
    draft = ScriptedDraft(target, free, "oracle", eos_token_id=int(free[0, 11]), **BLOCK)
    for order in ((13, 12), (12, 13)):
        eos = [int(free[0, i]) for i in order]
        kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
        assert torch.equal(target.generate(ids, **kwargs), target.generate(ids, assistant_model=draft, **kwargs))


@pytest.mark.parametrize(
    "limit", [{"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 3}, {"max_length": 11}]
)
def test_a_block_longer_than_the_budget(target, limit):  # C31
    ids = prompt(10)
    draft = scripted(target, ids, 20, "oracle", tree_shape=[16] * DEPTH, max_tree_nodes=128)
    plain = target.generate(ids, do_sample=False, **limit)
    assert torch.equal(plain, target.generate(ids, do_sample=False, assistant_model=draft, **limit))


def byte_level_tokenizer():
    """A byte-level BPE of 64 tokens: 40 characters and 24 merged pairs."""
    letters = string.ascii_letters[:40]
    merges = [(letters[i], letters[(7 * i + 3) % 40]) for i in range(24)]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("k", range(1, 2 * DEPTH + 2))
def test_stop_strings_at_every_offset(target, k):  # C27, across two blocks too
    ids = prompt(10, seed=4)
    tokenizer = byte_level_tokenizer()
    free = target.generate(ids, max_new_tokens=20, do_sample=False)
    draft = ScriptedDraft(target, free, "oracle", **BLOCK)
    names = tokenizer.convert_ids_to_tokens(free[0].tolist())
    spanning = names[9 + k][-1] + names[10 + k]
    for stop in ([spanning], ["zz", names[9 + k] + names[10 + k][0]]):
        kwargs = {"max_new_tokens": 20, "do_sample": False, "stop_strings": stop, "tokenizer": tokenizer}
        plain = target.generate(ids, **kwargs)
        assert torch.equal(plain, target.generate(ids, assistant_model=draft, **kwargs))
        assert plain.shape[1] < 30


@pytest.mark.parametrize("k", range(1, DEPTH + 3))
@pytest.mark.parametrize("ends", ["stop string", "criterion"])
def test_nothing_behind_a_stop_is_returned(target, k, ends):  # C29, C30
    """A stop within the budget: ids, scores, logits, streamed tokens and cache all end with it."""
    ids = prompt(10, seed=4)
    tokenizer = byte_level_tokenizer()
    free = target.generate(ids, max_new_tokens=20, do_sample=False)
    draft = ScriptedDraft(target, free, "oracle", **BLOCK)
    names = tokenizer.convert_ids_to_tokens(free[0].tolist())
    stop = (
        {"stop_strings": [names[9 + k] + names[10 + k]], "tokenizer": tokenizer}
        if ends == "stop string"
        else {"stopping_criteria": StoppingCriteriaList([StopAfter(11 + k)])}
    )
    kwargs = {"max_new_tokens": k + 3, "do_sample": False, "return_dict_in_generate": True, **stop}
    kwargs |= {"output_scores": True, "output_logits": True}
    streamer = Recorder()
    plain = target.generate(ids, **kwargs)
    out = target.generate(ids, streamer=streamer, assistant_model=draft, **kwargs)
    assert torch.equal(plain.sequences, out.sequences)
    new = out.sequences.shape[1] - 10
    assert new <= k + 1  # the budget is larger
    assert len(out.scores) == len(out.logits) == len(streamer.puts) - 1 == new
    assert out[CACHE_ARG].get_seq_length() == 10 + new - 1


def test_no_time_at_all_gives_one_token(target):  # C57
    ids = prompt(10)
    draft = scripted(target, ids, 20, "oracle", **BLOCK)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "max_time": 0.0}
    plain = target.generate(ids, **kwargs)
    assert plain.shape[1] == 11
    assert torch.equal(plain, target.generate(ids, assistant_model=draft, **kwargs))


class StopAfter(StoppingCriteria):
    """Stops at a length and records every call."""

    def __init__(self, length):
        self.length = length
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids[0].tolist())
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("k", range(1, DEPTH + 3))
def test_criteria_are_asked_once_per_position(target, k):
    ids = prompt(10, seed=4)
    draft = scripted(target, ids, 20, "oracle", **BLOCK)
    ours, theirs = StopAfter(10 + k), StopAfter(10 + k)
    out = target.generate(
        ids, max_new_tokens=20, do_sample=False, assistant_model=draft, stopping_criteria=StoppingCriteriaList([ours])
    )
    target.generate(ids, max_new_tokens=20, do_sample=False, stopping_criteria=StoppingCriteriaList([theirs]))
    assert out.shape[1] == 10 + k
    assert ours.calls == theirs.calls


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("k", range(1, DEPTH + 3))
def test_known_criteria_are_the_hosts(target, k, sample, monkeypatch):
    """End tokens, lengths and the clock: a token costs no device work for them."""
    ids = prompt(10, seed=4)
    torch.manual_seed(3)
    free = target.generate(ids, max_new_tokens=20, do_sample=sample)
    draft = ScriptedDraft(target, free, "oracle", **BLOCK)
    kwargs = {"max_new_tokens": 15, "do_sample": sample, "eos_token_id": int(free[0, 9 + k]), "pad_token_id": 0}
    kwargs["max_time"] = 1000.0
    torch.manual_seed(3)
    plain = target.generate(ids, **kwargs)
    asked = []
    monkeypatch.setattr(StoppingCriteriaList, "__call__", lambda *args, **kwargs: asked.append(args))
    torch.manual_seed(3)
    assert torch.equal(target.generate(ids, assistant_model=draft, **kwargs), plain)
    assert not asked


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


def test_streamed_tokens_stop_with_the_text(target):  # C29, C38
    ids = prompt(10, seed=4)
    draft = scripted(target, ids, 20, "oracle", **BLOCK)
    streamer = Recorder()
    out = target.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        assistant_model=draft,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([StopAfter(13)]),
    )
    assert torch.equal(streamer.puts[0], ids)
    assert [put.shape for put in streamer.puts[1:]] == [(1,)] * 3
    assert torch.cat(streamer.puts[1:]).tolist() == out[0, 10:].tolist()
    assert streamer.ended == 1
