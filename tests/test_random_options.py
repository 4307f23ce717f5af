"""Random combinations of settings, prompts, batches and drafts against plain `generate`.

Hundreds of examples in the usual run; `LONGSPEC_NIGHTLY=1` draws thousands.
"""

import os

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ScriptedDraft, learned, tiny_target
from packaging.version import Version
from transformers import LogitsProcessor

from longspec_hf.engine.host_copies import HostCopies
from longspec_hf.hook import CACHE_ARG

NIGHTLY = os.environ.get("LONGSPEC_NIGHTLY") == "1"
EXAMPLES = 4000 if NIGHTLY else 200
TARGETS = {family: tiny_target(family) for family in ("llama", "qwen2", "qwen3")}

# As a list of pairs, `sequence_bias` refuses token 0 in 5.17, without an assistant too; 5.24 takes it.
FIRST_BIASED = 0 if Version(transformers.__version__) >= Version("5.24") else 1


class NotTwiceInARow(LogitsProcessor):
    """A user's processor: no token follows itself."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


class EndsAtMultiple:
    """A user's criterion: the text ends behind a token divisible by a number."""

    def __init__(self, number):
        self.number = number

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % self.number == 0


OPTIONS = {
    "repetition_penalty": st.sampled_from([1.1, 1.5]),
    "no_repeat_ngram_size": st.integers(2, 3),
    "bad_words_ids": st.lists(st.lists(st.integers(1, 63), min_size=1, max_size=2), min_size=1, max_size=3),
    "suppress_tokens": st.lists(st.integers(0, 63), min_size=1, max_size=5),
    "begin_suppress_tokens": st.lists(st.integers(0, 63), min_size=1, max_size=5),
    "min_new_tokens": st.integers(1, 15),
    "forced_eos_token_id": st.integers(0, 63),
    "exponential_decay_length_penalty": st.tuples(st.integers(1, 6), st.sampled_from([1.1, 1.5])),
    "guidance_scale": st.sampled_from([1.3, 2.0]),
    "sequence_bias": st.integers(FIRST_BIASED, 63).map(lambda token: [[[token], -5.0]]),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "prefill_chunk_size": st.integers(1, 9),
    "output_scores": st.just(True),
    "output_logits": st.just(True),
    "output_hidden_states": st.just(True),
    "num_assistant_tokens": st.integers(1, 6),
}
SAMPLING = {
    "temperature": st.sampled_from([0.4, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 3, 20]),
    "top_p": st.sampled_from([0.5, 0.95, 1.0]),
    "min_p": st.sampled_from([0.05, 0.2]),
    "typical_p": st.sampled_from([0.5, 0.9]),
}
TREES = {
    "tree_shape": st.sampled_from([[], [1], [3], [1, 1, 1], [2, 4, 4], [4, 16, 16]]),
    "ngram_branch_length": st.integers(0, 6),
    "ngram_min_match": st.integers(1, 3),
    "max_tree_nodes": st.sampled_from([1, 2, 7, 64]),
    "sliding_window": st.sampled_from([1, 4, 16]),
    "fallback_to_plain": st.booleans(),
}


@st.composite
def calls(draw):
    """Everything of one call."""
    seed = draw(st.integers(0, 10_000))
    rows = draw(st.sampled_from([1, 1, 1, 2, 3]))
    lengths = draw(st.lists(st.integers(1, 40), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths) + draw(st.integers(0, 3))
    ids = torch.zeros(rows, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    period = draw(st.sampled_from([None, 1, 2, 3]))
    for row, length in enumerate(lengths):
        text = torch.randint(1, 64, (length,), generator=generator)
        if period is not None:
            text = text[:period].repeat(-(-length // period))[:length]
        ids[row, longest - length :] = text
        mask[row, longest - length :] = 1
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    kwargs = {name: draw(OPTIONS[name]) for name in names}
    kwargs["max_new_tokens"] = draw(st.integers(1, 20))
    if draw(st.booleans()):
        kwargs["eos_token_id"] = draw(st.lists(st.integers(0, 63), min_size=1, max_size=4))
        kwargs["pad_token_id"] = 0
    if kwargs.get("forced_eos_token_id") is not None or "exponential_decay_length_penalty" in kwargs:
        kwargs.setdefault("eos_token_id", [7])
        kwargs.setdefault("pad_token_id", 0)
    if (forced := kwargs.get("forced_eos_token_id")) in kwargs.get("suppress_tokens", []):
        # Plain `generate` refuses to force a token that is suppressed.
        kwargs["suppress_tokens"] = [token for token in kwargs["suppress_tokens"] if token != forced] or None
    sampled = draw(st.booleans()) and rows == 1
    if sampled:
        names = draw(st.lists(st.sampled_from(sorted(SAMPLING)), max_size=3, unique=True))
        kwargs |= {name: draw(SAMPLING[name]) for name in names}
    kwargs["do_sample"] = sampled
    return {
        "family": draw(st.sampled_from(sorted(TARGETS))),
        "seed": seed,
        "inputs": {"input_ids": ids, "attention_mask": mask},
        "kwargs": kwargs,
        "processor": draw(st.booleans()),
        "criterion": draw(st.sampled_from([None, None, 5, 11])),
        "tree": {name: draw(strategy) for name, strategy in TREES.items()},
        "mode": draw(st.sampled_from(["learned", "oracle", "noisy", "wrong"])),
    }


def run(target, call, **draft):
    """One `generate` call, with its own processors and criteria as they may keep a state."""
    own = {"logits_processor": [NotTwiceInARow()]} if call["processor"] else {}
    if call["criterion"]:
        own["stopping_criteria"] = [EndsAtMultiple(call["criterion"])]
    torch.manual_seed(call["seed"])
    out = target.generate(**call["inputs"], **call["kwargs"], **own, **draft, return_dict_in_generate=True)
    return out, torch.get_rng_state()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not NIGHTLY,
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def check(call):
    target = TARGETS[call["family"]]
    try:
        plain, state = run(target, call)
    except (RuntimeError, ValueError) as refusal:  # options that contradict one another
        with pytest.raises(type(refusal)):
            run(target, call, assistant_model=learned(target, **call["tree"]))
        return
    if call["mode"] == "learned":
        draft = learned(target, **call["tree"])
    else:
        draft = ScriptedDraft(target, plain.sequences[0], call["mode"], **call["tree"])
    out, our_state = run(target, call, assistant_model=draft)
    assert torch.equal(plain.sequences, out.sequences), (plain.sequences, out.sequences)
    assert torch.equal(state, our_state), "random numbers were drawn differently"
    stats = out.speculation_stats
    if stats.fallback_reason is None:
        by_rounds = stats.row_rounds + sum(stats.accepted_per_depth)
        assert stats.committed == by_rounds + stats.plain_steps + stats.committed_by_prefill
    for name in ("scores", "logits"):
        ours, theirs = out.get(name), plain.get(name)
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or (), theirs or (), strict=True):
            if len(plain.sequences) == 1:
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, equal_nan=True)
            assert a.shape == b.shape
    if plain.get("hidden_states") is not None:
        assert [h[-1].shape for h in plain.hidden_states] == [h[-1].shape for h in out.hidden_states]
    assert out[CACHE_ARG].get_seq_length() == plain[CACHE_ARG].get_seq_length()


def test_random_calls_equal_plain():
    check()


@pytest.mark.usefixtures("engine_on_cpu")
def test_random_calls_of_the_engine_equal_plain(monkeypatch):
    """All that rounds need is done before the first token is drawn, as while a GPU reads the prompt."""
    monkeypatch.setattr(HostCopies, "device_is_busy", lambda self: True)
    check()
