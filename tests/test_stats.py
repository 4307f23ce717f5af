"""Statistics add up."""

import pytest
from models import prompt, scripted

from longspec_hf import SpeculationStats


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong"])
def test_counts_add_up(target, mode):  # C104
    ids, new_tokens = prompt(10), 41
    draft = scripted(target, ids, new_tokens, mode, tree_shape=[2, 2, 2])
    out = target.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )
    stats = out.speculation_stats
    assert stats.committed == out.sequences.shape[1] - 10 == new_tokens
    # Every round commits the target's own token and what was accepted before it.
    assert stats.committed == stats.committed_by_prefill + stats.rounds + sum(stats.accepted_per_depth)
    assert stats.tau == (new_tokens - 1) / stats.rounds
    assert stats.drafted >= stats.rounds
    assert stats.accepted_per_depth == sorted(stats.accepted_per_depth, reverse=True)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.tokens_per_second > 0
    assert stats.fallback_reason is None
    assert {"oracle": stats.tau == 4, "noisy": 1 < stats.tau < 4, "wrong": stats.tau == 1}[mode]


def test_bonus_token_is_counted():
    stats = SpeculationStats()
    stats.add_round(drafted=[8], committed=[3])
    stats.add_round(drafted=[8], committed=[1])
    assert stats.tau == 2
    assert stats.accepted_per_depth == [1, 1]


def test_a_call_of_one_token_has_no_round(target):
    draft = scripted(target, prompt(5), 3, "oracle")
    out = target.generate(prompt(5), max_new_tokens=1, assistant_model=draft, return_dict_in_generate=True)
    stats = out.speculation_stats
    assert (stats.rounds, stats.committed, stats.tau, stats.tokens_per_second) == (0, 1, 0.0, 0.0)
