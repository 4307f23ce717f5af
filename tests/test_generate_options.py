"""Options of `generate`: each gives what plain decoding gives, speculated or with a reason why not."""

import copy
import threading

import pytest
import torch
import torch._dynamo.testing
from models import ScriptedDraft, learned, prompt, scripted, tiny_target
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from longspec_hf.hook import CACHE_ARG

NEW = 24


def compare(target, draft=None, speculated=True, **kwargs):
    """Plain and ours with equal arguments; returns both outputs."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    plain = target.generate(**copy.deepcopy(kwargs))
    out = target.generate(**kwargs, assistant_model=draft or learned(target))
    assert torch.equal(plain.sequences, out.sequences)
    assert (out.speculation_stats.fallback_reason is None) == speculated, out.speculation_stats.fallback_reason
    return plain, out


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong"])
@pytest.mark.parametrize("padding", [0, 3])
def test_hidden_states_line_up_with_tokens(target, mode, padding):  # C55
    ids = prompt(12)
    draft = scripted(target, ids, NEW, mode)
    ids = torch.nn.functional.pad(ids, (padding, 0))
    mask = (torch.arange(12 + padding) >= padding).long().unsqueeze(0)
    plain, out = compare(target, draft, input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert len(plain.hidden_states) == len(out.hidden_states) == NEW
    for place, (ours, theirs) in enumerate(zip(out.hidden_states, plain.hidden_states, strict=True)):
        assert len(ours) == len(theirs) == 3
        for a, b in zip(ours, theirs, strict=True):
            shown = slice(0 if place else padding, None)
            torch.testing.assert_close(a[:, shown], b[:, shown], atol=1e-4, rtol=1e-4)


def test_attentions_are_plains(target):  # C55
    model = tiny_target(attn_implementation="eager")
    plain, out = compare(model, speculated=False, input_ids=prompt(9), output_attentions=True, max_new_tokens=8)
    for ours, theirs in zip(out.attentions, plain.attentions, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong"])
def test_scores_and_logits_are_plains(target, mode):  # C54
    ids = prompt(12)
    draft = scripted(target, ids, NEW, mode)
    kwargs = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.0001}
    plain, out = compare(target, draft, input_ids=ids, **kwargs)
    for name in ("scores", "logits"):
        assert len(out[name]) == NEW
        torch.testing.assert_close(torch.cat(out[name]), torch.cat(plain[name]), atol=1e-4, rtol=1e-4)
    ours, theirs = (
        target.compute_transition_scores(each.sequences, each.scores, normalize_logits=True) for each in (out, plain)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert bool((ours < 0).all())


class NotBefore(LogitsProcessor):
    """A user's own minimum length."""

    def __init__(self, length, end):
        self.length, self.end = length, end

    def __call__(self, input_ids, scores):
        return (
            scores.index_fill(1, torch.tensor([self.end]), float("-inf"))
            if input_ids.shape[1] < self.length
            else scores
        )


@pytest.mark.parametrize("how", ["min_new_tokens", "min_length", "processor"])
def test_least_lengths(target, how):  # C32
    ids = prompt(12)
    free = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    end = int(free[0, 13])  # the greedy token of the second step
    option = {
        "min_new_tokens": {"min_new_tokens": 10},
        "min_length": {"min_length": 22},
        "processor": {"logits_processor": LogitsProcessorList([NotBefore(22, end)])},
    }[how]
    draft = ScriptedDraft(target, free, "oracle", tree_shape=[2] * 5)
    plain, _ = compare(target, draft, input_ids=ids, eos_token_id=end, pad_token_id=0, **option)
    assert plain.sequences.shape[1] >= 22
    assert target.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0).shape[1] <= 14


