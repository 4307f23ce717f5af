"""Batches: rows of their own lengths, acceptance and end, each equal to its run alone."""

import copy

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from longspec_hf.hook import CACHE_ARG

LENGTHS = (3, 11, 40)


def padded(lengths=LENGTHS, seed=0):
    """Left-padded ids and mask, and the prompts alone."""
    alone = [prompt(length, seed=seed + length) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in alone])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}, alone


class RowScripts(ScriptedDraft):
    """Knows every row's text and proposes it about half the time: rows accept different counts."""

    def next_token_logits(self, hidden, head, token_ids, position_ids):
        logits = torch.zeros(*token_ids.shape, self.config.vocab_size)
        for script in self.script:
            position = (position_ids + 1).clamp(max=len(script) - 1)
            follows = script[position - 1] == token_ids
            right = follows & (position * 7919 % 13 < 7)
            logits.scatter_add_(-1, script[position].unsqueeze(-1), right.float().unsqueeze(-1) * 9)
        return logits + torch.arange(self.config.vocab_size) * 0.01


def scripted_rows(target, alone, new_tokens, **kwargs):
    draft = RowScripts(target, torch.zeros(1), "noisy")
    draft.script = [target.generate(row, max_new_tokens=new_tokens, do_sample=False, **kwargs)[0] for row in alone]
    return draft


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripted", "learned"])
def test_rows_equal_their_solo_runs(family, scripts):  # C34, C35
    model = tiny_target(family)
    inputs, alone = padded()
    draft = scripted_rows(model, alone, 32)
    texts = [script[len(ids[0]) :] for script, ids in zip(draft.script, alone, strict=True)]
    end = int(texts[1][12])
    kwargs = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    plain = model.generate(**inputs, **kwargs)
    out = model.generate(
        **inputs, **kwargs, assistant_model=draft if scripts else learned(model), return_dict_in_generate=True
    )
    assert torch.equal(plain, out.sequences)
    lengths = [([*text.tolist(), end]).index(end) + 1 for text in texts]
    for row, text, length in zip(out.sequences[:, max(LENGTHS) :], texts, lengths, strict=True):
        assert torch.equal(row[:length], text[:length]) and bool((row[length:] == 0).all())
    assert min(lengths) < 14 and len(set(lengths)) > 1
    stats = out.speculation_stats
    assert stats.fallback_reason is None and stats.row_rounds > stats.rounds
    assert not scripts or stats.tau > 1.3


@pytest.mark.parametrize("kept", [False, True])
def test_finished_rows_cost_no_work(target, monkeypatch, kept):
    """A row that has ended is neither drafted nor verified any more; a cache gets its last token at the end."""
    inputs, alone = padded()
    texts = [target.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist() for ids in alone]
    # An end token that row 1 writes early and the others late or never.
    seen = {*texts[0][:20], *texts[2][:20], *texts[1][:3]}
    end = next(t for t in texts[1][3:12] if t not in seen)
    widths, last = [], []
    original = type(target).forward

    def forward(self, input_ids=None, **kwargs):
        widths.append(input_ids.shape)
        last[:] = input_ids.flatten().tolist()
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(target), "forward", forward)
    draft = learned(target)
    drafted = []
    expand = draft.next_token_logits
    draft.next_token_logits = lambda hidden, *a: drafted.append(hidden.shape[0]) or expand(hidden, *a)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    out = target.generate(**inputs, **options, assistant_model=draft, return_dict_in_generate=kept)
    monkeypatch.undo()
    assert torch.equal(
        out.sequences if kept else out,
        target.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=0),
    )
    ends = [([*text, end]).index(end) for text in texts]
    shorter = sum(row < max(ends) for row in ends)
    if kept:
        assert widths.pop() == (shorter, 1) and last == [end] * shorter
    rows = [shape[0] for shape in widths[1:]]
    assert rows == sorted(rows, reverse=True) and rows[0] == 3 and min(rows) < 3
    assert drafted == sorted(drafted, reverse=True) and min(drafted) < 3


