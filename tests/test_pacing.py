"""When a call goes over to plain steps, and what that can cost."""

import pytest
import torch
from models import prompt, scripted, tiny_target

from longspec_hf.pacing import Pacer


def simulate(pacer, new_tokens, round_cost, tokens_at, plain_cost=1.0, depth=4, tree=None):
    """Seconds a paced call takes; `tokens_at` says what a round at a place would commit."""
    seconds, done = 0.0, 0
    while done < new_tokens:
        if pacer.speculates():
            tokens = min(tokens_at(done), new_tokens - done)
            pacer.add_round(round_cost, tokens, tokens > depth, tree)
            seconds += round_cost
            done += tokens
        else:
            pacer.add_plain(plain_cost)
            seconds += plain_cost
            done += 1
    return seconds


@pytest.mark.parametrize("round_cost", [1.1, 1.5, 2.5, 4.0, 9.0])
@pytest.mark.parametrize("new_tokens", [128, 512, 4096])
def test_useless_rounds_cost_at_most_a_tenth(round_cost, new_tokens):
    pacer = Pacer()
    assert simulate(pacer, new_tokens, round_cost, lambda place: 1) <= 1.1 * new_tokens
    assert pacer.pauses >= 1


def test_rounds_that_pay_go_on():
    pacer = Pacer()
    tokens = [1, 3, 2, 4, 1, 1, 3, 2]
    seconds = simulate(pacer, 512, 1.5, lambda place: tokens[place % len(tokens)])
    assert seconds < 0.85 * 512


def test_speculation_comes_back_when_the_text_turns():
    """Useless for the first half, five tokens a round in the second."""
    pacer = Pacer()
    seconds = simulate(pacer, 2000, 2.0, lambda place: 1 if place < 1000 else 5)
    assert seconds < 1000 * 1.1 + 1000 * 0.6
    assert pacer.pauses > 1


@pytest.mark.parametrize("busy", [1.0, 5.0])
@pytest.mark.parametrize("round_cost", [1.1, 1.5, 2.5, 4.0, 9.0])
def test_known_costs_spare_the_comparison(round_cost, busy):
    """Rounds that pay are not interrupted for it, useless ones are left before patience has run out, however long
    everything takes on this machine now."""
    useless, useful = (Pacer(patience=100, known={"tree": round_cost}) for _ in range(2))
    seconds = simulate(useless, 512, busy * round_cost, lambda place: 1, busy, tree="tree")
    assert seconds <= busy * (512 * 1.05 + 12) and useless.pauses >= 1
    assert useless.costs() == {"tree": pytest.approx(round_cost)}
    tokens = iter([round_cost - 0.5, round_cost + 1.5] * 512)
    simulate(useful, 512, busy * round_cost, lambda place: next(tokens), busy, depth=99, tree="tree")
    assert useful.pauses == 0 and useful.plain_seconds is None and useful.costs() == {}


def test_a_tree_whose_cost_is_unknown_is_compared_as_ever():
    pacer = Pacer(patience=3, known={"tree": 1.5})
    for done in range(3):
        assert pacer.speculates(), done
        pacer.add_round(1.5, 2, False, "another")
    assert not pacer.speculates()
    pacer.add_plain(1.0)
    pacer.add_plain(1.0)
    assert pacer.speculates() and pacer.costs() == {"another": 1.5}


def test_known_costs_that_no_longer_hold_are_corrected_by_the_first_pause():
    """Known to cost five steps, they cost one and a half now, and bring two tokens."""
    pacer = Pacer(known={"tree": 5.0})
    assert simulate(pacer, 512, 1.5, lambda place: 2, tree="tree") < 0.8 * 512
    assert pacer.costs() == {"tree": pytest.approx(1.5)}


def test_full_rounds_are_not_interrupted_by_a_comparison():
    pacer = Pacer()
    for _ in range(50):
        assert pacer.speculates()
        pacer.add_round(9.0, 5, full=True)