RULES = {
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 64, 2))},
    "suppress_tokens": {"suppress_tokens": list(range(0, 64, 3))},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (4, 1.5),
        "eos_token_id": 9,
        "pad_token_id": 0,
    },
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(len(ids) % 4, 64, 4))},
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_count_positions(target, rule):  # C33
    ids = {"no_repeat_ngram_size": prompt(3).repeat(1, 4), "forced_bos_token_id": prompt(1)}.get(rule, prompt(12))
    free = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    plain, _ = compare(target, ScriptedDraft(target, free, "oracle"), input_ids=ids, **RULES[rule])
    ruled = ScriptedDraft(target, plain.sequences, "oracle")
    compare(target, ruled, input_ids=ids, **RULES[rule])
    assert not torch.equal(plain.sequences, free), "the rule changes nothing here"


def test_a_banned_word_across_two_blocks(target):  # C33
    ids = prompt(12)
    free = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    for place in range(12, 22):
        words = [free[0, place : place + 2].tolist()]
        draft = ScriptedDraft(target, free, "oracle")
        plain, _ = compare(target, draft, input_ids=ids, bad_words_ids=words, max_new_tokens=14)
        assert not torch.equal(plain.sequences, free[:, :26])


def test_nothing_is_left_of_the_call_before(target):  # C61
    draft = learned(target)
    calls = [prompt(40), prompt(9, seed=1), prompt(40)]
    outs = [compare(target, draft, input_ids=ids)[1] for ids in calls]
    assert torch.equal(outs[0].sequences, outs[2].sequences)
    first, _, again = (out[CACHE_ARG].draft_window for out in outs)
    assert torch.equal(first.keys, again.keys) and first.keys.data_ptr() != again.keys.data_ptr()
    assert outs[0].speculation_stats.rounds == outs[2].speculation_stats.rounds
    alone = compare(target, learned(target), input_ids=calls[1])[1]
    assert alone.speculation_stats.accepted_per_depth == outs[1].speculation_stats.accepted_per_depth


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_prompts_given_as_embeddings(target, with_ids, rows):  # C47
    ids = torch.cat([prompt(12, seed=row) for row in range(rows)])
    embeds = target.get_input_embeddings()(ids).detach()
    kwargs = {"inputs_embeds": embeds} | ({"input_ids": ids} if with_ids else {})
    plain, out = compare(target, **kwargs)
    assert torch.equal(plain.sequences[:, -NEW:], target.generate(ids, max_new_tokens=NEW, do_sample=False)[:, 12:])
    # The window holds the true prompt, so drafting is as good as with ids.
    by_ids = target.generate(
        ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, assistant_model=learned(target)
    )
    window, other = out[CACHE_ARG].draft_window, by_ids[CACHE_ARG].draft_window
    assert torch.equal(window.lengths, other.lengths)


def test_a_padded_embedding_prompt(target):
    ids = prompt(12)
    embeds = torch.cat([torch.full((1, 4, 32), 3.0), target.get_input_embeddings()(ids).detach()], dim=1)
    mask = (torch.arange(16) >= 4).long().unsqueeze(0)
    compare(target, inputs_embeds=embeds, attention_mask=mask)


@pytest.mark.parametrize("chunk", [16, 7])
def test_chunked_prefill_is_honoured(target, chunk, monkeypatch):  # C105
    ids = prompt(100)
    plain = target.generate(ids, max_new_tokens=10, do_sample=False)
    lengths = []
    original = type(target).forward

    def forward(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        outputs = original(self, input_ids=input_ids, **kwargs)
        return outputs

    monkeypatch.setattr(type(target), "forward", forward)
    out = target.generate(
        ids, max_new_tokens=10, do_sample=False, prefill_chunk_size=chunk, assistant_model=learned(target)
    )
    chunks = [chunk] * (100 // chunk) + ([100 % chunk] if 100 % chunk else [])
    assert torch.equal(plain, out) and lengths[: len(chunks)] == chunks


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_classifier_free_guidance(target, scale):
    negative = prompt(5, seed=3)
    compare(target, input_ids=prompt(12), guidance_scale=scale)
    compare(target, input_ids=prompt(12), guidance_scale=scale, negative_prompt_ids=negative)


def test_beam_search_is_plains(target):  # C37
    ids = prompt(8)
    plain = target.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    assert torch.equal(
        plain, target.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False, assistant_model=learned(target))
    )


def test_no_cache(target):  # C56
    ids = prompt(8)
    plain = target.generate(ids, max_new_tokens=6, do_sample=False)
    out = target.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, assistant_model=learned(target))
    assert torch.equal(plain, out)
    model = tiny_target()
    model.config.use_cache = False  # as training leaves it
    compare(model, input_ids=ids)


