"""What is done for the rounds while the device is still at the prefill: when, how much of it, and what it leaves."""

import pytest
import torch
from engine_calls import call
from models import learned, prompt, tiny_target

from longspec_hf.candidate_generator import LongSpecCandidateGenerator
from longspec_hf.engine import Engine
from longspec_hf.engine.host_copies import HostCopies
from longspec_hf.hook import CACHE_ARG, _Runner
from longspec_hf.text import TokenDrawer

pytestmark = pytest.mark.usefixtures("engine_on_cpu")


@pytest.fixture
def order(monkeypatch):
    """What a call does up to its first token, in order."""
    log = []

    def watch(owner, name, entry):
        original = getattr(owner, name)

        def watched(self, *args, **kwargs):
            log.append(entry(*args))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(LongSpecCandidateGenerator, "project_prompts", lambda *_: "window")
    watch(_Runner, "prefill", lambda: "prefill")
    watch(LongSpecCandidateGenerator, "index_prompts", lambda *_: "n-grams")
    watch(Engine, "prepare", lambda settings, greedy: "trees" if settings.depth else "steps")
    watch(TokenDrawer, "draw", lambda *_: "draw")
    return log


def busy_for(monkeypatch, looks):
    """Have the device look busy so many times."""
    left = iter(range(looks))
    monkeypatch.setattr(HostCopies, "device_is_busy", lambda self: next(left, None) is not None)


@pytest.mark.parametrize(("looks", "prepared"), [(0, []), (1, ["trees"]), (9, ["trees", "steps"])])
def test_rounds_are_prepared_while_the_device_is_busy(looks, prepared, order, monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    plain = call(model, ids).sequences
    busy_for(monkeypatch, looks)
    out = call(model, ids, learned(model, tree_shape=[2, 4], fallback_to_plain=True))
    assert torch.equal(out.sequences, plain)
    first = order.index("draw")
    assert order[:first] == ["window", "prefill", "n-grams", *prepared]


def test_without_a_fall_back_no_plain_step_is_prepared(order, monkeypatch):
    model = tiny_target(initializer_range=0.1)
    busy_for(monkeypatch, 9)
    call(model, prompt(40, seed=5), learned(model, fallback_to_plain=False))
    assert order[: order.index("draw")][3:] == ["trees"]


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_nothing_is_prepared_for_a_call_without_rounds(new_tokens, order, monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    plain = call(model, ids, max_new_tokens=new_tokens).sequences
    busy_for(monkeypatch, 9)
    assert torch.equal(call(model, ids, learned(model), max_new_tokens=new_tokens).sequences, plain)
    assert order[: order.index("draw")] == ["window", "prefill", "n-grams"]


def test_sequences_that_end_with_their_first_token_leave_what_was_prepared(monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = torch.cat([prompt(40, seed=seed) for seed in (5, 6, 7)])
    firsts = call(model, ids).sequences[:, 40].tolist()
    assert len(set(firsts)) > 1
    options = {"eos_token_id": firsts[0], "pad_token_id": 0}
    plain = call(model, ids, **options).sequences
    busy_for(monkeypatch, 9)
    assert torch.equal(call(model, ids, learned(model), **options).sequences, plain)


def test_a_prefill_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(60, seed=5)
    draft = learned(model)
    turn = call(model, ids[:, :40], draft, max_new_tokens=4)
    cache = turn[CACHE_ARG]
    before = cache.get_seq_length()

    def fails(self):
        raise RuntimeError("out of memory, on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(_Runner, "prefill", fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            call(model, torch.cat([turn.sequences, ids], 1), draft, **{CACHE_ARG: cache})
    assert cache.get_seq_length() == before