def test_scores_logits_and_transition_scores(target):
    inputs, alone = padded()
    kwargs = {
        "max_new_tokens": 20,
        "do_sample": False,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "repetition_penalty": 1.3,
    }
    plain = target.generate(**inputs, **kwargs)
    out = target.generate(**inputs, **kwargs, assistant_model=scripted_rows(target, alone, 20, repetition_penalty=1.3))
    assert torch.equal(plain.sequences, out.sequences)
    for name in ("scores", "logits"):
        for ours, theirs in zip(out[name], plain[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True),
        target.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_returned_cache_is_plains_where_rows_go_on(target):
    inputs, alone = padded()
    out = target.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        assistant_model=scripted_rows(target, alone, 20),
    )
    plain = target.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    for ours, theirs in zip(out[CACHE_ARG].layers, plain[CACHE_ARG].layers, strict=True):
        for row, length in enumerate(LENGTHS):
            first = max(LENGTHS) - length
            torch.testing.assert_close(ours.keys[row, :, first:], theirs.keys[row, :, first:], atol=1e-4, rtol=1e-4)
    # Another turn of all rows on that cache.
    more = torch.cat([out.sequences, torch.cat([prompt(4, seed=s) for s in (7, 8, 9)])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 24, dtype=torch.long)], dim=1)
    expected = target.generate(more, attention_mask=mask, max_new_tokens=10, do_sample=False)
    again = target.generate(
        more,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        assistant_model=learned(target),
        **{CACHE_ARG: out[CACHE_ARG]},
    )
    assert torch.equal(expected, again)


ROUNDS = ["trees", "engine", "compiled", "sampled"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rounds", ROUNDS)
def test_another_turn_after_rows_ended(family, rounds, request, monkeypatch):
    """The returned cache has the end tokens' rows too; the filling behind them is masked in the next turn."""
    if rounds == "engine":
        request.getfixturevalue("engine_on_cpu")
    if rounds == "compiled":
        monkeypatch.setattr("longspec_hf.hook.is_compiled", lambda target: True)
    model = tiny_target(family)
    inputs, alone = padded()
    draft = scripted_rows(model, alone, 32)
    texts = [script[len(ids[0]) :].tolist() for script, ids in zip(draft.script, alone, strict=True)]
    end = texts[1][12]
    kwargs = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "return_dict_in_generate": True}
    if rounds == "sampled":
        kwargs |= {"do_sample": True, "top_k": 1}
    addition = torch.cat([prompt(4, seed=seed) for seed in (7, 8, 9)])
    outs, turns = [], []
    for assistant in ({}, {"assistant_model": draft}):
        out = model.generate(**inputs, max_new_tokens=32, **kwargs, **assistant)
        new = out.sequences[:, max(LENGTHS) :]
        ended = (new == end).long().cumsum(1) - (new == end).long()
        mask = torch.cat([inputs["attention_mask"], (ended == 0).long(), torch.ones_like(addition)], dim=1)
        ids = torch.cat([out.sequences, addition], dim=1)
        outs.append((mask, copy.deepcopy(out[CACHE_ARG])))
        cache = {CACHE_ARG: out[CACHE_ARG]}
        turns.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, **kwargs, **cache).sequences)
    assert int(mask[:, :-4].min(dim=1).values.sum()) < 3  # some row ended before the others
    assert torch.equal(*turns)
    (mask, plain), (_, ours) = outs
    for layer, expected in zip(ours.layers, plain.layers, strict=True):
        rows = expected.keys.shape[2]
        shown = mask[:, : plain.get_seq_length()][:, -rows:].bool()
        for name in ("keys", "values"):
            left, right = (getattr(cached, name)[:, :, -rows:].transpose(1, 2)[shown] for cached in (layer, expected))
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_several_sequences_of_one_prompt(target):  # C36
    ids = prompt(9)
    kwargs = {"max_new_tokens": 25, "num_return_sequences": 3}
    torch.manual_seed(0)
    out = target.generate(ids, **kwargs, do_sample=True, assistant_model=learned(target), return_dict_in_generate=True)
    assert out.sequences.shape == (3, 34) and out.speculation_stats.fallback_reason is None
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3