def test_num_assistant_tokens_bounds_the_depth(target, monkeypatch):  # C44
    ids = prompt(20)
    draft = scripted(target, ids, NEW, "oracle", tree_shape=[1] * 5)
    before = (draft.config.to_dict(), copy.deepcopy(draft.generation_config), copy.deepcopy(target.generation_config))
    lengths = []
    original = type(target).forward

    def forward(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(target), "forward", forward)
    target.generate(ids, max_new_tokens=NEW, do_sample=False, num_assistant_tokens=2, assistant_model=draft)
    assert max(lengths[1:]) == 3
    after = (draft.config.to_dict(), draft.generation_config, target.generation_config)
    assert before[0] == after[0] and before[2] == after[2]
    assert (before[1] is None) == (after[1] is None)


def test_settings_of_call_and_draft(target):
    """The call's settings come before the draft's, and neither is changed."""
    ids = prompt(20)
    draft = scripted(target, ids, NEW, "oracle", tree_shape=[1, 1, 1])
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    config.tree_shape = [1, 1]
    assert target.generate(ids, generation_config=config, assistant_model=draft).speculation_stats.tau <= 3
    assert config.tree_shape == [1, 1] and draft.config.tree_shape == [1, 1, 1]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert target.generate(ids, generation_config=config, assistant_model=draft).speculation_stats.tau > 3


def test_near_the_context_limit():  # C72
    target = tiny_target(max_position_embeddings=64)
    for length in (55, 60, 63):
        compare(target, input_ids=prompt(length), max_new_tokens=64 - length)
        compare(target, input_ids=prompt(length), max_length=64, max_new_tokens=None)


@pytest.mark.parametrize("length", [1, 2, 3000])
def test_very_short_and_long_prompts(target, length):
    compare(target, input_ids=prompt(length))


def test_threads_on_one_pair(target):  # C21
    draft = learned(target)
    prompts = [prompt(10 + 7 * i, seed=i) for i in range(6)]
    expected = [target.generate(ids, max_new_tokens=25, do_sample=False) for ids in prompts]
    results: dict[int, torch.Tensor] = {}

    def run(number):
        kwargs = {"max_new_tokens": 25, "do_sample": False, "assistant_model": draft if number % 3 else None}
        results[number] = target.generate(prompts[number], **kwargs)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number, ids in enumerate(expected):
        assert torch.equal(ids, results[number])


def test_a_compiled_target_is_not_compiled_again_each_round():  # C106
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    target = tiny_target()
    ids = prompt(20)
    plain = target.generate(ids, max_new_tokens=120, do_sample=False)
    target.forward = torch.compile(target.forward, backend=counter, dynamic=False)
    draft = ScriptedDraft(target, plain, "noisy", ngram_branch_length=3)
    out = target.generate(
        ids, max_new_tokens=120, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )
    assert torch.equal(plain, out.sequences)
    assert out.speculation_stats.rounds >= 50
    assert counter.frame_count <= 3  # the prefill and the tree


def test_a_wrapped_target(target):  # C51
    peft = pytest.importorskip("peft", reason="the extra `train` is not installed")
    model = tiny_target()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    draft = learned(wrapped)
    ids = prompt(12)
    plain = wrapped.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    out = wrapped.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, out)
    with wrapped.disable_adapter():
        base = wrapped.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        assert not torch.equal(base, plain)
        assert torch.equal(
            base, wrapped.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, assistant_model=draft)
        )
    merged = wrapped.merge_and_unload()
    assert torch.equal(
        merged.generate(ids, max_new_tokens=NEW, do_sample=False),
        merged.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_model=draft),
    )