def test_plain_steps_are_timed_when_patience_has_run_out_and_rounds_do_not_pay_for_certain():
    pacer = Pacer(patience=3, certain=2.0)
    chosen = []
    for tokens in (1, 1, 5, 1, 1):  # a mean of 2.3 after three rounds, of 1.8 after five
        chosen.append(pacer.speculates())
        pacer.add_round(None, tokens, full=False)
    assert chosen == [True] * 5
    assert not pacer.speculates()
    pacer = Pacer(patience=3, certain=2.0)
    for done in range(3):
        assert pacer.speculates(), done
        pacer.add_round(1.0, 1, full=False)
    assert not pacer.speculates()


def test_rounds_and_steps_that_were_not_usual_are_not_charged():
    pacer = Pacer()
    pacer.add_round(None, 1, full=False)
    pacer.add_plain(None)
    assert pacer.plain_seconds is None and not pacer.speculates()
    pacer.add_plain(1.0)
    pacer.add_plain(1.0)
    assert pacer.speculates() and pacer.pauses == 0


def test_one_very_slow_round_is_forgiven():
    """The first round of a process may compile kernels."""
    pacer, rounds = Pacer(), 0
    pacer.add_round(1000.0, 1, full=False)
    for _ in range(400):
        if pacer.speculates():
            pacer.add_round(1.5, 3, full=False)
            rounds += 1
        else:
            pacer.add_plain(1.0)
    assert rounds > 150


def test_a_growing_context_is_followed():
    pacer = Pacer()
    pacer.add_round(3.0, 1, full=False)
    pacer.add_plain(1.0)
    for _ in range(200):
        pacer.add_plain(2.0)
    assert pacer.plain_seconds == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_always_wrong_draft_is_left(enabled):  # C102
    target = tiny_target(num_hidden_layers=6)
    ids = prompt(200)
    draft = scripted(target, ids, 200, "wrong", fallback_to_plain=enabled, tree_shape=[4, 16, 16, 16, 16])
    plain = target.generate(ids, max_new_tokens=200, do_sample=False)
    out = target.generate(
        ids, max_new_tokens=200, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )
    stats = out.speculation_stats
    assert torch.equal(plain, out.sequences)
    assert stats.rounds + stats.plain_steps == 199 and stats.committed == 200
    if enabled:  # a round with a beam of five levels costs this target several steps
        assert stats.plain_steps > 150 and stats.pauses >= 1
        assert "did not pay" in stats.fallback_reason and str(stats.plain_steps) in stats.fallback_reason
    else:
        assert stats.plain_steps == 0 and stats.fallback_reason is None


def test_a_call_may_switch_it_off(target):
    ids = prompt(30)
    draft = scripted(target, ids, 60, "wrong", fallback_to_plain=True)
    config = target.generation_config.__class__(max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
    config.fallback_to_plain = False
    out = target.generate(ids, generation_config=config, assistant_model=draft)
    assert out.speculation_stats.plain_steps == 0
    with pytest.raises(ValueError, match="`fallback_to_plain`"):
        config.fallback_to_plain = "yes"
        target.generate(ids, generation_config=config, assistant_model=draft)


def test_plain_steps_and_rounds_may_alternate(target, monkeypatch):
    """Whatever the clock says, the tokens are plain's; rows of a batch and padding included."""
    ids = torch.cat([prompt(20), prompt(20, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in ({"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids, "attention_mask": mask}):
        plain = target.generate(**inputs, max_new_tokens=60, do_sample=False)
        for period in (1, 2, 5):
            turn = iter(range(1000))
            monkeypatch.setattr(Pacer, "speculates", lambda self, t=turn, p=period: next(t) // p % 2 == 0)
            draft = scripted(target, ids[:1], 60, "noisy", fallback_to_plain=True)
            one = len(inputs["input_ids"]) == 1
            out = target.generate(
                **inputs,
                max_new_tokens=60,
                do_sample=False,
                assistant_model=draft,
                return_dict_in_generate=True,
                output_hidden_states=one,
            )
            assert torch.equal(plain, out.sequences)
            assert not one or len(out.hidden_states) == 60
            assert out.speculation_stats.plain_steps > 5 and out.speculation_stats.rounds > 2