def test_sampled_rows_follow_the_targets_distribution(target):
    """First two tokens of 4000 rows against the exact distribution."""
    ids = prompt(6)
    kwargs = {"do_sample": True, "temperature": 0.5, "top_k": 6}
    torch.manual_seed(1)
    draft = learned(target, tree_shape=[4, 4])
    out = torch.cat(
        [
            target.generate(ids, max_new_tokens=2, num_return_sequences=500, assistant_model=draft, **kwargs)[:, 6:]
            for _ in range(8)
        ]
    )
    probabilities: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for first, p in zip(*top(target, ids), strict=True):
            for second, q in zip(*top(target, torch.cat([ids, first.view(1, 1)], 1)), strict=True):
                probabilities[int(first), int(second)] = float(p * q)
    counts = dict.fromkeys(probabilities, 0)
    for pair in out.tolist():
        counts[tuple(pair)] += 1
    expected = {pair: 4000 * p for pair, p in probabilities.items()}
    kept = [pair for pair in expected if expected[pair] >= 5]
    statistic = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in kept)
    degrees = len(kept) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, (statistic, degrees)  # about p > 1e-4


def top(target, ids):
    scores = target(ids).logits[0, -1] / 0.5
    values, tokens = scores.topk(6)
    return tokens, values.softmax(-1)


def test_the_row_number_reaches_the_prefix_function(target):
    """Every row may only write tokens of its own residue class."""
    inputs, _ = padded()

    def allowed(row, ids):
        return [token for token in range(64) if token % 3 == row]

    kwargs = {"max_new_tokens": 15, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    plain = target.generate(**inputs, **kwargs)
    out = target.generate(**inputs, **kwargs, assistant_model=learned(target), return_dict_in_generate=True)
    assert torch.equal(plain, out.sequences) and out.speculation_stats.fallback_reason is None


class EveryRowTogether(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - scores.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([EveryRowTogether()])}, "EveryRowTogether"),
        ({"guidance_scale": 1.5}, "ClassifierFreeGuidance"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"recheck_near_ties": True}, "recheck_near_ties"),
        ({"max_time": 1000.0}, "MaxTimeCriteria"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ties_rows_together_is_decoded_plainly(target, kwargs, reason):
    inputs, _ = padded()
    fields = {"recheck_near_ties": kwargs.pop("recheck_near_ties")} if "recheck_near_ties" in kwargs else {}
    arguments = {**inputs, **kwargs, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**arguments)
    out = target.generate(**arguments, assistant_model=learned(target, **fields))
    assert torch.equal(plain.sequences, out.sequences)
    assert reason in out.speculation_stats.fallback_reason


def test_a_streamer_is_refused_as_in_plain(target):
    inputs, _ = padded()
    streamer = TextStreamer(tokenizer=None)
    with pytest.raises(ValueError, match="batch size 1"):
        target.generate(**inputs, max_new_tokens=4, streamer=streamer)
    with pytest.raises(ValueError, match="batch size 1"):
        target.generate(**inputs, max_new_tokens=4, streamer=streamer, assistant_model=learned(target))


def test_an_exception_in_a_batch_leaves_the_cache_as_it_was(target):
    inputs, _ = padded()
    first = target.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, assistant_model=learned(target)
    )
    cache = first[CACHE_ARG]
    before = [layer.keys.clone() for layer in cache.layers]
    draft = learned(target)
    calls = []

    def broken(hidden, head, *args):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("on purpose")
        return head(hidden)

    draft.next_token_logits = broken
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.long)], dim=1)
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": list(range(0, 64, 9)),
    }
    with pytest.raises(RuntimeError, match="on purpose"):
        target.generate(first.sequences, **arguments, assistant_model=draft, **{CACHE_ARG: cache})
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("sequences", [1, 2])
def test_ids_of_32_bits(target, sequences):
    """The output's have 64, as those of plain decoding."""
    ids = torch.cat([prompt(9, seed=seed) for seed in range(sequences)]).int()
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    plain, out = (target.generate(ids, **kwargs, **draft) for draft in ({}, {"assistant_model": learned(target)}))
    assert out.dtype is plain.dtype is torch.long and torch.equal(out, plain)
